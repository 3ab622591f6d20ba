// Elementwise operations with given scales: the kernels behind StaticQuantize and Dequantize, one for each MapPath.
#pragma once

#include "convert.h"
#include "dependent_launch.h"
#include "fp8kv/plan.h"
#include "launch.h"
#include "layout.h"
#include "pieces.h"
#include "scale.h"
#include "unit.h"
#include "visit.h"
#include "walk.h"

namespace fp8kv::cuda {

using device::Cut;
using device::cut_unit;
using device::Offsets;
using device::Range;
using device::Unit;
using device::Walk;

// MapPath::Runs. One unit a thread. kGapless: the whole input and the whole result are one contiguous piece each, so that the
// data can be asked for before it is known which scale belongs to it.
template <class Op, class In, class Out, int kOuter, bool kGapless>
__global__ void __launch_bounds__(256) map_runs(const In* __restrict__ input, Out* __restrict__ result,
                                                const float* __restrict__ scales, const __grid_constant__ Walk walk) {
  std::uint32_t unit = blockIdx.x * blockDim.x + threadIdx.x;
  if (unit >= walk.count) return;
  device::overlap_neighbors();
  std::int64_t in = std::int64_t{unit} * kUnit, out = in;
  Unit<In> raw;
  if constexpr (kGapless) raw = device::load_aligned(input + in);
  Offsets at;
  if constexpr (kOuter != 0) at = walk.at<kOuter>(walk.units_per_run.divide(unit));
  if constexpr (!kGapless) {
    in = at.in + unit * kUnit;
    out = at.out + unit * kUnit;
    raw = device::load_aligned(input + in);
  }
  const auto scale = Op::prepare(__ldg(scales + at.scale));
  device::store_aligned(result + out, device::map_unit<Op, Out>(raw, scale));
}

// The same at any alignment.
template <class Op, class In, class Out>
__global__ void __launch_bounds__(256) map_runs_any(const In* __restrict__ input, Out* __restrict__ result,
                                                    const float* __restrict__ scales, const __grid_constant__ Walk walk) {
  std::uint32_t unit = blockIdx.x * blockDim.x + threadIdx.x;
  if (unit >= walk.count) return;
  device::overlap_neighbors();
  const Offsets at = walk.at<-1>(walk.units_per_run.divide(unit));
  const Cut cut = cut_unit(result + at.out, unit, walk.run);
  if (cut.range.begin >= cut.range.end) return;
  const Unit<In> raw = device::load_any(input + at.in, cut.first, walk.run, cut.range);
  const auto scale = Op::prepare(__ldg(scales + at.scale));
  device::store_range(result + at.out + cut.first, device::map_unit<Op, Out>(raw, scale), cut.range);
}

// Scales that change within the run.
struct RunScales {
  std::int64_t stride;
  std::uint32_t period;  // elements after which they repeat, 0 for the whole run
  device::FastDiv block;
  bool vectors;  // aligned and one after the other: 8 at once

