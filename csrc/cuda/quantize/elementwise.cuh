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

// `rows` vectors, `stride` elements apart, with a scale for each column. By elements, which takes few registers: a kernel has
// as many as what it calls.
template <class Op, class Out, class In>
__device__ __noinline__ void divide_columns(const In* in, Out* out, std::int64_t stride, int rows, const float* scales) {
  for (int i = 0; i < kVecSize; ++i) {
    const auto scale = Op::prepare(scales[i]);
    for (int r = 0; r < rows; ++r) out[r * stride + i] = device::convert_element<Op, Out>(in[r * stride + i], scale);
  }
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

// A single vector: scale_of(i).
template <class Op, class Out, class In, class F>
__device__ __forceinline__ Vec<Out> multiplied(const Vec<In>& raw, const F& scale_of) {
  const Vec<In> raws[] = {raw};
  Vec<Out> converted[1];
  multiply_vecs<Op>(raws, converted, [&](int, int i) { return scale_of(i); });
  return converted[0];
}

// --- Groups of a contiguous tensor ----------

// core::GroupGrid, for kernels; everything counted in items of `unit` neighboring elements.
struct GroupGrid {
  std::uint32_t count;
  device::FastDiv row, group, row_block;
  std::uint32_t row_scale, group_scale;
  std::uint32_t rest;  // elements behind the last item

  GroupGrid(const core::GroupGrid& grid, std::int64_t numel, int unit)
      : count(static_cast<std::uint32_t>(numel / unit)),
        row(grid.row / unit),
        group(grid.group / unit),
        row_block(grid.row_block),
        row_scale(static_cast<std::uint32_t>(grid.row_scale)),
        group_scale(static_cast<std::uint32_t>(grid.group_scale)),
        rest(static_cast<std::uint32_t>(numel % unit)) {}

  __device__ __forceinline__ std::uint64_t scale_of(std::uint32_t row_index, std::uint32_t group_in_row) const {
    return std::uint64_t{row_block.div(row_index)} * row_scale + std::uint64_t{group_in_row} * group_scale;
  }

  // kGroups: One scale; groups of one Row; or a Grid of several rows.
  template <core::Groups kGroups>
  __device__ __forceinline__ std::uint64_t scale_of(std::uint32_t item) const {
    if constexpr (kGroups == core::Groups::One) return 0;
    if constexpr (kGroups == core::Groups::Row) return std::uint64_t{group.div(item)} * group_scale;
    const auto [row_index, column] = row.divmod(item);
    return scale_of(row_index, group.div(column));
  }
};

// A thread takes kVecs vectors, a block apart. Beyond the end it repeats the last one. With one scale and two vectors, elements
// may be left behind the last one: to look for them takes a single vector up to 2% longer.
template <class Op, class In, class Out, core::Groups kGroups, int kVecs>
__global__ void __launch_bounds__(256)
    elementwise_contiguous(const In* input, Out* result, const float* scales, const __grid_constant__ GroupGrid grid) {
  const std::uint32_t first = blockIdx.x * (blockDim.x * kVecs) + threadIdx.x;
  if (first >= grid.count) return;
  device::wait_then_release();
  std::uint32_t vec[kVecs];
  Vec<In> raw[kVecs];
#pragma unroll
  for (int k = 0; k < kVecs; ++k) {
    vec[k] = min(first + k * blockDim.x, grid.count - 1);
    raw[k] = device::load_aligned(input + std::int64_t{vec[k]} * kVecSize);
  }
  typename Op::Prepared prepared[kVecs];
  bool divide = false;
#pragma unroll
  for (int k = 0; k < kVecs; ++k) {
    prepared[k] = Op::prepare(scales[grid.scale_of<kGroups>(vec[k])]);
    divide |= prepared[k].divide;
  }
  Vec<Out> converted[kVecs];
  multiply_vecs<Op>(raw, converted, [&](int k, int) { return prepared[k]; });
#pragma unroll
  for (int k = 0; k < kVecs; ++k) device::store_aligned(result + std::int64_t{vec[k]} * kVecSize, converted[k]);
  if constexpr (kGroups == core::Groups::One && kVecs > 1) {
    if (blockIdx.x == 0 && threadIdx.x < grid.rest) {
      const std::int64_t i = std::int64_t{grid.count} * kVecSize + threadIdx.x;
      result[i] = device::convert_element<Op, Out>(input[i], prepared[0]);
    }
  }
  if (divide) {
#pragma unroll
    for (int k = 0; k < kVecs; ++k) {
      const std::int64_t at = std::int64_t{vec[k]} * kVecSize;
      divide_vec<Op>(input + at, result + at, scales[grid.scale_of<kGroups>(vec[k])]);
    }
  }
}

// Where kRows rows share their scales: a thread takes kRows vectors, one below the other, with one prepared scale. Beyond the
// end it repeats the last row.
template <class Op, class In, class Out, int kRows>
__global__ void __launch_bounds__(128, 10)
    elementwise_rows_of_blocks(const In* input, Out* result, const float* scales, std::uint32_t rows,
                               const __grid_constant__ GroupGrid grid) {
  const auto [batch, vec_in_row] = grid.row.divmod(blockIdx.x * blockDim.x + threadIdx.x);
  const std::uint32_t row = batch * kRows;
  if (row >= rows) return;
  device::wait_then_release();
  const std::uint32_t first = row * grid.row.divisor + vec_in_row;
  const auto at = [&](std::uint32_t r) { return std::int64_t{first + min(r, rows - 1 - row) * grid.row.divisor} * kVecSize; };
  Vec<In> raw[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) raw[r] = device::load_aligned(input + at(r));
  const float* scale = scales + grid.scale_of(row, grid.group.div(vec_in_row));
  const auto prepared = Op::prepare(*scale);
  Vec<Out> converted[kRows];
  multiply_vecs<Op>(raw, converted, [&](int, int) { return prepared; });
#pragma unroll
  for (int r = 0; r < kRows; ++r) device::store_aligned(result + at(r), converted[r]);
  if (prepared.divide) {
#pragma unroll 1
    for (int r = 0; r < kRows; ++r) divide_vec<Op>(input + at(r), result + at(r), *scale);
  }
}

// Where a unit of neighboring elements lies among groups.
struct UnitPlace {
  std::uint32_t row, group;
  int left;       // elements to the end of the group
  int next_size;  // elements of the next one
  bool ends_row;  // the group is the last of its row

  __device__ __forceinline__ UnitPlace(const GroupGrid& grid, std::uint32_t element) {
    const auto [row_index, column] = grid.row.divmod(element);
    row = row_index;
    group = grid.group.div(column);
    const std::uint32_t end = min((group + 1) * grid.group.divisor, grid.row.divisor);
    left = static_cast<int>(end - column);
    ends_row = end == grid.row.divisor;
    next_size = static_cast<int>(min(grid.group.divisor, grid.row.divisor - (ends_row ? 0u : end)));
  }
  __device__ __forceinline__ bool two_at_most() const { return left >= core::kUnitSize - next_size; }
};

// Elements [begin, end) one by one, each with a scale of its own.
template <class Op, class Out, class In>
__device__ __noinline__ void convert_elements(const In* input, Out* result, const float* scales, const GroupGrid& grid,
                                              std::uint32_t begin, std::uint32_t end) {
  for (std::uint32_t i = begin; i < end; ++i)
    result[i] = device::convert_element<Op, Out>(input[i], Op::prepare(scales[grid.scale_of<core::Groups::Grid>(i)]));
}

// A thread takes kUnitSize neighboring elements of the whole tensor. A group may end among them: each element is multiplied by
// the scale of its side. Rare are the others: a third group, a scale that divides, the end of the tensor.
template <class Op, class In, class Out>
__global__ void __launch_bounds__(128)
    elementwise_across_groups(const In* input, Out* result, const float* scales, const __grid_constant__ GroupGrid grid) {
  constexpr int kVecs = core::kUnitSize / kVecSize;
  const std::uint32_t first = (blockIdx.x * blockDim.x + threadIdx.x) * core::kUnitSize;
  if (first >= grid.count) return;
  device::wait_then_release();
  if (first + core::kUnitSize > grid.count) return convert_elements<Op>(input, result, scales, grid, first, grid.count);
  Vec<In> raw[kVecs];
  device::load_aligned(input + first, raw);

  const UnitPlace place(grid, first);
  const float* scale = scales + grid.scale_of(place.row, place.group);
  const float* next_scale = place.left >= core::kUnitSize ? scale
                            : place.ends_row              ? scales + grid.scale_of(place.row + 1, 0)
                                                          : scale + grid.group_scale;
  const auto prepared = Op::prepare(*scale), next = Op::prepare(*next_scale);
  Vec<Out> converted[kVecs];
  multiply_vecs<Op>(raw, converted, [&](int k, int i) { return Op::select(k * kVecSize + i < place.left, prepared, next); });
  device::store_aligned(result + first, converted);
  if (prepared.divide || next.divide || !place.two_at_most())
    convert_elements<Op>(input, result, scales, grid, first, first + core::kUnitSize);
}

// --- One scale per row ----------

// Calls f(place of the row, vector in it) for the vector of this thread, if there is one.
template <class F>
__device__ __forceinline__ void visit_vec_of_row(const IndexMap& map, const F& f) {
  const std::uint32_t vec = blockIdx.x * blockDim.x + threadIdx.x;
  if (vec >= map.count) return;
  device::wait_then_release();
  const auto [row, vec_in_row] = map.vecs_per_row.divmod(vec);
  f(map.at<-1>(row), vec_in_row);
}

template <class Op, class In, class Out>
__global__ void __launch_bounds__(256)
    elementwise_vectorized(const In* input, Out* result, const float* scales, const __grid_constant__ IndexMap map) {
  visit_vec_of_row(map, [&](const Offsets& at, std::uint32_t vec) {
    const Vec<In> raw = device::load_aligned(input + at.in + vec * kVecSize);
    const auto scale = Op::prepare(scales[at.scale]);
    device::store_aligned(result + at.out + vec * kVecSize, device::convert_vec<Op, Out>(raw, scale));
  });
}

template <class Op, class In, class Out>
__global__ void __launch_bounds__(256)
    elementwise_vectorized_unaligned(const In* input, Out* result, const float* scales, const __grid_constant__ IndexMap map) {
  visit_vec_of_row(map, [&](const Offsets& at, std::uint32_t vec) {
    const Slice slice = slice_of(result + at.out, vec, map.row_size);
    if (slice.range.begin >= slice.range.end) return;
    const Vec<In> raw = device::load_any(input + at.in, slice.first, map.row_size, slice.range);
    const auto scale = Op::prepare(scales[at.scale]);
    device::store_range(result + at.out + slice.first, device::convert_vec<Op, Out>(raw, scale), slice.range);
  });
}

// --- Scales that change along a row ----------

struct PerColumnScales {
  std::int64_t stride;
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
#pragma unroll
  for (int i = 0; i < kVecSize; ++i) {
    const bool valid = i >= range.begin && i < range.end;
    prepared[i] = Op::prepare(valid ? scales[columns.offset(first + i)] : 1.0f);
  }
}

template <class Op, class Out, class In>
__device__ __forceinline__ Vec<Out> convert_per_column(const Vec<In>& raw, const typename Op::Prepared (&scales)[kVecSize]) {
  float values[kVecSize];
  device::unpack(raw, values);
  device::apply<Op>(scales, values);
  return device::pack<Out>(values);
}

// Scales of 8 columns; whether one of them divides.
template <class Op>
__device__ __forceinline__ bool prepare_each(const float (&scales)[kVecSize], typename Op::Prepared (&prepared)[kVecSize]) {
  bool divide = false;
#pragma unroll
  for (int i = 0; i < kVecSize; ++i) {
    prepared[i] = Op::prepare(scales[i]);
    divide |= prepared[i].divide;
  }
  return divide;
}

// Contiguous, with 8 scales one aligned access. A thread owns 8 columns: it asks for their elements of kRows rows, then
// prepares their scales once.
template <class Op, class In, class Out, int kRows>
__global__ void __launch_bounds__(128)
    elementwise_per_channel(const In* input, Out* result, const float* scales, std::uint32_t rows,
                            const __grid_constant__ device::FastDiv vecs_per_row) {
  const auto [batch, vec_in_row] = vecs_per_row.divmod(blockIdx.x * blockDim.x + threadIdx.x);
  const std::uint32_t row = batch * kRows;
  if (row >= rows) return;
  device::wait_then_release();
  const std::uint32_t first = row * vecs_per_row.divisor + vec_in_row;
  const int count = static_cast<int>(min(rows - row, std::uint32_t{kRows}));
  const auto at = [&](int r) { return std::int64_t{first + r * vecs_per_row.divisor} * kVecSize; };
  Vec<In> raw[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    if (r < count) raw[r] = device::load_aligned(input + at(r));
  float values[kVecSize];
  device::unpack(device::load_aligned(scales + vec_in_row * kVecSize), values);
  typename Op::Prepared prepared[kVecSize];
  const bool divide = prepare_each<Op>(values, prepared);
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    if (r < count) device::store_aligned(result + at(r), multiplied<Op, Out>(raw[r], [&](int i) { return prepared[i]; }));
  if (divide)
    divide_columns<Op>(input + at(0), result + at(0), vecs_per_row.divisor * kVecSize, count, scales + vec_in_row * kVecSize);
}

// kCount elements, in the first words of a vector, at an address aligned to their size, which is at most 16 bytes.
template <int kCount, class T>
__device__ __forceinline__ Vec<T> load_part(const T* p) {
  constexpr int kBytes = kCount * sizeof(T);
  Vec<T> vec{};
  if constexpr (kBytes == 2) {
    std::uint16_t bits;
    asm volatile("ld.global.b16 %0, [%1];" : "=h"(bits) : "l"(p));
    vec.words[0] = bits;
  } else if constexpr (kBytes == 4) {
    asm volatile("ld.global.b32 %0, [%1];" : "=r"(vec.words[0]) : "l"(p));
  } else {
    device::load_words<kBytes / 4>(vec.words, p);
  }
  return vec;
}
template <int kCount, class T>
__device__ __forceinline__ void store_part(T* p, const Vec<T>& vec) {
  constexpr int kBytes = kCount * sizeof(T);
  static_assert(kBytes == 2 || kBytes == 4 || kBytes == 8);
  if constexpr (kBytes == 2)
    asm volatile("st.global.b16 [%0], %1;" ::"l"(p), "h"(static_cast<std::uint16_t>(vec.words[0])) : "memory");
  else if constexpr (kBytes == 4)
    asm volatile("st.global.b32 [%0], %1;" ::"l"(p), "r"(vec.words[0]) : "memory");
  else
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(p), "r"(vec.words[0]), "r"(vec.words[1]) : "memory");
}

// The same for one row that is short: two columns per thread, as what takes time is what one thread has to do.
template <class Op, class In, class Out>
__global__ void __launch_bounds__(128) elementwise_per_channel_of_one_row(const In* input, Out* result, const float* scales,
                                                                          bool dependent, std::uint32_t columns) {
  constexpr int kCount = core::kOneRowColumns;
  const std::uint32_t column = (blockIdx.x * blockDim.x + threadIdx.x) * kCount;
  if (column >= columns) return;
  device::wait_then_release(dependent);
  const Vec<In> raw = load_part<kCount>(input + column);
  float values[kVecSize];
  device::unpack(load_part<kCount>(scales + column), values);
  typename Op::Prepared prepared[kVecSize] = {};
  bool divide = false;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    prepared[i] = Op::prepare(values[i]);
    divide |= prepared[i].divide;
  }
  store_part<kCount>(result + column, multiplied<Op, Out>(raw, [&](int i) { return prepared[i]; }));
  if (divide) {
#pragma unroll 1
    for (int i = 0; i < kCount; ++i)
      result[column + i] = device::convert_element<Op, Out>(input[column + i], Op::prepare(scales[column + i]));
  }
}

