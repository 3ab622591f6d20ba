// Elementwise operations with given scales: the kernels behind StaticQuantize and Dequantize, one per core::ElementwiseKernel.
#pragma once

#include "core/chunks.h"
#include "core/dispatch.h"
#include "core/plan.h"
#include "cuda/common/launch.h"
#include "device/convert.cuh"
#include "device/index_map.cuh"
#include "device/pdl.cuh"
#include "device/vec.cuh"

namespace fp8kv::cuda {

using core::kVecSize;
using core::Layout;
using device::IndexMap;
using device::Offsets;
using device::Range;
using device::Slice;
using device::slice_of;
using device::Vec;

// --- One scale per row ----------

// One vector per thread. kContiguous: the whole input and the whole result are one contiguous range each, so that the data can
// be loaded before it is known which scale belongs to it.
template <class Op, class In, class Out, int kOuter, bool kContiguous>
__global__ void __launch_bounds__(256)
    elementwise_vectorized(const In* __restrict__ input, Out* __restrict__ result, const float* __restrict__ scales,
                           const __grid_constant__ IndexMap map) {
  const std::uint32_t vec = blockIdx.x * blockDim.x + threadIdx.x;
  if (vec >= map.count) return;
  device::wait_then_release();
  std::int64_t in = std::int64_t{vec} * kVecSize, out = in;
  Vec<In> raw;
  if constexpr (kContiguous) raw = device::load_aligned(input + in);
  Offsets at;
  if constexpr (kOuter != 0) {
    const auto [row, vec_in_row] = map.vecs_per_row.divmod(vec);
    at = map.at<kOuter>(row);
    if constexpr (!kContiguous) {
      in = at.in + vec_in_row * kVecSize;
      out = at.out + vec_in_row * kVecSize;
      raw = device::load_aligned(input + in);
    }
  }
  const auto scale = Op::prepare(__ldg(scales + at.scale));
  device::store_aligned(result + out, device::convert_vec<Op, Out>(raw, scale));
}

template <class Op, class In, class Out>
__global__ void __launch_bounds__(256)
    elementwise_vectorized_unaligned(const In* __restrict__ input, Out* __restrict__ result, const float* __restrict__ scales,
                                     const __grid_constant__ IndexMap map) {
  const std::uint32_t vec = blockIdx.x * blockDim.x + threadIdx.x;
  if (vec >= map.count) return;
  device::wait_then_release();
  const auto [row, vec_in_row] = map.vecs_per_row.divmod(vec);
  const Offsets at = map.at<-1>(row);
  const Slice slice = slice_of(result + at.out, vec_in_row, map.row_size);
  if (slice.range.begin >= slice.range.end) return;
  const Vec<In> raw = device::load_any(input + at.in, slice.first, map.row_size, slice.range);
  const auto scale = Op::prepare(__ldg(scales + at.scale));
  device::store_range(result + at.out + slice.first, device::convert_vec<Op, Out>(raw, scale), slice.range);
}

// --- Scales that change along a row ----------

struct PerColumnScales {
  std::int64_t stride;
  std::uint32_t period;  // elements after which they repeat, 0 for the whole row
  device::FastDiv block;
  bool vectors;  // 8 of them are one aligned access

