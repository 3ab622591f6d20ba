// Quantization on the CPU: which kernel gets which piece. The arithmetic is in quantize_kernels.h.
#include "fp8kv/quantize.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstring>
#include <limits>

#include "dispatch.h"
#include "fp8kv/error.h"
#include "fp8kv/fp8.h"
#include "layout.h"
#include "parallel.h"
#include "quantize_table.h"
#include "runs.h"

namespace fp8kv::cpu {
namespace {

const QuantizeTable& kernels() {
#if defined(FP8KV_X86)
  return pick(generic::quantize_table, avx2::quantize_table, avx512::quantize_table);
#else
  return pick(generic::quantize_table, generic::quantize_table, generic::quantize_table);
#endif
}

void check_cpu(const char* op, const TensorView& input) {
  if (input.device.type != Device::Type::CPU) fail(op, "input", "be on the cpu", device_string(input.device));
}

// Runs whose scale changes at every so many elements or sooner are walked in strips of columns; with longer blocks, each block
// of a run gets a kernel call of its own.
constexpr std::int64_t kLongBlock = 16;

bool scales_by_column(const Layout& layout) { return layout.run().scale != 0 && layout.run().block < kLongBlock; }

// Strided elements pass through the stack in pieces of this many.
constexpr std::int64_t kStaged = 512;

struct Stage {
  alignas(64) std::byte data[kStaged * sizeof(float)];
};

template <class T>
void copy_elements(const std::byte* from, std::int64_t from_stride, std::byte* to, std::int64_t to_stride, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i)
    std::memcpy(to + i * to_stride * sizeof(T), from + i * from_stride * sizeof(T), sizeof(T));
}

// Between strided places; strides count elements of `size` bytes.
void copy_elements(int size, const std::byte* from, std::int64_t from_stride, std::byte* to, std::int64_t to_stride,
                   std::int64_t count) {
  switch (size) {
    case 1: return copy_elements<std::uint8_t>(from, from_stride, to, to_stride, count);
    case 2: return copy_elements<std::uint16_t>(from, from_stride, to, to_stride, count);
    default: return copy_elements<std::uint32_t>(from, from_stride, to, to_stride, count);
  }
}

// --- Elementwise operations with given scales --------------------------------

// Quantize or dequantize: the same walk over different kernels and element sizes.
struct Map {
  const Layout& layout;
  const std::byte* in;
  std::byte* out;
  const float* scale;
  int in_size, out_size;
  const MapKernels& kernels;
};

Map make_map(const Layout& layout, const TensorView& input, const TensorView& result, const TensorView& scale,
             const MapKernels& kernels) {
  return {.layout = layout,
          .in = static_cast<const std::byte*>(input.data),
          .out = static_cast<std::byte*>(result.data),
          .scale = static_cast<const float*>(scale.data),
          .in_size = size_of(input.dtype),
          .out_size = size_of(result.dtype),
          .kernels = kernels};
}

// kernel(from, to, n, i) for elements [i, i + n) of `count` along the run from the offsets `in` and `out`, by way of the stack.
template <class Kernel>
void map_staged(const Map& map, std::int64_t in, std::int64_t out, std::int64_t count, const Kernel& kernel) {
  const Layout::Dim& run = map.layout.run();
  const std::byte* from = map.in + in * map.in_size;
  std::byte* to = map.out + out * map.out_size;
  Stage before, after;
  for (std::int64_t i = 0; i < count; i += kStaged) {
    const std::int64_t n = std::min(kStaged, count - i);
    copy_elements(map.in_size, from + i * run.in * map.in_size, run.in, before.data, 1, n);
    kernel(before.data, after.data, n, i);
    copy_elements(map.out_size, after.data, 1, to + i * run.out * map.out_size, run.out, n);
  }
}

void map_piece(const Map& map, std::int64_t in, std::int64_t out, const float* scale, std::int64_t columns, const Rows& rows) {
  if (core::contiguous_runs(map.layout))
    return map.kernels.rows(map.in + in * map.in_size, map.out + out * map.out_size, scale, columns, rows);
  for (std::int64_t r = 0; r < rows.count; ++r, in += rows.in, out += rows.out, scale += rows.scale)
    map_staged(map, in, out, columns,
               [&](const void* from, void* to, std::int64_t n, std::int64_t) { map.kernels.rows(from, to, scale, n, Rows{}); });
}

// A strip of columns. Scales are made ready once for all rows that share them.
class MapStrip {
 public:
  MapStrip(const Map& map, std::int64_t first_column, std::int64_t count) : map_(map), first_(first_column), count_(count) {}

  void row(std::int64_t in, std::int64_t out, std::int64_t scale) {
    if (scale != scale_) load_scales(scale);
    if (core::contiguous_runs(map_.layout))
      return map_.kernels.columns(map_.in + in * map_.in_size, map_.out + out * map_.out_size, count_, scales_, 0);
    map_staged(map_, in, out, count_, [&](const void* from, void* to, std::int64_t n, std::int64_t i) {
      map_.kernels.columns(from, to, n, scales_, i);
    });
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
    map_.kernels.prepare(scales_, count_);
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
                     map_piece(map, in, out, map.scale + scale, columns, rows);
                   });
  });
}

