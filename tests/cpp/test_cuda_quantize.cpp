// The CUDA backend as C++ users call it, without torch: on allocations of exactly the size the views need, so that a memory
// checker sees every byte read or written beside them. Expected bytes come from the CPU backend, which has tests of its own.
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "core/formats.h"
#include "core/plan.h"
#include "cuda_support.h"
#include "fp8kv/fp8.h"
#include "fp8kv/quantize.h"
#include "support.h"

namespace fp8kv {
namespace {

using testing_support::check;
using testing_support::Cuda;
using testing_support::error_of;
using testing_support::Sizes;
using testing_support::Tensor;

enum class Memory { Contiguous, Padded, Reversed, Spaced };

Sizes strides_for(const Sizes& sizes, Memory memory) {
  Sizes strides(sizes.size());
  const int ndim = static_cast<int>(sizes.size());
  std::int64_t stride = memory == Memory::Spaced ? 3 : 1;
  for (int i = 0; i < ndim; ++i) {
    const int d = memory == Memory::Reversed ? i : ndim - 1 - i;
    strides[d] = stride;
    stride *= std::max<std::int64_t>(sizes[d], 1);
    if (memory == Memory::Padded && i == 0) stride += 5;
  }
  return strides;
}

struct Case {
  const char* name;
  Sizes shape;
  Sizes scale;
  std::optional<GroupShape> group_shape;
  Memory input = Memory::Contiguous;
  Memory result = Memory::Contiguous;
  std::int64_t skip = 0;
};

const Case kCases[] = {
    {"tensor", {16, 256}, {1}, GroupShape{-1, -1}},
    {"tensor_odd", {7, 131}, {1}, std::nullopt},
    {"tensor_misaligned", {7, 136}, {1}, std::nullopt, Memory::Contiguous, Memory::Contiguous, 3},
    {"tensor_one_element", {1}, {1}, std::nullopt},
    {"tensor_redundant", {16, 4096}, {1}, GroupShape{-1, -1}},
    {"tensor_redundant_odd", {3, 10007}, {1}, GroupShape{-1, -1}, Memory::Contiguous, Memory::Contiguous, 1},
    {"tensor_cluster", {24, 4096}, {1}, GroupShape{-1, -1}},
    {"tensor_cluster_odd", {3, 43691}, {1}, GroupShape{-1, -1}, Memory::Contiguous, Memory::Contiguous, 1},
    {"tensor_cluster_2_vectors", {5, 40000}, {1}, GroupShape{-1, -1}},
    {"tensor_cluster_4_vectors", {5, 80008}, {1}, GroupShape{-1, -1}},
    {"tensor_cluster_8_vectors", {9, 100001}, {1}, GroupShape{-1, -1}, Memory::Contiguous, Memory::Contiguous, 3},
    {"tensor_cooperative", {700, 4096}, {1}, GroupShape{-1, -1}},
    {"tensor_cooperative_odd", {1201, 2049}, {1}, GroupShape{-1, -1}, Memory::Contiguous, Memory::Contiguous, 5},
    {"tensor_padded_rows", {9, 120}, {1}, GroupShape{-1, -1}, Memory::Padded, Memory::Padded},
    {"token", {37, 512}, {37}, GroupShape{1, -1}},
    {"token_odd", {37, 333}, {37, 1}, GroupShape{1, -1}, Memory::Contiguous, Memory::Padded, 1},
    {"token_short", {300, 20}, {300}, GroupShape{1, -1}},
    {"token_long", {3, 70001}, {3}, GroupShape{1, -1}},
    {"token_of_any_length", {37, 1333}, {37}, GroupShape{1, -1}},
    {"token_of_any_length_whole_vectors_at_the_end", {8, 1335}, {8}, GroupShape{1, -1}},
    {"token_of_any_length_one_row", {1, 5137}, {1}, GroupShape{1, -1}},
    {"token_of_any_length_2_vectors", {301, 5137}, {301}, GroupShape{1, -1}},
    {"token_of_any_length_4_vectors", {101, 20001}, {101}, GroupShape{1, -1}},
    {"token_of_any_length_8_vectors", {41, 40003}, {41}, GroupShape{1, -1}},
    {"token_transposed", {33, 72}, {33}, GroupShape{1, -1}, Memory::Reversed, Memory::Contiguous},
    {"channel", {300, 128}, {128}, GroupShape{-1, 1}},
    {"channel_odd", {130, 37}, {37}, GroupShape{-1, 1}},
    {"channel_merged", {1031, 1025}, {1025}, GroupShape{-1, 1}},
    {"channel_merged_few_rows", {17, 131073}, {131073}, GroupShape{-1, 1}},
    {"channel_merged_exactly", {64, 1028}, {1028}, GroupShape{-1, 1}},
    {"channel_one_row", {1, 4104}, {4104}, GroupShape{-1, 1}},
    {"channel_many_rows", {4100, 2056}, {2056}, GroupShape{-1, 1}},
    {"channel_padded", {130, 40}, {1, 40}, GroupShape{-1, 1}, Memory::Padded, Memory::Contiguous, 2},
    {"channel_both_transposed", {130, 40}, {40}, GroupShape{-1, 1}, Memory::Reversed, Memory::Reversed},
    {"head", {65, 8 * 64}, {8}, GroupShape{-1, 64}},
    {"head_blocks_of_scale", {65, 8, 64}, {1, 8, 1}, std::nullopt},
    {"head_odd", {65, 5 * 20}, {5}, GroupShape{-1, 20}, Memory::Contiguous, Memory::Contiguous, 7},
    // Groups that end inside units of the whole tensor: one in each, two, and none; with a whole and an incomplete last unit.
    {"head_across_units", {64, 5 * 20 + 4}, {6}, GroupShape{-1, 20}},
    {"head_three_groups_in_a_unit", {9, 2053}, {17}, GroupShape{-1, 128}},
    {"head_three_groups_in_a_unit_aligned", {8, 1028}, {33}, GroupShape{-1, 32}},
    {"head_of_17", {33, 5 * 17}, {5}, GroupShape{-1, 17}},
    {"head_across_units_misaligned", {33, 5 * 17}, {5}, GroupShape{-1, 17}, Memory::Contiguous, Memory::Contiguous, 8},
    {"heads_4d", {5, 3, 7, 21}, {1, 1, 7, 1}, std::nullopt},
    {"block_across_units", {37, 1201}, {3, 10}, GroupShape{16, 128}},
    {"token_across_units", {37, 333}, {37}, GroupShape{1, -1}},
    {"token_of_16", {501, 17}, {501}, GroupShape{1, -1}},
    {"tokens_across_units", {37, 333}, {8}, GroupShape{5, -1}},
    {"tensor_across_units", {127, 129}, {1}, GroupShape{-1, -1}},
    {"block", {256, 384}, {2, 3}, GroupShape{128, 128}},
    {"head_of_many_rows", {1031, 2048}, {16}, GroupShape{-1, 128}},
    {"block_of_many_rows", {1030, 2064}, {9, 17}, GroupShape{128, 128}},
    {"block_of_many_rows_in_pairs", {1030, 2048}, {515, 16}, GroupShape{2, 128}},
    {"block_ragged", {130, 200}, {2, 2}, GroupShape{128, 128}},
    {"block_small_ragged", {31, 77}, {11, 16}, GroupShape{3, 5}},
    {"block_row_ragged", {31, 500}, {31, 4}, GroupShape{1, 128}},
    {"block_one_row_ragged", {1, 40000}, {2}, GroupShape{-1, 30000}},
    {"block_row", {31, 512}, {31, 4}, GroupShape{1, 128}},
    {"block_row_of_one_unit", {31, 80}, {31, 5}, GroupShape{1, 16}},
    {"block_row_of_three_units", {9, 480}, {9, 10}, GroupShape{1, 48}},
    {"block_row_of_three_vectors", {8, 240}, {8, 10}, GroupShape{1, 24}},
    {"block_row_of_a_warp", {5, 2048}, {5, 4}, GroupShape{1, 512}},
    {"block_row_misaligned_units", {7, 256}, {7, 2}, GroupShape{1, 128}, Memory::Contiguous, Memory::Contiguous, 8},
    {"block_row_across_units", {31, 5 * 128 + 17}, {31, 6}, GroupShape{1, 128}},
    {"block_row_three_groups_in_a_unit", {9, 2053}, {9, 17}, GroupShape{1, 128}},
    {"block_row_across_one_tile", {1, 1100}, {55}, GroupShape{1, 20}},
    {"block_row_across_exact_tiles", {16, 260}, {16, 2}, GroupShape{1, 130}},
    {"block_row_of_17_across_units", {301, 5 * 17}, {301, 5}, GroupShape{1, 17}},
    {"block_row_of_255_across_units", {37, 3 * 255}, {37, 3}, GroupShape{1, 255}},
    {"block_row_odd", {31, 517}, {31, 5}, GroupShape{1, 128}},
    {"block_row_odd_of_a_warp", {7, 1027}, {7, 5}, GroupShape{1, 256}},
    {"block_row_odd_short", {7, 37}, {7, 3}, GroupShape{1, 16}},
    {"flat_rows", {3, 5, 24}, {4, 3}, GroupShape{4, 8}, Memory::Reversed, Memory::Contiguous},
    {"spaced", {12, 50}, {12}, GroupShape{1, -1}, Memory::Spaced, Memory::Spaced},
    {"empty", {0, 64}, {1}, GroupShape{-1, -1}},
    {"empty_tokens", {0, 64}, {0}, GroupShape{1, -1}},
};

struct Param {
  Case c;
  DType real;
  DType fp8;
};

class CudaQuantize : public Cuda, public testing::WithParamInterface<Param> {};

TEST_P(CudaQuantize, StaticGivesTheBytesOfTheCpu) {
  const auto& [c, real, fp8] = GetParam();
  Tensor input(real, c.shape, strides_for(c.shape, c.input), c.skip),
      scale(DType::Float32, c.scale, strides_for(c.scale, {}), 0);
  Tensor result(fp8, c.shape, strides_for(c.shape, c.result), c.skip);
  fill_reals(input);
  fill_scales(scale);
  for (Tensor* t : {&input, &scale, &result}) t->upload();
  cuda::run(StaticQuantize{result.on_device(), input.on_device(), scale.on_device(), c.group_shape});
  cpu::run(StaticQuantize{result.on_host(), input.on_host(), scale.on_host(), c.group_shape});
  expect_same(result, "result");
}

TEST_P(CudaQuantize, DynamicGivesTheBytesOfTheCpu) {
  const auto& [c, real, fp8] = GetParam();
  Tensor input(real, c.shape, strides_for(c.shape, c.input), c.skip),
      scale(DType::Float32, c.scale, strides_for(c.scale, {}), 0);
  Tensor result(fp8, c.shape, strides_for(c.shape, c.result), c.skip);
  fill_reals(input);
  for (Tensor* t : {&input, &scale, &result}) t->upload();
  cuda::run(DynamicQuantize{result.on_device(), input.on_device(), scale.on_device(), {}, c.group_shape});
  cpu::run(DynamicQuantize{result.on_host(), input.on_host(), scale.on_host(), {}, c.group_shape});
  expect_same(scale, "scale");
  expect_same(result, "result");
}

TEST_P(CudaQuantize, DynamicOfModerateValuesGivesTheBytesOfTheCpu) {
  const auto& [c, real, fp8] = GetParam();
  Tensor input(real, c.shape, strides_for(c.shape, c.input), c.skip),
      scale(DType::Float32, c.scale, strides_for(c.scale, {}), 0);
  Tensor result(fp8, c.shape, strides_for(c.shape, c.result), c.skip);
  fill_moderate_reals(input, real);
  for (Tensor* t : {&input, &scale, &result}) t->upload();
  cuda::run(DynamicQuantize{result.on_device(), input.on_device(), scale.on_device(), {}, c.group_shape});
  cpu::run(DynamicQuantize{result.on_host(), input.on_host(), scale.on_host(), {}, c.group_shape});
  expect_same(scale, "scale");
  expect_same(result, "result");
}

TEST_P(CudaQuantize, DequantizeGivesTheBytesOfTheCpu) {
  const auto& [c, real, fp8] = GetParam();
  Tensor input(fp8, c.shape, strides_for(c.shape, c.input), c.skip),
      scale(DType::Float32, c.scale, strides_for(c.scale, {}), 0);
  Tensor result(real, c.shape, strides_for(c.shape, c.result), c.skip);
  fill_reals(input);
  fill_scales(scale);
  for (Tensor* t : {&input, &scale, &result}) t->upload();
  cuda::run(Dequantize{result.on_device(), input.on_device(), scale.on_device(), c.group_shape});
  cpu::run(Dequantize{result.on_host(), input.on_host(), scale.on_host(), c.group_shape});
  expect_same(result, "result");
}

class CudaGroupAmax : public CudaQuantize {};

TEST_P(CudaGroupAmax, GivesTheBytesOfTheCpu) {
  const auto& [c, real, fp8] = GetParam();
  Tensor input(real, c.shape, strides_for(c.shape, c.input), c.skip),
      amax(DType::Float32, c.scale, strides_for(c.scale, {}), 0);
  fill_reals(input);
  std::memset(amax.bytes().data(), 0, amax.bytes().size());
  for (Tensor* t : {&input, &amax}) t->upload();
  cuda::run(GroupAmax{amax.on_device(), input.on_device(), *c.group_shape});
  cpu::run(GroupAmax{amax.on_host(), input.on_host(), *c.group_shape});
  expect_same(amax, "amax");
}

std::vector<Param> quantize_params() {
  std::vector<Param> all;
  for (const Case& c : kCases)
    for (DType real : {DType::Float32, DType::Float16, DType::BFloat16})
      for (DType format : {DType::E4M3, DType::E5M2, DType::Int8}) all.push_back({c, real, format});
  return all;
}

std::vector<Param> amax_params() {
  std::vector<Param> all;
  for (const Case& c : kCases)
    for (DType real : {DType::Float32, DType::Float16, DType::BFloat16})
      if (c.group_shape) all.push_back({c, real, DType::Other});
  return all;
}

std::string case_name(const testing::TestParamInfo<Param>& info) {
  const std::string real = std::string(info.param.c.name) + "_" + name(info.param.real);
  return core::is_quantized(info.param.fp8) ? real + "_" + name(info.param.fp8) : real;
}

INSTANTIATE_TEST_SUITE_P(Cases, CudaQuantize, testing::ValuesIn(quantize_params()), case_name);
INSTANTIATE_TEST_SUITE_P(Cases, CudaGroupAmax, testing::ValuesIn(amax_params()), case_name);

int attribute(cudaDeviceAttr which) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, 0));
  return value;
}

