// FP8KV_DEBUG=1: indices are checked on the host before anything is written. In a process of its own, as the variable is read
// once.
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "cuda_support.h"
#include "fp8kv/attention.h"
#include "fp8kv/kv_cache.h"
#include "fp8kv/rope.h"
#include "support.h"

namespace fp8kv {
namespace {

using testing_support::check;
using testing_support::Cuda;
using testing_support::error_of;
using testing_support::Sizes;
using testing_support::Tensor;

// 3 blocks of 4 slots, 1 head of 8; 2 tokens.
struct Tensors {
  Tensor rows{DType::Float32, {2, 1, 8}, {8, 8, 1}, 0}, out{DType::Float32, {2, 1, 8}, {8, 8, 1}, 0};
  Tensor key_cache{DType::E4M3, {3, 4, 1, 8}, {32, 8, 8, 1}, 0}, value_cache{DType::E4M3, {3, 4, 1, 8}, {32, 8, 8, 1}, 0};
  Tensor slots{DType::Int32, {2}, {1}, 0}, positions{DType::Int64, {2}, {1}, 0};
  Tensor scale{DType::Float32, {1}, {1}, 0}, cos_sin{DType::Float32, {10, 8}, {8, 1}, 0};
  Tensor block_table{DType::Int32, {1, 1}, {1, 1}, 0}, sums{DType::Int32, {2}, {1}, 0};
  Tensor lens{DType::Int32, {1}, {1}, 0}, starts{DType::Int32, {1}, {1}, 0};
};

class CudaDebug : public Cuda {
 protected:
  static void SetUpTestSuite() { setenv("FP8KV_DEBUG", "1", 1); }

  void SetUp() override {
    Cuda::SetUp();
    if (IsSkipped()) return;
    tensors.emplace();
    for (Tensor* t : {&tensors->rows, &tensors->key_cache, &tensors->value_cache, &tensors->cos_sin}) fill_reals(*t);
    fill_scales(tensors->scale);
    for (Tensor* t :
         {&tensors->rows, &tensors->out, &tensors->key_cache, &tensors->value_cache, &tensors->cos_sin, &tensors->scale})
      t->upload();
  }

  template <class T>
  static void set(Tensor& indices, const std::vector<T>& values) {
    ASSERT_EQ(indices.bytes().size(), values.size() * sizeof(T));
    std::memcpy(indices.bytes().data(), values.data(), indices.bytes().size());
    indices.upload();
  }

  CacheAppend append() const {
    return {.key = tensors->rows.on_device(),
            .value = tensors->rows.on_device(),
            .key_cache = tensors->key_cache.on_device(),
            .value_cache = tensors->value_cache.on_device(),
            .slot_mapping = tensors->slots.on_device(),
            .k_scale = tensors->scale.on_device(),
            .v_scale = tensors->scale.on_device()};
  }

  void expect_nothing_written() {
    for (Tensor* t : {&tensors->rows, &tensors->out, &tensors->key_cache, &tensors->value_cache}) expect_same(*t, "a tensor");
  }

