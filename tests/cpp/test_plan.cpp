// Launch plans and chunks: pure functions, looked at without a GPU.
#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "core/chunks.h"
#include "core/plan.h"

namespace fp8kv {
namespace {

constexpr int kMultiprocessors = 132;
constexpr int kMaxCluster = 16;

// Addresses are never read; plans look at their alignment only. 1 TiB apart.
void* address(int number, int misalignment = 0) {
  return reinterpret_cast<void*>((static_cast<std::uintptr_t>(number) << 40) + misalignment);
}

StaticQuantize problem(std::int64_t rows, std::int64_t cols, GroupShape shape, int misalignment = 0) {
  const auto count = [](std::int64_t size, std::int64_t group) { return group == -1 ? 1 : (size + group - 1) / group; };
  return {.result = contiguous(address(1, misalignment), DType::E4M3, {rows, cols}),
          .input = contiguous(address(2, 2 * misalignment), DType::BFloat16, {rows, cols}),
          .scale = contiguous(address(3), DType::Float32, {count(rows, shape.rows), count(cols, shape.cols)}),
          .group_shape = shape};
}

ElementwisePlan map(const StaticQuantize& p) { return plan_elementwise(validate(p), p.input, p.result, kMultiprocessors); }

DynamicPlan dynamic(const StaticQuantize& p, int max_cluster = kMaxCluster) {
  return plan_dynamic(validate(p), p.input, p.result, kMultiprocessors, max_cluster);
}

TEST(PlanMap, PerTensorIsOneRunOfUnits) {
  const ElementwisePlan plan = map(problem(64, 4096, {-1, -1}));
  EXPECT_EQ(plan.path, KernelPath::Vectorized);
  EXPECT_TRUE(plan.aligned);
  EXPECT_EQ(plan.work, 64 * 4096 / kVecSize);
  EXPECT_GE(plan.blocks * plan.threads, plan.work);
}

TEST(PlanMap, RowsOfOddLengthAreCutAtAlignedAddresses) {
  const ElementwisePlan plan = map(problem(10, 131, {1, -1}));
  EXPECT_EQ(plan.path, KernelPath::Vectorized);
  EXPECT_FALSE(plan.aligned);
  // 131 elements that begin up to 7 elements into a vec touch at most 18 vecs.
  EXPECT_EQ(plan.vecs_per_row, 18);
  EXPECT_EQ(plan.work, 180);
}

TEST(PlanMap, AMisalignedBaseIsNotAligned) {
  EXPECT_TRUE(map(problem(8, 64, {-1, -1}, 0)).aligned);
  EXPECT_FALSE(map(problem(8, 64, {-1, -1}, 1)).aligned);
}

TEST(PlanMap, PerChannelWalksMoreRowsOnLargeProblems) {
  EXPECT_EQ(map(problem(128, 4096, {-1, 1})).rows_per_thread, 1);
  EXPECT_EQ(map(problem(8192, 4096, {-1, 1})).rows_per_thread, 2);
}

TEST(PlanMap, PerChannelFoldsRowsOfOddLength) {
  const ElementwisePlan plan = map(problem(100, 129, {-1, 1}));
  EXPECT_EQ(plan.path, KernelPath::PerColumn);
  EXPECT_TRUE(plan.aligned);
  EXPECT_EQ(plan.rows_merged, 8);
  EXPECT_EQ(plan.vecs_per_row, 129);
  EXPECT_EQ(plan.rows, 13);
  EXPECT_EQ(map(problem(100, 130, {-1, 1})).rows_merged, 4);
  EXPECT_EQ(map(problem(100, 132, {-1, 1})).rows_merged, 2);
}

TEST(PlanMap, ColumnsOneByOneWhereTheRunIsStrided) {
  StaticQuantize p = problem(16, 64, {-1, -1});
  p.input.strides[0] = 256;
  p.input.strides[1] = 2;
  EXPECT_EQ(map(p).path, KernelPath::Scalar);
  EXPECT_EQ(map(p).work, 16 * 64);
}

TEST(PlanDynamic, ARowStaysInRegisters) {
  const DynamicPlan plan = dynamic(problem(100, 4096, {1, -1}));
  EXPECT_EQ(plan.path, DynamicPath::PerGroup);
  EXPECT_EQ(plan.blocks, 100);
  EXPECT_EQ(plan.lanes_per_group, 0);
  EXPECT_GE(plan.threads * plan.vecs_per_thread * kVecSize, 4096);
}

TEST(PlanDynamic, ShortGroupsShareAWarp) {
  const DynamicPlan plan = dynamic(problem(100, 4096, {1, 128}));
  EXPECT_EQ(plan.path, DynamicPath::PerGroup);
  EXPECT_EQ(plan.lanes_per_group, 16);
  EXPECT_EQ(plan.blocks, 100 * 32 / (plan.threads / 16));
}

TEST(PlanDynamic, AVeryLongRowIsReadTwice) {
  const DynamicPlan plan = dynamic(problem(2, 1 << 20, {1, -1}));
  EXPECT_EQ(plan.path, DynamicPath::PerGroup);
  EXPECT_EQ(plan.vecs_per_thread, 0);
  EXPECT_EQ(plan.threads, 1024);
}

TEST(PlanDynamic, PerTensorGrowsFromABlockToTheWholeDevice) {
  EXPECT_EQ(dynamic(problem(1, 4096, {-1, -1})).path, DynamicPath::PerGroup);
  EXPECT_EQ(dynamic(problem(16, 4096, {-1, -1})).path, DynamicPath::Redundant);
  EXPECT_EQ(dynamic(problem(17, 4096, {-1, -1})).path, DynamicPath::Cluster);
  EXPECT_EQ(dynamic(problem(17, 4096, {-1, -1}), 0).path, DynamicPath::Cooperative);
  EXPECT_EQ(dynamic(problem(4096, 4096, {-1, -1})).path, DynamicPath::Cooperative);
}

TEST(PlanDynamic, RepeatedBlocksReadAllAndShareTheResult) {
  const DynamicPlan plan = dynamic(problem(5, 2000, {-1, -1}));  // 1250 vecs
  EXPECT_EQ(plan.path, DynamicPath::Redundant);
  EXPECT_EQ(plan.threads, 1024);
  EXPECT_EQ(plan.vecs_per_thread, 2);
  EXPECT_EQ(plan.blocks, 3);  // of 512 vecs
}

TEST(PlanDynamic, GaplessWhereDataAndScalesAre) {
  EXPECT_TRUE(dynamic(problem(100, 4096, {1, -1})).contiguous);
  EXPECT_TRUE(dynamic(problem(100, 4096, {1, 128})).contiguous);
  EXPECT_FALSE(dynamic(problem(100, 4097, {1, -1})).contiguous);
  StaticQuantize p = problem(100, 64, {1, -1});
  p.input.strides[0] = 128;
  EXPECT_FALSE(dynamic(p).contiguous);
}

TEST(PlanDynamic, OneUnitAThreadWhereAllRowsAreUnderWayAtOnce) {
  EXPECT_EQ(dynamic(problem(128, 4096, {1, -1})).vecs_per_thread, 1);
  EXPECT_EQ(dynamic(problem(128, 4096, {1, -1})).threads, 512);
  EXPECT_EQ(dynamic(problem(1024, 4096, {1, -1})).vecs_per_thread, 2);
  EXPECT_EQ(dynamic(problem(1024, 4096, {1, -1})).threads, 256);
}

TEST(PlanDynamic, OtherGroupsTakeTwoPasses) {
  for (GroupShape shape : {GroupShape{-1, 1}, GroupShape{-1, 128}, GroupShape{128, 128}, GroupShape{2, -1}})
    EXPECT_EQ(dynamic(problem(256, 512, shape)).path, DynamicPath::TwoPasses) << shape.rows << ", " << shape.cols;
}

// --- Pieces
// ------------------------------------------------------------------------------------------------------------------------

// For every element in row-major order of the layout's dimensions: where it lies and which scale it has.
struct Element {
  std::int64_t in, out, scale;
  bool operator==(const Element&) const = default;
};

void list_elements(const core::Chunk& chunk, std::vector<Element>& elements) {
  const Layout& layout = chunk.layout;
  for (std::int64_t i = 0; i < layout.numel; ++i) {
    std::int64_t rest = i;
    Element e{chunk.in, chunk.out, chunk.scale};
    for (int d = layout.ndim - 1; d >= 0; --d) {
      const Layout::Dim& dim = layout.dims[d];
      const std::int64_t index = rest % dim.size;
      rest /= dim.size;
      e.in += index * dim.in;
      e.out += index * dim.out;
      e.scale += index / dim.block * dim.scale;
    }
    if (layout.flat_rows) e.scale += (chunk.flat_row + i / layout.run().size) / layout.flat_rows * layout.flat_scale;
    elements.push_back(e);
  }
}

class Pieces : public testing::TestWithParam<std::int64_t> {};

TEST_P(Pieces, CoverEveryElementOnceInOrder) {
  StaticQuantize strided{.result = contiguous(address(1), DType::E4M3, {3, 5, 24}),
                         .input = contiguous(address(2), DType::BFloat16, {3, 5, 24}),
                         .scale = contiguous(address(3), DType::Float32, {4, 3}),
                         .group_shape = GroupShape{4, 8}};
  strided.input.strides[0] = 999;
  for (const StaticQuantize& p : {problem(13, 48, {-1, -1}), problem(13, 48, {1, -1}), problem(13, 48, {-1, 1}),
                                  problem(13, 48, {-1, 16}), problem(13, 50, {5, 7}), strided}) {
    const Layout layout = validate(p);
    std::vector<Element> expected, actual;
    list_elements({layout}, expected);
    core::for_each_chunk({layout}, GetParam(), [&](const core::Chunk& chunk) {
      EXPECT_LE(chunk.layout.numel, GetParam());
      list_elements(chunk, actual);
    });
    EXPECT_EQ(actual, expected);
  }
}

TEST(EvenParts, WholeBlocksAndTheRestAreTheWholeLayout) {
  for (const StaticQuantize& p : {problem(13, 50, {-1, 16}), problem(1, 50, {1, 16}), problem(7, 47, {5, 16})}) {
    const Layout layout = validate(p);
    std::vector<Element> expected, actual;
    list_elements({layout}, expected);
    int parts = 0;
    core::for_each_uniform_part(layout, [&](const core::Chunk& part) {
      ++parts;
      EXPECT_EQ(part.layout.run().scale, 0);
      list_elements(part, actual);
    });
    EXPECT_EQ(parts, 2);
    const auto by_place = [](const Element& a, const Element& b) { return a.in < b.in; };
    std::sort(expected.begin(), expected.end(), by_place);
    std::sort(actual.begin(), actual.end(), by_place);
    EXPECT_EQ(actual, expected);
  }
}

TEST(EvenParts, OtherLayoutsStayInOnePiece) {
  for (const StaticQuantize& p :
       {problem(13, 48, {-1, 16}), problem(13, 50, {-1, 1}), problem(13, 50, {1, -1}), problem(13, 50, {-1, 7})}) {
    int parts = 0;
    core::for_each_uniform_part(validate(p), [&](const core::Chunk&) { ++parts; });
    EXPECT_EQ(parts, 1);
  }
}

INSTANTIATE_TEST_SUITE_P(Limits, Pieces, testing::Values(8, 16, 40, 104, 1000), testing::PrintToStringParamName());

// --- The paged cache --------------------------------

struct Geometry {
  std::int64_t tokens, heads, head_size;
  std::int64_t blocks = 64, block_size = 16;
  bool per_head = true;
  int misalignment = 0;  // of the caches, in bytes
};

CacheAppend append(const Geometry& g) {
  const auto cache = [&](int number) {
    return contiguous(address(number, g.misalignment), DType::E4M3, {g.blocks, g.block_size, g.heads, g.head_size});
  };
  const auto rows = [&](int number) { return contiguous(address(number), DType::BFloat16, {g.tokens, g.heads, g.head_size}); };
  const TensorView scale = contiguous(address(6), DType::Float32, {g.per_head ? g.heads : 1});
  return {rows(1), rows(2), cache(3), cache(4), contiguous(address(5), DType::Int64, {g.tokens}), "fp8", scale, scale};
}

TEST(PlanCache, HeadsOfWholeUnitsAreAligned) {
  const CachePlan plan = plan_append(validate(append({128, 8, 128})));
  EXPECT_EQ(plan.path, KernelPath::Vectorized);
  EXPECT_TRUE(plan.aligned);
  EXPECT_EQ(plan.vecs_per_head, 16);
  EXPECT_EQ(plan.tokens, 128);
}

TEST(PlanCache, OddHeadsOfOneScaleAreOneAlignedRun) {
  EXPECT_FALSE(plan_append(validate(append({16, 8, 20}))).aligned);
  const CachePlan merged = plan_append(validate(append({16, 8, 20, 64, 16, false})));
  EXPECT_TRUE(merged.aligned);
  EXPECT_EQ(merged.vecs_per_head, 20);
}

TEST(PlanCache, MisalignedRowsAreCutAtAlignedAddresses) {
  const CachePlan plan = plan_append(validate(append({16, 8, 128, 64, 16, true, 1})));
  EXPECT_EQ(plan.path, KernelPath::Vectorized);
  EXPECT_FALSE(plan.aligned);
  EXPECT_EQ(plan.vecs_per_head, 17);  // 128 elements that begin up to 7 into a vec
}

TEST(PlanCache, StridesOfSizeOneDoNotMatter) {
  CacheAppend p = append({16, 1, 128});
  p.key.strides[1] = p.key_cache.strides[2] = 3;
  EXPECT_TRUE(plan_append(validate(p)).aligned);
}

TEST(PlanCache, SpacedElementsGoOneByOne) {
  CacheAppend p = append({16, 2, 64});
  for (int d = 0; d < 3; ++d) p.key.strides[d] *= 2;
  EXPECT_EQ(plan_append(validate(p)).path, KernelPath::Scalar);
}

TEST(PlanCache, SlotsBeyond32BitsGoOneByOne) {
  constexpr std::int64_t kSlots = std::int64_t{1} << 31;
  EXPECT_EQ(plan_append(validate(append({16, 1, 8, kSlots / 16, 16}))).path, KernelPath::Vectorized);
  EXPECT_EQ(plan_append(validate(append({16, 1, 8, kSlots / 16 + 1, 16}))).path, KernelPath::Scalar);
}

TEST(PlanCache, ManyTokensAreLaunchedInPieces) {
  const std::int64_t tokens = 1 << 25;  // of 128 vecs
  const CachePlan plan = plan_append(validate(append({tokens, 8, 128})));
  EXPECT_LT(plan.tokens, tokens);
  EXPECT_LT(plan.tokens * 128, kMaxChunk);
  EXPECT_GE((plan.tokens + 1) * 128, kMaxChunk);
}

CachePlan plan_dynamic_append(std::int64_t head_size) {
  const CacheAppend p = append({128, 8, head_size});
  const TensorView scales = contiguous(address(7), DType::Float32, {64, 16, 8});
  TensorView others = scales;
  others.data = address(8);
  return plan_append_dynamic(
      validate(CacheAppendDynamic{p.key, p.value, p.key_cache, p.value_cache, scales, others, p.slot_mapping, "fp8"}));
}

TEST(PlanCache, ThreadsOfAWarpHoldAHead) {
  struct Expected {
    std::int64_t head_size;
    int threads, vecs;
  };
  for (const auto& [head_size, threads, vecs] :
       {Expected{8, 1, 2}, {64, 4, 2}, {80, 8, 2}, {128, 8, 2}, {256, 16, 2}, {512, 32, 2}, {576, 32, 4}, {1024, 32, 4}}) {
    const CachePlan plan = plan_dynamic_append(head_size);
    EXPECT_EQ(plan.path, KernelPath::Vectorized) << head_size;
    EXPECT_EQ(plan.threads_per_head, threads) << head_size;
    EXPECT_EQ(plan.vecs_per_thread, vecs) << head_size;
    EXPECT_GE(plan.threads_per_head * plan.vecs_per_thread, plan.vecs_per_head) << head_size;
  }
}

TEST(PlanCache, HeadsThatNoWarpHoldsAreReadTwice) {
  const CachePlan plan = plan_dynamic_append(1032);
  EXPECT_EQ(plan.path, KernelPath::Scalar);
  EXPECT_EQ(plan.threads_per_head, 32);
}

}  // namespace
// Q of 4 * heads, K and V in bfloat16, with RoPE.
RopeAppend rope(std::int64_t tokens, std::int64_t heads, std::int64_t head_size, std::int64_t rotary_dim) {
  const CacheAppend p = append({tokens, heads, head_size});
  RopeAppend r{contiguous(address(7), DType::BFloat16, {tokens, 4 * heads, head_size}),
               p.key,
               p.value,
               contiguous(address(8), DType::E4M3, {tokens, 4 * heads, head_size}),
               p.key_cache,
               p.value_cache,
               p.slot_mapping,
               "fp8",
               p.k_scale,
               p.k_scale,
               p.v_scale};
  r.positions = contiguous(address(9), DType::Int64, {tokens});
  r.cos_sin_cache = contiguous(address(10), DType::Float32, {100, rotary_dim});
  return r;
}

TEST(PlanRope, HeadsOfWholeUnitsAreAUnitAThread) {
  const RopeAppendPlan plan = plan_rope_append(validate(rope(16, 8, 128, 128)));
  EXPECT_EQ(plan.path, KernelPath::Vectorized);
  EXPECT_EQ(plan.threads_per_head, 16);
  EXPECT_EQ(plan_rope_append(validate(rope(16, 8, 80, 32))).threads_per_head, 10);
}

TEST(PlanRope, WithANormTheThreadsOfAHeadAreAPowerOfTwo) {
  RopeAppend p = rope(16, 8, 80, 32);
  p.k_norm_weight = contiguous(address(11), DType::BFloat16, {80});
  EXPECT_EQ(plan_rope_append(validate(p)).threads_per_head, 16);
  p = rope(16, 8, 264, 264);
  EXPECT_EQ(plan_rope_append(validate(p)).path, KernelPath::Vectorized);
  p.k_norm_weight = contiguous(address(11), DType::BFloat16, {264});
  EXPECT_EQ(plan_rope_append(validate(p)).path, KernelPath::Scalar) << "more than a warp holds";
}

TEST(PlanRope, ManyTokensShareWhatIsReadForAHead) {
  EXPECT_EQ(plan_rope_append(validate(rope(256, 8, 128, 128))).heads_per_thread, 1);
  EXPECT_EQ(plan_rope_append(validate(rope(2048, 8, 128, 128))).heads_per_thread, 2);
  RopeAppend p = rope(2048, 8, 128, 128);
  p.positions.reset(), p.cos_sin_cache.reset();
  EXPECT_EQ(plan_rope_append(validate(p)).heads_per_thread, 1) << "nothing to share";
  p = rope(256, 8, 128, 128);
  p.q_norm_weight = contiguous(address(11), DType::BFloat16, {128});
  EXPECT_EQ(plan_rope_append(validate(p)).heads_per_thread, 2);
}

TEST(PlanRope, WhatDoesNotFitIsAWarpAHead) {
  const auto path = [](const auto& change) {
    RopeAppend p = rope(16, 8, 128, 128);
    change(p);
    return plan_rope_append(validate(p)).path;
  };
  EXPECT_EQ(path([](auto& p) { p.cos_sin_cache->sizes[1] = 12; }), KernelPath::Scalar) << "half a vec";
  EXPECT_EQ(path([](auto& p) { p.query.data = static_cast<char*>(p.query.data) + 2; }), KernelPath::Scalar);
  EXPECT_EQ(path([](auto& p) { p.cos_sin_cache->strides[0] = 130; }), KernelPath::Scalar);
  EXPECT_EQ(path([](auto& p) { p.query_out.strides[0] += 4; }), KernelPath::Scalar);
  EXPECT_EQ(path([](auto& p) { p.query_out.dtype = DType::Float32, p.query_out.strides[0] *= 2; }), KernelPath::Scalar);
  EXPECT_EQ(path([](auto& p) { p.query.strides[0] += 8 * 128; }), KernelPath::Vectorized) << "a slice";
}

TEST(PlanRope, ManyTokensAreLaunchedInPieces) {
  const std::int64_t tokens = 1 << 24;
  const RopeAppendPlan plan = plan_rope_append(validate(rope(tokens, 8, 128, 128)));
  EXPECT_LT(plan.tokens, tokens);
  EXPECT_LT(plan.tokens * 16 * (32 + 8), kMaxChunk);
}

}  // namespace fp8kv