// A group that a cooperative kernel quantizes, on a stream and in a thread of its own.
class CooperativeWork {
 public:
  explicit CooperativeWork(std::int64_t rows)
      : input_(DType::Float32, {rows, kCols}, {kCols, 1}, 0), result_(DType::E4M3, {rows, kCols}, {kCols, 1}, 0) {
    check(cudaStreamCreate(&stream_));
  }
  ~CooperativeWork() { cudaStreamDestroy(stream_); }

  Tensor& input() { return input_; }
  Tensor& scale() { return scale_; }
  Tensor& result() { return result_; }

  core::DynamicPlan plan() const {
    const core::DeviceLimits limits{.multiprocessors = attribute(cudaDevAttrMultiProcessorCount),
                                    .shared_memory = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor)};
    const DynamicQuantize p = problem();
    return core::plan_dynamic({core::lower(p)}, p.input, p.result, limits, 16);
  }

  // The first error, in words.
  std::string run(int rounds) {
    return error_of([&] {
      for (int i = 0; i < rounds; ++i) cuda::run(problem(), stream_);
      const cudaError_t error = cudaStreamSynchronize(stream_);
      if (error != cudaSuccess) throw Error(cudaGetErrorString(error));
    });
  }

  void run_on_host() {
    cpu::run(DynamicQuantize{.result = result_.on_host(), .input = input_.on_host(), .scale = scale_.on_host()});
  }

 private:
  static constexpr std::int64_t kCols = 4096;

  DynamicQuantize problem() const {
    return {.result = result_.on_device(), .input = input_.on_device(), .scale = scale_.on_device()};
  }

  Tensor input_, scale_{DType::Float32, {1}, {1}, 0}, result_;
  cudaStream_t stream_ = nullptr;
};