  __device__ __forceinline__ std::int64_t offset(std::uint32_t column) const { return block.div(column) * stride; }
};

template <class Op>
__device__ __forceinline__ void prepare_scales(typename Op::Prepared (&prepared)[kVecSize], const float* scales,
                                               const PerColumnScales& columns, std::uint32_t first, Range range = {}) {
  if (columns.vectors) {
    float values[kVecSize];
    device::unpack(device::load_aligned(scales + first), values);
#pragma unroll
    for (int i = 0; i < kVecSize; ++i) prepared[i] = Op::prepare(values[i]);
    return;
  }
  std::uint32_t column = columns.period ? first % columns.period : first;
#pragma unroll
  for (int i = 0; i < kVecSize; ++i) {
    const bool valid = i >= range.begin && i < range.end;
    prepared[i] = Op::prepare(valid ? __ldg(scales + columns.offset(column)) : 1.0f);
    if (++column == columns.period) column = 0;
  }
}

template <class Op, class Out, class In>
__device__ __forceinline__ Vec<Out> convert_per_column(const Vec<In>& raw, const typename Op::Prepared (&scales)[kVecSize]) {
  float values[kVecSize];
  device::unpack(raw, values);
  device::apply<Op>(scales, values);
  return device::pack<Out>(values);
}

// Aligned, one row per thread, contiguous: as elementwise_vectorized.
template <class Op, class In, class Out>
__global__ void __launch_bounds__(256)
    elementwise_per_column_contiguous(const In* __restrict__ input, Out* __restrict__ result, const float* __restrict__ scales,
                                      const __grid_constant__ IndexMap map, const __grid_constant__ PerColumnScales columns) {
  const std::uint32_t vec = blockIdx.x * blockDim.x + threadIdx.x;
  if (vec >= map.count) return;
  device::wait_then_release();
  const std::int64_t first = std::int64_t{vec} * kVecSize;
  const Vec<In> raw = device::load_aligned(input + first);
  typename Op::Prepared prepared[kVecSize];
  prepare_scales<Op>(prepared, scales, columns, map.vecs_per_row.divmod(vec).remainder * kVecSize);
  device::store_aligned(result + first, convert_per_column<Op, Out>(raw, prepared));
}

// The rows that a thread loops over.
struct LoopedRows {
  std::uint32_t count;
  device::FastDiv batches;     // of kRows rows
  std::int64_t in, out;        // strides
  std::int64_t last_row_size;  // elements of the last row: a merged one may be incomplete
};

// Aligned. A thread owns 8 columns: it prepares their scales once and loops over kRows rows.
template <class Op, class In, class Out, int kRows>
__global__ void __launch_bounds__(256)
    elementwise_per_column(const In* __restrict__ input, Out* __restrict__ result, const float* __restrict__ scales,
                           const __grid_constant__ IndexMap map, const __grid_constant__ LoopedRows rows,
                           const __grid_constant__ PerColumnScales columns) {
  const std::uint32_t vec = blockIdx.x * blockDim.x + threadIdx.x;
  if (vec >= map.count) return;
  device::wait_then_release();
  const auto [index, vec_in_row] = map.vecs_per_row.divmod(vec);
  const auto [outer, batch] = rows.batches.divmod(index);
  const Offsets at = map.at<-1>(outer);
  const std::uint32_t column = vec_in_row * kVecSize;
  const std::uint32_t row = batch * kRows;
  const In* in = input + at.in + row * rows.in + column;
  Out* out = result + at.out + row * rows.out + column;

  Vec<In> raw[kRows];
  Range ranges[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const std::int64_t left = (row + r + 1 < rows.count    ? map.row_size
                               : row + r + 1 == rows.count ? rows.last_row_size
                                                           : 0) -
                              column;
    ranges[r].end = left >= kVecSize ? kVecSize : left < 0 ? 0 : static_cast<int>(left);
    if (ranges[r].end == kVecSize)
      raw[r] = device::load_aligned(in + r * rows.in);
    else if (ranges[r].end > 0)
      raw[r] = device::load_any(in + r * rows.in, 0, ranges[r].end, ranges[r]);
  }
  typename Op::Prepared prepared[kVecSize];
  prepare_scales<Op>(prepared, scales + at.scale, columns, column);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (ranges[r].end == 0) return;
    float values[kVecSize];
    device::unpack(raw[r], values);
    device::apply<Op>(prepared, values);
    device::store_range(out + r * rows.out, device::pack<Out>(values), ranges[r]);
  }
}

// Vectors begin at other columns in every row, so a thread takes one.
template <class Op, class In, class Out>
__global__ void __launch_bounds__(256)
    elementwise_per_column_unaligned(const In* __restrict__ input, Out* __restrict__ result, const float* __restrict__ scales,
                                     const __grid_constant__ IndexMap map, const __grid_constant__ PerColumnScales columns) {
  const std::uint32_t vec = blockIdx.x * blockDim.x + threadIdx.x;
  if (vec >= map.count) return;
  device::wait_then_release();
  const auto [row, vec_in_row] = map.vecs_per_row.divmod(vec);
  const Offsets at = map.at<-1>(row);
  const Slice slice = slice_of(result + at.out, vec_in_row, map.row_size);
  if (slice.range.begin >= slice.range.end) return;
  const Vec<In> raw = device::load_any(input + at.in, slice.first, map.row_size, slice.range);
  typename Op::Prepared prepared[kVecSize];
  prepare_scales<Op>(prepared, scales + at.scale, columns, static_cast<std::uint32_t>(slice.first), slice.range);
  device::store_range(result + at.out + slice.first, convert_per_column<Op, Out>(raw, prepared), slice.range);
}

// --- Anything ----------

// The part of an element's scale offset that follows from its flat row (Layout::flat_rows).
struct FlatRows {
  std::int64_t group = 0;  // 0: not used
  std::int64_t scale = 0;
  std::int64_t first = 0;
  std::int64_t columns = 1;

