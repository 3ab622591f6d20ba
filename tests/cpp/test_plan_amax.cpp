// Plans of the kernels that find the largest magnitudes of groups of any form.
#include <gtest/gtest.h>

#include "plan_support.h"

namespace fp8kv::core {
namespace {

using namespace testing_support;

AmaxPlan plan_of(const StaticQuantize& p, int multiprocessors = kMultiprocessors) {
  const GroupAmax amax{.amax = p.scale, .input = p.input, .group_shape = *p.group_shape};
  return plan_amax({lower(amax)}, p.input, multiprocessors);
}

AmaxPlan plan_of(std::int64_t rows, std::int64_t cols, GroupShape shape) {
  return plan_of(quantize_problem(rows, cols, shape));
}

// A row of one scale is seen as rows of kAmaxRowSize elements.
TEST(PlanAmax, PerTensorReducesOverRowsOfTheRow) {
  const AmaxPlan plan = plan_of(64, 4096 + 1, {-1, -1});
  EXPECT_EQ(plan.path, KernelPath::Vectorized);
  EXPECT_TRUE(plan.aligned);
  EXPECT_EQ(plan.reduced.size, 129);  // of 2048, the last one with 64 elements
  EXPECT_EQ(plan.reduced.in, kAmaxRowSize);
  EXPECT_EQ(plan.reduced.scale, 0);
  EXPECT_EQ(plan.reduced.block, 129);
  EXPECT_EQ(plan.limit, 64 * 4097);
  EXPECT_EQ(plan.outer.ndim, 1);
  EXPECT_EQ(plan.outer.inner().size, kAmaxRowSize);
  EXPECT_EQ(plan.outer_rows, 1);
  EXPECT_EQ(plan.vecs_per_row, 256);
  EXPECT_EQ(plan.span, 4);
  EXPECT_EQ(plan.num_spans, 33);
  EXPECT_EQ(plan.work, 33 * 256);
  EXPECT_EQ(plan.blocks, 33);
}

TEST(PlanAmax, PerTokenReducesOverRowsOfEachRow) {
  const AmaxPlan plan = plan_of(64, 5000, {1, -1});
  EXPECT_EQ(plan.path, KernelPath::Vectorized);
  EXPECT_EQ(plan.reduced.size, 3);
  EXPECT_EQ(plan.limit, 5000);
  EXPECT_EQ(plan.outer.ndim, 2);
  EXPECT_EQ(plan.outer_rows, 64);
  EXPECT_EQ(plan.num_spans, 1);
  EXPECT_EQ(plan.work, 64 * 256);
}

TEST(PlanAmax, AShortRowIsNotMadeLonger) {
  const AmaxPlan plan = plan_of(64, 100, {1, -1});
  EXPECT_EQ(plan.reduced.size, 1);
  EXPECT_EQ(plan.outer.inner().size, 100);
  EXPECT_EQ(plan.limit, 100);
  EXPECT_EQ(plan.vecs_per_row, 13);
}

TEST(PlanAmax, PerChannelReducesOverRows) {
  const AmaxPlan plan = plan_of(4096, 512, {-1, 1});
  EXPECT_EQ(plan.path, KernelPath::PerColumn);
  EXPECT_EQ(plan.reduced.size, 4096);
  EXPECT_EQ(plan.reduced.in, 512);
  EXPECT_EQ(plan.reduced.block, 4096);
  EXPECT_EQ(plan.limit, INT64_MAX);
  EXPECT_EQ(plan.outer.ndim, 1);
  EXPECT_EQ(plan.outer_rows, 1);
  EXPECT_EQ(plan.vecs_per_row, 64);
  EXPECT_EQ(plan.warps_per_row(), 2);
  EXPECT_EQ(plan.span, 8);  // 64 vectors in 512 spans: about as many threads as are wanted, 256 per multiprocessor
  EXPECT_EQ(plan.num_spans, 512);
  EXPECT_EQ(plan.blocks, 2 * 512 / 8);  // a warp takes 32 vectors of a span
}

TEST(PlanAmax, ChannelsOfOneRowHaveNothingToReduce) {
  const AmaxPlan plan = plan_of(1, 512, {-1, 1});
  EXPECT_EQ(plan.path, KernelPath::PerColumn);
  EXPECT_EQ(plan.reduced.size, 1);
  EXPECT_EQ(plan.outer.ndim, 1);
  EXPECT_EQ(plan.outer.inner().size, 512);
  EXPECT_EQ(plan.num_spans, 1);
  EXPECT_EQ(plan.blocks, 2);
}

TEST(PlanAmax, BlocksReduceOverTheirRows) {
  const AmaxPlan plan = plan_of(256, 384, {128, 128});
  EXPECT_EQ(plan.path, KernelPath::Vectorized);
  EXPECT_EQ(plan.reduced.size, 256);
  EXPECT_EQ(plan.reduced.block, 128);
  EXPECT_EQ(plan.reduced.scale, 3);
  EXPECT_EQ(plan.limit, INT64_MAX);
  EXPECT_EQ(plan.outer.ndim, 2);
  EXPECT_EQ(plan.outer_rows, 3);
  EXPECT_EQ(plan.vecs_per_row, 16);
  EXPECT_EQ(plan.spans_per_block(), 32);
  EXPECT_EQ(plan.num_spans, 64);
  EXPECT_EQ(plan.work, 64 * 3 * 16);
}

TEST(PlanAmax, SpansDoNotCrossBlocks) {
  const AmaxPlan plan = plan_of(20, 384, {6, 128});  // 6, 6, 6 and 2 rows
  EXPECT_EQ(plan.span, 4);
  EXPECT_EQ(plan.spans_per_block(), 2);
  EXPECT_EQ(plan.num_spans, 8);
}

// The longest of the dimensions that share a scale: 40 tokens rather than 4 heads.
TEST(PlanAmax, TheDimensionOfMostIndicesWithOneScaleIsReduced) {
  StaticQuantize p{.result = contiguous(address(1), DType::E4M3, {40, 6, 4, 64}),
                   .input = contiguous(address(2), DType::BFloat16, {40, 6, 4, 64}),
                   .scale = contiguous(address(3), DType::Float32, {1, 6, 1, 1})};
  p.input.strides[2] = 64 * 8, p.input.strides[1] = 64 * 8 * 4, p.input.strides[0] = 64 * 8 * 4 * 6;
  const AmaxPlan plan = plan_amax({lower(p)}, p.input, kMultiprocessors);
  EXPECT_EQ(plan.path, KernelPath::Vectorized);
  EXPECT_EQ(plan.reduced.size, 40);
  EXPECT_EQ(plan.reduced.in, 64 * 8 * 4 * 6);
  ASSERT_EQ(plan.outer.ndim, 3);
  EXPECT_EQ(plan.outer.dims[0].size, 6);
  EXPECT_EQ(plan.outer.dims[1].size, 4);
  EXPECT_EQ(plan.outer_rows, 24);
}

TEST(PlanAmax, SpansGrowUntilThereAreEnoughThreads) {
  EXPECT_EQ(plan_of(1, 1 << 22, {-1, -1}).span, 4);
  EXPECT_EQ(plan_of(1, 1 << 23, {-1, -1}).span, 8);
  EXPECT_EQ(plan_of(1, 1 << 28, {-1, -1}).span, 64) << "and no further";
}

TEST(PlanAmax, AlignmentIsThatOfTheInputAlone) {
  EXPECT_TRUE(plan_of(8, 64, {1, -1}).aligned);
  EXPECT_FALSE(plan_of(quantize_problem(8, 64, {1, -1}, 1)).aligned);
  EXPECT_FALSE(plan_of(8, 65, {1, -1}).aligned);
  EXPECT_TRUE(plan_of(1, 65, {1, -1}).aligned) << "the last vector is incomplete, not misaligned";
}

TEST(PlanAmax, ElementsOneByOneWhereNoVectorFits) {
  StaticQuantize spaced = quantize_problem(16, 64, {1, -1});
  spaced.input.strides[0] = 128, spaced.input.strides[1] = 2;
  const AmaxPlan plan = plan_of(spaced);
  EXPECT_EQ(plan.path, KernelPath::Scalar);
  EXPECT_EQ(plan.work, 16 * 64);
  EXPECT_EQ(plan.blocks, 4);  // of 256 threads
  EXPECT_EQ(plan_of(1, 7, {-1, -1}).path, KernelPath::Scalar) << "less than a vector";
  EXPECT_EQ(plan_of(1, 8, {-1, -1}).path, KernelPath::Vectorized);
  StaticQuantize huge = quantize_problem(1 << 12, 1 << 12, {1, -1});
  huge.input.strides[0] = 1 << 13, huge.input.strides[1] = 2;
  EXPECT_EQ(plan_of(huge).blocks, 8 * kMultiprocessors) << "a grid-stride loop";
}

TEST(PlanAmax, GroupsThatCountFlatRowsGoOneByOne) {
  GroupAmax p{.amax = contiguous(address(3), DType::Float32, {3}),
              .input = contiguous(address(2), DType::BFloat16, {3, 4, 64}),
              .group_shape = {5, -1}};
  p.input.strides[0] = 512;
  EXPECT_EQ(plan_amax({lower(p)}, p.input, kMultiprocessors).path, KernelPath::Scalar);
}

}  // namespace
}  // namespace fp8kv::core
