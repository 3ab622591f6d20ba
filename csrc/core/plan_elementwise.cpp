#include <bit>
#include <numeric>
#include <optional>

#include "core/plan.h"

namespace fp8kv::core {
namespace {

// From this number of vectors on the device is full, and a thread takes two.
constexpr std::int64_t kManyVecs = 1 << 18;

ElementwiseKernel vectorized_kernel(const Layout& layout, bool aligned) {
  if (!aligned) return ElementwiseKernel::VectorizedUnaligned;
  if (!contiguous(layout)) return ElementwiseKernel::Vectorized;
  switch (layout.ndim - 1) {
    case 0: return ElementwiseKernel::VectorizedContiguous0;
    case 1: return ElementwiseKernel::VectorizedContiguous1;
    case 2: return ElementwiseKernel::VectorizedContiguous2;
    default: return ElementwiseKernel::Vectorized;
  }
}

ElementwisePlan plan_vectorized(const Layout& layout, bool aligned) {
  ElementwisePlan plan{.path = KernelPath::Vectorized, .aligned = aligned};
  plan.kernel = vectorized_kernel(layout, aligned);
  plan.outer_dims = layout.ndim - 1;
  plan.row_size = layout.inner().size;
  plan.vecs_per_row = vecs_covering(plan.row_size, aligned);
  plan.work = layout.numel / plan.row_size * plan.vecs_per_row;
  const bool one_range = plan.kernel != ElementwiseKernel::VectorizedUnaligned && plan.kernel != ElementwiseKernel::Vectorized;
  if (one_range && plan.work >= kManyVecs) plan.vecs_per_thread = 2;
  return plan;
}

// The groups of a contiguous layout as a grid, if they are one.
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
  return grid;
}

// Three groups in a unit are slow. They are rare where only the last group of a row is that small, and rows are long.
bool three_in_a_unit_are_rare(const GroupGrid& grid) {
  constexpr std::int64_t kLongRow = 64 * kUnitSize;
  const std::int64_t rest = grid.row % grid.group;
  return grid.group >= kUnitSize && (rest == 0 || rest >= kUnitSize || grid.row >= kLongRow);
}

ElementwisePlan plan_across_groups(const Layout& layout) {
  ElementwisePlan plan{.kernel = ElementwiseKernel::AcrossGroups, .path = KernelPath::Vectorized, .aligned = true};
  plan.threads = 128;
  plan.row_size = layout.numel;
  plan.work = ceil_div(layout.numel, kUnitSize);
  plan.grid = *grid_of(layout);
  return plan;
}

bool scales_aligned(const Chunk& chunk, const TensorView& scale) {
  for (int d = 0; d + 1 < chunk.layout.ndim; ++d)
    if (chunk.layout.dims[d].scale % 4 != 0) return false;
  return base_aligned(scale, chunk.scale);
}

ElementwisePlan plan_per_column(const Chunk& chunk, const TensorView& input, const TensorView& result, const TensorView& scale,
                                bool aligned) {
  const Layout& layout = chunk.layout;
  const Layout::Dim& inner = layout.inner();
  ElementwisePlan plan{.path = KernelPath::PerColumn, .aligned = aligned};
  const bool loops = layout.ndim >= 2 && layout.dims[layout.ndim - 2].scale == 0;
  const Layout::Dim looped = loops ? layout.dims[layout.ndim - 2] : Layout::Dim{};
  plan.rows = looped.size;
  plan.row_size = inner.size;
  const bool one_range = contiguous(layout);
  if (!aligned && one_range && loops && layout.ndim == 2 && inner.block == 1 && base_aligned(input, chunk.in) &&
      base_aligned(result, chunk.out)) {
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
  plan.last_row_size = loops ? (looped.size - (plan.rows - 1) * plan.rows_merged) * inner.size : plan.row_size;
  plan.vector_scales = !merged && inner.scale == 1 && inner.block == 1 && scales_aligned(chunk, scale);
  plan.rows_per_thread = layout.numel / kVecSize < kManyVecs && !merged && plan.outer_dims == 0 ? 1 : 4;
  plan.kernel = plan.outer_dims == 0 ? ElementwiseKernel::PerColumn0 : ElementwiseKernel::PerColumn;
  const std::int64_t outer = layout.numel / inner.size / looped.size;
  plan.work = outer * ceil_div(plan.rows, plan.rows_per_thread) * plan.vecs_per_row;
  return plan;
}

}  // namespace

bool goes_across_groups(const Chunk& chunk, const TensorView& input, const TensorView& result) {
  const std::optional<GroupGrid> grid = grid_of(chunk.layout);
  return grid && (grid->row % kVecSize != 0 || grid->group % kVecSize != 0) && three_in_a_unit_are_rare(*grid) &&
         units_aligned(chunk, input, result);
}

ElementwisePlan plan_elementwise(const Chunk& chunk, const TensorView& input, const TensorView& result, const TensorView& scale,
                                 int multiprocessors) {
  const Layout& layout = chunk.layout;
  const bool aligned = vecs_aligned(chunk, input, result);
  ElementwisePlan plan;
  if (goes_across_groups(chunk, input, result)) {
    plan = plan_across_groups(layout);
  } else if (layout.flat_rows || !contiguous_rows(layout) || (!aligned && layout.inner().size < kVecSize)) {
    plan.outer_dims = layout.ndim;
    plan.work = layout.numel;
  } else if (layout.inner().scale != 0) {
    plan = plan_per_column(chunk, input, result, scale, aligned);
  } else {
    plan = plan_vectorized(layout, aligned);
  }
  // Small blocks spread tiny problems over more multiprocessors. Where threads take several vectors, they end together sooner.
  if (plan.path == KernelPath::PerColumn || plan.vecs_per_thread > 1 || plan.work <= 64 * std::int64_t{multiprocessors})
    plan.threads = 128;
  plan.blocks = ceil_div(plan.work, plan.threads * plan.vecs_per_thread);
  return plan;
}

}  // namespace fp8kv::core