  std::optional<Tensors> tensors;
};

TEST_F(CudaDebug, ASlotBeyondTheCache) {
  set<std::int32_t>(tensors->slots, {5, 12});
  EXPECT_EQ(
      error_of([&] { cuda::run(append()); }),
      "fp8kv::reshape_and_cache_flash: slot_mapping must have slots below num_blocks * block_size = 12, got 12 for token 1");
  expect_nothing_written();
}

TEST_F(CudaDebug, APositionBeyondTheTable) {
  set<std::int32_t>(tensors->slots, {5, 11});
  set<std::int64_t>(tensors->positions, {9, 10});
  const CacheAppend a = append();
  const RopeAppend problem{.query = a.key,
                           .key = a.key,
                           .value = a.value,
                           .query_out = tensors->out.on_device(),
                           .key_cache = a.key_cache,
                           .value_cache = a.value_cache,
                           .slot_mapping = a.slot_mapping,
                           .q_scale = a.k_scale,
                           .k_scale = a.k_scale,
                           .v_scale = a.v_scale,
                           .positions = tensors->positions.on_device(),
                           .cos_sin_cache = tensors->cos_sin.on_device()};
  EXPECT_EQ(error_of([&] { cuda::run(problem); }),
            "fp8kv::rope_quant_and_cache: positions must be from 0 to max_position - 1 = 9, rows of cos_sin_cache, got 10 for "
            "token 1");
  RopeAppend three_rows = problem;
  TensorView& positions = *three_rows.positions;
  positions.ndim = 2, positions.sizes[0] = 3, positions.sizes[1] = 2, positions.strides[0] = 0, positions.strides[1] = 1;
  three_rows.mrope_section = {problem.cos_sin_cache->sizes[1] / 2, 0, 0};
  EXPECT_EQ(error_of([&] { cuda::run(three_rows); }),
            "fp8kv::rope_quant_and_cache: positions must be from 0 to max_position - 1 = 9, rows of cos_sin_cache, got 10 for "
            "token 1 in row 0");
  expect_nothing_written();
}

TEST_F(CudaDebug, ABlockThatIsNotInTheCache) {
  set<std::int32_t>(tensors->block_table, {3});
  set<std::int32_t>(tensors->sums, {0, 2});
  const CacheGather problem{.key_cache = tensors->key_cache.on_device(),
                            .value_cache = tensors->value_cache.on_device(),
                            .key = tensors->rows.on_device(),
                            .value = tensors->out.on_device(),
                            .block_table = tensors->block_table.on_device(),
                            .cu_seq_lens = tensors->sums.on_device(),
                            .k_scale = tensors->scale.on_device(),
                            .v_scale = tensors->scale.on_device()};
  EXPECT_EQ(
      error_of([&] { cuda::run(problem); }),
      "fp8kv::gather_and_dequant_cache: block_table must have blocks from 0 to num_blocks - 1 = 2, got 3 at 0 in sequence "
      "0");
  expect_nothing_written();
}

TEST_F(CudaDebug, LengthsStartsAndBlocksOfAttention) {
  set<std::int32_t>(tensors->block_table, {2});
  set<std::int32_t>(tensors->sums, {0, 2});
  set<std::int32_t>(tensors->lens, {4});
  const PagedAttention problem{.query = tensors->rows.on_device(),
                               .key_cache = tensors->key_cache.on_device(),
                               .value_cache = tensors->value_cache.on_device(),
                               .out = tensors->out.on_device(),
                               .block_table = tensors->block_table.on_device(),
                               .seq_lens = tensors->lens.on_device(),
                               .k_scale = tensors->scale.on_device(),
                               .v_scale = tensors->scale.on_device(),
                               .cu_query_lens = tensors->sums.on_device(),
                               .max_query_len = 2,
                               .seq_starts = tensors->starts.on_device()};
  set<std::int32_t>(tensors->starts, {-1});
  EXPECT_EQ(error_of([&] { cuda::run(problem); }),
            "fp8kv::paged_attention: seq_starts must be at least 0, got -1 in sequence 0");
  set<std::int32_t>(tensors->starts, {0});
  set<std::int32_t>(tensors->sums, {0, 3});
  EXPECT_EQ(error_of([&] { cuda::run(problem); }),
            "fp8kv::paged_attention: query must have at least cu_query_lens[-1]=3 rows, got shape [2, 1, 8]");
  set<std::int32_t>(tensors->sums, {0, 2});
  set<std::int32_t>(tensors->block_table, {3});
  EXPECT_EQ(error_of([&] { cuda::run(problem); }),
            "fp8kv::paged_attention: block_table must have blocks from 0 to num_blocks - 1 = 2, got 3 at 0 in sequence 0");
  set<std::int32_t>(tensors->block_table, {2});
  set<std::int32_t>(tensors->lens, {5});
  EXPECT_EQ(error_of([&] { cuda::run(problem); }),
            "fp8kv::paged_attention: block_table must have blocks for all positions, max_blocks * block_size = 4, got a last "
            "position of 4 in sequence 0");
  expect_nothing_written();
}

// Nothing can be waited for there: the slot is skipped, as without the variable.
TEST_F(CudaDebug, NothingIsCheckedDuringCapture) {
  set<std::int32_t>(tensors->slots, {-1, -1});
  cuda::run(append());  // the kernel is loaded before the capture
  set<std::int32_t>(tensors->slots, {-1, 12});
  cudaStream_t stream;
  check(cudaStreamCreate(&stream));
  cudaGraph_t graph;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  EXPECT_EQ(error_of([&] { cuda::run(append(), stream); }), "");
  check(cudaStreamEndCapture(stream, &graph));
  cudaGraphExec_t executable;
  check(cudaGraphInstantiate(&executable, graph, 0));
  check(cudaGraphLaunch(executable, stream));
  check(cudaStreamSynchronize(stream));
  expect_nothing_written();
  cudaGraphExecDestroy(executable);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
}

}  // namespace
}  // namespace fp8kv
