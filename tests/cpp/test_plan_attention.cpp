// Plans of attention: which kernel, how many columns a block takes, how the work is divided, and what workspace that needs.
#include <gtest/gtest.h>

#include <bit>

#include "core/attention_memory.h"
#include "core/grouped_memory.h"
#include "plan_support.h"

namespace fp8kv::core {
namespace {

using namespace testing_support;

// Caches of E4M3 in blocks, one query per sequence.
struct Shape {
  std::int64_t seqs = 4, max_len = 1024, heads = 32, kv_heads = 8, head_size = 128, block_size = 16;
  std::int64_t queries = 1;  // of each sequence; more than 1: with cu_query_lens
  std::int64_t num_splits = 0;
  std::int64_t v_head_size = 0;  // 0: head_size

  std::int64_t v_size() const { return v_head_size > 0 ? v_head_size : head_size; }
};

PagedAttention problem_of(const Shape& s) {
  const std::int64_t rows = s.seqs * s.queries, max_blocks = s.max_len / s.block_size;
  const auto cache = [&](int number, std::int64_t head_size) {
    return contiguous(address(number), DType::E4M3, {s.seqs * max_blocks, s.block_size, s.kv_heads, head_size});
  };
  PagedAttention p{.query = contiguous(address(1), DType::BFloat16, {rows, s.heads, s.head_size}),
                   .key_cache = cache(2, s.head_size),
                   .value_cache = cache(3, s.v_size()),
                   .out = contiguous(address(4), DType::BFloat16, {rows, s.heads, s.v_size()}),
                   .block_table = contiguous(address(5), DType::Int32, {s.seqs, max_blocks}),
                   .seq_lens = contiguous(address(6), DType::Int32, {s.seqs}),
                   .k_scale = contiguous(address(7), DType::Float32, {s.kv_heads}),
                   .v_scale = contiguous(address(8), DType::Float32, {1}),
                   .num_splits = s.num_splits};
  if (s.queries > 1) p.cu_query_lens = contiguous(address(9), DType::Int32, {s.seqs + 1}), p.max_query_len = s.queries;
  return p;
}

AttentionPlan plan_of(const PagedAttention& p, const DeviceLimits& limits = kLimits) {
  return plan_attention(lower(p), limits);
}
AttentionPlan plan_of(const Shape& s, const DeviceLimits& limits = kLimits) { return plan_of(problem_of(s), limits); }

DeviceLimits with_shared_memory(int bytes) {
  DeviceLimits limits = kLimits;
  limits.shared_memory = bytes;
  return limits;
}

// --- Which kernel --------------------------------

TEST(PlanAttention, TilesForUsualHeadAndBlockSizes) {
  for (std::int64_t head_size : {64, 96, 128, 192, 256})
    for (std::int64_t block_size : {16, 32, 48, 256})
      EXPECT_EQ(plan_of({.head_size = head_size, .block_size = block_size}).kernel, AttentionKernel::Tiled)
          << head_size << " " << block_size;
}

TEST(PlanAttention, AnythingElseIsGeneric) {
  const auto is_generic = [](auto change) {
    PagedAttention p = problem_of({});
    change(p);
    return plan_of(p).kernel == AttentionKernel::Generic;
  };
  EXPECT_FALSE(is_generic([](auto&) {}));
  EXPECT_TRUE(plan_of({.head_size = 80}).kernel == AttentionKernel::Generic);
  EXPECT_TRUE(plan_of({.block_size = 8}).kernel == AttentionKernel::Generic);
  EXPECT_TRUE(is_generic([](auto& p) { p.key_cache.dtype = p.value_cache.dtype = DType::BFloat16; }));
  EXPECT_TRUE(is_generic([](auto& p) { p.key_cache.data = address(2, 8); }));
  EXPECT_TRUE(is_generic([](auto& p) { p.value_cache.strides[1] += 8; }));
  EXPECT_TRUE(is_generic([](auto& p) { p.query.data = address(1, 2); }));
  EXPECT_TRUE(is_generic([](auto& p) { p.query.strides[0] += 4; }));
  EXPECT_TRUE(is_generic([](auto& p) { p.query.strides[2] = 2, p.query.strides[1] *= 2, p.query.strides[0] *= 2; }));
}

TEST(PlanAttention, StridesOfDimensionsOfOneDontMatter) {
  PagedAttention p = problem_of({.seqs = 1, .heads = 4, .kv_heads = 1});
  p.key_cache.strides[2] = 3, p.query.strides[0] = 5;
  EXPECT_EQ(plan_of(p).kernel, AttentionKernel::Tiled);
}

TEST(PlanAttention, GenericBlocksAreRowsTimesHeads) {
  const AttentionPlan plan = plan_of({.head_size = 80});
  EXPECT_EQ(plan.blocks, 4 * 32);
  EXPECT_EQ(plan.warps, 4);
  EXPECT_EQ(plan.shared_memory, 5 * 80 * 4);
  EXPECT_EQ(plan.workspace_size, 0);
  EXPECT_EQ(plan_of({.head_size = 4000}).warps, 2);
}

TEST(PlanAttention, TwoKindsAreGrouped) {
  const auto kernel = [](auto change) {
    PagedAttention p = problem_of({.head_size = 192, .v_head_size = 128});
    change(p);
    return plan_of(p).kernel;
  };
  EXPECT_EQ(kernel([](auto&) {}), AttentionKernel::Grouped);
  EXPECT_EQ(kernel([](auto& p) { p.query.data = address(1, 2), p.query.strides[2] = 3; }), AttentionKernel::Grouped);
  EXPECT_EQ(kernel([](auto& p) { p.key_cache.data = address(2, 8); }), AttentionKernel::Generic);
  EXPECT_EQ(kernel([](auto& p) { p.value_cache.strides[1] += 8; }), AttentionKernel::Generic);
  EXPECT_EQ(kernel([](auto& p) { p.key_cache.dtype = p.value_cache.dtype = DType::BFloat16; }), AttentionKernel::Generic);
  EXPECT_EQ(plan_of({.head_size = 24, .v_head_size = 16}).kernel, AttentionKernel::Generic);
  EXPECT_EQ(plan_of({.head_size = 128, .v_head_size = 72}).kernel, AttentionKernel::Generic);
  EXPECT_EQ(plan_of({.head_size = 64, .v_head_size = 528}).kernel, AttentionKernel::Generic) << "registers";
  EXPECT_EQ(plan_of({.head_size = 4096, .v_head_size = 64}).kernel, AttentionKernel::Generic) << "shared memory";
  EXPECT_EQ(plan_of({.block_size = 7, .v_head_size = 64}).kernel, AttentionKernel::Grouped) << "any block size";
}

TEST(PlanAttention, TwoFormatsAreNeverTiled) {
  PagedAttention p = problem_of({});
  ASSERT_EQ(plan_of(p).kernel, AttentionKernel::Tiled);
  p.v_cache_dtype = DType::E4M3;
  EXPECT_EQ(plan_of(p).kernel, AttentionKernel::Tiled) << "the same format, by its name";
  for (DType dtype : {DType::E5M2, DType::Int8}) {
    p.v_cache_dtype = p.value_cache.dtype = dtype;
    EXPECT_EQ(plan_of(p).kernel, AttentionKernel::Grouped);
  }
  p.v_cache_dtype = p.value_cache.dtype = DType::BFloat16;
  EXPECT_EQ(plan_of(p).kernel, AttentionKernel::Generic);
}

TEST(PlanAttention, GenericMemoryOfTwoHeadSizes) {
  const AttentionPlan plan = plan_of({.head_size = 24, .v_head_size = 20});
  EXPECT_EQ(plan.warps, 4);
  EXPECT_EQ(plan.shared_memory, (24 + 4 * 20) * 4);
  EXPECT_EQ(plan_of({.head_size = 8000, .v_head_size = 2000}).warps, 2);
  EXPECT_EQ(plan_of({.head_size = 2000, .v_head_size = 8000}).warps, 1);
  EXPECT_EQ(plan_of({.head_size = 8000, .v_head_size = 8000}).warps, 0) << "refused";
}

// --- The grouped kernel --------------------------------

TEST(PlanAttention, GroupedColumnsAreTheHeadsOfAGroup) {
  const auto plan = [](std::int64_t heads, std::int64_t kv_heads) {
    return plan_of({.seqs = 1000, .heads = heads, .kv_heads = kv_heads, .head_size = 192, .v_head_size = 128});
  };
  EXPECT_EQ(plan(8, 8).columns, 8);
  EXPECT_EQ(plan(64, 8).columns, 8);
  EXPECT_EQ(plan(9, 1).columns, 16);
  EXPECT_EQ(plan(32, 1).columns, 32);
  EXPECT_EQ(plan(33, 1).columns, 64);
  EXPECT_EQ(plan(128, 1).columns, 64);
  EXPECT_EQ(plan(64, 8).blocks, 1000 * 8);
  EXPECT_EQ(plan(128, 1).blocks, 1000 * 2);
  EXPECT_EQ(plan(72, 1).blocks, 1000 * 2);
  EXPECT_EQ(plan(128, 1).workspace_size, 0);
}

TEST(PlanAttention, FewItemsShareTheirPositions) {
  const auto plan = [](std::int64_t seqs, std::int64_t max_len, std::int64_t num_splits) {
    return plan_of({.seqs = seqs,
                    .max_len = max_len,
                    .heads = 128,
                    .kv_heads = 1,
                    .head_size = 576,
                    .num_splits = num_splits,
                    .v_head_size = 512});
  };
  EXPECT_EQ(plan(1, 65536, 0).parts, kMultiprocessors / 2);
  EXPECT_EQ(plan(16, 65536, 0).parts, kMultiprocessors / 32);
  EXPECT_EQ(plan(66, 65536, 0).parts, 1);
  EXPECT_EQ(plan(1, 1024, 0).parts, 8) << "4 tiles each";
  EXPECT_EQ(plan(1, 1024, 1).parts, 1);
  EXPECT_EQ(plan(1, 1024, 5).parts, 5);
  EXPECT_EQ(plan(1, 1024, 1000).parts, 32) << "no more parts than tiles";
  const AttentionPlan five = plan(3, 1024, 5);
  EXPECT_EQ(five.blocks, 3 * 2 * 5);
  EXPECT_EQ(five.slots, 3 * 2 * 5);
  EXPECT_EQ(five.merges, 3 * 2);
  EXPECT_EQ(five.workspace_size, 3 * 2 * 5 * (8 + 64 * (512 + 4) * 4));
}

TEST(PlanAttention, GroupedMemoryFitsEveryDevice) {
  for (int bytes : {100 * 1024, 164 * 1024, 228 * 1024})
    for (auto [head_size, v_head_size] : {std::pair{576, 512}, {192, 128}, {64, 128}, {16, 512}})
      for (std::int64_t heads : {1, 16, 32, 128}) {
        const PagedAttention p =
            problem_of({.heads = heads, .kv_heads = 1, .head_size = head_size, .v_head_size = v_head_size});
        const AttentionPlan plan = plan_of(p, with_shared_memory(bytes));
        if (plan.kernel == AttentionKernel::Generic) {
          EXPECT_GT(GroupedMemory(head_size, v_head_size, 8, false, 1).size, bytes - 1024);
          continue;
        }
        EXPECT_EQ(plan.shared_memory, grouped_memory(lower(p), plan.columns, bytes).size);
        EXPECT_LE(plan.shared_memory, bytes - 1024);
      }
}

TEST(PlanAttention, AsManyStagesAsFitBesideTheOtherBlocks) {
  const auto stages = [](std::int64_t heads, std::int64_t head_size, std::int64_t v_head_size, int bytes) {
    const PagedAttention p = problem_of({.heads = heads, .kv_heads = 1, .head_size = head_size, .v_head_size = v_head_size});
    return grouped_memory(lower(p), plan_of(p).columns, bytes).stages;
  };
  EXPECT_EQ(stages(8, 192, 128, 228 * 1024), 3) << "of three blocks";
  EXPECT_EQ(stages(128, 576, 512, 228 * 1024), 1) << "of one";
  EXPECT_EQ(stages(8, 192, 128, 164 * 1024), 1);
}

TEST(PlanAttention, VInKNeedsNoMemoryOfItsOwn) {
  PagedAttention p = problem_of({.heads = 128, .kv_heads = 1, .head_size = 576, .v_head_size = 512});
  EXPECT_FALSE(values_in_keys(lower(p)));
  p.value_cache = p.key_cache, p.value_cache.sizes[3] = 512;
  EXPECT_TRUE(values_in_keys(lower(p)));
  EXPECT_EQ(plan_of(p).kernel, AttentionKernel::Grouped);
  EXPECT_EQ(GroupedMemory(576, 512, 64, false, 1).size - GroupedMemory(576, 512, 64, true, 1).size,
            32 * (2 * 512 + 16) + 32 * 512);
  p.value_cache.data = address(2, 64);
  EXPECT_FALSE(values_in_keys(lower(p)));
}

TEST(PlanAttention, AllWarpsOfAGroupHaveLogitsToCalculate) {
  for (int columns : {8, 16, 32, 64})
    for (int value_size : GroupedShape::kValueSizes) {
      const int warps = GroupedShape::warps(columns, value_size), parts = GroupedShape::key_parts(columns, value_size);
      EXPECT_EQ(warps / parts * 16, std::max(columns, 16)) << columns << " " << value_size;
      EXPECT_EQ(value_size % (16 * warps), 0);
    }
}

// --- Columns --------------------------------

struct Columns {
  std::int64_t heads, kv_heads, queries, head_size;
  int column_tiles, column_warps;
};

TEST(PlanAttention, AllColumnsOfAKvHeadInOneBlockUpTo64) {
  for (const Columns& c :
       {Columns{8, 8, 1, 128, 1, 1}, Columns{64, 8, 1, 128, 1, 1}, Columns{72, 8, 1, 128, 2, 1}, Columns{32, 2, 1, 256, 2, 1},
        Columns{32, 8, 2, 128, 1, 1}, Columns{32, 8, 4, 128, 2, 1}, Columns{32, 8, 8, 128, 4, 1}, Columns{64, 8, 8, 128, 4, 2},
        Columns{64, 8, 8, 256, 2, 4}, Columns{32, 8, 8, 192, 2, 2}, Columns{32, 8, 100, 64, 4, 2}}) {
    const AttentionPlan plan =
        plan_of({.heads = c.heads, .kv_heads = c.kv_heads, .head_size = c.head_size, .queries = c.queries});
    EXPECT_EQ(plan.column_tiles, c.column_tiles) << c.heads << " " << c.queries << " " << c.head_size;
    EXPECT_EQ(plan.column_warps, c.column_warps) << c.heads << " " << c.queries << " " << c.head_size;
    EXPECT_EQ(plan.columns, 8 * c.column_tiles * c.column_warps);
  }
}

TEST(PlanAttention, SharedMemoryFitsEveryDevice) {
  for (int bytes : {100 * 1024, 164 * 1024, 228 * 1024})
    for (std::int64_t head_size : {64, 96, 128, 192, 256})
      for (std::int64_t queries : {1, 2, 4, 8})
        for (bool per_token : {false, true}) {
          PagedAttention p = problem_of({.head_size = head_size, .queries = queries});
          if (per_token) p.k_scale = contiguous(address(7), DType::Float32, {4 * 64, 16, 8});
          const AttentionPlan plan = plan_of(p, with_shared_memory(bytes));
          const AttentionMemory memory(static_cast<int>(head_size), plan.column_tiles, per_token, plan.warps, plan.columns);
          EXPECT_EQ(plan.shared_memory, memory.size);
          EXPECT_LE(plan.shared_memory, bytes - 1024);
          EXPECT_GE(plan.warps, 4);
          EXPECT_EQ(plan.warps % plan.column_warps, 0);
        }
}

// --- How the work is divided --------------------------------

TEST(PlanAttention, BlocksFillTheDeviceWhereThereIsEnoughToDo) {
  EXPECT_EQ(plan_of({.seqs = 16, .max_len = 8192}).blocks, kMultiprocessors);
  EXPECT_EQ(plan_of({.seqs = 64, .max_len = 8192}).blocks, 4 * kMultiprocessors) << "many items";
  EXPECT_EQ(plan_of({.seqs = 16, .max_len = 8192, .head_size = 64}).blocks, 2 * kMultiprocessors) << "short rows";
  EXPECT_EQ(plan_of({.seqs = 64, .max_len = 8192, .head_size = 256}).blocks, kMultiprocessors);
  EXPECT_EQ(plan_of({.seqs = 64, .max_len = 8192, .queries = 8}).blocks, kMultiprocessors);
  EXPECT_EQ(plan_of(problem_of({.seqs = 64, .max_len = 8192}), with_shared_memory(100 * 1024)).blocks, kMultiprocessors);
  // 8 KV heads of 64 tiles, 8 to a block.
  EXPECT_EQ(plan_of({.seqs = 1, .max_len = 1024}).blocks, 64);
}

TEST(PlanAttention, ManySmallerBlocksWhereThereAreManyItems) {
  EXPECT_EQ(plan_of({.seqs = 16, .max_len = 8192}).warps, 8);
  EXPECT_EQ(plan_of({.seqs = 64, .max_len = 8192}).warps, 4);
  EXPECT_EQ(plan_of({.seqs = 64, .max_len = 8192, .queries = 8}).warps, 8) << "more columns";
  EXPECT_EQ(plan_of({.seqs = 64, .max_len = 8192, .num_splits = 1}).warps, 8) << "depends on no other sequence";
}

TEST(PlanAttention, AnItemCostsAsManyTilesAsWereReadMeanwhile) {
  EXPECT_EQ(plan_of({.seqs = 16, .max_len = 8192}).item_overhead, 32);
  EXPECT_EQ(plan_of({.seqs = 64, .max_len = 8192}).item_overhead, 8) << "by one of four blocks";
  EXPECT_EQ(plan_of({.seqs = 16, .max_len = 8192, .head_size = 256}).item_overhead, 16) << "larger tiles";
}

TEST(PlanAttention, AnotherKernelMergesWhatIsTooMuchForABlock) {
  const auto merges = [](const Shape& s) { return plan_of(s).merges; };
  EXPECT_EQ(merges({.seqs = 16, .max_len = 8192}), 0);
  EXPECT_EQ(merges({.seqs = 1, .max_len = 8192}), 0);
  EXPECT_EQ(merges({.seqs = 64, .max_len = 8192, .heads = 64}), 0);
  EXPECT_EQ(merges({.seqs = 16, .max_len = 8192, .queries = 4}), kMultiprocessors) << "16 columns of 128";
  EXPECT_EQ(merges({.seqs = 16, .max_len = 8192, .heads = 32, .kv_heads = 2, .head_size = 256}), kMultiprocessors);
  EXPECT_EQ(merges({.seqs = 1, .max_len = 131072, .heads = 8, .kv_heads = 1}), 1) << "132 parts";
  EXPECT_EQ(merges({.seqs = 1, .max_len = 131072, .heads = 8, .kv_heads = 1, .num_splits = 100}), 1);
  EXPECT_EQ(merges({.seqs = 1, .max_len = 131072, .heads = 8, .kv_heads = 1, .num_splits = 4}), 0);
}

TEST(PlanAttention, AFewPartsForEachWarpThatMerges) {
  const auto sharers = [](const Shape& s) { return plan_of(s).merge_sharers; };
  const Shape one{.seqs = 1, .max_len = 131072, .heads = 4, .kv_heads = 1, .head_size = 256};
  EXPECT_EQ(plan_of(one).parts, kMultiprocessors);
  EXPECT_EQ(sharers(one), 16);
  EXPECT_EQ(sharers({.seqs = 1, .max_len = 131072, .heads = 16, .kv_heads = 4}), 1) << "merged by their last block";
  EXPECT_EQ(sharers({.seqs = 1, .max_len = 131072, .heads = 32, .kv_heads = 4}), 16) << "33 parts";
  EXPECT_EQ(sharers({.seqs = 16, .max_len = 8192, .heads = 32, .kv_heads = 2, .head_size = 256}), 2) << "5 parts";
}

TEST(PlanAttention, AWindowBoundsTheTiles) {
  PagedAttention p = problem_of({.seqs = 1, .max_len = 131072});
  p.sliding_window = 128;
  EXPECT_EQ(plan_of(p).blocks, 8 * 2) << "10 tiles of each KV head";
}

TEST(PlanAttention, OnePartNeedsNoWorkspaceAndDependsOnNoBound) {
  const AttentionPlan one = plan_of(Shape{.num_splits = 1});
  EXPECT_EQ(one.workspace_size, 0);
  EXPECT_EQ(one.slots, 0);
  EXPECT_EQ(one.blocks, 4 * 8);
  const AttentionPlan other = plan_of({.seqs = 100, .max_len = 65536, .queries = 7, .num_splits = 1});
  EXPECT_EQ(other.warps, one.warps);
  EXPECT_EQ(other.columns, one.columns);
  EXPECT_EQ(other.column_warps, one.column_warps);
}

TEST(PlanAttention, PartsAreItemsTimesSplits) {
  const AttentionPlan plan = plan_of(Shape{.num_splits = 3});
  EXPECT_EQ(plan.parts, 3);
  EXPECT_EQ(plan.blocks, 4 * 8 * 3);
  EXPECT_EQ(plan.slots, 4 * 8 * 3);
  EXPECT_EQ(plan.workspace_size, plan.slots * (8 + plan.columns * (128 + 4) * 4)) << "a counter and a slot for each";
  EXPECT_EQ(plan_of({.max_len = 64, .num_splits = 1000}).parts, 4) << "no more parts than tiles";
}

TEST(PlanAttention, TwoSlotsPerBlock) {
  const AttentionPlan plan = plan_of({.seqs = 8, .max_len = 8192});
  EXPECT_EQ(plan.slots, 2 * plan.blocks);
  EXPECT_EQ(plan.workspace_size, plan.slots * (8 + 8 * (128 + 4) * 4));
}

AttentionClusters clusters_of(int blocks_at_once) {
  AttentionClusters clusters;
  for (auto& of_tiles : clusters.active)
    for (int log2 = 1; log2 <= AttentionClusters::kMaxLog2Blocks; ++log2) of_tiles[log2] = blocks_at_once >> log2;
  return clusters;
}

TEST(PlanAttention, OneShortSequenceIsMergedInClusters) {
  const auto plan_with = [](const Shape& s, int blocks_at_once) {
    return plan_attention(lower(problem_of(s)), kLimits, clusters_of(blocks_at_once));
  };
  const AttentionPlan plan = plan_with({.seqs = 1, .max_len = 1024}, 132);
  EXPECT_EQ(plan.cluster, 8);
  EXPECT_EQ(plan.parts, 8);
  EXPECT_EQ(plan.blocks, 8 * 8);
  EXPECT_EQ(plan.workspace_size, 0);
  EXPECT_EQ(plan.slots, 0);
  EXPECT_EQ(plan_with({.seqs = 1, .max_len = 1024}, 32).cluster, 4) << "no room for more at once";
  EXPECT_EQ(plan_with({.seqs = 1, .max_len = 1024}, 0).cluster, 1);
  EXPECT_EQ(plan_with({.seqs = 1, .max_len = 512}, 132).cluster, 4) << "a tile for each warp";
  EXPECT_EQ(plan_with({.seqs = 1, .max_len = 2048}, 132).cluster, 8) << "two tiles";
  EXPECT_EQ(plan_with({.seqs = 1, .max_len = 4096}, 132).cluster, 1) << "too long";
  EXPECT_EQ(plan_with({.seqs = 1, .max_len = 1024, .heads = 32, .kv_heads = 32}, 132).cluster, 4);
  EXPECT_EQ(plan_with({.seqs = 1, .max_len = 1024, .queries = 4}, 132).cluster, 8) << "two column tiles";
  EXPECT_EQ(plan_with({.seqs = 1, .max_len = 1024, .queries = 8}, 132).cluster, 1);
  EXPECT_EQ(plan_with({.seqs = 2, .max_len = 1024}, 132).cluster, 1);
  EXPECT_EQ(plan_with({.seqs = 1, .max_len = 1024, .num_splits = 4}, 132).cluster, 1);
}

TEST(PlanAttention, ClustersHaveMemoryForWhatTheyReceive) {
  for (auto [head_size, inbox] : {std::pair{64, 16 + 8 * 66 * 4}, {96, 16 + 8 * 3 * 34 * 4}, {128, 16 + 8 * 2 * 66 * 4}}) {
    const auto plan = [&](int blocks_at_once) {
      return plan_attention(lower(problem_of({.seqs = 1, .max_len = 1024, .head_size = head_size})), kLimits,
                            clusters_of(blocks_at_once));
    };
    EXPECT_EQ(plan(0).cluster, 1);
    EXPECT_EQ(plan(132).cluster, 8);
    EXPECT_EQ(plan(132).shared_memory, plan(0).shared_memory + inbox) << head_size;
  }
}

TEST(PlanAttention, OneSequenceHasTheSameNumberOfBlocksForEachKvHead) {
  const auto plan = plan_of(Shape{.seqs = 1, .max_len = 32768});
  EXPECT_EQ(plan.parts, kMultiprocessors / 8);
  EXPECT_EQ(plan.blocks, kMultiprocessors / 8 * 8);
  EXPECT_EQ(plan.slots, plan.blocks);
  EXPECT_EQ(plan.least_units, plan.warps) << "tiles that are worth a block";
  EXPECT_EQ(plan_of({.seqs = 1, .max_len = 512}).parts, 4);
  EXPECT_EQ(plan_of({.seqs = 1, .max_len = 8192, .queries = 1000}).parts, 0) << "more items than blocks";
  EXPECT_EQ(plan_of({.seqs = 2, .max_len = 32768}).parts, 0);
}

// fp8kv.attention_workspace_size, which allocates before there is a plan.
std::int64_t upper_bound(const Shape& s, int multiprocessors) {
  if (s.num_splits == 1) return 0;
  const std::int64_t head_size = std::max(s.head_size, s.v_size());
  const std::int64_t bytes_per_column = 4 * (head_size + 4) + 1, group = s.heads / s.kv_heads, rows = s.seqs * s.queries;
  if (s.num_splits == 0) return 2 * multiprocessors * 64 * bytes_per_column;
  std::int64_t columns = 8;
  while (columns < std::min<std::int64_t>(64, group * s.queries)) columns *= 2;
  const std::int64_t by_length = s.seqs * ceil_div(group * s.queries, columns), by_rows = s.seqs + rows * group / columns;
  std::int64_t all_columns = std::min(by_length, by_rows) * columns;
  if (s.v_head_size > 0) {
    const auto of_row =
        static_cast<std::int64_t>(std::bit_ceil(static_cast<std::uint64_t>(std::clamp<std::int64_t>(group, 8, 64))));
    all_columns = std::max(all_columns, rows * ceil_div(group, of_row) * of_row);
  }
  return all_columns * s.kv_heads * s.num_splits * bytes_per_column + 8;
}

TEST(PlanAttention, NeedsNoMoreThanTheUpperBound) {
  for (int bytes : {100 * 1024, 228 * 1024})
    for (std::int64_t seqs : {1, 7, 300})
      for (auto [heads, kv_heads] : {std::pair{32, 8}, {8, 8}, {36, 4}, {64, 1}, {10, 5}})
        for (std::int64_t head_size : {64, 96, 128, 192, 256})
          for (std::int64_t queries : {1, 2, 3, 8, 100})
            for (std::int64_t num_splits : {0, 1, 2, 5}) {
              const Shape s{seqs, 4096, heads, kv_heads, head_size, 16, queries, num_splits};
              const AttentionPlan plan = plan_of(s, with_shared_memory(bytes));
              ASSERT_EQ(plan.kernel, AttentionKernel::Tiled);
              EXPECT_LE(plan.workspace_size, upper_bound(s, kMultiprocessors))
                  << seqs << " " << heads << " " << kv_heads << " " << head_size << " " << queries << " " << num_splits;
            }
}

TEST(PlanAttention, GroupedNeedsNoMoreThanTheUpperBound) {
  for (int bytes : {164 * 1024, 228 * 1024})
    for (std::int64_t seqs : {1, 7, 300})
      for (auto [heads, kv_heads] : {std::pair{32, 8}, {8, 8}, {36, 4}, {128, 1}, {40, 1}, {10, 5}})
        for (auto [head_size, v_head_size] : {std::pair{576, 512}, {192, 128}, {64, 96}, {16, 256}})
          for (std::int64_t queries : {1, 2, 100})
            for (std::int64_t num_splits : {0, 1, 2, 5}) {
              const Shape s{seqs, 4096, heads, kv_heads, head_size, 16, queries, num_splits, v_head_size};
              const AttentionPlan plan = plan_of(problem_of(s), with_shared_memory(bytes));
              ASSERT_EQ(plan.kernel, AttentionKernel::Grouped);
              EXPECT_LE(plan.workspace_size, upper_bound(s, kMultiprocessors))
                  << seqs << " " << heads << " " << kv_heads << " " << head_size << " " << queries << " " << num_splits;
            }
}

TEST(PlanAttention, OneBlockMergesNothing) {
  const AttentionPlan plan = plan_of({.seqs = 1, .max_len = 16, .heads = 4, .kv_heads = 1});
  EXPECT_EQ(plan.blocks, 1);
  EXPECT_EQ(plan.workspace_size, 0);
}

TEST(PlanAttention, MoreUnitsThan31BitsAreNotShared) {
  PagedAttention p = problem_of({.seqs = 1 << 16, .max_len = 16});
  EXPECT_EQ(plan_of(p).parts, 0);
  p.block_table.sizes[1] = 1 << 20;
  const AttentionPlan plan = plan_of(p);
  EXPECT_EQ(plan.parts, 1);
  EXPECT_EQ(plan.blocks, 8 << 16);
}

}  // namespace
}  // namespace fp8kv::core