// --- Largest magnitudes of groups --------------------------------

struct Amax {
  const Layout& layout;
  const std::byte* in;
  float* amax;
  int in_size;
  const AmaxKernels& kernels;
};

Amax make_amax(const Layout& layout, const TensorView& input, const TensorView& amax) {
  return {.layout = layout,
          .in = static_cast<const std::byte*>(input.data),
          .amax = static_cast<float*>(amax.data),
          .in_size = size_of(input.dtype),
          .kernels = kernels().amax[real_index(input.dtype)]};
}

// The order of the bit patterns: that of the values for all that are >= 0. Any order of merging gives the same result.
void merge_amax(float& amax, std::int32_t bits) {
  std::atomic_ref<float> shared(amax);
  float seen = shared.load(std::memory_order_relaxed);
  while (std::bit_cast<std::int32_t>(seen) < bits)
    if (shared.compare_exchange_weak(seen, std::bit_cast<float>(bits), std::memory_order_relaxed)) return;
}

// kernel(from, n, i) for elements [i, i + n) of `count` along the run from the offset `in`, by way of the stack.
template <class Kernel>
void amax_staged(const Amax& a, std::int64_t in, std::int64_t count, const Kernel& kernel) {
  const std::int64_t stride = a.layout.run().in;
  const std::byte* from = a.in + in * a.in_size;
  Stage stage;
  for (std::int64_t i = 0; i < count; i += kStaged) {
    const std::int64_t n = std::min(kStaged, count - i);
    copy_elements(a.in_size, from + i * stride * a.in_size, stride, stage.data, 1, n);
    kernel(stage.data, n, i);
  }
}

// Rows that are looked at together.
constexpr std::int64_t kMaxRows = 64;

void amax_piece(const Amax& a, std::int64_t in, std::int32_t* largest, std::int64_t columns, const Rows& rows) {
  if (a.layout.run().in == 1) return a.kernels.rows(a.in + in * a.in_size, largest, columns, rows);
  for (std::int64_t r = 0; r < rows.count; ++r, in += rows.in) {
    largest[r] = 0;
    amax_staged(a, in, columns, [&](const void* from, std::int64_t n, std::int64_t) {
      std::int32_t part;
      a.kernels.rows(from, &part, n, Rows{});
      largest[r] = std::max(largest[r], part);
    });
  }
}

// Merges neighbouring pieces of one group on the way.
void amax_of_pieces(const Amax& a, std::int64_t begin, std::int64_t end) {
  std::int64_t group = -1;
  std::int32_t largest = 0, found[kMaxRows];
  for_each_piece(a.layout, begin, end, kMaxRows,
                 [&](std::int64_t in, std::int64_t, std::int64_t scale, std::int64_t columns, const Rows& rows) {
                   amax_piece(a, in, found, columns, rows);
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
    if (a_.layout.run().in == 1) return a_.kernels.columns(a_.in + in * a_.in_size, largest_, count_);
    amax_staged(a_, in, count_,
                [&](const void* from, std::int64_t n, std::int64_t i) { a_.kernels.columns(from, largest_ + i, n); });
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

// Not inlined or analysed: its division must stay where the floating-point environment is set.
[[gnu::noipa]] float scale_of(DType fp8, float amax, float upper_bound) {
  return fp8 == DType::E4M3 ? dynamic_scale<E4M3>(amax, upper_bound) : dynamic_scale<E5M2>(amax, upper_bound);
}

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
                     amax_piece(amax, in, largest, columns, rows);
                     float* scales = amax.amax + scale;
                     for (std::int64_t r = 0; r < rows.count; ++r)
                       scales[r * rows.scale] = scale_of(fp8, std::bit_cast<float>(largest[r]), upper_bound);
                     map_piece(map, in, out, scales, columns, rows);
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
  check_cpu("static_scaled_fp8_quant", problem.input);
  if (layout.numel == 0) return;
  const MapKernels& found = kernels().quantize[real_index(problem.input.dtype)][fp8_index(problem.result.dtype)];
  run_map(make_map(layout, problem.input, problem.result, problem.scale, found), parallel_for);
}

void run(const DynamicQuantize& problem, const ParallelFor& parallel_for) {
  const Layout layout = validate(problem);
  check_cpu("dynamic_scaled_fp8_quant", problem.input);
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
  check_cpu("scaled_fp8_dequant", problem.input);
  if (layout.numel == 0) return;
  const MapKernels& found = kernels().dequantize[fp8_index(problem.input.dtype)][real_index(problem.result.dtype)];
  run_map(make_map(layout, problem.input, problem.result, problem.scale, found), parallel_for);
}

void run(const GroupAmax& problem, const ParallelFor& parallel_for) {
  const Layout layout = validate(problem);
  check_cpu("group_amax", problem.input);
  if (layout.numel == 0) return;
  run_amax(make_amax(layout, problem.input, problem.amax), parallel_for);
}

}  // namespace fp8kv::cpu
