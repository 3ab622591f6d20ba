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

// Strided elements pass through the stack in pieces of this many.
constexpr std::int64_t kStaged = 512;

// Blocks at least this long along the run get a kernel call of their own.
constexpr std::int64_t kLongBlock = 16;

// Copies elements of `size` bytes between strided places.
template <class T>
void copy_elements(const std::byte* from, std::int64_t from_stride, std::byte* to, std::int64_t to_stride, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i)
    std::memcpy(to + i * to_stride * sizeof(T), from + i * from_stride * sizeof(T), sizeof(T));
}

void copy_elements(int size, const std::byte* from, std::int64_t from_stride, std::byte* to, std::int64_t to_stride,
                   std::int64_t count) {
  switch (size) {
    case 1: return copy_elements<std::uint8_t>(from, from_stride, to, to_stride, count);
    case 2: return copy_elements<std::uint16_t>(from, from_stride, to, to_stride, count);
    default: return copy_elements<std::uint32_t>(from, from_stride, to, to_stride, count);
  }
}

// --- Elementwise operations with given scales --------------------------------------------------------------------------------

// Quantize or dequantize: the same walk over different kernels and element sizes.
struct Map {
  const Layout& layout;
  const std::byte* in;
  std::byte* out;
  const float* scale;
  int in_size, out_size;
  MapKernels kernels;
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

// `count` elements along the run from element offsets `in` and `out`. With `columns`, scale[i] is that of element i.
void map_piece(const Map& map, std::int64_t in, std::int64_t out, std::int64_t count, const float* scale, bool columns) {
  const Layout::Dim& run = map.layout.run();
  const MapKernel kernel = columns ? map.kernels.columns : map.kernels.run;
  const std::byte* from = map.in + in * map.in_size;
  std::byte* to = map.out + out * map.out_size;
  if (run.in == 1 && run.out == 1) return kernel(from, to, count, scale);

  alignas(64) std::byte in_staged[kStaged * sizeof(float)], out_staged[kStaged * sizeof(float)];
  for (std::int64_t i = 0; i < count; i += kStaged) {
    const std::int64_t n = std::min(kStaged, count - i);
    copy_elements(map.in_size, from + i * run.in * map.in_size, run.in, in_staged, 1, n);
    kernel(in_staged, out_staged, n, columns ? scale + i : scale);
    copy_elements(map.out_size, out_staged, 1, to + i * run.out * map.out_size, run.out, n);
  }
}

// As map_piece, for `count` elements from `column` of a run whose first scale is scale[0].
void map_columns(const Map& map, std::int64_t in, std::int64_t out, std::int64_t column, std::int64_t count,
                 const float* scale) {
  const Layout::Dim& run = map.layout.run();
  in += column * run.in;
  out += column * run.out;
  if (run.scale == 0) return map_piece(map, in, out, count, scale, false);
  if (run.scale == 1 && run.block == 1) return map_piece(map, in, out, count, scale + column, true);

  float staged[kStaged];
  for (std::int64_t i = 0; i < count;) {
    const std::int64_t group = (column + i) / run.block;
    if (run.block >= kLongBlock) {
      const std::int64_t n = std::min((group + 1) * run.block - column - i, count - i);
      map_piece(map, in + i * run.in, out + i * run.out, n, scale + group * run.scale, false);
      i += n;
    } else {
      const std::int64_t n = std::min(kStaged, count - i);
      std::int64_t phase = (column + i) % run.block;
      const float* next = scale + group * run.scale;
      for (std::int64_t j = 0; j < n; ++j) {
        staged[j] = *next;
        if (++phase == run.block) phase = 0, next += run.scale;
      }
      map_piece(map, in + i * run.in, out + i * run.out, n, staged, true);
      i += n;
    }
  }
}

void run_map(const Map& map, const ParallelFor& parallel_for) {
  parallel(parallel_for, map.layout.numel, 1, [&](std::int64_t begin, std::int64_t end) {
    for_each_run_part(map.layout, begin, end, [&](const Runs& runs, std::int64_t column, std::int64_t count) {
      map_columns(map, runs.in(), runs.out(), column, count, map.scale + runs.scale());
    });
  });
}

// --- Largest magnitudes of groups ------------------------------------------------------------------------------------------

struct Amax {
  const Layout& layout;
  const std::byte* in;
  float* amax;
  int in_size;
  AmaxKernel kernel;
  AmaxColumnsKernel columns_kernel;
};

Amax make_amax(const Layout& layout, const TensorView& input, const TensorView& amax) {
  const int type = real_index(input.dtype);
  return {.layout = layout,
          .in = static_cast<const std::byte*>(input.data),
          .amax = static_cast<float*>(amax.data),
          .in_size = size_of(input.dtype),
          .kernel = kernels().amax[type],
          .columns_kernel = kernels().amax_columns[type]};
}

// The order of the bit patterns: that of the values for all that are >= 0. Any order of merging gives the same result.
void merge_amax(float& amax, std::int32_t bits) {
  std::atomic_ref<float> shared(amax);
  float seen = shared.load(std::memory_order_relaxed);
  while (std::bit_cast<std::int32_t>(seen) < bits)
    if (shared.compare_exchange_weak(seen, std::bit_cast<float>(bits), std::memory_order_relaxed)) return;
}

// The largest finite magnitude of `count` elements along the run from element offset `in`.
std::int32_t amax_piece(const Amax& a, std::int64_t in, std::int64_t count) {
  const std::int64_t stride = a.layout.run().in;
  const std::byte* from = a.in + in * a.in_size;
  if (stride == 1) return a.kernel(from, count);
  alignas(64) std::byte staged[kStaged * sizeof(float)];
  std::int32_t largest = 0;
  for (std::int64_t i = 0; i < count; i += kStaged) {
    const std::int64_t n = std::min(kStaged, count - i);
    copy_elements(a.in_size, from + i * stride * a.in_size, stride, staged, 1, n);
    largest = std::max(largest, a.kernel(staged, n));
  }
  return largest;
}

// One scale a run: neighbouring pieces of one group are merged on the way.
void amax_of_runs(const Amax& a, const ParallelFor& parallel_for) {
  parallel(parallel_for, a.layout.numel, 1, [&](std::int64_t begin, std::int64_t end) {
    std::int64_t group = -1;
    std::int32_t largest = 0;
    for_each_run_part(a.layout, begin, end, [&](const Runs& runs, std::int64_t column, std::int64_t count) {
      if (runs.scale() != group) {
        if (group >= 0) merge_amax(a.amax[group], largest);
        group = runs.scale();
        largest = 0;
      }
      largest = std::max(largest, amax_piece(a, runs.in() + column * a.layout.run().in, count));
    });
    merge_amax(a.amax[group], largest);
  });
}

// Scales that change along the run: the maxima of a strip of columns are kept while rows pass by.
class Strip {
 public:
  static constexpr std::int64_t kColumns = 2048;

