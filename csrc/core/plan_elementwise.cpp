#include <bit>
#include <numeric>

#include "core/plan.h"

namespace fp8kv::core {
namespace {

ElementwiseKernel vectorized_kernel(const Layout& layout, bool aligned) {
  if (!aligned) return ElementwiseKernel::VectorizedUnaligned;
  if (!contiguous(layout)) return ElementwiseKernel::VectorizedStrided;
  switch (layout.ndim - 1) {
    case 0: return ElementwiseKernel::VectorizedContiguous0;
    case 1: return ElementwiseKernel::VectorizedContiguous1;
    case 2: return ElementwiseKernel::VectorizedContiguous2;
    default: return ElementwiseKernel::VectorizedContiguous;
  }
}

ElementwisePlan plan_vectorized(const Layout& layout, bool aligned) {
  ElementwisePlan plan{.path = KernelPath::Vectorized, .aligned = aligned};
  plan.kernel = vectorized_kernel(layout, aligned);
  plan.outer_dims = layout.ndim - 1;
  plan.row_size = layout.inner().size;
  plan.vecs_per_row = vecs_covering(plan.row_size, aligned);
  plan.work = layout.numel / plan.row_size * plan.vecs_per_row;
  return plan;
}

ElementwiseKernel per_column_kernel(const ElementwisePlan& plan, bool contiguous) {
  switch (plan.rows_per_thread) {
    case 4: return ElementwiseKernel::PerColumn4;
    case 2: return ElementwiseKernel::PerColumn2;
    default: break;
  }
  const bool one_range = contiguous && plan.rows_merged == 1 && plan.outer_dims == 0;
  return one_range ? ElementwiseKernel::PerColumnContiguous : ElementwiseKernel::PerColumn1;
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
  // One row while there is little to do; then more, so that preparing the scales is shared. Merged rows share even more work.
  const std::int64_t vecs = layout.numel / kVecSize;
  if (vecs > (merged ? 1 << 17 : 1 << 18)) plan.rows_per_thread = merged ? 4 : 2;
  plan.rows_per_thread =
      static_cast<int>(std::min<std::int64_t>(plan.rows_per_thread, std::bit_floor(static_cast<std::uint64_t>(plan.rows))));
  const std::int64_t outer = layout.numel / inner.size / looped.size;
  plan.work = outer * ceil_div(plan.rows, plan.rows_per_thread) * plan.vecs_per_row;
  plan.kernel = per_column_kernel(plan, one_range);
  return plan;
}

}  // namespace

ElementwisePlan plan_elementwise(const Chunk& chunk, const TensorView& input, const TensorView& result, const TensorView& scale,
                                 int multiprocessors) {
  const Layout& layout = chunk.layout;
  const bool aligned = vecs_aligned(chunk, input, result);
  ElementwisePlan plan;
  if (layout.flat_rows || !contiguous_rows(layout) || (!aligned && layout.inner().size < kVecSize)) {
    plan.outer_dims = layout.ndim;
    plan.work = layout.numel;
  } else if (layout.inner().scale != 0) {
    plan = plan_per_column(chunk, input, result, scale, aligned);
  } else {
    plan = plan_vectorized(layout, aligned);
  }
  // Columns hold many registers: smaller blocks fill a multiprocessor better. They also spread tiny problems over more
  // multiprocessors.
  plan.threads = plan.path == KernelPath::PerColumn ? (plan.rows_per_thread == 2 ? 64 : 128) : 256;
  if (plan.work <= 64 * std::int64_t{multiprocessors}) plan.threads = std::min(plan.threads, 128);
  plan.blocks = ceil_div(plan.work, plan.threads);
  return plan;
}

}  // namespace fp8kv::core
