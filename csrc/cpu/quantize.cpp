// Quantization on the CPU: which kernel gets which rows. The arithmetic is in kernels/.
#include "fp8kv/quantize.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <limits>

#include "core/chunks.h"
#include "core/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/row_iterator.h"
#include "cpu/rows.h"

namespace fp8kv::cpu {
namespace {

using core::Layout;

// Rows whose scale changes within a short block are taken in panels of columns; with long blocks, each block of a row gets a
// kernel call of its own.
bool scales_by_column(const Layout& layout) { return layout.inner().scale != 0 && layout.inner().block < core::kLongBlock; }

// --- Elementwise operations with given scales ----------

// Quantize or dequantize: the same path through memory with different kernels and element sizes.
struct Elementwise {
  const Layout& layout;
  StridedElements in, out;
  const float* scale;
  const ElementwiseKernels& kernels;
};

// Along the rows of a Layout.
StridedElements elements(const TensorView& view, std::int64_t stride) {
  return {static_cast<std::byte*>(view.data), size_of(view.dtype), stride};
}

Elementwise make_elementwise(const Layout& layout, const TensorView& input, const TensorView& result, const TensorView& scale,
                             const ElementwiseKernels& kernels) {
  return {.layout = layout,
          .in = elements(input, layout.inner().in),
          .out = elements(result, layout.inner().out),
          .scale = static_cast<const float*>(scale.data),
          .kernels = kernels};
}

// A panel of columns. Scales are made ready once for all rows that share them.
class ElementwisePanel {
 public:
  ElementwisePanel(const Elementwise& op, std::int64_t first_column, std::int64_t count)
      : op_(op), first_(first_column), count_(count) {}

  void row(std::int64_t in, std::int64_t out, std::int64_t scale) {
    if (scale != scale_) load_scales(scale);
    convert_strided_columns(op_.kernels, op_.in.at(in), op_.out.at(out), count_, scales_, 0);
  }

 private:
  void load_scales(std::int64_t scale) {
    const Layout::Dim& inner = op_.layout.inner();
    const float* from = op_.scale + scale;
    if (inner.block == 1) {
      for (std::int64_t i = 0; i < count_; ++i) scales_.scale[i] = from[(first_ + i) * inner.scale];
    } else {
      for (std::int64_t i = 0; i < count_; ++i) scales_.scale[i] = from[(first_ + i) / inner.block * inner.scale];
    }
    op_.kernels.prepare_columns(scales_, count_);
    scale_ = scale;
  }