  Strip(const Amax& a, std::int64_t first_column)
      : a_(a), first_(first_column), count_(std::min(kColumns, a.layout.run().size - first_column)) {}
  ~Strip() { flush(); }
  Strip(const Strip&) = delete;
  Strip& operator=(const Strip&) = delete;

  void add(std::int64_t in, std::int64_t scale) {
    if (scale != scale_) flush();
    if (scale_ < 0) {
      std::fill(largest_, largest_ + count_, 0);
      scale_ = scale;
    }
    const std::int64_t stride = a_.layout.run().in;
    const std::byte* from = a_.in + (in + first_ * stride) * a_.in_size;
    if (stride == 1) return a_.columns_kernel(from, count_, largest_);
    alignas(64) std::byte staged[kStaged * sizeof(float)];
    for (std::int64_t i = 0; i < count_; i += kStaged) {
      const std::int64_t n = std::min(kStaged, count_ - i);
      copy_elements(a_.in_size, from + i * stride * a_.in_size, stride, staged, 1, n);
      a_.columns_kernel(staged, n, largest_ + i);
    }
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
    scale_ = -1;
  }

  const Amax& a_;
  std::int64_t first_, count_;
  std::int64_t scale_ = -1;  // offset of the row's scales; -1: nothing gathered
  std::int32_t largest_[kColumns];
};

void amax_of_columns(const Amax& a, const ParallelFor& parallel_for) {
  const std::int64_t columns = a.layout.run().size;
  const std::int64_t strips = (columns + Strip::kColumns - 1) / Strip::kColumns;
  const std::int64_t rows = Runs::count(a.layout);
  parallel(parallel_for, strips * rows, std::min(columns, Strip::kColumns), [&](std::int64_t begin, std::int64_t end) {
    while (begin < end) {
      const std::int64_t first_row = begin % rows;
      const std::int64_t count = std::min(rows - first_row, end - begin);
      Strip strip(a, begin / rows * Strip::kColumns);
      Runs runs(a.layout, first_row);
      for (std::int64_t i = 0; i < count; ++i, runs.advance()) strip.add(runs.in(), runs.scale());
      begin += count;
    }
  });
}

void run_amax(const Amax& a, const ParallelFor& parallel_for) {
  a.layout.run().scale == 0 ? amax_of_runs(a, parallel_for) : amax_of_columns(a, parallel_for);
}

// --- Scales found from the input ---------------------------------------------------------------------------------------------

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

bool runs_are_groups(const Layout& layout) {
  if (layout.run().scale != 0 || layout.run().size > kCachedRun || layout.flat_rows != 0) return false;
  for (int d = 0; d + 1 < layout.ndim; ++d)
    if (layout.dims[d].block != 1 || layout.dims[d].scale == 0) return false;
  return true;
}

// Each run is read twice, the second time from the cache.
void quantize_runs(const Map& map, const Amax& amax, DType fp8, float upper_bound, const ParallelFor& parallel_for) {
  const std::int64_t size = map.layout.run().size;
  parallel(parallel_for, Runs::count(map.layout), size, [&](std::int64_t begin, std::int64_t end) {
    Runs runs(map.layout, begin);
    for (std::int64_t i = begin; i < end; ++i, runs.advance()) {
      float& scale = amax.amax[runs.scale()];
      scale = scale_of(fp8, std::bit_cast<float>(amax_piece(amax, runs.in(), size)), upper_bound);
      map_piece(map, runs.in(), runs.out(), size, &scale, false);
    }
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
  const auto quantize = runs_are_groups(layout) ? quantize_runs : quantize_groups;
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
