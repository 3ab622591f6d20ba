#include <algorithm>
#include <bit>

#include "core/plan.h"

namespace fp8kv::core {
namespace {

constexpr std::int64_t kMaxThreads = 1024;
constexpr int kWarp = 32;

std::int64_t round_up(std::int64_t n, std::int64_t step) { return ceil_div(n, step) * step; }

// The fewest vectors per thread, `fewest` times a power of two, with which `threads` hold `vecs` of them; 0 if more than
// `most`.
int vecs_per_thread(std::int64_t vecs, std::int64_t threads, int fewest, int most) {
  int count = fewest;
  while (count <= most && vecs > threads * count) count *= 2;
  return count <= most ? count : 0;
}

// Whether the scales of rows that are groups are contiguous.
bool scales_contiguous(const Layout& layout) {
  std::int64_t rows = 1;
  for (int d = layout.ndim - 2; d >= 0; --d) {
    if (layout.dims[d].scale != rows) return false;
    rows *= layout.dims[d].size;
  }
  return true;
}

bool row_fits(const Layout& layout) {
  return rows_are_groups(layout) && contiguous_rows(layout) && layout.inner().size <= kMaxChunk;
}

// Whether groups of one row each, short enough to be read at both ends of a tile, end inside vectors.
bool tiles_fit(const Chunk& chunk, const TensorView& input, const TensorView& result) {
  if (chunk.layout.numel > kMaxChunk || !goes_across_groups(chunk, input, result)) return false;
  const GroupGrid grid = *grid_of(chunk.layout);
  const bool own_scales = grid.row == chunk.layout.numel || (grid.row_block == 1 && grid.row_scale != 0);
  return own_scales && grid.group_scale != 0 && grid.group <= kLongestTileGroup;
}

void plan_one_group(DynamicPlan& plan, DType real, const DeviceLimits& limits, int max_cluster) {
  const std::int64_t vecs = plan.vecs_per_row;
  const int most = vecs_in_registers(real);
  plan.vecs_per_thread = vecs_per_thread(vecs, kMaxThreads, 2, most);
  if (plan.vecs_per_thread > 0) {
    plan.path = DynamicPath::Redundant;
    plan.threads = kRedundantThreads;
    plan.blocks = ceil_div(vecs, kRedundantVecs);
    return;
  }
  plan.vecs_per_thread = vecs_per_thread(vecs, max_cluster * kMaxThreads, 1, most);
  if (plan.vecs_per_thread > 0) {
    plan.path = DynamicPath::Cluster;
    plan.blocks = max_cluster;
    plan.threads = static_cast<int>(round_up(ceil_div(vecs, plan.blocks * plan.vecs_per_thread), kWarp));
    return;
  }
  plan.path = DynamicPath::Cooperative;
  plan.threads = kCooperativeThreads;
  const std::int64_t needed = ceil_div(vecs, kCooperativeThreads);
  plan.blocks = std::min<std::int64_t>(needed, std::int64_t{kCooperativeBlocks} * limits.multiprocessors);
  const std::int64_t beyond_registers = ceil_div(needed, plan.blocks) - most;
  plan.shared_vecs = static_cast<int>(std::clamp<std::int64_t>(beyond_registers, 0, max_shared_vecs(real, limits)));
}

}  // namespace

// 2 KiB per block stay for static and reserved memory.
int max_shared_vecs(DType real, const DeviceLimits& limits) {
  const int vec_bytes = kCooperativeThreads * kVecSize * size_of(real);
  return std::max(0, (limits.shared_memory / kCooperativeBlocks - 2048) / vec_bytes);
}

bool fits_one_pass(const Layout& layout) {
  bool fits = true;
  for_each_uniform_part(layout, [&](const Chunk& part) { fits &= row_fits(part.layout); });
  return fits;
}

DynamicPlan plan_dynamic(const Chunk& chunk, const TensorView& input, const TensorView& result, const DeviceLimits& limits,
                         int max_cluster) {
  const Layout& layout = chunk.layout;
  DynamicPlan plan;
  plan.aligned = vecs_aligned(chunk, input, result);
  plan.vecs_per_row = vecs_covering(layout.inner().size, plan.aligned);
  if (tiles_fit(chunk, input, result)) {
    plan.path = DynamicPath::AcrossGroups;
    plan.grid = *grid_of(layout);
    plan.threads = kTileThreads;
    const std::int64_t units = ceil_div(layout.numel, kUnitSize);
    if (units >= 4096 * std::int64_t{limits.multiprocessors}) plan.tile_units = kManyTileUnits;  // many blocks remain
    plan.blocks = ceil_div(units, kTileThreads * plan.tile_units);
    return plan;
  }
  if (!row_fits(layout)) return plan;

  const std::int64_t groups = layout.numel / layout.inner().size, vecs = plan.vecs_per_row;
  if (groups == 1 && vecs > kMaxThreads) {
    plan_one_group(plan, input.dtype, limits, max_cluster);
    return plan;
  }
  plan.path = DynamicPath::PerGroup;
  plan.contiguous =
      contiguous(layout) && scales_contiguous(layout) && base_aligned(input, chunk.in) && base_aligned(result, chunk.out);
  const bool units = plan.aligned && plan.contiguous && vecs % 2 == 0 && units_aligned(chunk, input, result);
  const std::int64_t lanes = !plan.aligned ? ceil_div(layout.inner().size, kElementsPerLane) : units ? vecs / 2 : vecs;
  if (lanes <= kWarp) {
    plan.units = units;
    plan.lanes_per_group = static_cast<int>(std::bit_ceil(static_cast<std::uint64_t>(lanes)));
    plan.threads = groups * plan.lanes_per_group <= 64 * std::int64_t{limits.multiprocessors} ? 64 : 128;
    plan.blocks = ceil_div(groups, plan.threads / plan.lanes_per_group);
    return plan;
  }
  // One vector per thread where all groups are in flight at once, else two; rows at any address have more to do for each, and
  // prefer more, as do aligned blocks of them whose ends are not.
  const bool few = groups * vecs <= 1024 * std::int64_t{limits.multiprocessors};
  const int most = vecs_in_registers(input.dtype);
  const int fewest = plan.aligned ? (few ? 1 : 2) : plan.contiguous ? (few ? 1 : 4) : most;
  plan.vecs_per_thread = vecs_per_thread(vecs, kMaxThreads, fewest, most);
  plan.threads =
      plan.vecs_per_thread == 0 ? kMaxThreads : static_cast<int>(round_up(ceil_div(vecs, plan.vecs_per_thread), kWarp));
  plan.blocks = groups;
  return plan;
}

}  // namespace fp8kv::core