// Contiguous rows of any length, merged until a merged row is of whole vectors.
struct MergedRows {
  std::uint32_t count;           // elements
  device::FastDiv vecs_per_row;  // of a merged row
  device::FastDiv columns;       // that scales repeat after
};

// Elements [begin, end) one by one.
template <class Op, class Out, class In>
__device__ __noinline__ void convert_columns(const In* input, Out* result, const float* scales, const MergedRows& rows,
                                             std::uint32_t begin, std::uint32_t end) {
#pragma unroll 1
  for (std::uint32_t i = begin; i < end; ++i)
    result[i] = device::convert_element<Op, Out>(input[i], Op::prepare(scales[rows.columns.divmod(i).remainder]));
}

// A thread owns 8 elements of a merged row, and so their scales, in kRows merged rows.
template <class Op, class In, class Out, int kRows>
__global__ void __launch_bounds__(128, 8)
    elementwise_per_channel_merged(const In* input, Out* result, const float* scales, bool dependent,
                                   const __grid_constant__ MergedRows rows) {
  const auto [batch, vec_in_row] = rows.vecs_per_row.divmod(blockIdx.x * blockDim.x + threadIdx.x);
  const std::uint32_t step = rows.vecs_per_row.divisor;
  const std::uint32_t first = batch * kRows * step + vec_in_row;
  const std::uint32_t whole = rows.count / kVecSize;
  if (first >= (rows.count + kVecSize - 1) / kVecSize) return;
  device::wait_then_release(dependent);
  Vec<In> raw[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    if (first + r * step < whole) raw[r] = device::load_aligned(input + std::int64_t{first + r * step} * kVecSize);
  const std::uint32_t column = rows.columns.divmod(vec_in_row * kVecSize).remainder;
  const float* here = scales + column;
  const float* wrapped = here - rows.columns.divisor;
  float values[kVecSize];
#pragma unroll
  for (int i = 0; i < kVecSize; ++i) values[i] = column + i < rows.columns.divisor ? here[i] : wrapped[i];
  typename Op::Prepared prepared[kVecSize];
  const bool divide = prepare_each<Op>(values, prepared);
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    if (first + r * step < whole)
      device::store_aligned(result + std::int64_t{first + r * step} * kVecSize,
                            multiplied<Op, Out>(raw[r], [&](int i) { return prepared[i]; }));
  if (divide || first + (kRows - 1) * step >= whole) {  // or the tensor may end inside a vector
#pragma unroll 1
    for (int r = 0; r < kRows; ++r) {
      const std::uint32_t vec = first + r * step;
      if (divide || vec == whole)
        convert_columns<Op>(input, result, scales, rows, vec * kVecSize, min((vec + 1) * kVecSize, rows.count));
    }
  }
}

// The rows that a thread loops over.
struct LoopedRows {
  std::uint32_t count;
  device::FastDiv batches;  // of kRows rows
  std::int64_t in, out;     // strides
};

// Aligned, in any other way. A thread owns 8 columns: it prepares their scales once and loops over kRows rows.
template <class Op, class In, class Out, int kRows>
__global__ void __launch_bounds__(256)
    elementwise_per_column(const In* input, Out* result, const float* scales, const __grid_constant__ IndexMap map,
                           const __grid_constant__ LoopedRows rows, const __grid_constant__ PerColumnScales columns) {
  const std::uint32_t vec = blockIdx.x * blockDim.x + threadIdx.x;
  if (vec >= map.count) return;
  device::wait_then_release();
  const auto [index, vec_in_row] = map.vecs_per_row.divmod(vec);
  const auto [outer, batch] = rows.batches.divmod(index);
  const Offsets at = map.at<-1>(outer);
  const std::uint32_t column = vec_in_row * kVecSize;
  const std::uint32_t row = batch * kRows;
  const int count = static_cast<int>(min(rows.count - row, std::uint32_t{kRows}));
  const In* in = input + at.in + row * rows.in + column;
  Out* out = result + at.out + row * rows.out + column;

  Vec<In> raw[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    if (r < count) raw[r] = device::load_aligned(in + r * rows.in);
  typename Op::Prepared prepared[kVecSize];
  prepare_scales<Op>(prepared, scales + at.scale, columns, column);
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    if (r < count) device::store_aligned(out + r * rows.out, convert_per_column<Op, Out>(raw[r], prepared));
}

// Vectors begin at other columns in every row, so a thread takes one.
template <class Op, class In, class Out>
__global__ void __launch_bounds__(256)
    elementwise_per_column_unaligned(const In* input, Out* result, const float* scales, const __grid_constant__ IndexMap map,
                                     const __grid_constant__ PerColumnScales columns) {
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
    elementwise_scalar(const In* input, Out* result, const float* scales, const __grid_constant__ IndexMap map,
                       const __grid_constant__ FlatRows flat) {
  const std::uint32_t element = blockIdx.x * blockDim.x + threadIdx.x;
  if (element >= map.count) return;
  device::wait_then_release();
  const Offsets at = map.at<-1>(element);
  const auto scale = Op::prepare(scales[at.scale + flat.offset(element)]);
  result[at.out] = device::convert_element<Op, Out>(input[at.in], scale);
}

// --- Launches ----------

template <class Op, class In, class Out>
auto contiguous_kernel(const core::ElementwisePlan& plan) {
  using core::Groups;
  const bool two = plan.vecs_per_thread == 2;
  switch (plan.groups) {
    case Groups::One:
      return two ? elementwise_contiguous<Op, In, Out, Groups::One, 2> : elementwise_contiguous<Op, In, Out, Groups::One, 1>;
    case Groups::Row:
      return two ? elementwise_contiguous<Op, In, Out, Groups::Row, 2> : elementwise_contiguous<Op, In, Out, Groups::Row, 1>;
    case Groups::Grid: break;
  }
  return two ? elementwise_contiguous<Op, In, Out, Groups::Grid, 2> : elementwise_contiguous<Op, In, Out, Groups::Grid, 1>;
}

template <class Op, class In, class Out>
auto merged_kernel(int rows) {
  return rows == 4   ? elementwise_per_channel_merged<Op, In, Out, 4>
         : rows == 2 ? elementwise_per_channel_merged<Op, In, Out, 2>
                     : elementwise_per_channel_merged<Op, In, Out, 1>;
}

template <class Op, class In, class Out>
void launch_elementwise_chunk(const core::ElementwisePlan& plan, const core::Chunk& chunk, const In* input, Out* result,
                              const float* scales, cudaStream_t stream) {
  using core::ElementwiseKernel;
  const Layout::Dim& inner = chunk.layout.inner();
  IndexMap map = IndexMap::over(chunk.layout, plan.outer_dims, plan.vecs_per_row, plan.work);
  map.row_size = plan.row_size;
  const PerColumnScales columns{.stride = inner.scale, .block = device::FastDiv(inner.block), .vectors = plan.vector_scales};
  const LoopedRows rows{.count = static_cast<std::uint32_t>(plan.rows),
                        .batches = device::FastDiv(core::ceil_div(plan.rows, plan.rows_per_thread)),
                        .in = plan.row_in,
                        .out = plan.row_out};
  const auto blocks = static_cast<unsigned>(plan.blocks);
  const auto launch = [&](auto kernel, const auto&... arguments) {
    launch_dependent(kernel, blocks, plan.threads, stream, input + chunk.in, result + chunk.out, scales + chunk.scale,
                     arguments...);
  };
  const auto grid = [&](int unit) { return GroupGrid(plan.grid, chunk.layout.numel, unit); };
  switch (plan.kernel) {
    case ElementwiseKernel::Scalar: return launch(elementwise_scalar<Op, In, Out>, map, FlatRows::of(chunk));
    case ElementwiseKernel::Contiguous: return launch(contiguous_kernel<Op, In, Out>(plan), grid(kVecSize));
    case ElementwiseKernel::RowsOfBlocks:
      return launch(elementwise_rows_of_blocks<Op, In, Out, core::kRowsOfBlocks>,
                    static_cast<std::uint32_t>(chunk.layout.numel / plan.grid.row), grid(kVecSize));
    case ElementwiseKernel::AcrossGroups: return launch(elementwise_across_groups<Op, In, Out>, grid(1));
    case ElementwiseKernel::Vectorized: return launch(elementwise_vectorized<Op, In, Out>, map);
    case ElementwiseKernel::VectorizedUnaligned: return launch(elementwise_vectorized_unaligned<Op, In, Out>, map);
    case ElementwiseKernel::PerChannelOfOneRow:
      return launch(elementwise_per_channel_of_one_row<Op, In, Out>, launches_dependent(blocks),
                    static_cast<std::uint32_t>(inner.size));
    case ElementwiseKernel::PerChannel:
      return launch(
          plan.rows_per_thread == 1 ? elementwise_per_channel<Op, In, Out, 1> : elementwise_per_channel<Op, In, Out, 4>,
          rows.count, map.vecs_per_row);
    case ElementwiseKernel::PerChannelMerged:
      return launch(merged_kernel<Op, In, Out>(plan.rows_per_thread), launches_dependent(blocks),
                    MergedRows{.count = static_cast<std::uint32_t>(chunk.layout.numel),
                               .vecs_per_row = map.vecs_per_row,
                               .columns = device::FastDiv(inner.size)});
    case ElementwiseKernel::PerColumn:
      return launch(plan.rows_per_thread == 2 ? elementwise_per_column<Op, In, Out, 2> : elementwise_per_column<Op, In, Out, 1>,
                    map, rows, columns);
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
