// Quantization on the CPU: which kernel gets which piece. The arithmetic is in quantize_kernels.h.
#include "fp8kv/quantize.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <limits>

#include "fp8kv/fp8.h"
#include "launch.h"
#include "layout.h"
#include "parallel.h"
#include "quantize_table.h"
#include "runs.h"

namespace fp8kv::cpu {
namespace {

// Runs whose scale changes at every so many elements or sooner are walked in strips of columns; with longer blocks, each block
// of a run gets a kernel call of its own.
constexpr std::int64_t kLongBlock = 16;

bool scales_by_column(const Layout& layout) { return layout.run().scale != 0 && layout.run().block < kLongBlock; }

// --- Elementwise operations with given scales --------------------------------

// Quantize or dequantize: the same walk over different kernels and element sizes.
struct Map {
  const Layout& layout;
  Elements in, out;
  const float* scale;
  const MapKernels& kernels;
};

// Along the runs of a Layout.
Elements elements(const TensorView& view, std::int64_t stride) {
  return {static_cast<std::byte*>(view.data), size_of(view.dtype), stride};
}

Map make_map(const Layout& layout, const TensorView& input, const TensorView& result, const TensorView& scale,
             const MapKernels& kernels) {
  return {.layout = layout,
          .in = elements(input, layout.run().in),
          .out = elements(result, layout.run().out),
          .scale = static_cast<const float*>(scale.data),
          .kernels = kernels};
}

// A strip of columns. Scales are made ready once for all rows that share them.
class MapStrip {
 public:
  MapStrip(const Map& map, std::int64_t first_column, std::int64_t count) : map_(map), first_(first_column), count_(count) {}

  void row(std::int64_t in, std::int64_t out, std::int64_t scale) {
    if (scale != scale_) load_scales(scale);
    const Elements from = map_.in.at(in), to = map_.out.at(out);
    if (core::contiguous_runs(map_.layout)) return map_.kernels.columns(from.data, to.data, count_, scales_, 0);
    map_staged(from, to, count_,
               [&](const void* x, void* y, std::int64_t n, std::int64_t i) { map_.kernels.columns(x, y, n, scales_, i); });
  }

 private:
  void load_scales(std::int64_t scale) {
    const Layout::Dim& run = map_.layout.run();
    const float* from = map_.scale + scale;
    if (run.block == 1) {
      for (std::int64_t i = 0; i < count_; ++i) scales_.scale[i] = from[(first_ + i) * run.scale];
    } else {
      for (std::int64_t i = 0; i < count_; ++i) scales_.scale[i] = from[(first_ + i) / run.block * run.scale];
    }
    map_.kernels.prepare_columns(scales_, count_);
    scale_ = scale;
  }