// The limit on the shared memory of a kernel is the same for all threads: a small launch must not lower it while a large one is
// on its way.
TEST_F(Cuda, ThreadsLaunchCooperativeKernelsOfDifferentSizesAtOnce) {
  constexpr int kRounds = 300;
  CooperativeWork large(2500), small(700);
  for (CooperativeWork* work : {&large, &small}) {
    ASSERT_EQ(work->plan().path, core::DynamicPath::Cooperative);
    fill_reals(work->input());
    for (Tensor* t : {&work->input(), &work->scale(), &work->result()}) t->upload();
    work->run_on_host();
  }
  ASSERT_GT(large.plan().shared_vecs, small.plan().shared_vecs);
  std::string of_large, of_small;
  std::thread other([&] { of_large = large.run(kRounds); });
  of_small = small.run(kRounds);
  other.join();
  EXPECT_EQ(of_large, "");
  EXPECT_EQ(of_small, "");
  for (CooperativeWork* work : {&large, &small}) {
    expect_same(work->scale(), "scale");
    expect_same(work->result(), "result");
  }
}

// As large as it takes for blocks of several units per thread.
TEST_F(Cuda, LargeTilesOfGroupsThatEndInsideVectors) {
  const Sizes shape{2059, 4213}, groups{2059, 33};
  for (bool moderate : {false, true}) {
    Tensor input(DType::BFloat16, shape, strides_for(shape, {}), 0), scale(DType::Float32, groups, strides_for(groups, {}), 0),
        result(DType::E4M3, shape, strides_for(shape, {}), 0);
    if (moderate)
      fill_moderate_reals(input, DType::BFloat16);
    else
      fill_reals(input);
    for (Tensor* t : {&input, &scale, &result}) t->upload();
    cuda::run(DynamicQuantize{result.on_device(), input.on_device(), scale.on_device(), {}, GroupShape{1, 128}});
    cpu::run(DynamicQuantize{result.on_host(), input.on_host(), scale.on_host(), {}, GroupShape{1, 128}});
    expect_same(scale, "scale");
    expect_same(result, "result");
  }
}

