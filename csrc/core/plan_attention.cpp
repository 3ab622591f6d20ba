#include <bit>

#include "core/attention_memory.h"
#include "core/formats.h"
#include "core/grouped_memory.h"
#include "core/plan.h"

namespace fp8kv::core {
namespace {

constexpr int kMaxWarps = 8;
constexpr int kMaxColumns = 64;  // that share a reading of K and V
constexpr std::int64_t kMaxSlots = 1 << 30;
// The cost of beginning and ending an item, in bytes of K and V that a multiprocessor could have read in that time.
constexpr std::int64_t kItemOverhead = 128 * 1024;
constexpr std::int64_t kMaxOverhead = 256;  // tiles

bool is_tiled_head_size(std::int64_t size) { return size == 64 || size == 96 || size == 128 || size == 192 || size == 256; }

// Every row of a head can be copied in aligned chunks of 16 bytes.
bool chunks_aligned(const AttentionLayout& l, const PagedView& view) {
  const auto fits = [](std::int64_t stride, std::int64_t size) { return stride % 16 == 0 || size == 1; };
  // Strides count in 31 bits, as do positions of rows in a block.
  const auto counts = [&] {
    std::int64_t sum = 0;
    for (const auto& [stride, size] :
         {std::pair{view.block, std::int64_t{1}}, {view.offset, l.block_size}, {view.head, l.num_kv_heads}}) {
      if (std::abs(stride) >= kMaxChunk / size) return false;
      sum += std::abs(stride) * size;
    }
    return sum < kMaxChunk;
  };
  return view.dim == 1 && counts() && reinterpret_cast<std::uintptr_t>(view.data) % 16 == 0 && fits(view.block, l.num_blocks) &&
         fits(view.offset, l.block_size) && fits(view.head, l.num_kv_heads);
}

bool fits_tiles(const AttentionLayout& l) {
  return l.of_one_kind() && is_quantized(l.cache_dtype) && is_tiled_head_size(l.head_size) && l.block_size % kTile == 0 &&
         chunks_aligned(l, l.key_cache) && chunks_aligned(l, l.value_cache) && query_vecs_aligned(l) &&
         l.num_rows < kMaxChunk / l.heads_per_kv_head() && l.num_blocks < kMaxChunk && l.num_seqs < kMaxChunk;
}

// The grouped kernel copies 16 bytes at a time too, and multiplies 16 elements of K.
bool fits_groups(const AttentionLayout& l) {
  return !l.of_one_kind() && is_quantized(l.cache_dtype) && is_quantized(l.v_cache_dtype) && l.head_size % 16 == 0 &&
         l.v_head_size % 16 == 0 && l.head_size <= kMaxGenericHeadSizes && l.v_head_size <= GroupedShape::kValueSizes[1] &&
         chunks_aligned(l, l.key_cache) && chunks_aligned(l, l.value_cache) && l.num_blocks < kMaxChunk;
}

bool scales_per_token(const AttentionLayout& l) { return l.k_scale.per_token() || l.v_scale.per_token(); }

int memory_of(const AttentionLayout& l, const AttentionPlan& plan) {
  const AttentionMemory memory(static_cast<int>(l.head_size), plan.column_tiles, scales_per_token(l), plan.warps, plan.columns);
  return memory.size + (plan.cluster > 1 ? memory.inbox_size : 0);
}

// The columns of a block: as many as there are, if possible, so that K and V are read once.
void choose_columns(const AttentionLayout& l, AttentionPlan& plan) {
  // With one part the result must not depend on upper bounds.
  const std::int64_t queries = plan.parts == 1 ? 1 : std::min<std::int64_t>(l.max_query_len, kMaxColumns);
  const std::int64_t columns = std::min<std::int64_t>(queries * l.heads_per_kv_head(), kMaxColumns);
  const auto tiles = static_cast<int>(ceil_div(columns, kColumnTile));
  const int most_per_warp = l.head_size > 128 ? 2 : 4;  // registers
  plan.column_tiles = std::min(most_per_warp, static_cast<int>(std::bit_ceil(static_cast<unsigned>(tiles))));
  plan.column_warps = static_cast<int>(std::bit_ceil(static_cast<unsigned>(ceil_div(tiles, plan.column_tiles))));
}

void set_columns(AttentionPlan& plan) { plan.columns = plan.column_tiles * plan.column_warps * kColumnTile; }

// Fewer warps, then fewer columns, until the shared memory of a block is enough.
void fit_memory(const AttentionLayout& l, const DeviceLimits& limits, AttentionPlan& plan) {
  set_columns(plan);
  const int most = limits.shared_memory - kReservedMemory;
  while (memory_of(l, plan) > most) {
    if (plan.warps > 4) {
      plan.warps /= 2;
    } else if (plan.column_tiles > 1) {
      plan.column_tiles /= 2;
    } else if (plan.column_warps > 1) {
      plan.column_warps /= 2;
    } else {
      plan.warps /= 2;
    }
    set_columns(plan);
  }
}

// Upper bounds of items and tiles.
std::int64_t max_items(const AttentionLayout& l, const AttentionPlan& plan, std::int64_t max_query_len) {
  const std::int64_t group = l.heads_per_kv_head();
  const std::int64_t by_length = l.num_seqs * ceil_div(max_query_len * group, plan.columns);
  const std::int64_t by_rows = l.num_seqs + l.num_rows * group / plan.columns;
  return std::min(by_length, by_rows) * l.num_kv_heads;
}

std::int64_t max_tiles(const AttentionLayout& l) {
  std::int64_t seen = l.max_seq_len;
  if (l.sliding_window > 0) seen = std::min(seen, l.sliding_window + l.max_query_len + kTile);
  return std::max<std::int64_t>(1, ceil_div(seen, kTile));
}

// How many blocks a multiprocessor has at once. One has enough bytes on their way, but for short rows. Where there are many
// items, four smaller ones work while others are between two items.
std::int64_t choose_residency(const AttentionLayout& l, const DeviceLimits& limits, AttentionPlan& plan) {
  if (plan.column_tiles > 1 || l.head_size > 128) return 1;  // registers
  const auto fits = [&](int blocks) { return blocks * (memory_of(l, plan) + kReservedMemory) <= limits.shared_memory; };
  const int warps = plan.warps;
  if (l.num_seqs * l.num_kv_heads > 3 * std::int64_t{limits.multiprocessors}) {
    plan.warps = std::min(warps, 4);
    if (fits(4)) return 4;
    plan.warps = warps;
    return fits(2) ? 2 : 1;
  }
  return l.head_size < 128 && fits(2) ? 2 : 1;
}

// Blocks per cluster of one short sequence, which is no more than two rounds of tiles for the warps of each block, and no less
// than one. Longer ones want more blocks than fit clusters well.
int choose_cluster(const AttentionLayout& l, const DeviceLimits& limits, const AttentionClusters& clusters,
                   const AttentionPlan& plan) {
  if (plan.parts > 0 || l.num_seqs > 1 || plan.column_tiles > AttentionClusters::kMaxColumnTiles || plan.column_warps > 1)
    return 1;
  AttentionPlan in_cluster = plan;
  in_cluster.cluster = 2;
  if (memory_of(l, in_cluster) > limits.shared_memory - kReservedMemory) return 1;
  const std::int64_t items = max_items(l, plan, l.max_query_len);
  for (int log2 = AttentionClusters::kMaxLog2Blocks; log2 > 0; --log2) {
    const std::int64_t blocks = std::int64_t{1} << log2;
    if (items * blocks <= limits.multiprocessors && items <= clusters.active[plan.column_tiles - 1][log2] &&
        max_tiles(l) >= blocks * plan.warps && max_tiles(l) <= 2 * blocks * plan.warps)
      return static_cast<int>(blocks);
  }
  return 1;
}

// Warps for the parts of a column; each has a few of them. Not more than let the blocks of the merging kernel start early.
int sharers_of(std::int64_t parts, const AttentionPlan& plan) {
  constexpr std::int64_t kMostWarps = 8 * 2048;
  auto sharers = static_cast<int>(std::bit_ceil(static_cast<unsigned>(std::clamp<std::int64_t>(ceil_div(parts, 4), 1, 16))));
  while (sharers > 1 && plan.merges * plan.columns * sharers > kMostWarps) sharers /= 2;
  return sharers;
}

// Whether the last block of an item merges its parts, or another kernel, whose start takes longer but which has more blocks.
void choose_merge(const AttentionLayout& l, std::int64_t parts, std::int64_t most_merges, AttentionPlan& plan) {
  constexpr std::int64_t kMostElements = 1024, kMostBytes = 96 * 1024;  // that one block merges, and reads, as fast
  const std::int64_t columns = std::min<std::int64_t>(plan.columns, l.max_query_len * l.heads_per_kv_head());
  const std::int64_t elements = columns * l.head_size;
  if (plan.slots == 0 || (elements <= kMostElements && parts * elements * 4 <= kMostBytes)) return;
  plan.merges = most_merges;
  plan.merge_sharers = sharers_of(parts, plan);
}

// A block has as many query heads of a row and KV head as there are and fit. Where these are few, blocks share the positions.
// Without columns they don't fit at all.
AttentionPlan plan_grouped(const AttentionLayout& l, const DeviceLimits& limits) {
  constexpr int kPositions = GroupedShape::kPositions, kLeastTiles = 4;  // that are worth a block
  AttentionPlan plan;
  plan.kernel = AttentionKernel::Grouped;
  const auto group = static_cast<unsigned>(std::min<std::int64_t>(l.heads_per_kv_head(), kMaxColumns));
  plan.columns = static_cast<int>(std::max(8u, std::bit_ceil(group)));
  const auto memory = [&] { return grouped_memory(l, plan.columns, limits.shared_memory).size; };
  while (plan.columns >= 8 && memory() > limits.shared_memory - kReservedMemory) plan.columns /= 2;
  if (plan.columns < 8) return {.columns = 0};
  const int value_size = GroupedShape::value_size(l.v_head_size);
  plan.warps = GroupedShape::warps(plan.columns, value_size);
  plan.shared_memory = memory();
  plan.merges = l.num_rows * l.num_kv_heads * ceil_div(l.heads_per_kv_head(), std::int64_t{plan.columns});

  std::int64_t seen = l.max_seq_len;
  if (l.sliding_window > 0) seen = std::min(seen, l.sliding_window);
  const std::int64_t tiles = std::max<std::int64_t>(1, ceil_div(seen, std::int64_t{kPositions}));
  const std::int64_t resident =
      std::int64_t{limits.multiprocessors} * std::min(GroupedShape::blocks_at_once(plan.columns, value_size),
                                                      limits.shared_memory / (plan.shared_memory + kReservedMemory));
  plan.parts = l.num_splits > 0 ? std::min(l.num_splits, tiles)
                                : std::min(resident / plan.merges, ceil_div(tiles, std::int64_t{kLeastTiles}));
  plan.parts = std::clamp<std::int64_t>(plan.parts, 1, std::max<std::int64_t>(1, kMaxSlots / plan.merges));
  plan.blocks = plan.merges * plan.parts;
  if (plan.parts == 1) {
    plan.merges = 0;
    return plan;
  }
  plan.slots = plan.blocks;
  plan.merge_sharers = sharers_of(plan.parts, plan);
  plan.workspace_size = slot_counters_size(plan.slots) + plan.slots * plan.columns * (l.v_head_size + 4) * 4;
  return plan;
}

AttentionPlan plan_generic(const AttentionLayout& l) {
  // As many warps as fit what every kernel may have of shared memory; each has a row of sums of its own.
  AttentionPlan plan;
  const std::int64_t rest = std::max<std::int64_t>(0, kMaxGenericHeadSizes - l.head_size);
  plan.warps = static_cast<int>(std::min<std::int64_t>(4, rest / l.v_head_size));
  plan.shared_memory = static_cast<int>((l.head_size + plan.warps * l.v_head_size) * static_cast<std::int64_t>(sizeof(float)));
  plan.blocks = l.num_rows * l.num_heads;
  return plan;
}

}  // namespace

bool query_vecs_aligned(const AttentionLayout& l) {
  const auto fits = [](std::int64_t stride, std::int64_t size) { return stride % kVecSize == 0 || size == 1; };
  return l.query.dim == 1 && base_aligned(l.query.data, l.query_dtype) && fits(l.query.token, l.num_rows) &&
         fits(l.query.head, l.num_heads);
}

AttentionPlan plan_attention(const AttentionLayout& l, const DeviceLimits& limits, const AttentionClusters& clusters) {
  if (l.empty()) return {};
  if (fits_groups(l))
    if (const AttentionPlan plan = plan_grouped(l, limits); plan.columns > 0) return plan;
  if (!fits_tiles(l)) return plan_generic(l);
  AttentionPlan plan;
  plan.kernel = AttentionKernel::Tiled;
  plan.warps = kMaxWarps;
  plan.parts = std::min<std::int64_t>({l.num_splits, max_tiles(l), kMaxParts});
  choose_columns(l, plan);
  fit_memory(l, limits, plan);
  // Units count in 31 bits.
  const std::int64_t tiles = std::max<std::int64_t>(1, ceil_div(l.capacity, kTile)) + kMaxOverhead;
  if (plan.parts == 0 && max_items(l, plan, l.num_rows) > kMaxChunk / tiles) plan.parts = 1;
  plan.cluster = choose_cluster(l, limits, clusters, plan);
  if (plan.cluster > 1) plan.parts = plan.cluster;
  const std::int64_t resident = plan.parts == 0 ? choose_residency(l, limits, plan) : 1;
  plan.shared_memory = memory_of(l, plan);
  const std::int64_t items = max_items(l, plan, l.max_query_len);
  if (plan.parts == 0 && l.num_seqs == 1 && items <= limits.multiprocessors * resident) {
    // The same number of blocks for each item, without a look at other sequences.
    plan.least_units = plan.warps;
    plan.parts = std::min(limits.multiprocessors * resident / items, ceil_div(max_tiles(l), plan.least_units));
  }
  if (plan.parts == 0) {
    plan.least_units = plan.warps;
    plan.item_overhead = static_cast<int>(std::min(kMaxOverhead, kItemOverhead / (2 * kTile * l.head_size * resident)));
    plan.blocks = std::min(limits.multiprocessors * resident, ceil_div(items * max_tiles(l), plan.least_units));
    plan.slots = plan.blocks > 1 ? 2 * plan.blocks : 0;
    choose_merge(l, plan.blocks / items + 1, plan.blocks, plan);
  } else {
    plan.parts = std::max<std::int64_t>(1, std::min(plan.parts, kMaxSlots / items));
    plan.blocks = std::min<std::int64_t>(items * plan.parts, INT32_MAX);
    plan.slots = plan.parts > 1 && plan.cluster == 1 ? items * plan.parts : 0;
    choose_merge(l, plan.parts, items, plan);
  }
  plan.workspace_size = slot_counters_size(plan.slots) + plan.slots * plan.columns * (l.head_size + 4) * 4;
  return plan;
}

}  // namespace fp8kv::core