  __device__ __forceinline__ std::int64_t offset(std::uint32_t element) const { return block.quotient(element) * stride; }
};

template <class Op>
__device__ __forceinline__ void prepare_scales(typename Op::Prepared (&prepared)[kUnit], const float* scales,
                                               const RunScales& run, std::uint32_t first, Range range = {}) {
  if (run.vectors) {
    float values[kUnit];
    device::unpack(device::load_aligned(scales + first), values);
#pragma unroll
    for (int i = 0; i < kUnit; ++i) prepared[i] = Op::prepare(values[i]);
    return;
  }
  std::uint32_t element = run.period ? first % run.period : first;
#pragma unroll
  for (int i = 0; i < kUnit; ++i) {
    const bool valid = i >= range.begin && i < range.end;
    prepared[i] = Op::prepare(valid ? __ldg(scales + run.offset(element)) : 1.0f);
    if (++element == run.period) element = 0;
  }
}

struct Rows {
  std::uint32_t count;         // rows to walk
  device::FastDiv groups;      // of kRows rows
  std::int64_t in, out;        // strides
  std::int64_t last_row_size;  // elements of the last row: a folded one may be incomplete
};

// MapPath::Columns, aligned, one row a thread, in one contiguous piece: as map_runs.
template <class Op, class In, class Out>
__global__ void __launch_bounds__(256)
    map_columns_gapless(const In* __restrict__ input, Out* __restrict__ result, const float* __restrict__ scales,
                        const __grid_constant__ Walk walk, const __grid_constant__ RunScales run_scales) {
  std::uint32_t unit = blockIdx.x * blockDim.x + threadIdx.x;
  if (unit >= walk.count) return;
  device::overlap_neighbors();
  const std::int64_t first = std::int64_t{unit} * kUnit;
  const Unit<In> raw = device::load_aligned(input + first);
  walk.units_per_run.divide(unit);
  typename Op::Prepared prepared[kUnit];
  prepare_scales<Op>(prepared, scales, run_scales, unit * kUnit);
  float values[kUnit];
  device::unpack(raw, values);
  device::apply<Op>(prepared, values);
  device::store_aligned(result + first, device::pack<Out>(values));
}

// MapPath::Columns, aligned. A thread owns 8 columns: it prepares their scales once and walks kRows rows.
template <class Op, class In, class Out, int kRows>
__global__ void __launch_bounds__(256)
    map_columns(const In* __restrict__ input, Out* __restrict__ result, const float* __restrict__ scales,
                const __grid_constant__ Walk walk, const __grid_constant__ Rows rows,
                const __grid_constant__ RunScales run_scales) {
  std::uint32_t unit = blockIdx.x * blockDim.x + threadIdx.x;
  if (unit >= walk.count) return;
  device::overlap_neighbors();
  std::uint32_t group = walk.units_per_run.divide(unit);
  const std::uint32_t outer = rows.groups.divide(group);
  const Offsets at = walk.at<-1>(outer);
  const std::uint32_t column = unit * kUnit;
  const std::uint32_t row = group * kRows;
  const In* in = input + at.in + row * rows.in + column;
  Out* out = result + at.out + row * rows.out + column;

  Unit<In> raw[kRows];
  Range ranges[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const std::int64_t left = (row + r + 1 < rows.count    ? walk.run
                               : row + r + 1 == rows.count ? rows.last_row_size
                                                           : 0) -
                              column;
    ranges[r].end = left >= kUnit ? kUnit : left < 0 ? 0 : static_cast<int>(left);
    if (ranges[r].end == kUnit)
      raw[r] = device::load_aligned(in + r * rows.in);
    else if (ranges[r].end > 0)
      raw[r] = device::load_any(in + r * rows.in, 0, ranges[r].end, ranges[r]);
  }
  typename Op::Prepared prepared[kUnit];
  prepare_scales<Op>(prepared, scales + at.scale, run_scales, column);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (ranges[r].end == 0) return;
    float values[kUnit];
    device::unpack(raw[r], values);
    device::apply<Op>(prepared, values);
    device::store_range(out + r * rows.out, device::pack<Out>(values), ranges[r]);
  }
}

// MapPath::Columns, any alignment: units are cut anew in every row, so a thread takes one.
template <class Op, class In, class Out>
__global__ void __launch_bounds__(256)
    map_columns_any(const In* __restrict__ input, Out* __restrict__ result, const float* __restrict__ scales,
                    const __grid_constant__ Walk walk, const __grid_constant__ RunScales run_scales) {
  std::uint32_t unit = blockIdx.x * blockDim.x + threadIdx.x;
  if (unit >= walk.count) return;
  device::overlap_neighbors();
  const Offsets at = walk.at<-1>(walk.units_per_run.divide(unit));
  const Cut cut = cut_unit(result + at.out, unit, walk.run);
  if (cut.range.begin >= cut.range.end) return;
  const Unit<In> raw = device::load_any(input + at.in, cut.first, walk.run, cut.range);
  typename Op::Prepared prepared[kUnit];
  prepare_scales<Op>(prepared, scales + at.scale, run_scales, static_cast<std::uint32_t>(cut.first), cut.range);
  float values[kUnit];
  device::unpack(raw, values);
  device::apply<Op>(prepared, values);
  device::store_range(result + at.out + cut.first, device::pack<Out>(values), cut.range);
}

// The part of an element's scale offset that follows from its flat row (Layout::flat_rows).
struct FlatRows {
  std::int64_t group = 0;  // 0: not used
  std::int64_t scale = 0;
  std::int64_t first = 0;
  std::int64_t cols = 1;

  static FlatRows of(const core::Piece& piece) {
    const Layout& layout = piece.layout;
    return {layout.flat_rows, layout.flat_scale, piece.flat_row, layout.run().size};
  }
  __device__ __forceinline__ std::int64_t offset(std::uint32_t element) const {
    return group ? (first + element / cols) / group * scale : 0;
  }
};

// MapPath::Elements. One element a thread.
template <class Op, class In, class Out>
__global__ void __launch_bounds__(256)
    map_elements(const In* __restrict__ input, Out* __restrict__ result, const float* __restrict__ scales,
                 const __grid_constant__ Walk walk, const __grid_constant__ FlatRows flat) {
  const std::uint32_t element = blockIdx.x * blockDim.x + threadIdx.x;
  if (element >= walk.count) return;
  device::overlap_neighbors();
  const Offsets at = walk.at<-1>(element);
  const auto scale = Op::prepare(__ldg(scales + at.scale + flat.offset(element)));
  result[at.out] = device::map_element<Op, Out>(input[at.in], scale);
}

template <class Op, class In, class Out>
struct MapLauncher {
  const In* input;
  Out* result;
  const float* scales;
  cudaStream_t stream;

