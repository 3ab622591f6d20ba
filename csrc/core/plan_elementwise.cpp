#include <bit>
#include <numeric>

#include "core/plan.h"

namespace fp8kv::core {
namespace {

// From this number of vectors on the device is full, and a thread takes two.
constexpr std::int64_t kManyVecs = 1 << 18;

constexpr int kChannelThreads = 128;  // per block of the kernels per column, but for two rows per thread

// Three groups in a unit are slow. They are rare where only the last group of a row is that small, and rows are long.
bool three_in_a_unit_are_rare(const GroupGrid& grid) {
  constexpr std::int64_t kLongRow = 64 * kUnitSize;
  const std::int64_t rest = grid.row % grid.group;
  return grid.group >= kUnitSize && (rest == 0 || rest >= kUnitSize || grid.row >= kLongRow);
}

ElementwisePlan plan_across_groups(const GroupGrid& grid, std::int64_t numel) {
  ElementwisePlan plan{.kernel = ElementwiseKernel::AcrossGroups, .path = KernelPath::Vectorized, .aligned = true};
  plan.threads = 128;
  plan.work = ceil_div(numel, kUnitSize);
  plan.grid = grid;
  return plan;
}

// Whether batches of kRowsOfBlocks rows have one scale for each column, and few rows are missing in the last batch.
bool batches_share_scales(const GroupGrid& grid, std::int64_t rows) {
  const bool shared = grid.row_scale == 0 || grid.row_block % kRowsOfBlocks == 0;
  return shared && (rows % kRowsOfBlocks == 0 || rows >= 16 * kRowsOfBlocks);
}

ElementwisePlan plan_contiguous(const GroupGrid& grid, std::int64_t numel) {
  ElementwisePlan plan{.kernel = ElementwiseKernel::Contiguous, .path = KernelPath::Vectorized, .aligned = true};
  plan.work = numel / kVecSize;
  plan.grid = grid;
  const bool one_row = grid.row == numel;
  plan.groups = one_row && grid.group == numel ? Groups::One : one_row ? Groups::Row : Groups::Grid;
  if (plan.work < kManyVecs) return plan;
  if (batches_share_scales(grid, numel / grid.row)) {
    plan.kernel = ElementwiseKernel::RowsOfBlocks;
    plan.rows_per_thread = kRowsOfBlocks;
    plan.work = ceil_div(numel / grid.row, kRowsOfBlocks) * (grid.row / kVecSize);
  } else {
    plan.vecs_per_thread = 2;
  }
  return plan;
}

ElementwisePlan plan_vectorized(const Layout& layout, bool aligned) {
  ElementwisePlan plan{.path = KernelPath::Vectorized, .aligned = aligned};
  plan.kernel = aligned ? ElementwiseKernel::Vectorized : ElementwiseKernel::VectorizedUnaligned;
  plan.outer_dims = layout.ndim - 1;
  plan.row_size = layout.inner().size;
  plan.vecs_per_row = vecs_covering(plan.row_size, aligned);
  plan.work = layout.numel / plan.row_size * plan.vecs_per_row;
  return plan;
}

bool scales_aligned(const Chunk& chunk, const TensorView& scale) {
  for (int d = 0; d + 1 < chunk.layout.ndim; ++d)
    if (chunk.layout.dims[d].scale % 4 != 0) return false;
  return base_aligned(scale, chunk.scale);
}

ElementwisePlan plan_per_column(const Chunk& chunk, const TensorView& input, const TensorView& result, const TensorView& scale,
                                bool aligned, int multiprocessors) {
  const Layout& layout = chunk.layout;
  const Layout::Dim& inner = layout.inner();
  ElementwisePlan plan{.path = KernelPath::PerColumn, .aligned = aligned};
  const bool loops = layout.ndim >= 2 && layout.dims[layout.ndim - 2].scale == 0;
  const Layout::Dim looped = loops ? layout.dims[layout.ndim - 2] : Layout::Dim{};
  plan.rows = looped.size;
  plan.row_size = inner.size;
  const bool one_range = contiguous(layout);
  if (!aligned && one_range && loops && layout.ndim == 2 && inner.block == 1 && inner.scale == 1 &&
      base_aligned(input, chunk.in) && base_aligned(result, chunk.out)) {
    plan.rows_merged = kVecSize / std::gcd(inner.size, std::int64_t{kVecSize});
    plan.aligned = true;
  }
  if (!plan.aligned) {
    plan.kernel = ElementwiseKernel::PerColumnUnaligned;
    plan.outer_dims = layout.ndim - 1;
    plan.vecs_per_row = vecs_covering(inner.size, false);
    plan.work = layout.numel / inner.size * plan.vecs_per_row;
    return plan;
  }
  const bool merged = plan.rows_merged > 1;
  plan.outer_dims = layout.ndim - (loops ? 2 : 1);
  plan.row_size = inner.size * plan.rows_merged;
  plan.vecs_per_row = plan.row_size / kVecSize;
  plan.rows = ceil_div(looped.size, plan.rows_merged);
  plan.row_in = looped.in * plan.rows_merged;
  plan.row_out = looped.out * plan.rows_merged;
  plan.vector_scales = !merged && inner.scale == 1 && inner.block == 1 && scales_aligned(chunk, scale);
  // One row while there is little to do; then more, so that preparing the scales is shared. Merged rows share even more work.
  const std::int64_t vecs = layout.numel / kVecSize;
  const bool per_channel = one_range && plan.outer_dims == 0 && plan.vector_scales;
  if (per_channel && looped.size == 1 && inner.size <= std::int64_t{kChannelThreads} * multiprocessors) {
    plan.kernel = ElementwiseKernel::PerChannelOfOneRow;
    plan.work = inner.size / kOneRowColumns;
    return plan;
  }
  if (per_channel) {
    plan.kernel = ElementwiseKernel::PerChannel;
    plan.rows_per_thread = vecs >= kManyVecs ? 4 : 1;
  } else {
    plan.kernel = merged ? ElementwiseKernel::PerChannelMerged : ElementwiseKernel::PerColumn;
    if (vecs > (merged ? 1 << 17 : 1 << 18)) plan.rows_per_thread = merged ? 4 : 2;
    plan.rows_per_thread =
        static_cast<int>(std::min<std::int64_t>(plan.rows_per_thread, std::bit_floor(static_cast<std::uint64_t>(plan.rows))));
  }
  const std::int64_t outer = layout.numel / inner.size / looped.size;
  plan.work = outer * ceil_div(plan.rows, plan.rows_per_thread) * plan.vecs_per_row;
  return plan;
}

}  // namespace

std::optional<GroupGrid> grid_of(const Layout& layout) {
  if (layout.flat_rows || !contiguous_rows(layout) || !contiguous(layout)) return std::nullopt;
  const Layout::Dim& inner = layout.inner();
  GroupGrid grid{.row = inner.size, .group = inner.scale ? inner.block : inner.size, .group_scale = inner.scale};
  int outer = layout.ndim - 2;
  if (outer >= 0 && inner.scale == 0 && layout.dims[outer].block == 1) {  // neighboring groups of the same size
    grid.row *= layout.dims[outer].size;
    grid.group_scale = layout.dims[outer].scale;
    --outer;
  }
  if (outer > 0) return std::nullopt;
  if (outer == 0) {
    grid.row_block = layout.dims[0].block;
    grid.row_scale = layout.dims[0].scale;
  }
  const auto fits = [](std::int64_t stride) { return stride >= 0 && stride < std::int64_t{1} << 32; };
  if (!fits(grid.row_scale) || !fits(grid.group_scale)) return std::nullopt;
  return grid;
}

bool goes_across_groups(const Chunk& chunk, const TensorView& input, const TensorView& result) {
  const std::optional<GroupGrid> grid = grid_of(chunk.layout);
  return grid && (grid->row % kVecSize != 0 || grid->group % kVecSize != 0) && three_in_a_unit_are_rare(*grid) &&
         units_aligned(chunk, input, result);
}

ElementwisePlan plan_elementwise(const Chunk& chunk, const TensorView& input, const TensorView& result, const TensorView& scale,
                                 int multiprocessors) {
  const Layout& layout = chunk.layout;
  const bool aligned = vecs_aligned(chunk, input, result);
  const std::optional<GroupGrid> grid = grid_of(layout);
  ElementwisePlan plan;
  if (goes_across_groups(chunk, input, result)) {
    const bool many_of_one_scale = grid->group == layout.numel && layout.numel / kVecSize >= kManyVecs;
    plan = many_of_one_scale ? plan_contiguous(*grid, layout.numel) : plan_across_groups(*grid, layout.numel);
  } else if (layout.flat_rows || !contiguous_rows(layout) || (!aligned && layout.inner().size < kVecSize)) {
    plan.outer_dims = layout.ndim;
    plan.work = layout.numel;
  } else if (layout.inner().scale != 0) {
    plan = plan_per_column(chunk, input, result, scale, aligned, multiprocessors);
  } else if (aligned && grid) {
    plan = plan_contiguous(*grid, layout.numel);
  } else {
    plan = plan_vectorized(layout, aligned);
  }
  // Columns hold many registers: smaller blocks fill a multiprocessor better. They also spread tiny problems over more
  // multiprocessors.
  if (plan.path == KernelPath::PerColumn)
    plan.threads = plan.rows_per_thread == 2 ? 64 : kChannelThreads;
  else if (plan.vecs_per_thread > 1 || plan.rows_per_thread > 1 || plan.work <= 64 * std::int64_t{multiprocessors})
    plan.threads = 128;
  plan.blocks = ceil_div(plan.work, plan.threads * plan.vecs_per_thread);
  return plan;
}

}  // namespace fp8kv::core
