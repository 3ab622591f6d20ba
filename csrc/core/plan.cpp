#include "fp8kv/plan.h"

#include <algorithm>
#include <bit>
#include <numeric>

#include "layout.h"

namespace fp8kv {
namespace {

using core::ceil_div;

constexpr int kWarp = 32;

// Bytes of the widest single access to a unit: 8 for FP8, 16 for all else (float32 takes two).
bool base_aligned(const void* data, DType dtype) {
  return reinterpret_cast<std::uintptr_t>(data) % std::min(16, kUnit * size_of(dtype)) == 0;
}

bool base_aligned(const TensorView& view) { return base_aligned(view.data, view.dtype); }

bool outer_strides_aligned(const Layout& layout) {
  for (int d = 0; d + 1 < layout.ndim; ++d)
    if (layout.dims[d].in % kUnit != 0 || layout.dims[d].out % kUnit != 0) return false;
  return true;
}

bool units_aligned(const Layout& layout, const TensorView& input, const TensorView& result) {
  return layout.run().size % kUnit == 0 && outer_strides_aligned(layout) && base_aligned(input) && base_aligned(result);
}

// Where units are cut at aligned addresses of the result, a run may begin up to 7 elements into its first unit.
std::int64_t units_per_run(std::int64_t run, bool aligned) { return ceil_div(aligned ? run : run + kUnit - 1, kUnit); }

bool gapless(const Layout& layout) {
  for (int d = 0; d + 1 < layout.ndim; ++d) {
    const Layout::Dim &dim = layout.dims[d], &inner = layout.dims[d + 1];
    if (dim.in != inner.in * inner.size || dim.out != inner.out * inner.size) return false;
  }
  return true;
}

// Whether the scales of runs that are groups lie one after the other.
bool scales_gapless(const Layout& layout) {
  std::int64_t runs = 1;
  for (int d = layout.ndim - 2; d >= 0; --d) {
    if (layout.dims[d].scale != runs) return false;
    runs *= layout.dims[d].size;
  }
  return true;
}

MapPlan plan_columns(const Layout& layout, const TensorView& input, const TensorView& result) {
  const Layout::Dim& run = layout.run();
  MapPlan plan{.path = MapPath::Columns, .aligned = units_aligned(layout, input, result), .gapless = gapless(layout)};
  plan.walks = layout.ndim >= 2 && layout.dims[layout.ndim - 2].scale == 0;
  plan.rows = plan.walks ? layout.dims[layout.ndim - 2].size : 1;
  if (!plan.aligned && plan.gapless && plan.walks && layout.ndim == 2 && run.block == 1 && base_aligned(input) &&
      base_aligned(result)) {
    plan.rows_folded = kUnit / std::gcd(run.size, std::int64_t{kUnit});
    plan.aligned = true;
  }
  if (plan.aligned) {
    plan.units_per_run = run.size * plan.rows_folded / kUnit;
    plan.rows = ceil_div(plan.rows, plan.rows_folded);
    // One row while there is little to do; then more, so that preparing the scales is shared. Folded rows share more work yet.
    const std::int64_t units = layout.numel / kUnit;
    if (units > (plan.rows_folded > 1 ? 1 << 17 : 1 << 18)) plan.rows_per_thread = plan.rows_folded > 1 ? 4 : 2;
    plan.rows_per_thread =
        static_cast<int>(std::min<std::int64_t>(plan.rows_per_thread, std::bit_floor(static_cast<std::uint64_t>(plan.rows))));
  } else {
    plan.units_per_run = units_per_run(run.size, false);
  }
  const std::int64_t outer = layout.numel / run.size / (plan.walks ? layout.dims[layout.ndim - 2].size : 1);
  plan.work = outer * ceil_div(plan.rows, plan.rows_per_thread) * plan.units_per_run;
  return plan;
}

}  // namespace

MapPlan plan_map(const Layout& layout, const TensorView& input, const TensorView& result, int multiprocessors) {
  const Layout::Dim& run = layout.run();
  const bool aligned = units_aligned(layout, input, result);
  MapPlan plan;
  if (layout.flat_rows || !core::contiguous_runs(layout) || (!aligned && run.size < kUnit)) {
    plan.work = layout.numel;
  } else if (run.scale != 0) {
    plan = plan_columns(layout, input, result);
  } else {
    plan.path = MapPath::Runs;
    plan.aligned = aligned;
    plan.gapless = gapless(layout);
    plan.units_per_run = units_per_run(run.size, aligned);
    plan.work = layout.numel / run.size * plan.units_per_run;
  }
  // Columns hold many registers: smaller blocks fill a multiprocessor better. Very small problems reach more multiprocessors
  // so.
  plan.threads = plan.path == MapPath::Columns ? (plan.rows_per_thread == 2 ? 64 : 128) : 256;
  if (plan.work <= 64 * std::int64_t{multiprocessors}) plan.threads = std::min(plan.threads, 128);
  plan.blocks = ceil_div(plan.work, plan.threads);
  return plan;
}

DynamicPlan plan_dynamic(const Layout& layout, const TensorView& input, const TensorView& result, int multiprocessors,
                         int max_cluster) {
  constexpr std::int64_t kMaxThreads = 1024;
  const int max_units_per_thread = 16 / size_of(input.dtype);  // 32 registers
  const Layout::Dim& run = layout.run();
  DynamicPlan plan;
  plan.aligned = units_aligned(layout, input, result);
  plan.units_per_run = units_per_run(run.size, plan.aligned);
  if (!core::runs_are_groups(layout) || !core::contiguous_runs(layout) || run.size > kMaxPiece) return plan;

  const std::int64_t groups = layout.numel / run.size;
  const std::int64_t units = plan.units_per_run;
  const auto round_up = [](std::int64_t n, std::int64_t step) { return ceil_div(n, step) * step; };
  // The fewest units a thread, 1, 2, 4 or 8, with which `threads` hold the run; 0 where none suffices.
  const auto units_per_thread = [&](std::int64_t threads, int fewest) {
    int count = fewest;
    while (count <= max_units_per_thread && units > threads * count) count *= 2;
    return count <= max_units_per_thread ? count : 0;
  };

  if (groups == 1 && units > kMaxThreads) {
    plan.units_per_thread = units_per_thread(kMaxThreads, 2);
    if (plan.units_per_thread > 0) {
      plan.path = AmaxPath::Repeated;
      plan.blocks = ceil_div(units, kMaxThreads / 2);
      plan.threads = kMaxThreads;
      return plan;
    }
    plan.units_per_thread = units_per_thread(max_cluster * kMaxThreads, 1);
    if (plan.units_per_thread > 0) {
      plan.path = AmaxPath::Cluster;
      plan.blocks = max_cluster;
      plan.threads = static_cast<int>(round_up(ceil_div(units, plan.blocks * plan.units_per_thread), 32));
    } else {
      plan.path = AmaxPath::Whole;
    }
    return plan;
  }
  plan.path = AmaxPath::Groups;
  plan.gapless = plan.aligned && gapless(layout) && scales_gapless(layout);
  if (units <= 32) {
    plan.lanes_per_group = static_cast<int>(std::bit_ceil(static_cast<std::uint64_t>(units)));
    plan.threads = groups * plan.lanes_per_group <= 64 * std::int64_t{multiprocessors} ? 64 : 128;
    plan.blocks = ceil_div(groups, plan.threads / plan.lanes_per_group);
    return plan;
  }
  // One unit a thread where all groups are under way at once, else two; misaligned runs have more to do for each, and like
  // more.
  const bool few = groups * units <= 1024 * std::int64_t{multiprocessors};
  plan.units_per_thread = units_per_thread(kMaxThreads, !plan.aligned ? max_units_per_thread : few ? 1 : 2);
  plan.threads =
      plan.units_per_thread == 0 ? kMaxThreads : static_cast<int>(round_up(ceil_div(units, plan.units_per_thread), 32));
  plan.blocks = groups;
  return plan;
}

namespace {

bool contiguous_runs(const CacheLayout& layout) {
  for (const CacheSide* side : {&layout.key, &layout.value})
    if ((side->heads.dim != 1 || side->cache.dim != 1) && layout.head_size > 1) return false;
  return true;
}

bool units_aligned(const CacheLayout& layout) {
  const auto step = [](std::int64_t stride, std::int64_t size) { return stride % kUnit == 0 || size == 1; };
  for (const CacheSide* side : {&layout.key, &layout.value}) {
    const HeadsView& h = side->heads;
    const PagedView& c = side->cache;
    if (!base_aligned(h.data, layout.real) || !base_aligned(c.data, layout.element)) return false;
    if (!step(h.token, layout.num_tokens) || !step(h.head, layout.num_heads)) return false;
    if (!step(c.block, layout.num_blocks) || !step(c.offset, layout.block_size) || !step(c.head, layout.num_heads))
      return false;
  }
  return layout.head_size % kUnit == 0;
}

// The paths without scales of their own. `max_slot`: the last that a token may be at.
CachePlan plan_cache(const CacheLayout& layout, std::int64_t max_slot) {
  CachePlan plan;
  plan.tokens = layout.num_tokens;
  if (!contiguous_runs(layout) || max_slot >= kMaxPiece || layout.num_heads * layout.head_size >= kMaxPiece) return plan;
  const bool aligned = units_aligned(layout);
  const std::int64_t units = units_per_run(layout.head_size, aligned);
  plan.path = MapPath::Runs;
  plan.aligned = aligned;
  plan.units_per_head = units;
  plan.tokens = std::min(plan.tokens, (kMaxPiece - 1) / (layout.num_heads * units));
  return plan;
}

}  // namespace

CachePlan plan_append(const CacheLayout& layout) {
  CachePlan plan = plan_cache(layout, layout.num_slots() - 1);
  constexpr std::int64_t kMany = 1 << 20;
  if (plan.aligned && plan.tokens * layout.num_heads * plan.units_per_head >= kMany) plan.threads = 128;
  return plan;
}

CachePlan plan_append_dynamic(const CacheLayout& layout) {
  CachePlan plan = plan_cache(layout, layout.num_slots() - 1);
  for (int units : {2, 4}) {
    if (plan.path == MapPath::Elements || plan.units_per_head > kWarp * units) continue;
    plan.units_per_thread = units;
    plan.threads_per_head = static_cast<int>(std::bit_ceil(static_cast<std::uint64_t>(ceil_div(plan.units_per_head, units))));
    plan.tokens = std::min(plan.tokens, (kMaxPiece - 1) / (layout.num_heads * plan.threads_per_head));
    return plan;
  }
  // A warp for each head, whatever its size.
  return {.tokens = layout.num_tokens, .threads_per_head = kWarp};
}

// Positions are int32 by themselves.
CachePlan plan_gather(const CacheLayout& layout) { return plan_cache(layout, 0); }

RopePlan plan_rope(const RopeLayout& layout) {
  const CacheLayout& cache = layout.cache;
  RopePlan plan;
  const std::int64_t heads = std::max<std::int64_t>(1, layout.num_heads + cache.num_heads), units = cache.head_size / kUnit;
  const bool norm = layout.norm_weights[0].data || layout.norm_weights[1].data;
  const auto rows_fit = [](const HeadsView& v, DType dtype) {
    return v.dim == 1 && v.head % kUnit == 0 && v.token % kUnit == 0 && base_aligned(v.data, dtype);
  };
  const auto cache_fits = [&](const PagedView& v) {
    return v.dim == 1 && v.head % kUnit == 0 && v.offset % kUnit == 0 && v.block % kUnit == 0 &&
           base_aligned(v.data, cache.element);
  };
  const auto vector_fits = [](const VectorView& v) {  // read by half units
    return !v.data || (v.step == 1 && reinterpret_cast<std::uintptr_t>(v.data) % (kUnit / 2 * size_of(v.dtype)) == 0);
  };
  const bool fits = size_of(cache.real) == 2 && is_fp8(cache.element) &&
                    (is_fp8(layout.query_element) || layout.query_element == cache.real) && cache.head_size % kUnit == 0 &&
                    layout.rotary_dim % kUnit == 0 && layout.cos_sin_row % (kUnit / 2) == 0 && cache.num_slots() < kMaxPiece &&
                    (!norm || units <= kWarp) && rows_fit(layout.query, cache.real) &&
                    rows_fit(layout.query_out, layout.query_element) && rows_fit(cache.key.heads, cache.real) &&
                    rows_fit(cache.value.heads, cache.real) && cache_fits(cache.key.cache) && cache_fits(cache.value.cache) &&
                    vector_fits(layout.cos_sin) && vector_fits(layout.norm_weights[0]) && vector_fits(layout.norm_weights[1]);
  if (fits) {
    plan.path = MapPath::Runs;
    plan.threads_per_head = static_cast<int>(norm ? std::bit_ceil(static_cast<std::uint64_t>(units)) : units);
    // Two heads share the loads of cosines, sines and weights, once there is enough to do for half as many threads.
    const std::int64_t work = cache.num_tokens * (layout.num_heads + 2 * cache.num_heads) * units;
    if (norm ? work > 1 << 17 : layout.rotary_dim > 0 && work > 1 << 18) plan.heads_per_thread = 2;
  }
  const std::int64_t most = (kMaxPiece - 1) / (2 * heads * plan.threads_per_head);
  plan.tokens = std::min(cache.num_tokens, std::max<std::int64_t>(1, most));
  return plan;
}

}  // namespace fp8kv