  static FlatRows of(const core::Chunk& chunk) {
    const Layout& layout = chunk.layout;
    return {layout.flat_rows, layout.flat_scale, chunk.flat_row, layout.inner().size};
  }
  __device__ __forceinline__ std::int64_t offset(std::uint32_t element) const {
    return group ? (first + element / columns) / group * scale : 0;
  }
};

// One element per thread.
template <class Op, class In, class Out>
__global__ void __launch_bounds__(256)
    elementwise_scalar(const In* __restrict__ input, Out* __restrict__ result, const float* __restrict__ scales,
                       const __grid_constant__ IndexMap map, const __grid_constant__ FlatRows flat) {
  const std::uint32_t element = blockIdx.x * blockDim.x + threadIdx.x;
  if (element >= map.count) return;
  device::wait_then_release();
  const Offsets at = map.at<-1>(element);
  const auto scale = Op::prepare(__ldg(scales + at.scale + flat.offset(element)));
  result[at.out] = device::convert_element<Op, Out>(input[at.in], scale);
}

// --- Launches ----------

template <class Op, class In, class Out>
void launch_elementwise_chunk(const core::ElementwisePlan& plan, const core::Chunk& chunk, const In* input, Out* result,
                              const float* scales, cudaStream_t stream) {
  using core::ElementwiseKernel;
  const Layout::Dim& inner = chunk.layout.inner();
  IndexMap map = IndexMap::over(chunk.layout, plan.outer_dims, plan.vecs_per_row, plan.work);
  map.row_size = plan.row_size;
  const PerColumnScales columns{.stride = inner.scale,
                                .period = plan.rows_merged > 1 ? static_cast<std::uint32_t>(inner.size) : 0u,
                                .block = device::FastDiv(inner.block),
                                .vectors = plan.vector_scales};
  const LoopedRows rows{.count = static_cast<std::uint32_t>(plan.rows),
                        .batches = device::FastDiv(core::ceil_div(plan.rows, plan.rows_per_thread)),
                        .in = plan.row_in,
                        .out = plan.row_out,
                        .last_row_size = plan.last_row_size};
  const auto launch = [&](auto kernel, const auto&... arguments) {
    launch_dependent(kernel, static_cast<unsigned>(plan.blocks), plan.threads, stream, input + chunk.in, result + chunk.out,
                     scales + chunk.scale, map, arguments...);
  };
  switch (plan.kernel) {
    case ElementwiseKernel::Scalar: return launch(elementwise_scalar<Op, In, Out>, FlatRows::of(chunk));
    case ElementwiseKernel::VectorizedContiguous0: return launch(elementwise_vectorized<Op, In, Out, 0, true>);
    case ElementwiseKernel::VectorizedContiguous1: return launch(elementwise_vectorized<Op, In, Out, 1, true>);
    case ElementwiseKernel::VectorizedContiguous2: return launch(elementwise_vectorized<Op, In, Out, 2, true>);
    case ElementwiseKernel::VectorizedContiguous: return launch(elementwise_vectorized<Op, In, Out, -1, true>);
    case ElementwiseKernel::VectorizedStrided: return launch(elementwise_vectorized<Op, In, Out, -1, false>);
    case ElementwiseKernel::VectorizedUnaligned: return launch(elementwise_vectorized_unaligned<Op, In, Out>);
    case ElementwiseKernel::PerColumnContiguous: return launch(elementwise_per_column_contiguous<Op, In, Out>, columns);
    case ElementwiseKernel::PerColumn1: return launch(elementwise_per_column<Op, In, Out, 1>, rows, columns);
    case ElementwiseKernel::PerColumn2: return launch(elementwise_per_column<Op, In, Out, 2>, rows, columns);
    case ElementwiseKernel::PerColumn4: return launch(elementwise_per_column<Op, In, Out, 4>, rows, columns);
    case ElementwiseKernel::PerColumnUnaligned: return launch(elementwise_per_column_unaligned<Op, In, Out>, columns);
  }
}

// The whole problem, in chunks where it is very large.
template <class Op, class In, class Out>
void launch_elementwise(const char* op, const Layout& layout, const TensorView& input, const TensorView& result,
                        const TensorView& scale, cudaStream_t stream) {
  const int multiprocessors = device_limits().multiprocessors;
  core::for_each_uniform_part(layout, [&](const core::Chunk& part) {
    core::for_each_chunk(part, core::kMaxChunk, [&](const core::Chunk& chunk) {
      const core::ElementwisePlan plan = core::plan_elementwise(chunk, input, result, scale, multiprocessors);
      launch_elementwise_chunk<Op>(plan, chunk, static_cast<const In*>(input.data), static_cast<Out*>(result.data),
                                   static_cast<const float*>(scale.data), stream);
      check_launch(op);
    });
  });
}

}  // namespace fp8kv::cuda
