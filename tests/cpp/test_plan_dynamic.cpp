// Plans of dynamic quantization: how the largest magnitude of each group is found.
#include <gtest/gtest.h>

#include <bit>

#include "plan_support.h"

namespace fp8kv::core {
namespace {

using namespace testing_support;

constexpr int kMaxCluster = 16;

DynamicPlan plan_of(const StaticQuantize& p, int max_cluster = kMaxCluster, const DeviceLimits& limits = kLimits) {
  return plan_dynamic({lower(p)}, p.input, p.result, limits, max_cluster);
}

// --- Rows that are groups --------------------------------

TEST(PlanDynamic, ARowStaysInRegisters) {
  const DynamicPlan plan = plan_of(quantize_problem(100, 4096, {1, -1}));
  EXPECT_EQ(plan.path, DynamicPath::PerGroup);
  EXPECT_EQ(plan.blocks, 100);
  EXPECT_EQ(plan.lanes_per_group, 0);
  EXPECT_GE(plan.threads * plan.vecs_per_thread * kVecSize, 4096);
}

TEST(PlanDynamic, ShortGroupsShareAWarp) {
  const DynamicPlan plan = plan_of(quantize_problem(100, 4096, {1, 128}));
  EXPECT_EQ(plan.path, DynamicPath::PerGroup);
  EXPECT_TRUE(plan.units);
  EXPECT_EQ(plan.lanes_per_group, 8);
  EXPECT_EQ(plan.blocks, 100 * 32 / (plan.threads / 8));
}

TEST(PlanDynamic, LanesOfShortGroupsTakeUnitsVectorsOrElements) {
  struct Row {
    std::int64_t cols, group;
    int lanes;
    bool units;
  };
  for (const auto& [cols, group, lanes, units] : {Row{480, 48, 4, true},         // 3 units
                                                  {2048, 512, 32, true},         // 32
                                                  {240, 24, 4, false},           // 3 vectors
                                                  {2112, 1056, 0, false},        // 66 units
                                                  {4 * 17, 17, 4, false},        // 17 elements
                                                  {3 * 131, 131, 32, false},     // 131
                                                  {4 * 255, 255, 32, false}}) {  // 255
    StaticQuantize p = quantize_problem(16, cols, {1, group});
    if (group % 2 == 1) p.input.strides[0] = cols + 1;  // otherwise units of the whole tensor
    const DynamicPlan plan = plan_of(p);
    EXPECT_EQ(plan.path, DynamicPath::PerGroup) << group;
    EXPECT_EQ(plan.lanes_per_group, lanes) << group;
    EXPECT_EQ(plan.units, units) << group;
  }
  EXPECT_FALSE(plan_of(quantize_problem(16, 256, {1, 128}, 8)).units) << "8 bytes of the result";
  EXPECT_TRUE(plan_of(quantize_problem(16, 256, {1, 128}, 16)).units);
  StaticQuantize padded = quantize_problem(16, 128, {1, -1});
  padded.input.strides[0] = 256;
  EXPECT_FALSE(plan_of(padded).units);
  EXPECT_EQ(plan_of(padded).lanes_per_group, 16);
}

TEST(PlanDynamic, AVeryLongRowIsReadTwice) {
  const DynamicPlan plan = plan_of(quantize_problem(2, 1 << 20, {1, -1}));
  EXPECT_EQ(plan.path, DynamicPath::PerGroup);
  EXPECT_EQ(plan.vecs_per_thread, 0);
  EXPECT_EQ(plan.threads, 1024);
}

TEST(PlanDynamic, ContiguousWhereDataAndScalesAre) {
  EXPECT_TRUE(plan_of(quantize_problem(100, 4096, {1, -1})).contiguous);
  EXPECT_TRUE(plan_of(quantize_problem(100, 4096, {1, 128})).contiguous);
  EXPECT_TRUE(plan_of(quantize_problem(100, 4097, {1, -1})).contiguous) << "rows of any length";
  EXPECT_FALSE(plan_of(quantize_problem(100, 4097, {1, -1}, 1)).contiguous) << "from an aligned address on";
  StaticQuantize p = quantize_problem(100, 64, {1, -1});
  p.input.strides[0] = 128;
  EXPECT_FALSE(plan_of(p).contiguous);
}

TEST(PlanDynamic, OneVectorPerThreadWhereAllRowsAreInFlightAtOnce) {
  EXPECT_EQ(plan_of(quantize_problem(128, 4096, {1, -1})).vecs_per_thread, 1);
  EXPECT_EQ(plan_of(quantize_problem(128, 4096, {1, -1})).threads, 512);
  EXPECT_EQ(plan_of(quantize_problem(1024, 4096, {1, -1})).vecs_per_thread, 2);
  EXPECT_EQ(plan_of(quantize_problem(1024, 4096, {1, -1})).threads, 256);
}

TEST(PlanDynamic, TilesAreOfThreeUnitsPerThreadWhereManyBlocksRemain) {
  const auto plan = [](std::int64_t units) { return plan_of(quantize_problem(1, units * 16, {1, 100})); };
  EXPECT_EQ(plan(4096 * 132 - 1).tile_units, 1);
  EXPECT_EQ(plan(4096 * 132 - 1).blocks, 32 * 132);
  EXPECT_EQ(plan(4096 * 132).tile_units, 3);
  EXPECT_EQ(plan(4096 * 132).blocks, 1408);
}

TEST(PlanDynamic, ContiguousRowsOfOddLengthTakeOneOrFourVectorsPerThread) {
  const DynamicPlan one = plan_of(quantize_problem(128, 4097, {1, -1})), four = plan_of(quantize_problem(1024, 4097, {1, -1}));
  EXPECT_FALSE(one.aligned);
  EXPECT_EQ(one.vecs_per_thread, 1);
  EXPECT_EQ(one.threads, 544);  // 514 vectors, in whole warps
  EXPECT_EQ(four.vecs_per_thread, 4);
  EXPECT_EQ(four.threads, 160);
  StaticQuantize padded = quantize_problem(1024, 4097, {1, -1});
  padded.input.strides[0] = 4099;
  EXPECT_EQ(plan_of(padded).vecs_per_thread, 8);
}

// --- Groups that end inside vectors --------------------------------

TEST(PlanDynamic, ShortGroupsThatEndInsideVectorsAreTakenInTiles) {
  const DynamicPlan plan = plan_of(quantize_problem(4097, 5137, {1, 128}));
  EXPECT_EQ(plan.path, DynamicPath::AcrossGroups);
  EXPECT_EQ(plan.threads, 128);
  EXPECT_EQ(plan.tile_units, 3);
  EXPECT_EQ(plan.blocks, 3426);  // of 3 * 2048 elements
  EXPECT_EQ(plan.grid.row, 5137);
  EXPECT_EQ(plan.grid.group, 128);
  EXPECT_EQ(plan.grid.row_scale, 41);
  EXPECT_EQ(plan.grid.group_scale, 1);
  const auto path = [](const StaticQuantize& p) { return plan_of(p).path; };
  EXPECT_EQ(path(quantize_problem(100, 77, {1, -1})), DynamicPath::AcrossGroups) << "rows";
  EXPECT_EQ(path(quantize_problem(1, 7 * 77, {1, 77})), DynamicPath::AcrossGroups) << "of one row";
  EXPECT_EQ(path(quantize_problem(100, 255, {1, -1})), DynamicPath::AcrossGroups);
  EXPECT_EQ(path(quantize_problem(100, 257, {1, -1})), DynamicPath::PerGroup) << "too long";
  EXPECT_EQ(path(quantize_problem(100, 5136, {1, 128})), DynamicPath::TwoPasses) << "as one part: vectors fit";
  EXPECT_EQ(path(quantize_problem(100, 5137, {2, 128})), DynamicPath::TwoPasses) << "groups of several rows";
  EXPECT_EQ(path(quantize_problem(100, 77, {1, -1}, 8)), DynamicPath::PerGroup) << "units are not aligned";
}

// --- One group --------------------------------

// Vectors of a group of one row that threads hold in registers and, in a cooperative kernel, in shared memory.
std::int64_t vecs_held(const DynamicPlan& plan, DType real) {
  const std::int64_t threads = plan.blocks * plan.threads;
  if (plan.path == DynamicPath::Redundant) return std::int64_t{plan.threads} * plan.vecs_per_thread;
  if (plan.path == DynamicPath::Cluster) return threads * plan.vecs_per_thread;
  return threads * (vecs_in_registers(real) + plan.shared_vecs);
}

TEST(PlanDynamic, PerTensorGrowsFromABlockToTheWholeDevice) {
  EXPECT_EQ(plan_of(quantize_problem(1, 4096, {-1, -1})).path, DynamicPath::PerGroup);
  EXPECT_EQ(plan_of(quantize_problem(16, 4096, {-1, -1})).path, DynamicPath::Redundant);
  EXPECT_EQ(plan_of(quantize_problem(17, 4096, {-1, -1})).path, DynamicPath::Cluster);
  EXPECT_EQ(plan_of(quantize_problem(4096, 4096, {-1, -1})).path, DynamicPath::Cooperative);
}

TEST(PlanDynamic, RedundantBlocksReadAllAndShareTheResult) {
  const DynamicPlan plan = plan_of(quantize_problem(5, 2000, {-1, -1}));  // 1250 vectors
  EXPECT_EQ(plan.path, DynamicPath::Redundant);
  EXPECT_EQ(plan.threads, 1024);
  EXPECT_EQ(plan.vecs_per_thread, 2);
  EXPECT_EQ(plan.blocks, 3);  // of 512 vecs
}

TEST(PlanDynamic, ClustersOfAnySizeHoldTheGroupOrAreNotUsed) {
  for (int max_cluster : {1, 2, 3, 5, 7, 8, 12, 15, 16})
    for (std::int64_t vecs : {8193, 8704, 12289, 20000, 40961, 65536, 98304, 98305, 120000, 131072, 131073}) {
      SCOPED_TRACE(std::to_string(vecs) + " vectors in clusters of " + std::to_string(max_cluster));
      const DynamicPlan plan = plan_of(quantize_problem(1, vecs * kVecSize, {-1, -1}), max_cluster);
      if (vecs > std::int64_t{max_cluster} * 1024 * 8) {
        EXPECT_EQ(plan.path, DynamicPath::Cooperative);
        continue;
      }
      ASSERT_EQ(plan.path, DynamicPath::Cluster);
      EXPECT_EQ(plan.blocks, max_cluster);
      EXPECT_EQ(plan.threads % 32, 0);
      EXPECT_LE(plan.threads, 1024);
      EXPECT_TRUE(std::has_single_bit(static_cast<unsigned>(plan.vecs_per_thread))) << plan.vecs_per_thread;
      EXPECT_LE(plan.vecs_per_thread, 8);
      EXPECT_GE(vecs_held(plan, DType::BFloat16), vecs);
    }
}

TEST(PlanDynamic, AClusterOfTwelve) {
  const DynamicPlan plan = plan_of(quantize_problem(17, 4096, {-1, -1}), 12);  // 8704 vectors
  EXPECT_EQ(plan.path, DynamicPath::Cluster);
  EXPECT_EQ(plan.blocks, 12);
  EXPECT_EQ(plan.vecs_per_thread, 1);
  EXPECT_EQ(plan.threads, 736);  // 725.3 vectors per block, in whole warps
}

TEST(PlanDynamic, WithoutClustersTheWholeDeviceCooperates) {
  const DynamicPlan plan = plan_of(quantize_problem(17, 4096, {-1, -1}), 0);
  EXPECT_EQ(plan.path, DynamicPath::Cooperative);
  EXPECT_EQ(plan.threads, 512);
  EXPECT_EQ(plan.blocks, 17);  // 8704 vectors: one per thread
  EXPECT_EQ(plan.shared_vecs, 0);
  EXPECT_EQ(plan_of(quantize_problem(1, 8192, {-1, -1}), 0).path, DynamicPath::PerGroup);
  EXPECT_EQ(plan_of(quantize_problem(16, 4096, {-1, -1}), 0).path, DynamicPath::Redundant);
}

TEST(PlanDynamic, CooperativeKernelsKeepWhatTheChipHolds) {
  struct Row {
    std::int64_t rows;
    std::int64_t blocks;
    int shared_vecs;
  };
  // 512 vectors per row: one per thread of a block. 264 blocks are on the device at once, with 8 vectors per thread in
  // registers and at most 14 in shared memory.
  for (const auto& [rows, blocks, shared_vecs] : {Row{257, 257, 0},
                                                  {264, 264, 0},
                                                  {8 * 264, 264, 0},
                                                  {8 * 264 + 1, 264, 1},
                                                  {4096, 264, 8},
                                                  {22 * 264, 264, 14},
                                                  {22 * 264 + 1, 264, 14},
                                                  {1 << 18, 264, 14}}) {
    const DynamicPlan plan = plan_of(quantize_problem(rows, 4096, {-1, -1}));
    EXPECT_EQ(plan.path, DynamicPath::Cooperative) << rows;
    EXPECT_EQ(plan.threads, 512) << rows;
    EXPECT_EQ(plan.blocks, blocks) << rows;
    EXPECT_EQ(plan.shared_vecs, shared_vecs) << rows;
    if (rows > 22 * 264) continue;
    EXPECT_GE(vecs_held(plan, DType::BFloat16), rows * 512) << rows;
  }
}

TEST(PlanDynamic, CooperativeKernelsFitTheDevice) {
  const StaticQuantize p = quantize_problem(4096, 4096, {-1, -1});
  const DynamicPlan small = plan_of(p, 0, {.multiprocessors = 1, .shared_memory = 228 * 1024});
  EXPECT_EQ(small.blocks, 2);
  EXPECT_EQ(small.shared_vecs, 14);
  EXPECT_EQ(plan_of(p, 0, {.multiprocessors = 132, .shared_memory = 100 * 1024}).shared_vecs, 6);
  EXPECT_EQ(plan_of(p, 0, {.multiprocessors = 132}).shared_vecs, 0);
}

TEST(PlanDynamic, SharedMemoryOfABlockWithoutWhatIsReserved) {
  const auto most = [](DType real, int bytes) { return max_shared_vecs(real, {.multiprocessors = 1, .shared_memory = bytes}); };
  EXPECT_EQ(most(DType::BFloat16, 228 * 1024), 14);  // 112 KiB in steps of 512 * 16 bytes
  EXPECT_EQ(most(DType::Float16, 228 * 1024), 14);
  EXPECT_EQ(most(DType::Float32, 228 * 1024), 7);
  EXPECT_EQ(most(DType::BFloat16, 2 * (2048 + 8192)), 1);
  EXPECT_EQ(most(DType::BFloat16, 2 * (2048 + 8192) - 2), 0);
  EXPECT_EQ(most(DType::BFloat16, 4096), 0);
  EXPECT_EQ(most(DType::BFloat16, 0), 0);
}

TEST(PlanDynamic, RegistersHold128BytesPerThread) {
  EXPECT_EQ(vecs_in_registers(DType::Float32), 4);
  EXPECT_EQ(vecs_in_registers(DType::Float16), 8);
  EXPECT_EQ(vecs_in_registers(DType::BFloat16), 8);
}

// --- One pass or two --------------------------------

TEST(PlanDynamic, OnePassWhereRowsAreGroups) {
  const auto fits = [](const StaticQuantize& p) { return fits_one_pass(lower(p)); };
  EXPECT_TRUE(fits(quantize_problem(256, 512, {-1, -1})));
  EXPECT_TRUE(fits(quantize_problem(256, 512, {1, -1})));
  EXPECT_TRUE(fits(quantize_problem(256, 512, {1, 128})));
  EXPECT_TRUE(fits(quantize_problem(256, 500, {1, 128}))) << "three whole blocks and a smaller one per row";
  EXPECT_FALSE(fits(quantize_problem(256, 500, {1, 4}))) << "blocks below a vector";
  StaticQuantize padded = quantize_problem(256, 512, {1, -1});
  padded.input.strides[0] = 513;
  EXPECT_TRUE(fits(padded));
  StaticQuantize spaced = quantize_problem(256, 512, {1, -1});
  spaced.input.strides[0] = 1024, spaced.input.strides[1] = 2;
  EXPECT_FALSE(fits(spaced));
}

TEST(PlanDynamic, OtherGroupsTakeTwoPasses) {
  for (GroupShape shape : {GroupShape{-1, 1}, GroupShape{-1, 128}, GroupShape{128, 128}, GroupShape{2, -1}}) {
    const StaticQuantize p = quantize_problem(256, 512, shape);
    EXPECT_EQ(plan_of(p).path, DynamicPath::TwoPasses) << shape.rows << ", " << shape.cols;
    EXPECT_FALSE(fits_one_pass(lower(p))) << shape.rows << ", " << shape.cols;
  }
}

TEST(PlanDynamic, ARowThatCannotBeCountedIn32BitsTakesTwoPasses) {
  const StaticQuantize fits = quantize_problem(1, kMaxChunk, {-1, -1}), large = quantize_problem(1, kMaxChunk + 8, {-1, -1});
  EXPECT_TRUE(fits_one_pass(lower(fits)));
  EXPECT_EQ(plan_of(fits).path, DynamicPath::Cooperative);
  EXPECT_FALSE(fits_one_pass(lower(large)));
  EXPECT_EQ(plan_of(large).path, DynamicPath::TwoPasses);
}

TEST(PlanDynamic, APathOtherThanTwoPassesIsPlannedForAllPartsThatFitOnePass) {
  for (std::int64_t rows : {1, 3, 300})
    for (std::int64_t cols : {7, 20, 129, 1000, 40000})
      for (GroupShape shape : {GroupShape{-1, -1}, {1, -1}, {1, 16}, {1, 128}, {2, 64}, {-1, 1}, {-1, 128}}) {
        const StaticQuantize p = quantize_problem(rows, cols, shape);
        bool one_pass = true;
        for_each_uniform_part(lower(p), [&](const Chunk& part) {
          one_pass &= plan_dynamic(part, p.input, p.result, kLimits, kMaxCluster).path != DynamicPath::TwoPasses;
        });
        EXPECT_EQ(fits_one_pass(lower(p)), one_pass) << rows << "x" << cols << " by " << shape.rows << ", " << shape.cols;
      }
}

}  // namespace
}  // namespace fp8kv::core
