#include <algorithm>

#include "core/plan.h"

namespace fp8kv::core {
namespace {

// How many indices along a dimension share a scale.
std::int64_t shared_extent(const Layout::Dim& dim) { return dim.scale == 0 ? dim.size : dim.block; }

// Takes the dimension along which most indices share a scale out of the layout.
void choose_reduced(AmaxPlan& plan, const Layout& layout) {
  const Layout::Dim& inner = layout.inner();
  const int row = layout.ndim - 1;
  int chosen = row;
  std::int64_t best = inner.scale == 0 ? ceil_div(inner.size, kAmaxRowSize) : 0;
  for (int d = 0; d < row; ++d)
    if (shared_extent(layout.dims[d]) > best) best = shared_extent(layout.dims[chosen = d]);

  plan.outer = layout;
  plan.limit = INT64_MAX;
  if (chosen < row) {
    plan.reduced = layout.dims[chosen];
    plan.reduced.block = shared_extent(plan.reduced);
    std::copy(layout.dims + chosen + 1, layout.dims + layout.ndim, plan.outer.dims + chosen);
    --plan.outer.ndim;
  } else if (best > 0) {  // the row, as rows of kAmaxRowSize elements
    plan.reduced = {.size = best, .in = kAmaxRowSize, .block = best};
    plan.limit = inner.size;
    plan.outer.dims[row].size = std::min(inner.size, kAmaxRowSize);
  } else {
    plan.reduced = {};
  }
}

bool input_rows_aligned(const Chunk& chunk, const TensorView& input) {
  for (int d = 0; d + 1 < chunk.layout.ndim; ++d)
    if (chunk.layout.dims[d].in % kVecSize != 0) return false;
  return base_aligned(input, chunk.in);
}

}  // namespace

AmaxPlan plan_amax(const Chunk& chunk, const TensorView& input, int multiprocessors) {
  const Layout& layout = chunk.layout;
  const Layout::Dim& inner = layout.inner();
  AmaxPlan plan;
  if (layout.flat_rows || inner.in != 1 || (inner.size < kVecSize && layout.ndim == 1)) {
    plan.work = layout.numel;
    plan.blocks = grid_stride_blocks(layout.numel, multiprocessors);
    return plan;
  }
  plan.path = inner.scale == 0 ? KernelPath::Vectorized : KernelPath::PerColumn;
  plan.aligned = input_rows_aligned(chunk, input);
  choose_reduced(plan, layout);
  for (int d = 0; d + 1 < plan.outer.ndim; ++d) plan.outer_rows *= plan.outer.dims[d].size;
  plan.vecs_per_row = ceil_div(plan.outer.inner().size, kVecSize);
  // Enough threads to fill the device; fewer where every thread, or nearly so, writes a maximum for each of its columns.
  const std::int64_t wanted_threads = std::int64_t{multiprocessors} * (plan.path == KernelPath::Vectorized ? 1024 : 256);
  const std::int64_t threads_per_index = plan.outer_rows * plan.vecs_per_row;
  plan.span = std::clamp<std::int64_t>(ceil_div(plan.reduced.size * threads_per_index, wanted_threads * 4) * 4, 4, 64);
  plan.num_spans = plan.spans_per_block() * ceil_div(plan.reduced.size, plan.reduced.block);
  if (plan.path == KernelPath::Vectorized) {
    plan.work = threads_per_index * plan.num_spans;
    plan.blocks = ceil_div(plan.work, plan.threads);
  } else {
    plan.blocks = plan.outer_rows * plan.warps_per_row() * ceil_div(plan.num_spans, plan.threads / 32);
  }
  return plan;
}

}  // namespace fp8kv::core