TEST_F(Cuda, CanBeCapturedIntoAGraph) {
  Tensor input(DType::BFloat16, {4, 64}, {64, 1}, 0), scale(DType::Float32, {1}, {1}, 0),
      result(DType::E4M3, {4, 64}, {64, 1}, 0);
  for (std::size_t i = 0; i < input.bytes().size(); ++i) input.bytes()[i] = i % 2 ? 0x3f : static_cast<unsigned char>(i);
  const float half = 0.5f;
  std::memcpy(scale.bytes().data(), &half, 4);
  for (Tensor* t : {&input, &scale, &result}) t->upload();
  cudaStream_t stream;
  check(cudaStreamCreate(&stream));
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  cuda::run(StaticQuantize{result.on_device(), input.on_device(), scale.on_device()}, stream);
  check(cudaStreamEndCapture(stream, &graph));
  check(cudaGraphInstantiate(&executable, graph, 0));
  check(cudaGraphLaunch(executable, stream));
  check(cudaStreamSynchronize(stream));
  const auto* bits = reinterpret_cast<const std::uint16_t*>(input.bytes().data());
  const auto bytes = result.download();
  for (int i = 0; i < 256; ++i) EXPECT_EQ(bytes[i], quantize<E4M3>(decode(BFloat16{bits[i]}), half).bits) << i;
  cudaGraphExecDestroy(executable);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
}

}  // namespace
}  // namespace fp8kv
