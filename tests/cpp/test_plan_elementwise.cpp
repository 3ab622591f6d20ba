// Plans of the elementwise kernels: which kernel, how many threads, what each of them does.
#include <gtest/gtest.h>

#include "plan_support.h"

namespace fp8kv::core {
namespace {

using namespace testing_support;

ElementwisePlan plan_of(const StaticQuantize& p, int multiprocessors = kMultiprocessors) {
  return plan_elementwise({lower(p)}, p.input, p.result, p.scale, multiprocessors);
}

// --- Which kernel --------------------------------

using Kernel = ElementwiseKernel;

StaticQuantize with_input_pitch(StaticQuantize p, std::int64_t pitch) {
  p.input.strides[0] = pitch;
  return p;
}

StaticQuantize with_spaced_input(StaticQuantize p) {
  p.input.strides[0] = 2 * p.input.sizes[1];
  p.input.strides[1] = 2;
  return p;
}

// A scale for every index of the dimensions that `scale_sizes` does not leave at 1.
StaticQuantize blocks_4d(std::initializer_list<std::int64_t> sizes, std::initializer_list<std::int64_t> scale_sizes) {
  return {.result = contiguous(address(1), DType::E4M3, sizes),
          .input = contiguous(address(2), DType::BFloat16, sizes),
          .scale = contiguous(address(3), DType::Float32, scale_sizes)};
}

// Groups of rows that cross a dimension of a strided input.
StaticQuantize flat_rows() {
  StaticQuantize p{.result = contiguous(address(1), DType::E4M3, {3, 4, 64}),
                   .input = contiguous(address(2), DType::BFloat16, {3, 4, 64}),
                   .scale = contiguous(address(3), DType::Float32, {3}),
                   .group_shape = GroupShape{5, -1}};
  p.input.strides[0] = 512;
  return p;
}

struct KernelOf {
  const char* name;
  StaticQuantize problem;
  Kernel kernel;
  KernelPath path;
};

void PrintTo(const KernelOf& c, std::ostream* os) { *os << c.name; }

const KernelOf kKernels[] = {
    {"spaced_elements", with_spaced_input(quantize_problem(16, 64, {-1, -1})), Kernel::Scalar, KernelPath::Scalar},
    {"flat_rows", flat_rows(), Kernel::Scalar, KernelPath::Scalar},
    {"rows_below_a_vector", with_input_pitch(quantize_problem(16, 7, {1, -1}), 16), Kernel::Scalar, KernelPath::Scalar},
    {"tensor", quantize_problem(64, 4096, {-1, -1}), Kernel::Contiguous, KernelPath::Vectorized},
    {"token", quantize_problem(64, 4096, {1, -1}), Kernel::Contiguous, KernelPath::Vectorized},
    {"row_blocks", quantize_problem(64, 4096, {1, 128}), Kernel::Contiguous, KernelPath::Vectorized},
    {"head", quantize_problem(64, 4096, {-1, 128}), Kernel::Contiguous, KernelPath::Vectorized},
    {"blocks", quantize_problem(256, 384, {128, 128}), Kernel::Contiguous, KernelPath::Vectorized},
    {"blocks_of_many_rows", quantize_problem(1024, 2048, {128, 128}), Kernel::RowsOfBlocks, KernelPath::Vectorized},
    {"heads_of_many_rows", quantize_problem(1031, 2048, {-1, 128}), Kernel::RowsOfBlocks, KernelPath::Vectorized},
    {"blocks_4d", blocks_4d({2, 3, 4, 16}, {2, 1, 4, 1}), Kernel::Vectorized, KernelPath::Vectorized},
    {"padded_rows", with_input_pitch(quantize_problem(16, 64, {-1, -1}), 72), Kernel::Vectorized, KernelPath::Vectorized},
    {"odd_tensor", quantize_problem(10, 131, {-1, -1}), Kernel::AcrossGroups, KernelPath::Vectorized},
    {"large_odd_tensor", quantize_problem(4097, 5137, {-1, -1}), Kernel::Contiguous, KernelPath::Vectorized},
    {"odd_rows", quantize_problem(10, 131, {1, -1}), Kernel::AcrossGroups, KernelPath::Vectorized},
    {"odd_rows_padded", with_input_pitch(quantize_problem(10, 131, {1, -1}), 132), Kernel::VectorizedUnaligned,
     KernelPath::Vectorized},
    {"odd_pitch", with_input_pitch(quantize_problem(16, 64, {-1, -1}), 67), Kernel::VectorizedUnaligned,
     KernelPath::Vectorized},
    {"misaligned", quantize_problem(8, 64, {-1, -1}, 1), Kernel::VectorizedUnaligned, KernelPath::Vectorized},
    {"channel", quantize_problem(128, 4096, {-1, 1}), Kernel::PerChannel, KernelPath::PerColumn},
    {"short_blocks", quantize_problem(128, 4096, {-1, 4}), Kernel::PerColumn, KernelPath::PerColumn},
    {"channel_of_one_row", quantize_problem(1, 4096, {-1, 1}), Kernel::PerChannelOfOneRow, KernelPath::PerColumn},
    {"channel_of_one_long_row", quantize_problem(1, 1 << 17, {-1, 1}), Kernel::PerChannel, KernelPath::PerColumn},
    {"channel_padded", with_input_pitch(quantize_problem(128, 64, {-1, 1}), 72), Kernel::PerColumn, KernelPath::PerColumn},
    {"channel_merged", quantize_problem(100, 129, {-1, 1}), Kernel::PerChannelMerged, KernelPath::PerColumn},
    {"channel_in_blocks_of_rows", quantize_problem(128, 64, {32, 1}), Kernel::PerColumn, KernelPath::PerColumn},
    {"channel_many_rows", quantize_problem(8192, 4096, {-1, 1}), Kernel::PerChannel, KernelPath::PerColumn},
    {"channel_merged_many_rows", quantize_problem(1031, 1025, {-1, 1}), Kernel::PerChannelMerged, KernelPath::PerColumn},
    {"channel_odd_pitch", with_input_pitch(quantize_problem(100, 129, {-1, 1}), 131), Kernel::PerColumnUnaligned,
     KernelPath::PerColumn},
    {"channel_misaligned", quantize_problem(100, 128, {-1, 1}, 1), Kernel::PerColumnUnaligned, KernelPath::PerColumn},
};

class PlanElementwiseKernels : public testing::TestWithParam<KernelOf> {};

INSTANTIATE_TEST_SUITE_P(, PlanElementwiseKernels, testing::ValuesIn(kKernels),
                         [](const auto& info) { return std::string(info.param.name); });

TEST_P(PlanElementwiseKernels, KernelAndPath) {
  const ElementwisePlan plan = plan_of(GetParam().problem);
  EXPECT_EQ(plan.kernel, GetParam().kernel);
  EXPECT_EQ(plan.path, GetParam().path);
}

TEST_P(PlanElementwiseKernels, ThreadsCoverTheWork) {
  const StaticQuantize& p = GetParam().problem;
  for (int multiprocessors : {1, kMultiprocessors}) {
    const ElementwisePlan plan = plan_of(p, multiprocessors);
    EXPECT_GE(plan.blocks * plan.threads * plan.vecs_per_thread, plan.work);
    EXPECT_LT((plan.blocks - 1) * plan.threads * plan.vecs_per_thread, plan.work);
    const std::int64_t for_each = plan.kernel == Kernel::AcrossGroups         ? kUnitSize
                                  : plan.kernel == Kernel::PerChannelOfOneRow ? kOneRowColumns
                                  : plan.path == KernelPath::Scalar           ? 1
                                                                              : kVecSize * plan.rows_per_thread;
    const std::int64_t rest = plan.kernel == Kernel::Contiguous ? p.input.numel() % kVecSize : 0;
    EXPECT_GE(plan.work * for_each + rest, p.input.numel());
  }
}

TEST(PlanElementwise, EveryKernelIsReached) {
  for (int kernel = 0; kernel <= static_cast<int>(Kernel::PerColumnUnaligned); ++kernel) {
    const auto reached = [&](const KernelOf& c) { return static_cast<int>(plan_of(c.problem).kernel) == kernel; };
    EXPECT_TRUE(std::any_of(std::begin(kKernels), std::end(kKernels), reached)) << "kernel " << kernel;
  }
}

// --- What threads do --------------------------------

TEST(PlanElementwise, PerTensorIsOneGroup) {
  const ElementwisePlan plan = plan_of(quantize_problem(64, 4096, {-1, -1}));
  EXPECT_TRUE(plan.aligned);
  EXPECT_EQ(plan.groups, Groups::One);
  EXPECT_EQ(plan.work, 64 * 4096 / kVecSize);
}

TEST(PlanElementwise, GroupsOfOneRowAreCountedOnly) {
  EXPECT_EQ(plan_of(quantize_problem(64, 4096, {1, -1})).groups, Groups::Row);
  EXPECT_EQ(plan_of(quantize_problem(64, 4096, {1, 128})).groups, Groups::Row);
  EXPECT_EQ(plan_of(quantize_problem(1, 4096, {-1, 128})).groups, Groups::Row);
  EXPECT_EQ(plan_of(quantize_problem(64, 4096, {-1, 128})).groups, Groups::Grid);
  EXPECT_EQ(plan_of(quantize_problem(256, 4096, {128, -1})).groups, Groups::Grid);
  EXPECT_EQ(plan_of(quantize_problem(256, 4096, {128, 128})).groups, Groups::Grid);
}

TEST(PlanElementwise, ThreadsTakeTwoVectorsInLargeContiguousProblems) {
  for (GroupShape shape : {GroupShape{-1, -1}, {1, -1}, {1, 128}}) {
    const ElementwisePlan small = plan_of(quantize_problem(511, 4096, shape)),
                          large = plan_of(quantize_problem(512, 4096, shape));
    EXPECT_EQ(small.vecs_per_thread, 1);
    EXPECT_EQ(small.threads, 256);
    EXPECT_EQ(large.vecs_per_thread, 2);
    EXPECT_EQ(large.threads, 128);
    EXPECT_EQ(large.blocks, 512 * 512 / 256);
  }
  EXPECT_EQ(plan_of(with_input_pitch(quantize_problem(512, 4096, {1, -1}), 4104)).vecs_per_thread, 1) << "not contiguous";
}

TEST(PlanElementwise, ThreadsTakeFourRowsOfBlocksInLargeContiguousProblems) {
  for (GroupShape shape : {GroupShape{-1, 128}, {128, 128}, {4, 256}, {256, -1}}) {
    const ElementwisePlan small = plan_of(quantize_problem(511, 4096, shape)),
                          large = plan_of(quantize_problem(513, 4096, shape));
    EXPECT_EQ(small.kernel, Kernel::Contiguous);
    EXPECT_EQ(large.kernel, Kernel::RowsOfBlocks);
    EXPECT_EQ(large.rows_per_thread, 4);
    EXPECT_EQ(large.work, 129 * 512);
    EXPECT_EQ(large.threads, 128);
    EXPECT_EQ(large.blocks, 129 * 4);
  }
  const auto two_vectors = [](const StaticQuantize& p) {
    const ElementwisePlan plan = plan_of(p);
    return plan.kernel == Kernel::Contiguous && plan.vecs_per_thread == 2;
  };
  EXPECT_TRUE(two_vectors(quantize_problem(512, 4096, {2, 128}))) << "batches of rows with two scales";
  EXPECT_TRUE(two_vectors(quantize_problem(63, 1 << 16, {-1, 128}))) << "a last batch that is not whole would count";
  EXPECT_FALSE(two_vectors(quantize_problem(60, 1 << 16, {-1, 128})));
  EXPECT_FALSE(two_vectors(quantize_problem(65, 1 << 16, {-1, 128})));
}

TEST(PlanElementwise, StridedRowsOfOddLengthAreDividedAtAlignedAddresses) {
  const ElementwisePlan plan = plan_of(with_input_pitch(quantize_problem(10, 131, {1, -1}), 132));
  EXPECT_FALSE(plan.aligned);
  // 131 elements that begin up to 7 elements into a vector touch at most 18 vectors.
  EXPECT_EQ(plan.vecs_per_row, 18);
  EXPECT_EQ(plan.work, 180);
}

// --- Units of the whole tensor --------------------------------

bool across_groups(const StaticQuantize& p) { return goes_across_groups({lower(p)}, p.input, p.result); }

// Where the grid has the scale of an element, against the groups themselves. The scales are contiguous.
void expect_scales(const StaticQuantize& p, GroupShape shape) {
  const Layout layout = lower(p);
  const ElementwisePlan plan = plan_elementwise({layout}, p.input, p.result, p.scale, kMultiprocessors);
  ASSERT_EQ(plan.kernel, Kernel::AcrossGroups);
  EXPECT_EQ(plan.work, ceil_div(layout.numel, 16));
  const std::int64_t rows = p.input.sizes[0], cols = p.input.sizes[1], per_row = p.scale.sizes[1];
  const GroupGrid& grid = plan.grid;
  for (std::int64_t row = 0; row < rows; ++row)
    for (std::int64_t col = 0; col < cols; ++col) {
      const std::int64_t i = row * cols + col;
      const std::int64_t found = i / grid.row / grid.row_block * grid.row_scale + i % grid.row / grid.group * grid.group_scale;
      const std::int64_t group_row = shape.rows == -1 ? 0 : row / shape.rows,
                         group_col = shape.cols == -1 ? 0 : col / shape.cols;
      ASSERT_EQ(found, group_row * per_row + group_col) << row << ", " << col;
    }
}

TEST(PlanElementwise, AGridOfGroupsHasTheScaleOfEveryElement) {
  for (GroupShape shape : {GroupShape{-1, -1}, {1, -1}, {5, -1}, {-1, 20}, {-1, 52}, {1, 20}, {3, 20}, {-1, 105}, {3, 104}}) {
    SCOPED_TRACE(std::to_string(shape.rows) + ", " + std::to_string(shape.cols));
    for (std::int64_t cols : {105, 100 + 20, 100 + 18}) {
      const StaticQuantize p = quantize_problem(11, cols, shape);
      if (across_groups(p)) expect_scales(p, shape);
    }
  }
  expect_scales(quantize_problem(11, 105, {1, -1}), {1, -1});
  expect_scales(quantize_problem(11, 100, {-1, 20}), {-1, 20});
  expect_scales(quantize_problem(11, 118, {3, 20}), {3, 20});
}

TEST(PlanElementwise, UnitsGoAcrossGroupsOnlyWhereVectorsDoNotFit) {
  EXPECT_TRUE(across_groups(quantize_problem(11, 105, {1, -1})));
  EXPECT_FALSE(across_groups(quantize_problem(11, 104, {1, -1})));
  EXPECT_TRUE(across_groups(quantize_problem(10, 100, {-1, 20})));
  EXPECT_FALSE(across_groups(quantize_problem(10, 96, {-1, 24})));
  EXPECT_FALSE(across_groups(quantize_problem(11, 105, {-1, 1}))) << "a scale for each column";
}

TEST(PlanElementwise, ALargeTensorOfOneScaleNeedsNoUnits) {
  const ElementwisePlan plan = plan_of(quantize_problem(4097, 5137, {-1, -1}));
  EXPECT_EQ(plan.kernel, Kernel::Contiguous);
  EXPECT_EQ(plan.groups, Groups::One);
  EXPECT_EQ(plan.vecs_per_thread, 2);
  EXPECT_EQ(plan.work, 4097 * 5137 / kVecSize) << "the rest is 1 element";
  EXPECT_EQ(plan_of(quantize_problem(1, (1 << 21) + 1, {-1, -1})).kernel, Kernel::Contiguous);
  EXPECT_EQ(plan_of(quantize_problem(1, (1 << 21) - 1, {-1, -1})).kernel, Kernel::AcrossGroups) << "single vectors";
}

TEST(PlanElementwise, UnitsOfManyGroupsAreAvoided) {
  EXPECT_FALSE(across_groups(quantize_problem(10, 150, {-1, 15}))) << "groups below a unit";
  EXPECT_TRUE(across_groups(quantize_problem(10, 128 + 17, {-1, 128})));
  EXPECT_FALSE(across_groups(quantize_problem(10, 128 + 15, {-1, 128}))) << "in every short row a group below a unit";
  EXPECT_TRUE(across_groups(quantize_problem(10, 1024 + 15, {-1, 128}))) << "rare in long rows";
}

TEST(PlanElementwise, UnitsAreAligned) {
  const StaticQuantize p = quantize_problem(11, 105, {1, -1});
  const auto across = [&](std::int64_t in, std::int64_t out) {
    return goes_across_groups({.layout = lower(p), .in = in, .out = out}, p.input, p.result);
  };
  EXPECT_TRUE(across(8, 16));
  EXPECT_FALSE(across(4, 16));
  EXPECT_FALSE(across(8, 8));
  EXPECT_FALSE(across_groups(with_input_pitch(p, 112)));
}

TEST(PlanElementwise, VectorsAreAlignedOnlyInAlignedViews) {
  EXPECT_TRUE(plan_of(quantize_problem(8, 64, {-1, -1}, 0)).aligned);
  for (int misalignment = 1; misalignment < kVecSize; ++misalignment)
    EXPECT_FALSE(plan_of(quantize_problem(8, 64, {-1, -1}, misalignment)).aligned) << misalignment;
  EXPECT_TRUE(plan_of(quantize_problem(8, 64, {-1, -1}, kVecSize)).aligned);
}

TEST(PlanElementwise, ChunksAreAlignedByTheirOwnFirstElement) {
  const StaticQuantize p = quantize_problem(8, 64, {-1, -1});
  const auto aligned = [&](std::int64_t in, std::int64_t out) {
    const Chunk chunk{.layout = lower(p), .in = in, .out = out};
    return plan_elementwise(chunk, p.input, p.result, p.scale, kMultiprocessors).aligned;
  };
  EXPECT_TRUE(aligned(0, 0));
  EXPECT_TRUE(aligned(16, 8));
  EXPECT_FALSE(aligned(4, 8));
  EXPECT_FALSE(aligned(16, 4));
}

TEST(PlanElementwise, PerChannelTakesFourRowsPerThread) {
  const ElementwisePlan plan = plan_of(quantize_problem(518, 4096, {-1, 1}));
  EXPECT_EQ(plan.rows_per_thread, 4);
  EXPECT_EQ(plan.threads, 128);
  EXPECT_EQ(plan.work, 130 * 512);
  EXPECT_EQ(plan_of(quantize_problem(128, 4096, {-1, 1})).rows_per_thread, 1);
}

TEST(PlanElementwise, OneShortRowPerChannelTakesTwoColumnsPerThread) {
  const ElementwisePlan plan = plan_of(quantize_problem(1, 4096, {-1, 1}));
  EXPECT_EQ(plan.work, 2048);
  EXPECT_EQ(plan.threads, 128);
  EXPECT_EQ(plan.blocks, 16);
  EXPECT_EQ(plan_of(quantize_problem(1, 128 * 132, {-1, 1})).kernel, Kernel::PerChannelOfOneRow);
  EXPECT_EQ(plan_of(quantize_problem(1, 128 * 132 + 8, {-1, 1})).kernel, Kernel::PerChannel);
  EXPECT_EQ(plan_of(quantize_problem(2, 4096, {-1, 1})).kernel, Kernel::PerChannel);
}

TEST(PlanElementwise, PerChannelMergesRowsOfOddLength) {
  const ElementwisePlan plan = plan_of(quantize_problem(100, 129, {-1, 1}));
  EXPECT_TRUE(plan.aligned);
  EXPECT_EQ(plan.rows_merged, 8);
  EXPECT_EQ(plan.row_size, 8 * 129);
  EXPECT_EQ(plan.vecs_per_row, 129);
  EXPECT_EQ(plan.rows, 13);
  EXPECT_EQ(plan.row_in, 8 * 129);
  EXPECT_EQ(plan.row_out, 8 * 129);
  EXPECT_EQ(plan_of(quantize_problem(100, 130, {-1, 1})).rows_merged, 4);
  EXPECT_EQ(plan_of(quantize_problem(100, 132, {-1, 1})).rows_merged, 2);
  EXPECT_EQ(plan_of(quantize_problem(100, 136, {-1, 1})).rows_merged, 1);
}

TEST(PlanElementwise, RowsThatDoNotTouchAreNotMerged) {
  EXPECT_EQ(plan_of(with_input_pitch(quantize_problem(100, 129, {-1, 1}), 131)).rows_merged, 1);
  EXPECT_EQ(plan_of(quantize_problem(100, 129, {-1, 1}, 1)).rows_merged, 1) << "merged rows would not be aligned";
  EXPECT_EQ(plan_of(quantize_problem(100, 129, {32, 1})).rows_merged, 1) << "rows of several scales";
  StaticQuantize p = quantize_problem(100, 129, {-1, 1});
  p.scale.strides[1] = 2;
  EXPECT_EQ(plan_of(p).rows_merged, 1) << "scales that are not neighbors";
}

TEST(PlanElementwise, MergedRowsTakeUpToFourPerThread) {
  EXPECT_EQ(plan_of(quantize_problem(100, 129, {-1, 1})).rows_per_thread, 1) << "little to do";
  EXPECT_EQ(plan_of(quantize_problem(4097, 5137, {-1, 1})).rows_per_thread, 4);
  EXPECT_EQ(plan_of(quantize_problem(17, (1 << 17) + 1, {-1, 1})).rows_per_thread, 2) << "three merged rows";
  EXPECT_EQ(plan_of(quantize_problem(3, (1 << 20) + 1, {-1, 1})).rows_per_thread, 1) << "one";
}

TEST(PlanElementwise, EightScalesAreOneAccessWhereTheyAreAlignedNeighbors) {
  const auto vector_scales = [](const auto& change) {
    StaticQuantize p = quantize_problem(128, 64, {-1, 1});
    change(p);
    return plan_of(p).vector_scales;
  };
  EXPECT_TRUE(vector_scales([](auto&) {}));
  EXPECT_FALSE(vector_scales([](auto& p) { p.scale.data = address(3, 4); }));
  EXPECT_TRUE(vector_scales([](auto& p) { p.scale.data = address(3, 16); }));
  EXPECT_FALSE(vector_scales([](auto& p) { p.scale.strides[1] = 2; }));
  EXPECT_FALSE(vector_scales([](auto& p) { p = quantize_problem(128, 64, {-1, 4}); })) << "4 columns share a scale";
  EXPECT_FALSE(vector_scales([](auto& p) { p = quantize_problem(128, 65, {-1, 1}); })) << "merged rows";
  EXPECT_TRUE(vector_scales([](auto& p) { p = quantize_problem(128, 64, {32, 1}); }));
  EXPECT_FALSE(vector_scales([](auto& p) { p = quantize_problem(128, 64, {32, 1}), p.scale.strides[0] = 66; }));
}

TEST(PlanElementwise, TinyProblemsTakeSmallBlocks) {
  EXPECT_EQ(plan_of(quantize_problem(1, 64 * 132 * 8, {-1, -1})).threads, 128);
  EXPECT_EQ(plan_of(quantize_problem(1, 64 * 132 * 8 + 8, {-1, -1})).threads, 256);
  EXPECT_EQ(plan_of(quantize_problem(1, 64 * 132 * 8, {-1, -1}), 131).threads, 256);
}

TEST(PlanElementwise, ScalarFindsAllDimensionsByTheirIndex) {
  const ElementwisePlan plan = plan_of(with_spaced_input(quantize_problem(16, 64, {1, -1})));
  EXPECT_EQ(plan.outer_dims, 2);
  EXPECT_EQ(plan.work, 16 * 64);
}

}  // namespace
}  // namespace fp8kv::core
