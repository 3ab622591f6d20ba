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

// --- Divisions, out of line ----------

// The product is found and stored for all; where a scale divides, which is rare, the quotient then replaces it. It is found
// from memory again, so that no register of the usual path is kept for it, and after the product, as loads that only one side
// of a branch needs would wait for the branch.
template <class Op, class Out, class In>
__device__ __noinline__ void divide_vec(const In* in, Out* out, float scale) {
  device::store_aligned(out, device::convert_vec<Op, Out>(device::load_aligned(in), Op::prepare(scale)));
}

// Vectors whose scales do not divide: scale_of(k, i) is that of element i of vector k.
template <class Op, class Out, class In, int kVecs, class F>
__device__ __forceinline__ void multiply_vecs(const Vec<In> (&raw)[kVecs], Vec<Out> (&converted)[kVecs], const F& scale_of) {
#pragma unroll
  for (int k = 0; k < kVecs; ++k) {
    float values[kVecSize];
    device::unpack(raw[k], values);
#pragma unroll
    for (int i = 0; i < kVecSize; ++i) values[i] = Op::apply(scale_of(k, i), values[i]);
    if constexpr (sizeof(Out) == 2)
      converted[k] = device::pack_any_nan<Out>(values);
    else
      converted[k] = device::pack<Out>(values);
  }
  if constexpr (sizeof(Out) == 2) device::make_nan_canonical(converted);
}

// --- One scale per row ----------

// Where a vector lies. kContiguous: the whole input and the whole result are one contiguous range each, so that the data can be
// loaded before it is known which scale belongs to it.
template <int kOuter, bool kContiguous>
__device__ __forceinline__ Offsets offsets_of(const IndexMap& map, std::uint32_t vec) {
  const std::int64_t first = std::int64_t{vec} * kVecSize;
  if constexpr (kOuter == 0) return {first, first, 0};
  const auto [row, vec_in_row] = map.vecs_per_row.divmod(vec);
  Offsets at = map.at<kOuter>(row);
  at.in = kContiguous ? first : at.in + vec_in_row * kVecSize;
  at.out = kContiguous ? first : at.out + vec_in_row * kVecSize;
  return at;
}