  const Map& map_;
  std::int64_t first_, count_;
  std::int64_t scale_ = -1;  // offset of the scales that are loaded; -1: none
  ColumnScales scales_;
};
static_assert(ColumnScales::kMaxCount >= kStripColumns);

void run_map(const Map& map, const ParallelFor& parallel_for) {
  if (scales_by_column(map.layout)) {
    const std::int64_t item_size = std::min(map.layout.run().size, kStripColumns);
    return parallel(parallel_for, strip_items(map.layout), item_size,
                    [&](std::int64_t begin, std::int64_t end) { for_each_strip<MapStrip>(map, map.layout, begin, end); });
  }
  parallel(parallel_for, map.layout.numel, 1, [&](std::int64_t begin, std::int64_t end) {
    for_each_piece(map.layout, begin, end, map.layout.numel,
                   [&](std::int64_t in, std::int64_t out, std::int64_t scale, std::int64_t columns, const Rows& rows) {
                     map_rows(map.kernels, map.in.at(in), map.out.at(out), columns, rows, map.scale + scale);
                   });
  });
}

// --- Largest magnitudes of groups --------------------------------

struct Amax {
  const Layout& layout;
  Elements in;
  float* amax;
  const AmaxKernels& kernels;
};

Amax make_amax(const Layout& layout, const TensorView& input, const TensorView& amax) {
  return {.layout = layout,
          .in = elements(input, layout.run().in),
          .amax = static_cast<float*>(amax.data),
          .kernels = kernels().amax[real_index(input.dtype)]};
}

// The order of the bit patterns: that of the values for all that are >= 0. Any order of merging gives the same result.
void merge_amax(float& amax, std::int32_t bits) {
  std::atomic_ref<float> shared(amax);
  float seen = shared.load(std::memory_order_relaxed);
  while (std::bit_cast<std::int32_t>(seen) < bits)
    if (shared.compare_exchange_weak(seen, std::bit_cast<float>(bits), std::memory_order_relaxed)) return;
}

// Merges neighbouring pieces of one group on the way.
void amax_of_pieces(const Amax& a, std::int64_t begin, std::int64_t end) {
  std::int64_t group = -1;
  std::int32_t largest = 0, found[kMaxRows];
  for_each_piece(a.layout, begin, end, kMaxRows,
                 [&](std::int64_t in, std::int64_t, std::int64_t scale, std::int64_t columns, const Rows& rows) {
                   amax_rows(a.kernels, a.in.at(in), found, columns, rows);
                   for (std::int64_t r = 0; r < rows.count; ++r, scale += rows.scale) {
                     if (scale != group) {
                       if (group >= 0) merge_amax(a.amax[group], largest);
                       group = scale;
                       largest = 0;
                     }
                     largest = std::max(largest, found[r]);
                   }
                 });
  merge_amax(a.amax[group], largest);
}

// A strip of columns, whose maxima are kept while rows that share scales pass by.
class AmaxStrip {
 public:
  AmaxStrip(const Amax& a, std::int64_t first_column, std::int64_t count) : a_(a), first_(first_column), count_(count) {}
  ~AmaxStrip() { flush(); }
  AmaxStrip(const AmaxStrip&) = delete;
  AmaxStrip& operator=(const AmaxStrip&) = delete;

  void row(std::int64_t in, std::int64_t, std::int64_t scale) {
    if (scale != scale_) {
      flush();
      std::fill(largest_, largest_ + count_, 0);
      scale_ = scale;
    }
    const Elements from = a_.in.at(in);
    if (from.stride == 1) return a_.kernels.columns(from.data, largest_, count_);
    read_staged(from, count_, [&](const void* x, std::int64_t n, std::int64_t i) { a_.kernels.columns(x, largest_ + i, n); });
  }

 private:
  void flush() {
    if (scale_ < 0) return;
    const Layout::Dim& run = a_.layout.run();
    for (std::int64_t i = 0; i < count_;) {
      const std::int64_t group = (first_ + i) / run.block;
      const std::int64_t end = std::min(count_, (group + 1) * run.block - first_);
      std::int32_t largest = 0;
      for (; i < end; ++i) largest = std::max(largest, largest_[i]);
      merge_amax(a_.amax[scale_ + group * run.scale], largest);
    }
  }

  const Amax& a_;
  std::int64_t first_, count_;
  std::int64_t scale_ = -1;  // offset of the scales of the rows gathered; -1: none
  std::int32_t largest_[kStripColumns];
};

void run_amax(const Amax& a, const ParallelFor& parallel_for) {
  if (scales_by_column(a.layout)) {
    const std::int64_t item_size = std::min(a.layout.run().size, kStripColumns);
    return parallel(parallel_for, strip_items(a.layout), item_size,
                    [&](std::int64_t begin, std::int64_t end) { for_each_strip<AmaxStrip>(a, a.layout, begin, end); });
  }
  parallel(parallel_for, a.layout.numel, 1, [&](std::int64_t begin, std::int64_t end) { amax_of_pieces(a, begin, end); });
}

// --- Scales found from the input --------------------------------

// visit(scale) for every element of the scale tensor.
template <class Visit>
void for_each_scale(const Layout& layout, float* scales, const ParallelFor& parallel_for, const Visit& visit) {
  parallel(parallel_for, layout.num_groups, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t group = begin; group < end; ++group) {
      std::int64_t rest = group, offset = 0;
      for (int d = layout.scale_ndim - 1; d >= 0; --d) {
        offset += rest % layout.scale_sizes[d] * layout.scale_strides[d];
        rest /= layout.scale_sizes[d];
      }
      visit(scales[offset]);
    }
  });
}

