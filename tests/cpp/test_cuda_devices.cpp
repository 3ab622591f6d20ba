// Every problem on CUDA must be on the current device (refused before anything is launched, so the addresses are made up), and
// what is known of a device is found once.
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <optional>
#include <string>

#include "cuda/common/per_device.h"
#include "cuda_support.h"
#include "fp8kv/error.h"
#include "problems.h"

namespace fp8kv {
namespace {

using namespace testing_support;

// The sentence of each problem, with all of its views on `device`.
class CudaDevices : public Cuda {
 protected:
  template <class Problem, class... Views>
  static std::string sentence_on(Device device, Problem problem, Views Problem::*... members) {
    (move_to(device, problem.*members), ...);
    return error_of([&] { cuda::run(problem); });
  }

  static void expect_refused(Device device, const std::string& words) {
    const GroupShape per_token{1, -1};
    EXPECT_EQ(sentence_on(device, static_problem({4, 8}, {4}, per_token), &StaticQuantize::result, &StaticQuantize::input,
                          &StaticQuantize::scale),
              "fp8kv::static_scaled_fp8_quant: input " + words);
    EXPECT_EQ(sentence_on(device, dynamic_problem({4, 8}, {4}, per_token), &DynamicQuantize::result, &DynamicQuantize::input,
                          &DynamicQuantize::scale),
              "fp8kv::dynamic_scaled_fp8_quant: input " + words);
    EXPECT_EQ(sentence_on(device, dequantize_problem({4, 8}, {4}, per_token), &Dequantize::result, &Dequantize::input,
                          &Dequantize::scale),
              "fp8kv::scaled_fp8_dequant: input " + words);
    EXPECT_EQ(sentence_on(device, amax_problem({4, 8}, {4}, per_token), &GroupAmax::amax, &GroupAmax::input),
              "fp8kv::group_amax: input " + words);
    using A = CacheAppend;
    EXPECT_EQ(sentence_on(device, append_problem(), &A::key, &A::value, &A::key_cache, &A::value_cache, &A::slot_mapping,
                          &A::k_scale, &A::v_scale),
              "fp8kv::reshape_and_cache_flash: key " + words);
    using D = CacheAppendDynamic;
    EXPECT_EQ(sentence_on(device, append_dynamic_problem(), &D::key, &D::value, &D::key_cache, &D::value_cache,
                          &D::k_scale_cache, &D::v_scale_cache, &D::slot_mapping),
              "fp8kv::reshape_and_cache_flash_dynamic: key " + words);
    using G = CacheGather;
    EXPECT_EQ(sentence_on(device, gather_problem(), &G::key_cache, &G::value_cache, &G::key, &G::value, &G::block_table,
                          &G::cu_seq_lens, &G::k_scale, &G::v_scale, &G::seq_starts),
              "fp8kv::gather_and_dequant_cache: key_cache " + words);
    using R = RopeAppend;
    EXPECT_EQ(sentence_on(device, rope_problem(), &R::query, &R::key, &R::value, &R::query_out, &R::key_cache, &R::value_cache,
                          &R::slot_mapping, &R::q_scale, &R::k_scale, &R::v_scale, &R::positions, &R::cos_sin_cache,
                          &R::q_norm_weight, &R::k_norm_weight),
              "fp8kv::rope_quant_and_cache: query " + words);
    using P = PagedAttention;
    EXPECT_EQ(sentence_on(device, attention_problem(), &P::query, &P::key_cache, &P::value_cache, &P::out, &P::block_table,
                          &P::seq_lens, &P::k_scale, &P::v_scale, &P::cu_query_lens, &P::q_scale, &P::seq_starts, &P::sinks,
                          &P::k_offset, &P::v_offset, &P::lse, &P::workspace),
              "fp8kv::paged_attention: query " + words);
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess) << "something was launched";
  }

 private:
  static void move_to(Device device, TensorView& view) { view.device = device; }
  static void move_to(Device device, std::optional<TensorView>& view) { view->device = device; }
};

TEST_F(CudaDevices, HostMemoryIsRefused) { expect_refused({}, "must be on a CUDA device, got cpu"); }

TEST_F(CudaDevices, AnotherDeviceThanTheCurrentOneIsRefused) {
  expect_refused({Device::Type::CUDA, 1}, "must be on the current device, cuda:0, got cuda:1");
}

TEST_F(CudaDevices, TheCurrentDeviceMayBeAnother) {
  int count = 0;
  check(cudaGetDeviceCount(&count));
  if (count < 2) GTEST_SKIP() << "one GPU";
  check(cudaSetDevice(1));
  expect_refused({Device::Type::CUDA, 0}, "must be on the current device, cuda:1, got cuda:0");
  check(cudaSetDevice(0));
}

TEST_F(CudaDevices, AFailedQueryIsAskedAgainAndAnAnswerIsKept) {
  cuda::PerDevice<int> value;
  int asked = 0;
  const auto fail = [&] {
    ++asked;
    cuda::check_query(cudaErrorInvalidValue);
    return 0;
  };
  EXPECT_THROW(value.get(fail), Error);
  EXPECT_THROW(value.get(fail), Error);
  const auto answer = [&] { return ++asked; };
  EXPECT_EQ(value.get(answer), 3);
  EXPECT_EQ(value.get(answer), 3);
  EXPECT_EQ(asked, 3);
  EXPECT_EQ(cudaGetLastError(), cudaSuccess) << "left behind for the next launch";
}

}  // namespace
}  // namespace fp8kv