// A thread takes kVecs vectors, a block apart. Beyond the end it repeats the last one.
template <class Op, class In, class Out, int kOuter, bool kContiguous, int kVecs>
__global__ void __launch_bounds__(256)
    elementwise_vectorized(const In* __restrict__ input, Out* __restrict__ result, const float* __restrict__ scales,
                           const __grid_constant__ IndexMap map) {
  const std::uint32_t vec = blockIdx.x * (blockDim.x * kVecs) + threadIdx.x;
  if (vec >= map.count) return;
  device::wait_then_release();
  Offsets at[kVecs];
  Vec<In> raw[kVecs];
#pragma unroll
  for (int k = 0; k < kVecs; ++k) {
    at[k] = offsets_of<kOuter, kContiguous>(map, min(vec + k * blockDim.x, map.count - 1));
    raw[k] = device::load_aligned(input + at[k].in);
  }
  typename Op::Prepared prepared[kVecs];
  bool divide = false;
#pragma unroll
  for (int k = 0; k < kVecs; ++k) {
    prepared[k] = Op::prepare(__ldg(scales + at[k].scale));
    divide |= prepared[k].divide;
  }
  Vec<Out> converted[kVecs];
  multiply_vecs<Op>(raw, converted, [&](int k, int) { return prepared[k]; });
#pragma unroll
  for (int k = 0; k < kVecs; ++k) device::store_aligned(result + at[k].out, converted[k]);
  if (divide) {
#pragma unroll
    for (int k = 0; k < kVecs; ++k) divide_vec<Op>(input + at[k].in, result + at[k].out, __ldg(scales + at[k].scale));
  }
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

// --- Groups that end anywhere ----------

// core::GroupGrid, for kernels.
struct GroupGrid {
  std::uint32_t count;  // elements
  device::FastDiv row, group, row_block;
  std::int64_t row_scale, group_scale;

  GroupGrid(const core::GroupGrid& grid, std::int64_t numel)
      : count(static_cast<std::uint32_t>(numel)),
        row(grid.row),
        group(grid.group),
        row_block(grid.row_block),
        row_scale(grid.row_scale),
        group_scale(grid.group_scale) {}

  __device__ __forceinline__ std::int64_t scale_of(std::uint32_t row_index, std::uint32_t group_in_row) const {
    return row_block.div(row_index) * row_scale + group_in_row * group_scale;
  }
  __device__ __forceinline__ std::int64_t scale_of(std::uint32_t element) const {
    const auto [row_index, column] = row.divmod(element);
    return scale_of(row_index, group.div(column));
  }
};

// Elements [begin, end) one by one, each with a scale of its own.
template <class Op, class Out, class In>
__device__ __noinline__ void convert_elements(const In* input, Out* result, const float* scales, const GroupGrid& grid,
                                              std::uint32_t begin, std::uint32_t end) {
  for (std::uint32_t i = begin; i < end; ++i)
    result[i] = device::convert_element<Op, Out>(input[i], Op::prepare(__ldg(scales + grid.scale_of(i))));
}

// A thread takes kUnitSize neighboring elements of the whole tensor. A group may end among them: each element is multiplied by
// the scale of its side. Rare are the others: a third group, a scale that divides, the end of the tensor.
template <class Op, class In, class Out>
__global__ void __launch_bounds__(128)
    elementwise_across_groups(const In* __restrict__ input, Out* __restrict__ result, const float* __restrict__ scales,
                              const __grid_constant__ GroupGrid grid) {
  constexpr int kVecs = core::kUnitSize / kVecSize;
  const std::uint32_t first = (blockIdx.x * blockDim.x + threadIdx.x) * core::kUnitSize;
  if (first >= grid.count) return;
  device::wait_then_release();
  if (first + core::kUnitSize > grid.count) return convert_elements<Op>(input, result, scales, grid, first, grid.count);
  Vec<In> raw[kVecs];
  device::load_aligned(input + first, raw);

  const auto [row, column] = grid.row.divmod(first);
  const std::uint32_t group = grid.group.div(column);
  const std::uint32_t end = min((group + 1) * grid.group.divisor, grid.row.divisor);
  const bool ends_row = end == grid.row.divisor;
  const std::uint32_t next_size = min(grid.group.divisor, grid.row.divisor - (ends_row ? 0u : end));
  const int left = static_cast<int>(end - column);  // elements of the first group
  const float* scale = scales + grid.scale_of(row, group);
  const float* next_scale = left >= core::kUnitSize ? scale
                            : ends_row              ? scales + grid.scale_of(row + 1, 0)
                                                    : scale + grid.group_scale;
  const auto prepared = Op::prepare(__ldg(scale)), next = Op::prepare(__ldg(next_scale));
  Vec<Out> converted[kVecs];
  multiply_vecs<Op>(raw, converted, [&](int k, int i) { return Op::select(k * kVecSize + i < left, prepared, next); });
  device::store_aligned(result + first, converted);
  if (prepared.divide || next.divide || left + static_cast<int>(next_size) < core::kUnitSize)
    convert_elements<Op>(input, result, scales, grid, first, first + core::kUnitSize);
}

// --- Scales that change along a row ----------

struct PerColumnScales {
  std::int64_t stride;
  std::uint32_t period;  // elements after which they repeat, 0 for the whole row
  device::FastDiv block;
  bool vectors;  // 8 of them are one aligned access

  __device__ __forceinline__ std::int64_t offset(std::uint32_t column) const { return block.div(column) * stride; }
};

// The scales of the columns from `first` on, prepared; of those outside the range there are none.
template <class Op>
__device__ __forceinline__ void prepare_scales(typename Op::Prepared (&prepared)[kVecSize], const float* scales,
                                               const PerColumnScales& columns, std::uint32_t first, Range range = {}) {
  float values[kVecSize];
  if (columns.vectors) {
    device::unpack(device::load_aligned(scales + first), values);
  } else {
    std::uint32_t column = columns.period ? first % columns.period : first;
#pragma unroll
    for (int i = 0; i < kVecSize; ++i) {
      values[i] = i >= range.begin && i < range.end ? __ldg(scales + columns.offset(column)) : 1.0f;
      if (++column == columns.period) column = 0;
    }
  }
#pragma unroll
  for (int i = 0; i < kVecSize; ++i) prepared[i] = Op::prepare(values[i]);
}

template <class Op, class Out, class In>
__device__ __forceinline__ Vec<Out> convert_per_column(const Vec<In>& raw, const typename Op::Prepared (&scales)[kVecSize]) {
  float values[kVecSize];
  device::unpack(raw, values);
  device::apply<Op>(scales, values);
  return device::pack<Out>(values);
}

// The rows that a thread loops over.
struct LoopedRows {
  std::uint32_t count;
  device::FastDiv batches;     // of kRows rows
  std::int64_t in, out;        // strides
  std::int64_t last_row_size;  // elements of the last row: a merged one may be incomplete
};

// `rows` rows of `count` of a thread's columns, one by one.
template <class Op, class Out, class In>
__device__ __noinline__ void convert_columns(const In* in, Out* out, int rows, int count, std::int64_t row_in,
                                             std::int64_t row_out, const float* scales, const PerColumnScales& columns,
                                             std::uint32_t first) {
  for (int i = 0; i < count; ++i) {
    const std::uint32_t column = columns.period ? (first + i) % columns.period : first + i;
    const auto scale = Op::prepare(__ldg(scales + columns.offset(column)));
    for (int r = 0; r < rows; ++r) out[r * row_out + i] = device::convert_element<Op, Out>(in[r * row_in + i], scale);
  }
}

// Aligned. A thread owns 8 columns: it asks for their elements of kRows rows, then prepares their scales once. kOuter: 0 where
// there are no other dimensions, else -1.
template <class Op, class In, class Out, int kOuter, int kRows>
__global__ void __launch_bounds__(128)
    elementwise_per_column(const In* __restrict__ input, Out* __restrict__ result, const float* __restrict__ scales,
                           const __grid_constant__ IndexMap map, const __grid_constant__ LoopedRows rows,
                           const __grid_constant__ PerColumnScales columns) {
  const std::uint32_t vec = blockIdx.x * blockDim.x + threadIdx.x;
  if (vec >= map.count) return;
  device::wait_then_release();
  auto [batch, vec_in_row] = map.vecs_per_row.divmod(vec);
  Offsets at;
  if constexpr (kOuter != 0) {
    const auto [outer, inner] = rows.batches.divmod(batch);
    at = map.at<kOuter>(outer);
    batch = inner;
  }
  const std::uint32_t column = vec_in_row * kVecSize, row = batch * kRows;
  const In* in = input + at.in + row * rows.in + column;
  Out* out = result + at.out + row * rows.out + column;
  scales += at.scale;
  // Rows from `row` on in which all 8 elements exist. Of a last row that is incomplete, fewer may.
  const std::int64_t left = rows.last_row_size - column;
  const int whole = static_cast<int>(rows.count - row) - (left < kVecSize ? 1 : 0);

  Vec<In> raw[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    if (r < whole) raw[r] = device::load_aligned(in + r * rows.in);
  typename Op::Prepared prepared[kVecSize];
  prepare_scales<Op>(prepared, scales, columns, column);
  bool divide = false;
#pragma unroll
  for (int i = 0; i < kVecSize; ++i) divide |= prepared[i].divide;
  Vec<Out> converted[kRows];
  multiply_vecs<Op>(raw, converted, [&](int, int i) { return prepared[i]; });
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    if (r < whole) device::store_aligned(out + r * rows.out, converted[r]);
  if (divide) convert_columns<Op>(in, out, min(whole, kRows), kVecSize, rows.in, rows.out, scales, columns, column);
  if (whole < kRows && left > 0 && left < kVecSize)
    convert_columns<Op>(in + whole * rows.in, out + whole * rows.out, 1, static_cast<int>(left), 0, 0, scales, columns, column);
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
                     scales + chunk.scale, arguments...);
  };
  const bool two = plan.vecs_per_thread == 2;
  switch (plan.kernel) {
    case ElementwiseKernel::Scalar: return launch(elementwise_scalar<Op, In, Out>, map, FlatRows::of(chunk));
    case ElementwiseKernel::VectorizedContiguous0:
      return launch(two ? elementwise_vectorized<Op, In, Out, 0, true, 2> : elementwise_vectorized<Op, In, Out, 0, true, 1>,
                    map);
    case ElementwiseKernel::VectorizedContiguous1:
      return launch(two ? elementwise_vectorized<Op, In, Out, 1, true, 2> : elementwise_vectorized<Op, In, Out, 1, true, 1>,
                    map);
    case ElementwiseKernel::VectorizedContiguous2:
      return launch(two ? elementwise_vectorized<Op, In, Out, 2, true, 2> : elementwise_vectorized<Op, In, Out, 2, true, 1>,
                    map);
    case ElementwiseKernel::Vectorized: return launch(elementwise_vectorized<Op, In, Out, -1, false, 1>, map);
    case ElementwiseKernel::VectorizedUnaligned: return launch(elementwise_vectorized_unaligned<Op, In, Out>, map);
    case ElementwiseKernel::AcrossGroups:
      return launch(elementwise_across_groups<Op, In, Out>, GroupGrid(plan.grid, chunk.layout.numel));
    case ElementwiseKernel::PerColumn0:
      return launch(
          plan.rows_per_thread == 1 ? elementwise_per_column<Op, In, Out, 0, 1> : elementwise_per_column<Op, In, Out, 0, 4>,
          map, rows, columns);
    case ElementwiseKernel::PerColumn: return launch(elementwise_per_column<Op, In, Out, -1, 4>, map, rows, columns);
    case ElementwiseKernel::PerColumnUnaligned: return launch(elementwise_per_column_unaligned<Op, In, Out>, map, columns);
  }
}

// The whole problem, in chunks where it is very large.
template <class Op, class In, class Out>
void launch_elementwise(const char* op, const Layout& layout, const TensorView& input, const TensorView& result,
                        const TensorView& scale, cudaStream_t stream) {
  const int multiprocessors = device_limits().multiprocessors;
  const auto launch = [&](const core::Chunk& part) {
    core::for_each_chunk(part, core::kMaxChunk, [&](const core::Chunk& chunk) {
      const core::ElementwisePlan plan = core::plan_elementwise(chunk, input, result, scale, multiprocessors);
      launch_elementwise_chunk<Op>(plan, chunk, static_cast<const In*>(input.data), static_cast<Out*>(result.data),
                                   static_cast<const float*>(scale.data), stream);
      check_launch(op);
    });
  };
  if (core::goes_across_groups({layout}, input, result)) return launch({layout});
  core::for_each_uniform_part(layout, launch);
}

}  // namespace fp8kv::cuda