// Runs longer than this don't stay in the cache between two passes, and are better shared by the threads.
constexpr std::int64_t kCachedRun = 1 << 16;

// Each run is read twice, the second time from the cache.
void quantize_runs(const Map& map, const Amax& amax, DType fp8, float upper_bound, const ParallelFor& parallel_for) {
  const std::int64_t columns = map.layout.run().size;
  const std::int64_t max_rows = std::clamp<std::int64_t>(kCachedRun / 4 / columns, 1, kMaxRows);
  parallel(parallel_for, Runs::count(map.layout), columns, [&](std::int64_t begin, std::int64_t end) {
    for_each_piece(map.layout, begin * columns, end * columns, max_rows,
                   [&](std::int64_t in, std::int64_t out, std::int64_t scale, std::int64_t, const Rows& rows) {
                     std::int32_t largest[kMaxRows];
                     amax_rows(amax.kernels, amax.in.at(in), largest, columns, rows);
                     float* scales = amax.amax + scale;
                     for (std::int64_t r = 0; r < rows.count; ++r)
                       scales[r * rows.scale] = scale_of(fp8, std::bit_cast<float>(largest[r]), upper_bound);
                     map_rows(map.kernels, map.in.at(in), map.out.at(out), columns, rows, scales);
                   });
  });
}

void quantize_groups(const Map& map, const Amax& amax, DType fp8, float upper_bound, const ParallelFor& parallel_for) {
  for_each_scale(map.layout, amax.amax, parallel_for, [](float& scale) { scale = 0.0f; });
  run_amax(amax, parallel_for);
  for_each_scale(map.layout, amax.amax, parallel_for, [=](float& scale) { scale = scale_of(fp8, scale, upper_bound); });
  run_map(map, parallel_for);
}

}  // namespace

void run(const StaticQuantize& problem, const ParallelFor& parallel_for) {
  const Layout layout = validate(problem);
  check_cpu("static_scaled_fp8_quant", "input", problem.input);
  if (layout.numel == 0) return;
  const MapKernels& found = kernels().quantize[real_index(problem.input.dtype)][fp8_index(problem.result.dtype)];
  run_map(make_map(layout, problem.input, problem.result, problem.scale, found), parallel_for);
}

void run(const DynamicQuantize& problem, const ParallelFor& parallel_for) {
  const Layout layout = validate(problem);
  check_cpu("dynamic_scaled_fp8_quant", "input", problem.input);
  const DType fp8 = problem.result.dtype;
  const Amax amax = make_amax(layout, problem.input, problem.scale);
  if (layout.numel == 0) {
    for_each_scale(layout, amax.amax, parallel_for, [=](float& scale) { scale = min_scale(fp8); });
    return;
  }
  const float upper_bound =
      problem.scale_ub ? *static_cast<const float*>(problem.scale_ub->data) : std::numeric_limits<float>::infinity();
  const MapKernels& found = kernels().quantize[real_index(problem.input.dtype)][fp8_index(fp8)];
  const Map map = make_map(layout, problem.input, problem.result, problem.scale, found);
  const bool in_cache = core::runs_are_groups(layout) && layout.run().size <= kCachedRun;
  const auto quantize = in_cache ? quantize_runs : quantize_groups;
  quantize(map, amax, fp8, upper_bound, parallel_for);
}

void run(const Dequantize& problem, const ParallelFor& parallel_for) {
  const Layout layout = validate(problem);
  check_cpu("scaled_fp8_dequant", "input", problem.input);
  if (layout.numel == 0) return;
  const MapKernels& found = kernels().dequantize[fp8_index(problem.input.dtype)][real_index(problem.result.dtype)];
  run_map(make_map(layout, problem.input, problem.result, problem.scale, found), parallel_for);
}

void run(const GroupAmax& problem, const ParallelFor& parallel_for) {
  const Layout layout = validate(problem);
  check_cpu("group_amax", "input", problem.input);
  if (layout.numel == 0) return;
  run_amax(make_amax(layout, problem.input, problem.amax), parallel_for);
}

}  // namespace fp8kv::cpu
