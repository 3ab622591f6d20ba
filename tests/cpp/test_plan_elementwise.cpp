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
    {"tensor", quantize_problem(64, 4096, {-1, -1}), Kernel::VectorizedContiguous0, KernelPath::Vectorized},
    {"token", quantize_problem(64, 4096, {1, -1}), Kernel::VectorizedContiguous1, KernelPath::Vectorized},
    {"row_blocks", quantize_problem(64, 4096, {1, 128}), Kernel::VectorizedContiguous1, KernelPath::Vectorized},
    {"head", quantize_problem(64, 4096, {-1, 128}), Kernel::VectorizedContiguous2, KernelPath::Vectorized},
    {"blocks", quantize_problem(256, 384, {128, 128}), Kernel::VectorizedContiguous2, KernelPath::Vectorized},
    {"blocks_4d", blocks_4d({2, 3, 4, 16}, {2, 1, 4, 1}), Kernel::VectorizedContiguous, KernelPath::Vectorized},
    {"padded_rows", with_input_pitch(quantize_problem(16, 64, {-1, -1}), 72), Kernel::VectorizedStrided,
     KernelPath::Vectorized},
    {"odd_rows", quantize_problem(10, 131, {1, -1}), Kernel::VectorizedUnaligned, KernelPath::Vectorized},
    {"odd_pitch", with_input_pitch(quantize_problem(16, 64, {-1, -1}), 67), Kernel::VectorizedUnaligned,
     KernelPath::Vectorized},
    {"misaligned", quantize_problem(8, 64, {-1, -1}, 1), Kernel::VectorizedUnaligned, KernelPath::Vectorized},
    {"channel", quantize_problem(128, 4096, {-1, 1}), Kernel::PerColumnContiguous, KernelPath::PerColumn},
    {"short_blocks", quantize_problem(128, 4096, {-1, 4}), Kernel::PerColumnContiguous, KernelPath::PerColumn},
    {"channel_of_one_row", quantize_problem(1, 4096, {-1, 1}), Kernel::PerColumnContiguous, KernelPath::PerColumn},
    {"channel_padded", with_input_pitch(quantize_problem(128, 64, {-1, 1}), 72), Kernel::PerColumn1, KernelPath::PerColumn},
    {"channel_merged", quantize_problem(100, 129, {-1, 1}), Kernel::PerColumn1, KernelPath::PerColumn},
    {"channel_in_blocks_of_rows", quantize_problem(128, 64, {32, 1}), Kernel::PerColumn1, KernelPath::PerColumn},
    {"channel_many_rows", quantize_problem(8192, 4096, {-1, 1}), Kernel::PerColumn2, KernelPath::PerColumn},
    {"channel_merged_many_rows", quantize_problem(1031, 1025, {-1, 1}), Kernel::PerColumn4, KernelPath::PerColumn},
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
    EXPECT_GE(plan.blocks * plan.threads, plan.work);
    EXPECT_LT((plan.blocks - 1) * plan.threads, plan.work);
    const std::int64_t per_thread = plan.path == KernelPath::Scalar ? 1 : kVecSize * plan.rows_per_thread;
    EXPECT_GE(plan.work * per_thread, p.input.numel());
  }
}

TEST(PlanElementwise, EveryKernelIsReached) {
  for (int kernel = 0; kernel <= static_cast<int>(Kernel::PerColumnUnaligned); ++kernel) {
    const auto reached = [&](const KernelOf& c) { return static_cast<int>(plan_of(c.problem).kernel) == kernel; };
    EXPECT_TRUE(std::any_of(std::begin(kKernels), std::end(kKernels), reached)) << "kernel " << kernel;
  }
}

// --- What threads do --------------------------------

TEST(PlanElementwise, PerTensorIsOneRowOfVectors) {
  const ElementwisePlan plan = plan_of(quantize_problem(64, 4096, {-1, -1}));
  EXPECT_TRUE(plan.aligned);
  EXPECT_EQ(plan.outer_dims, 0);
  EXPECT_EQ(plan.row_size, 64 * 4096);
  EXPECT_EQ(plan.work, 64 * 4096 / kVecSize);
}

TEST(PlanElementwise, RowsOfOddLengthAreDividedAtAlignedAddresses) {
  const ElementwisePlan plan = plan_of(quantize_problem(10, 131, {1, -1}));
  EXPECT_FALSE(plan.aligned);
  // 131 elements that begin up to 7 elements into a vector touch at most 18 vectors.
  EXPECT_EQ(plan.vecs_per_row, 18);
  EXPECT_EQ(plan.work, 180);
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

TEST(PlanElementwise, PerChannelTakesMoreRowsPerThreadInLargeProblems) {
  EXPECT_EQ(plan_of(quantize_problem(512, 4096, {-1, 1})).rows_per_thread, 1);
  const ElementwisePlan plan = plan_of(quantize_problem(520, 4096, {-1, 1}));
  EXPECT_EQ(plan.rows_per_thread, 2);
  EXPECT_EQ(plan.threads, 64);
  EXPECT_EQ(plan.work, 260 * 512);
  EXPECT_EQ(plan_of(quantize_problem(1, 1 << 23, {-1, 1})).rows_per_thread, 1) << "there is one row";
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
  EXPECT_EQ(plan.last_row_size, 4 * 129);
  EXPECT_EQ(plan_of(quantize_problem(100, 130, {-1, 1})).rows_merged, 4);
  EXPECT_EQ(plan_of(quantize_problem(100, 132, {-1, 1})).rows_merged, 2);
  EXPECT_EQ(plan_of(quantize_problem(100, 136, {-1, 1})).rows_merged, 1);
}

TEST(PlanElementwise, RowsThatDoNotTouchAreNotMerged) {
  EXPECT_EQ(plan_of(with_input_pitch(quantize_problem(100, 129, {-1, 1}), 131)).rows_merged, 1);
  EXPECT_EQ(plan_of(quantize_problem(100, 129, {-1, 1}, 1)).rows_merged, 1) << "merged rows would not be aligned";
  EXPECT_EQ(plan_of(quantize_problem(100, 129, {32, 1})).rows_merged, 1) << "rows of several scales";
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