  void operator()(const core::Piece& piece, const MapPlan& plan) const {
    switch (plan.path) {
      case MapPath::Runs: return runs(piece, plan);
      case MapPath::Columns: return columns(piece, plan);
      case MapPath::Elements: return elements(piece, plan);
    }
  }

 private:
  template <class... Params>
  void launch(void (*kernel)(const In*, Out*, const float*, Params...), const core::Piece& piece, const MapPlan& plan,
              const Params&... params) const {
    launch_dependent(kernel, static_cast<unsigned>(plan.blocks), plan.threads, stream, input + piece.in, result + piece.out,
                     scales + piece.scale, params...);
  }

  void runs(const core::Piece& piece, const MapPlan& plan) const {
    const int outer = piece.layout.ndim - 1;
    const Walk walk = Walk::over(piece.layout, outer, plan.units_per_run, plan.work);
    if (!plan.aligned) return launch(map_runs_any<Op, In, Out>, piece, plan, walk);
    if (outer == 0) return launch(map_runs<Op, In, Out, 0, true>, piece, plan, walk);
    if (!plan.gapless) return launch(map_runs<Op, In, Out, -1, false>, piece, plan, walk);
    if (outer == 1) return launch(map_runs<Op, In, Out, 1, true>, piece, plan, walk);
    if (outer == 2) return launch(map_runs<Op, In, Out, 2, true>, piece, plan, walk);
    launch(map_runs<Op, In, Out, -1, true>, piece, plan, walk);
  }

  void columns(const core::Piece& piece, const MapPlan& plan) const {
    const Layout& layout = piece.layout;
    const Layout::Dim& run = layout.run();
    const bool folded = plan.rows_folded > 1;
    const bool vectors = plan.aligned && !folded && run.scale == 1 && run.block == 1 && scales_aligned(piece);
    const RunScales run_scales{run.scale, folded ? static_cast<std::uint32_t>(run.size) : 0u, device::FastDiv(run.block),
                               vectors};
    if (!plan.aligned)
      return launch(map_columns_any<Op, In, Out>, piece, plan,
                    Walk::over(layout, layout.ndim - 1, plan.units_per_run, plan.work), run_scales);
    Walk walk = Walk::over(layout, layout.ndim - (plan.walks ? 2 : 1), plan.units_per_run, plan.work);
    walk.run = run.size * plan.rows_folded;
    Rows rows{static_cast<std::uint32_t>(plan.rows), device::FastDiv(core::ceil_div(plan.rows, plan.rows_per_thread)), 0, 0,
              walk.run};
    if (plan.walks) {
      const Layout::Dim& dim = layout.dims[layout.ndim - 2];
      rows.in = dim.in * plan.rows_folded;
      rows.out = dim.out * plan.rows_folded;
      rows.last_row_size = (dim.size - (plan.rows - 1) * plan.rows_folded) * run.size;
    }
    if (plan.rows_per_thread == 1 && !folded && walk.ndim == 0 && plan.gapless)
      return launch(map_columns_gapless<Op, In, Out>, piece, plan, walk, run_scales);
    if (plan.rows_per_thread == 1) return launch(map_columns<Op, In, Out, 1>, piece, plan, walk, rows, run_scales);
    if (plan.rows_per_thread == 2) return launch(map_columns<Op, In, Out, 2>, piece, plan, walk, rows, run_scales);
    launch(map_columns<Op, In, Out, 4>, piece, plan, walk, rows, run_scales);
  }

  bool scales_aligned(const core::Piece& piece) const {
    for (int d = 0; d + 1 < piece.layout.ndim; ++d)
      if (piece.layout.dims[d].scale % 4 != 0) return false;
    return reinterpret_cast<std::uintptr_t>(scales + piece.scale) % 16 == 0;
  }

  void elements(const core::Piece& piece, const MapPlan& plan) const {
    launch(map_elements<Op, In, Out>, piece, plan, Walk::over(piece.layout, piece.layout.ndim, 1, plan.work),
           FlatRows::of(piece));
  }
};

// Launches the whole problem, in pieces where it is very large.
template <class Op, class In, class Out>
void launch_map(const char* op, const Layout& layout, const TensorView& input, const TensorView& result,
                const TensorView& scale, cudaStream_t stream) {
  const MapLauncher<Op, In, Out> launcher{static_cast<const In*>(input.data), static_cast<Out*>(result.data),
                                          static_cast<const float*>(scale.data), stream};
  core::for_each_even_part(layout, [&](const core::Piece& part) {
    core::for_each_piece(part, kMaxPiece, [&](const core::Piece& piece) {
      launcher(piece, plan_map(piece.layout, shifted(input, piece.in), shifted(result, piece.out), multiprocessors()));
      check_launch(op);
    });
  });
}

}  // namespace fp8kv::cuda