  const Elementwise& op_;
  std::int64_t first_, count_;
  std::int64_t scale_ = -1;  // offset of the scales that are loaded; -1: none
  ColumnScales scales_;
};
static_assert(ColumnScales::kMaxCount >= kPanelColumns);

void run_elementwise(const Elementwise& op, const ParallelFor& parallel_for) {
  if (scales_by_column(op.layout)) {
    const std::int64_t item_size = std::min(op.layout.inner().size, kPanelColumns);
    return parallel(parallel_for, panel_items(op.layout), item_size,
                    [&](std::int64_t begin, std::int64_t end) { for_each_panel<ElementwisePanel>(op, op.layout, begin, end); });
  }
  parallel(parallel_for, op.layout.numel, 1, [&](std::int64_t begin, std::int64_t end) {
    for_each_row_segment(op.layout, begin, end, op.layout.numel,
                         [&](std::int64_t in, std::int64_t out, std::int64_t scale, std::int64_t columns, const Rows& rows) {
                           convert_strided_rows(op.kernels, op.in.at(in), op.out.at(out), columns, rows, op.scale + scale);
                         });
  });
}

// --- Largest magnitudes of groups ----------

struct Amax {
  const Layout& layout;
  StridedElements in;
  float* amax;
  const AmaxKernels& kernels;
};

Amax make_amax(const Layout& layout, const TensorView& input, const TensorView& amax) {
  return {.layout = layout,
          .in = elements(input, layout.inner().in),
          .amax = static_cast<float*>(amax.data),
          .kernels = kernels().amax[core::real_index(input.dtype)]};
}

// The order of the bit patterns: that of the values for all that are >= 0. Any order of merging gives the same result.
void merge_amax(float& amax, std::int32_t bits) {
  std::atomic_ref<float> shared(amax);
  float seen = shared.load(std::memory_order_relaxed);
  while (std::bit_cast<std::int32_t>(seen) < bits)
    if (shared.compare_exchange_weak(seen, std::bit_cast<float>(bits), std::memory_order_relaxed)) return;
}

// Merges neighboring segments of one group on the way.
void amax_of_segments(const Amax& a, std::int64_t begin, std::int64_t end) {
  std::int64_t group = -1;
  std::int32_t largest = 0, found[kMaxRows];
  for_each_row_segment(a.layout, begin, end, kMaxRows,
                       [&](std::int64_t in, std::int64_t, std::int64_t scale, std::int64_t columns, const Rows& rows) {
                         amax_strided_rows(a.kernels, a.in.at(in), found, columns, rows);
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

// A panel of columns, whose maxima are kept while rows that share scales pass by.
class AmaxPanel {
 public:
  AmaxPanel(const Amax& a, std::int64_t first_column, std::int64_t count) : a_(a), first_(first_column), count_(count) {}
  ~AmaxPanel() { flush(); }
  AmaxPanel(const AmaxPanel&) = delete;
  AmaxPanel& operator=(const AmaxPanel&) = delete;

  void row(std::int64_t in, std::int64_t, std::int64_t scale) {
    if (scale != scale_) {
      flush();
      std::fill(largest_, largest_ + count_, 0);
      scale_ = scale;
    }
    const StridedElements from = a_.in.at(in);
    if (from.stride == 1) return a_.kernels.columns(from.data, largest_, count_);
    read_staged(from, count_, [&](const void* x, std::int64_t n, std::int64_t i) { a_.kernels.columns(x, largest_ + i, n); });
  }

 private:
  void flush() {
    if (scale_ < 0) return;
    const Layout::Dim& inner = a_.layout.inner();
    for (std::int64_t i = 0; i < count_;) {
      const std::int64_t group = (first_ + i) / inner.block;
      const std::int64_t end = std::min(count_, (group + 1) * inner.block - first_);
      std::int32_t largest = 0;
      for (; i < end; ++i) largest = std::max(largest, largest_[i]);
      merge_amax(a_.amax[scale_ + group * inner.scale], largest);
    }
  }

  const Amax& a_;
  std::int64_t first_, count_;
  std::int64_t scale_ = -1;  // offset of the scales of the rows gathered; -1: none
  std::int32_t largest_[kPanelColumns];
};

void run_amax(const Amax& a, const ParallelFor& parallel_for) {
  if (scales_by_column(a.layout)) {
    const std::int64_t item_size = std::min(a.layout.inner().size, kPanelColumns);
    return parallel(parallel_for, panel_items(a.layout), item_size,
                    [&](std::int64_t begin, std::int64_t end) { for_each_panel<AmaxPanel>(a, a.layout, begin, end); });
  }
  parallel(parallel_for, a.layout.numel, 1, [&](std::int64_t begin, std::int64_t end) { amax_of_segments(a, begin, end); });
}

// --- Scales found from the input ----------

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

// Rows longer than this don't stay in the cache between two passes, and are better shared by the threads.
constexpr std::int64_t kCachedRow = 1 << 16;

// Each row is read twice, the second time from the cache.
void quantize_rows(const Elementwise& op, const Amax& amax, float upper_bound, const ParallelFor& parallel_for) {
  const std::int64_t columns = op.layout.inner().size;
  const std::int64_t max_rows = std::clamp<std::int64_t>(kCachedRow / 8 / columns, 1, kMaxRows);
  parallel(parallel_for, RowIterator::count(op.layout), columns, [&](std::int64_t begin, std::int64_t end) {
    for_each_row_segment(op.layout, begin * columns, end * columns, max_rows,
                         [&](std::int64_t in, std::int64_t out, std::int64_t scale, std::int64_t, const Rows& rows) {
                           Rows block = rows;
                           block.ahead = rows.count * columns * op.in.size;  // the next block, while this one is in the cache
                           quantize_strided_rows(op.kernels, amax.kernels, op.in.at(in), op.out.at(out), columns, block,
                                                 amax.amax + scale, upper_bound);
                         });
  });
}

void quantize_groups(const Elementwise& op, const Amax& amax, DType fp8, float upper_bound, const ParallelFor& parallel_for) {
  for_each_scale(op.layout, amax.amax, parallel_for, [](float& scale) { scale = 0.0f; });
  run_amax(amax, parallel_for);
  for_each_scale(op.layout, amax.amax, parallel_for, [=](float& scale) { scale = dynamic_scale_of(fp8, scale, upper_bound); });
  run_elementwise(op, parallel_for);
}

}  // namespace

void run(const StaticQuantize& problem, const ParallelFor& parallel_for) {
  const Layout layout = core::lower(problem);
  core::check_on_device({"static_scaled_fp8_quant", "input", problem.input}, Device{});
  if (layout.numel == 0) return;
  const ElementwiseKernels& found = kernels_for(problem.input.dtype, problem.result.dtype);
  run_elementwise(make_elementwise(layout, problem.input, problem.result, problem.scale, found), parallel_for);
}

void run(const DynamicQuantize& problem, const ParallelFor& parallel_for) {
  const Layout layout = core::lower(problem);
  core::check_on_device({"dynamic_scaled_fp8_quant", "input", problem.input}, Device{});
  const DType fp8 = problem.result.dtype;
  const Amax amax = make_amax(layout, problem.input, problem.scale);
  if (layout.numel == 0) {
    for_each_scale(layout, amax.amax, parallel_for, [=](float& scale) { scale = core::min_scale(fp8); });
    return;
  }
  const float upper_bound =
      problem.scale_ub ? *static_cast<const float*>(problem.scale_ub->data) : std::numeric_limits<float>::infinity();
  const ElementwiseKernels& found = kernels_for(problem.input.dtype, problem.result.dtype);
  const Elementwise op = make_elementwise(layout, problem.input, problem.result, problem.scale, found);
  if (core::rows_are_groups(layout) && layout.inner().size <= kCachedRow)
    quantize_rows(op, amax, upper_bound, parallel_for);
  else
    quantize_groups(op, amax, fp8, upper_bound, parallel_for);
}

void run(const Dequantize& problem, const ParallelFor& parallel_for) {
  const Layout layout = core::lower(problem);
  core::check_on_device({"scaled_fp8_dequant", "input", problem.input}, Device{});
  if (layout.numel == 0) return;
  const ElementwiseKernels& found = kernels_for(problem.input.dtype, problem.result.dtype);
  run_elementwise(make_elementwise(layout, problem.input, problem.result, problem.scale, found), parallel_for);
}

void run(const GroupAmax& problem, const ParallelFor& parallel_for) {
  const Layout layout = core::lower(problem);
  core::check_on_device({"group_amax", "input", problem.input}, Device{});
  if (layout.numel == 0) return;
  run_amax(make_amax(layout, problem.input, problem.amax), parallel_for);
}

}  // namespace fp8kv::cpu
