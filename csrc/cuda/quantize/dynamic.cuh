// The kernels of dynamic quantization, one per core::DynamicPath, and their launches. Instantiated for one input type per
// source file.
#pragma once

#include <cooperative_groups.h>

#include <bit>
#include <type_traits>
#include <utility>

#include "cuda/quantize/dynamic.h"
#include "cuda/quantize/elementwise.cuh"
#include "cuda/quantize/group_amax.h"
#include "cuda/quantize/static.h"
#include "device/reduce.cuh"

namespace fp8kv::cuda {

namespace cg = cooperative_groups;
using core::DynamicPath;
using core::kCooperativeBlocks;
using core::kCooperativeThreads;
using core::kRedundantThreads;
using core::kRedundantVecs;
using core::vecs_in_registers;

// A row of the input and its place in the result.
template <class Fp8, class In, bool kAligned>
struct Row {
  const In* in;
  Fp8* out;
  std::int64_t size;

  __device__ __forceinline__ Slice slice(std::uint32_t vec) const {
    if constexpr (kAligned) return {std::int64_t{vec} * kVecSize, {}};
    return slice_of(out, vec, size);
  }
  __device__ __forceinline__ Vec<In> load(const Slice& slice) const {
    if constexpr (kAligned) return device::load_aligned(in + slice.first);
    if (slice.range.begin >= slice.range.end) return {};
    return device::load_any(in, slice.first, size, slice.range);
  }
  __device__ __forceinline__ void store(const Slice& slice, const Vec<Fp8>& vec) const {
    device::store_range(out + slice.first, vec, slice.range);
  }
};

// The vectors of a row that a thread has: `first`, `first` + `step`, ... below `end`.
struct Share {
  std::uint32_t first, step, end;
};

// With a scale that does not divide.
template <class Fp8, class In>
__device__ __forceinline__ Vec<Fp8> quantized(const Vec<In>& raw, const typename device::QuantizeOp<Fp8>::Prepared& scale) {
  return multiplied<device::QuantizeOp<Fp8>, Fp8>(raw, [&](int) { return scale; });
}

// What is rare is done from memory again, out of line (see divide_vec): the quotients of a scale that divides, and the maximum
// where there is an infinity or a NaN.
template <class Fp8, class In, bool kAligned>
__device__ __noinline__ void divide_share(Row<Fp8, In, kAligned> row, float scale, Share share) {
  using Op = device::QuantizeOp<Fp8>;
  const auto prepared = Op::prepare(scale);
  for (std::uint32_t vec = share.first; vec < share.end; vec += share.step) {
    const Slice slice = row.slice(vec);
    row.store(slice, device::convert_vec<Op, Fp8>(row.load(slice), prepared));
  }
}

template <class Fp8, class In, bool kAligned>
__device__ __noinline__ std::uint32_t finite_max_of_share(Row<Fp8, In, kAligned> row, Share share) {
  std::uint32_t bits = 0;
  for (std::uint32_t vec = share.first; vec < share.end; vec += share.step)
    bits = max(bits, device::finite_max_bits(row.load(row.slice(vec))));
  return bits;
}

// The largest finite magnitude bits of a thread's vectors, given a word of the largest of all.
template <class Fp8, class In, bool kAligned>
__device__ __forceinline__ std::uint32_t finite_max_of(std::uint32_t word, const Row<Fp8, In, kAligned>& row, Share share) {
  const std::uint32_t bits = device::largest_of_word<In>(word);
  return bits < device::kInfinityBits<In> ? bits : finite_max_of_share(row, share);
}

// `count` vectors, `step` apart, in batches: a load stays behind the stores before it.
template <class Fp8, class In, bool kAligned, class Load, class Store>
__device__ __forceinline__ void quantize_in_batches(const Row<Fp8, In, kAligned>& row, std::uint32_t vec, std::uint32_t step,
                                                    std::uint32_t count, const Load& load, const Store& store) {
  constexpr int kBatch = 4;
  for (; count > 0; vec += kBatch * step) {
    const int batch = count < kBatch ? static_cast<int>(count) : kBatch;
    Vec<In> raw[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k)
      if (k < batch) raw[k] = load(row.slice(vec + k * step));
#pragma unroll
    for (int k = 0; k < kBatch; ++k)
      if (k < batch) store(row.slice(vec + k * step), raw[k]);
    count -= batch;
  }
}

// The threads of a group hold its row in registers. kVecs: vectors per thread; 0 reads the row a second time instead. kSubwarp:
// the threads are a part of a warp, a power of two, and not the block. `works`: false for lanes beyond the last group.
template <int kVecs, bool kSubwarp, class Fp8, class In, bool kAligned>
__device__ __forceinline__ void quantize_group(const Row<Fp8, In, kAligned>& row, float* scale_out, const float* upper_bound,
                                               bool works, std::uint32_t lane, std::uint32_t threads, std::uint32_t vecs) {
  using Op = device::QuantizeOp<Fp8>;
  if (!works) vecs = 0;
  const Share share{lane, threads, vecs};
  constexpr int kHeld = kVecs > 0 ? kVecs : 1;
  Vec<In> held[kHeld];
  std::uint32_t word = 0;
  if constexpr (kVecs > 0) {
#pragma unroll
    for (int k = 0; k < kVecs; ++k) {
      const std::uint32_t vec = lane + k * threads;
      held[k] = vec < vecs ? row.load(row.slice(vec)) : Vec<In>{};
    }
#pragma unroll
    for (int k = 0; k < kVecs; ++k) device::raise_word(word, held[k]);
  } else {
#pragma unroll 4
    for (std::uint32_t vec = lane; vec < vecs; vec += threads) device::raise_word(word, row.load(row.slice(vec)));
  }
  const float bound = device::bound_of(upper_bound);
  std::uint32_t bits = finite_max_of(word, row, share);
  if constexpr (kSubwarp) {
    bits = device::lanes_max(bits, static_cast<int>(threads));
  } else {
    __shared__ std::uint32_t scratch[32];
    bits = device::block_max(bits, scratch);
  }

  const float scale = device::fast_dynamic_scale<Fp8>(device::magnitude<In>(bits), bound);
  const auto prepared = Op::prepare(scale);
  if (lane == 0 && works) *scale_out = scale;
  if constexpr (kVecs > 0) {
#pragma unroll
    for (int k = 0; k < kVecs; ++k) {
      const std::uint32_t vec = lane + k * threads;
      if (vec < vecs) row.store(row.slice(vec), quantized<Fp8>(held[k], prepared));
    }
  } else if (lane < vecs) {
    quantize_in_batches(
        row, lane, threads, (vecs - 1 - lane) / threads + 1, [&](const Slice& slice) { return row.load(slice); },
        [&](const Slice& slice, const Vec<In>& raw) { row.store(slice, quantized<Fp8>(raw, prepared)); });
  }
  if (prepared.divide) divide_share(row, scale, share);
}

// DynamicPath::PerGroup. A group has 2^lanes_log2 lanes of a warp, or the block.
template <class Fp8, class In, int kVecs, bool kSubwarp, bool kAligned>
__global__ void __launch_bounds__(1024) quantize_groups(const In* input, Fp8* result, float* scales, const float* upper_bound,
                                                        const __grid_constant__ IndexMap map, int lanes_log2) {
  const std::uint32_t threads = kSubwarp ? 1u << lanes_log2 : blockDim.x;
  const std::uint32_t group = kSubwarp ? (blockIdx.x * blockDim.x + threadIdx.x) >> lanes_log2 : blockIdx.x;
  device::wait_then_release();
  const Offsets at = map.at<-1>(min(group, map.count - 1));  // whole warps take part in the maximum
  quantize_group<kVecs, kSubwarp>(Row<Fp8, In, kAligned>{input + at.in, result + at.out, map.row_size}, scales + at.scale,
                                  upper_bound, group < map.count, kSubwarp ? threadIdx.x & (threads - 1) : threadIdx.x, threads,
                                  map.vecs_per_row.divisor);
}

// The same where a group has the block, and aligned rows are contiguous, as are their scales: few parameters, and nothing to
// compute before the loads.
template <class Fp8, class In, int kVecs>
__global__ void __launch_bounds__(1024) quantize_rows_contiguous(const In* input, Fp8* result, float* scales,
                                                                 const float* upper_bound, bool dependent, std::uint32_t vecs) {
  const std::int64_t first = std::int64_t{blockIdx.x} * vecs * kVecSize;
  device::wait_then_release(dependent);
  quantize_group<kVecs, false>(Row<Fp8, In, true>{input + first, result + first, 0}, scales + blockIdx.x, upper_bound, true,
                               threadIdx.x, blockDim.x, vecs);
}

template <class In>
__device__ __forceinline__ std::uint32_t finite_bits_at(const In* p) {
  return device::finite_bits<In>(*reinterpret_cast<const typename device::BitsOf<In>::type*>(p));
}

// A row by its elements, by a block: what is rare.
template <class Fp8, class In>
__device__ __noinline__ void quantize_row_by_elements(const In* input, Fp8* result, float* scale_out, float bound,
                                                      std::uint32_t begin, std::uint32_t end) {
  using Op = device::QuantizeOp<Fp8>;
  __shared__ std::uint32_t scratch[32];
  std::uint32_t bits = 0;
#pragma unroll 1
  for (std::uint32_t i = begin + threadIdx.x; i < end; i += blockDim.x) bits = max(bits, finite_bits_at(input + i));
  bits = device::block_max(bits, scratch);
  const float scale = device::fast_dynamic_scale<Fp8>(device::magnitude<In>(bits), bound);
  if (threadIdx.x == 0) *scale_out = scale;
  const auto prepared = Op::prepare(scale);
#pragma unroll 1
  for (std::uint32_t i = begin + threadIdx.x; i < end; i += blockDim.x)
    result[i] = device::convert_element<Op, Fp8>(input[i], prepared);
}

// Rows of any length that follow each other from an aligned address on, as do their scales, a row for each block: vectors of
// the whole input. The first and the last of a row may have elements of its neighbors: two threads take these ends in addition.
template <class Fp8, class In, int kVecs>
__global__ void __launch_bounds__(1024)
    quantize_rows_of_any_length(const In* input, Fp8* result, float* scales, const float* upper_bound, bool dependent,
                                std::uint32_t size, std::uint32_t count) {
  using Op = device::QuantizeOp<Fp8>;
  using Bits = typename device::BitsOf<In>::type;
  __shared__ std::uint32_t scratch[32];
  const std::uint32_t begin = blockIdx.x * size, end = begin + size;
  const std::uint32_t first = begin / kVecSize, last = (end - 1) / kVecSize;
  device::wait_then_release(dependent);
  Vec<In> held[kVecs];
#pragma unroll
  for (int k = 0; k < kVecs; ++k) {
    const std::uint32_t vec = first + 1 + threadIdx.x + k * blockDim.x;
    held[k] = vec < last ? device::load_aligned(input + std::int64_t{vec} * kVecSize) : Vec<In>{};
  }
  const bool has_end = threadIdx.x < 2, left_end = threadIdx.x == 0;
  const std::uint32_t end_at = (left_end ? first : last) * kVecSize;
  const int cut = static_cast<int>((left_end ? begin : end) - end_at);  // elements before the row, or of it
  Vec<In> at_end{};
  if (has_end) {
    if (end_at + kVecSize <= count) {
      at_end = device::load_aligned(input + end_at);
    } else {
#pragma unroll
      for (int i = 0; i < kVecSize; ++i)
        if (i < cut)
          at_end.words[i * sizeof(In) / 4] |= std::uint32_t{reinterpret_cast<const Bits*>(input)[end_at + i]}
                                              << (8 * (i * sizeof(In) % 4));
    }
  }
  const float bound = device::bound_of(upper_bound);
  std::uint32_t word = 0;
#pragma unroll
  for (int k = 0; k < kVecs; ++k) device::raise_word(word, held[k]);
  if (has_end) {
    std::uint32_t words[2] = {};
    device::raise_words(words, at_end, cut);
    word = device::larger_word<In>(word, left_end ? words[1] : words[0]);
  }
  const std::uint32_t bits = device::block_max(device::largest_of_word<In>(word), scratch);
  const float scale = device::fast_dynamic_scale<Fp8>(device::magnitude<In>(bits), bound);
  const auto prepared = Op::prepare(scale);
  if (bits >= device::kInfinityBits<In> || prepared.divide)
    return quantize_row_by_elements(input, result, scales + blockIdx.x, bound, begin, end);
#pragma unroll
  for (int k = 0; k < kVecs; ++k) {
    const std::uint32_t vec = first + 1 + threadIdx.x + k * blockDim.x;
    if (vec < last) device::store_aligned(result + std::int64_t{vec} * kVecSize, quantized<Fp8>(held[k], prepared));
  }
  if (left_end) scales[blockIdx.x] = scale;
  if (has_end)
    device::store_range(result + end_at, quantized<Fp8>(at_end, prepared), left_end ? Range{cut, kVecSize} : Range{0, cut});
}

// Of kLanes neighboring lanes, or of `width` where that is 0.
template <int kLanes>
__device__ __forceinline__ std::uint32_t group_max(std::uint32_t value, int width) {
  if constexpr (kLanes == 0) {
    value = device::lanes_max(value, width);
  } else {
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) value = max(value, __shfl_xor_sync(0xffffffffu, value, offset));
  }
  return value;
}

// The same for short groups of whole units, one for each of at most 2^lanes_log2 lanes; kLanes as in group_max.
template <class Fp8, class In, int kLanes>
__global__ void __launch_bounds__(128)
    quantize_units_contiguous(const In* input, Fp8* result, float* scales, const float* upper_bound, bool dependent,
                              std::uint32_t groups, std::uint32_t units, int lanes_log2) {
  using Op = device::QuantizeOp<Fp8>;
  constexpr int kVecs = core::kUnitSize / kVecSize;
  const std::uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x;
  const std::uint32_t lanes = kLanes > 0 ? kLanes : 1u << lanes_log2;
  const std::uint32_t group = kLanes > 0 ? thread / kLanes : thread >> lanes_log2, lane = thread & (lanes - 1);
  const bool works = group < groups && lane < units;
  const std::int64_t first = (std::int64_t{group} * units + lane) * core::kUnitSize;
  device::wait_then_release(dependent);
  Vec<In> raw[kVecs] = {};
  if (works) device::load_aligned(input + first, raw);
  const float bound = device::bound_of(upper_bound);
  const std::uint32_t bits = group_max<kLanes>(device::finite_max_bits(raw), static_cast<int>(lanes));
  if (!works) return;
  const float scale = device::fast_dynamic_scale<Fp8>(device::magnitude<In>(bits), bound);
  const auto prepared = Op::prepare(scale);
  if (lane == 0) scales[group] = scale;
  Vec<Fp8> converted[kVecs];
  multiply_vecs<Op>(raw, converted, [&](int, int) { return prepared; });
  device::store_aligned(result + first, converted);
  if (prepared.divide) divide_share(Row<Fp8, In, true>{input + first, result + first, 0}, scale, {0, 1, kVecs});
}

// The same for short groups at any address: element by element, of which neighboring lanes take neighbors.
template <class Fp8, class In>
__global__ void __launch_bounds__(128) quantize_elements(const In* input, Fp8* result, float* scales, const float* upper_bound,
                                                         const __grid_constant__ IndexMap map, int lanes_log2) {
  using Op = device::QuantizeOp<Fp8>;
  const std::uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x, lanes = 1u << lanes_log2;
  const std::uint32_t group = thread >> lanes_log2, lane = thread & (lanes - 1);
  const auto size = group < map.count ? static_cast<std::uint32_t>(map.row_size) : 0u;
  device::wait_then_release();
  const Offsets at = map.at<-1>(min(group, map.count - 1));
  const In* in = input + at.in + lane;
  Fp8* out = result + at.out + lane;
  using Bits = typename device::BitsOf<In>::type;
  Bits held[core::kElementsPerLane] = {};
#pragma unroll
  for (std::uint32_t k = 0; k < core::kElementsPerLane; ++k)
    if (lane + k * lanes < size) held[k] = *reinterpret_cast<const Bits*>(in + k * lanes);
  std::uint32_t bits = 0;
#pragma unroll
  for (std::uint32_t k = 0; k < core::kElementsPerLane; ++k) bits = max(bits, device::finite_bits<In>(held[k]));
  const float bound = device::bound_of(upper_bound);
  bits = device::lanes_max(bits, static_cast<int>(lanes));
  const float scale = device::fast_dynamic_scale<Fp8>(device::magnitude<In>(bits), bound);
  const auto prepared = Op::prepare(scale);
  if (lane == 0 && size > 0) scales[at.scale] = scale;
#pragma unroll
  for (std::uint32_t k = 0; k < core::kElementsPerLane; ++k)
    if (lane + k * lanes < size)
      out[k * lanes] = device::pack_element<Fp8>(Op::apply(prepared, device::magnitude<In>(held[k])));
  if (prepared.divide)
    for (std::uint32_t i = lane; i < size; i += lanes) out[i - lane] = device::convert_element<Op, Fp8>(in[i - lane], prepared);
}

// DynamicPath::AcrossGroups. A block takes a tile of the whole tensor, a thread kUnits units of it, which have parts of up to
// two groups each. The maxima of the tile's groups are collected in shared memory. Of the first and the last group other
// elements may lie in other tiles: they are read here too. The scale of a group is stored by the block in whose tile it begins.
struct GroupTile {
  GroupGrid grid;
  device::FastDiv groups_per_row;

  __device__ __forceinline__ std::uint32_t number_of(std::uint32_t row, std::uint32_t group) const {
    return row * groups_per_row.divisor + group;
  }
  __device__ __forceinline__ std::uint32_t number_of(std::uint32_t element) const {
    const auto [row, column] = grid.row.divmod(element);
    return number_of(row, grid.group.div(column));
  }
  __device__ __forceinline__ std::uint32_t begin_of(std::uint32_t number) const {
    const auto [row, group] = groups_per_row.divmod(number);
    return row * grid.row.divisor + group * grid.group.divisor;
  }
  __device__ __forceinline__ std::uint64_t scale_of(std::uint32_t number) const {
    const auto [row, group] = groups_per_row.divmod(number);
    return grid.scale_of(row, group);
  }
};

// Of elements [begin, end), one by one: what is rare.
template <class In>
__device__ __noinline__ void raise_maxima(const In* input, const GroupTile& tile, std::uint32_t begin, std::uint32_t end,
                                          std::uint32_t* maxima, std::uint32_t first_group) {
  for (std::uint32_t i = begin; i < end; ++i) atomicMax(&maxima[tile.number_of(i) - first_group], finite_bits_at(input + i));
}
template <class Fp8, class In>
__device__ __noinline__ void quantize_by_elements(const In* input, Fp8* result, const GroupTile& tile, std::uint32_t begin,
                                                  std::uint32_t end, const float* scales, std::uint32_t first_group) {
  using Op = device::QuantizeOp<Fp8>;
  for (std::uint32_t i = begin; i < end; ++i)
    result[i] = device::convert_element<Op, Fp8>(input[i], Op::prepare(scales[tile.number_of(i) - first_group]));
}

template <class Fp8, class In, int kUnits>
__global__ void __launch_bounds__(core::kTileThreads)
    quantize_across_groups(const In* input, Fp8* result, float* scales, const float* upper_bound, bool dependent,
                           const __grid_constant__ GroupTile tile) {
  using Op = device::QuantizeOp<Fp8>;
  constexpr int kVecs = core::kUnitSize / kVecSize;
  constexpr std::uint32_t kTileSize = core::kTileThreads * core::kUnitSize * kUnits;
  // Of kUnitSize elements, and a few smaller ones at the ends of long rows.
  constexpr int kMostGroups = (core::kTileThreads + 8) * kUnits;
  // With several units, what the first and the last group have in other tiles is asked for together with them; with one, the
  // registers for that would cost more than the second wait.
  constexpr bool kAskTogether = kUnits > 1;
  constexpr std::uint32_t kOutside = core::kLongestTileGroup / core::kTileThreads;
  __shared__ std::uint32_t maxima[kMostGroups];
  __shared__ float his[kMostGroups], los[kMostGroups], group_scales[kMostGroups];
  __shared__ std::uint32_t first_shared, last_shared;
  const GroupGrid& grid = tile.grid;
  const std::uint32_t begin = blockIdx.x * kTileSize, end = min(begin + kTileSize, grid.count);
  std::uint32_t first_group = 0, last_group = 0;
  if constexpr (kAskTogether) first_group = tile.number_of(begin), last_group = tile.number_of(end - 1);
  device::wait_then_release(dependent);
  std::uint32_t unit[kUnits], unit_end[kUnits];
  Vec<In> raw[kUnits][kVecs] = {};
  bool usual[kUnits];
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    unit[u] = min(begin + (threadIdx.x + u * core::kTileThreads) * core::kUnitSize, end);
    unit_end[u] = min(unit[u] + core::kUnitSize, end);
    usual[u] = unit[u] + core::kUnitSize <= end;
    if (usual[u]) device::load_aligned(input + unit[u], raw[u]);
  }
  std::uint32_t before[kOutside] = {}, behind[kOutside] = {};
  if constexpr (kAskTogether) {
    const std::uint32_t first_begin = tile.begin_of(first_group), last_end = min(tile.begin_of(last_group + 1), grid.count);
#pragma unroll
    for (std::uint32_t k = 0; k < kOutside; ++k) {
      const std::uint32_t i = threadIdx.x + k * core::kTileThreads;
      if (first_begin + i < begin) before[k] = load_part<1>(input + first_begin + i).words[0];
      if (end + i < last_end) behind[k] = load_part<1>(input + end + i).words[0];
    }
  }
  const float bound = device::bound_of(upper_bound);
#pragma unroll 1
  for (int i = threadIdx.x; i < kMostGroups; i += core::kTileThreads) maxima[i] = 0;
  if constexpr (!kAskTogether) {
    if (threadIdx.x == 0) first_shared = tile.number_of(begin);
    if (threadIdx.x == 32) last_shared = tile.number_of(end - 1);
  }
  int left[kUnits];
  std::uint32_t local[kUnits];
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    const UnitPlace place(grid, unit[u]);
    left[u] = place.left;
    local[u] = tile.number_of(place.row, place.group);
    usual[u] = usual[u] && place.two_at_most();
  }
  __syncthreads();
  if constexpr (!kAskTogether) first_group = first_shared, last_group = last_shared;
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    local[u] -= first_group;
    std::uint32_t words[2] = {};
#pragma unroll
    for (int k = 0; k < kVecs; ++k) device::raise_words(words, raw[u][k], left[u] - k * kVecSize);
    const std::uint32_t bits = device::largest_of_word<In>(words[0]), next_bits = device::largest_of_word<In>(words[1]);
    if (usual[u] && max(bits, next_bits) < device::kInfinityBits<In>) {
      atomicMax(&maxima[local[u]], bits);
      if (left[u] < core::kUnitSize) atomicMax(&maxima[local[u] + 1], next_bits);
    } else {
      raise_maxima(input, tile, unit[u], unit_end[u], maxima, first_group);
    }
  }
  if constexpr (kAskTogether) {
    std::uint32_t of_first = 0, of_last = 0;
#pragma unroll
    for (std::uint32_t k = 0; k < kOutside; ++k) {
      of_first = max(of_first, device::finite_bits<In>(before[k]));
      of_last = max(of_last, device::finite_bits<In>(behind[k]));
    }
    of_first = __reduce_max_sync(0xffffffffu, of_first);
    of_last = __reduce_max_sync(0xffffffffu, of_last);
    if (threadIdx.x % 32 == 0) {
      atomicMax(&maxima[0], of_first);
      atomicMax(&maxima[last_group - first_group], of_last);
    }
  } else {
#pragma unroll 1
    for (std::uint32_t i = tile.begin_of(first_group) + threadIdx.x; i < begin; i += core::kTileThreads)
      atomicMax(&maxima[0], finite_bits_at(input + i));
    const std::uint32_t end_of_last = min(tile.begin_of(last_group + 1), grid.count);
#pragma unroll 1
    for (std::uint32_t i = end + threadIdx.x; i < end_of_last; i += core::kTileThreads)
      atomicMax(&maxima[last_group - first_group], finite_bits_at(input + i));
  }
  __syncthreads();

  bool divide = false;
#pragma unroll 1
  for (std::uint32_t i = threadIdx.x; i <= last_group - first_group; i += core::kTileThreads) {
    const float scale = device::fast_dynamic_scale<Fp8>(device::magnitude<In>(maxima[i]), bound);
    const auto prepared = Op::prepare(scale);
    his[i] = prepared.hi;
    los[i] = prepared.lo;
    group_scales[i] = scale;
    divide |= prepared.divide;
    if (i > 0 || tile.begin_of(first_group) == begin) scales[tile.scale_of(first_group + i)] = scale;
  }
  divide = __syncthreads_or(divide);
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    if (divide || !usual[u]) {
      quantize_by_elements(input, result, tile, unit[u], unit_end[u], group_scales, first_group);
      continue;
    }
    const std::uint32_t next = left[u] < core::kUnitSize ? local[u] + 1 : local[u];
    const float hi = his[local[u]], lo = los[local[u]], next_hi = his[next], next_lo = los[next];
    Vec<Fp8> converted[kVecs];
    multiply_vecs<Op>(raw[u], converted, [&](int k, int i) {
      const bool first = k * kVecSize + i < left[u];
      return typename Op::Prepared{first ? hi : next_hi, first ? lo : next_lo, 0.0f, false};
    });
    device::store_aligned(result + unit[u], converted);
  }
}

// DynamicPath::Redundant: one row, one scale. Every block finds the maximum of all of it, which takes less time than asking
// other blocks, and quantizes its own kRedundantVecs vectors.
template <class Fp8, class In, int kVecs, bool kAligned>
__global__ void __launch_bounds__(kRedundantThreads)
    quantize_redundant(const In* input, Fp8* result, float* scale_out, const float* upper_bound, std::int64_t size,
                       std::uint32_t vecs) {
  using Op = device::QuantizeOp<Fp8>;
  __shared__ std::uint32_t scratch[32];
  device::wait_then_release();
  const Row<Fp8, In, kAligned> row{input, result, size};
  const std::uint32_t own_vec = blockIdx.x * kRedundantVecs + threadIdx.x;
  const bool quantizes = threadIdx.x < kRedundantVecs && own_vec < vecs;
  const Slice slice = row.slice(own_vec);
  const Vec<In> own = quantizes ? row.load(slice) : Vec<In>{};
  const Share share{threadIdx.x, kRedundantThreads, vecs};
  Vec<In> held[kVecs];
#pragma unroll
  for (int k = 0; k < kVecs; ++k) {
    const std::uint32_t vec = threadIdx.x + k * kRedundantThreads;
    held[k] = vec < vecs ? row.load(row.slice(vec)) : Vec<In>{};
  }
  const float bound = device::bound_of(upper_bound);
  std::uint32_t word = 0;
#pragma unroll
  for (int k = 0; k < kVecs; ++k) device::raise_word(word, held[k]);
  const std::uint32_t bits = device::block_max(finite_max_of(word, row, share), scratch);
  const float scale = device::fast_dynamic_scale<Fp8>(device::magnitude<In>(bits), bound);
  if (own_vec == 0) *scale_out = scale;
  if (!quantizes) return;
  const auto prepared = Op::prepare(scale);
  row.store(slice, quantized<Fp8>(own, prepared));
  if (prepared.divide) divide_share(row, scale, {own_vec, 1, own_vec + 1});
}

constexpr int kMaxClusterBlocks = 16;

// DynamicPath::Cluster: one row, one scale, one thread block cluster. Every block sends its maximum to all others.
template <class Fp8, class In, int kVecs, bool kAligned>
__global__ void __launch_bounds__(1024) quantize_cluster(const In* input, Fp8* result, float* scale_out,
                                                         const float* upper_bound, std::int64_t size, std::uint32_t vecs) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  using Op = device::QuantizeOp<Fp8>;
  __shared__ std::uint32_t scratch[32];
  __shared__ std::uint32_t maxima[kMaxClusterBlocks];
  cg::cluster_group cluster = cg::this_cluster();
  auto started = cluster.barrier_arrive();
  const std::uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x;
  const std::uint32_t stride = gridDim.x * blockDim.x;
  const Row<Fp8, In, kAligned> row{input, result, size};
  const float bound = device::bound_of(upper_bound);

  Vec<In> held[kVecs];
#pragma unroll
  for (int k = 0; k < kVecs; ++k) {
    const std::uint32_t vec = thread + k * stride;
    held[k] = vec < vecs ? row.load(row.slice(vec)) : Vec<In>{};
  }
  std::uint32_t word = 0;
#pragma unroll
  for (int k = 0; k < kVecs; ++k) device::raise_word(word, held[k]);
  std::uint32_t bits = device::block_max(finite_max_of(word, row, {thread, stride, vecs}), scratch);
  cluster.barrier_wait(std::move(started));  // the shared memory of all blocks is there
  if (threadIdx.x < gridDim.x) *cluster.map_shared_rank(&maxima[blockIdx.x], threadIdx.x) = bits;
  cluster.sync();
  const unsigned lane = threadIdx.x % 32;
  bits = __reduce_max_sync(0xffffffffu, lane < gridDim.x ? maxima[lane] : 0u);

  const float scale = device::fast_dynamic_scale<Fp8>(device::magnitude<In>(bits), bound);
  if (thread == 0) *scale_out = scale;
  const auto prepared = Op::prepare(scale);
#pragma unroll
  for (int k = 0; k < kVecs; ++k) {
    const std::uint32_t vec = thread + k * stride;
    if (vec < vecs) row.store(row.slice(vec), quantized<Fp8>(held[k], prepared));
  }
  if (prepared.divide) divide_share(row, scale, {thread, stride, vecs});
#endif
}

// DynamicPath::Cooperative: one row, one scale, all multiprocessors. Between the two passes a thread keeps its first vectors in
// registers and the next `shared_vecs` in shared memory; the rest is read again, last first, while the L2 cache still has it.
// To that end the cache is to give up first what is not read again, and the result. The scale itself collects the maximum:
// dynamic_scale never decreases, so the largest scale of the blocks is the scale of all.
template <class Fp8, class In, bool kAligned>
__global__ void __launch_bounds__(kCooperativeThreads, kCooperativeBlocks)
    quantize_cooperative(const In* input, Fp8* result, float* scale_out, const float* upper_bound, std::int64_t size,
                         std::uint32_t vecs, int shared_vecs) {
  using Op = device::QuantizeOp<Fp8>;
  constexpr int kHeld = vecs_in_registers(DTypeOf<In>::value);
  constexpr std::uint32_t kCachedVecs = (32 << 20) / sizeof(Vec<In>);  // that the L2 cache may still have
  extern __shared__ __align__(16) char shared[];
  __shared__ std::uint32_t scratch[32];
  Vec<In>* kept = reinterpret_cast<Vec<In>*>(shared) + threadIdx.x;  // number k at kept[k * kCooperativeThreads]
  const cg::grid_group grid = cg::this_grid();
  const std::uint32_t thread = blockIdx.x * kCooperativeThreads + threadIdx.x;
  const std::uint32_t stride = gridDim.x * kCooperativeThreads;
  const std::uint32_t first_kept = thread + kHeld * stride;
  const std::uint32_t first_rest = first_kept + shared_vecs * stride;
  const bool has_rest = vecs > (kHeld + shared_vecs) * stride;
  const std::uint32_t first_cached = has_rest && vecs > kCachedVecs ? vecs - kCachedVecs : 0;
  const Row<Fp8, In, kAligned> row{input, result, size};
  const std::uint64_t usual = device::cache_policy(false), once = device::cache_policy(has_rest);
  const auto load = [&](const Slice& slice, std::uint64_t policy) {
    if constexpr (kAligned)
      return device::load_aligned(input + slice.first, policy);
    else
      return row.load(slice);
  };

  if (thread == 0) *scale_out = 0.0f;
  auto zeroed = grid.barrier_arrive();
  Vec<In> held[kHeld];
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    const std::uint32_t vec = thread + k * stride;
    held[k] = vec < vecs ? load(row.slice(vec), once) : Vec<In>{};
  }
  std::uint32_t word = 0;
  int number = 0;
#pragma unroll 4
  for (std::uint32_t vec = first_kept; vec < min(vecs, first_rest); vec += stride, ++number) {
    const Vec<In> raw = load(row.slice(vec), once);
    kept[number * kCooperativeThreads] = raw;
    device::raise_word(word, raw);
  }
#pragma unroll 8
  for (std::uint32_t vec = first_rest; vec < vecs; vec += stride)
    device::raise_word(word, load(row.slice(vec), vec < first_cached ? once : usual));
#pragma unroll
  for (int k = 0; k < kHeld; ++k) device::raise_word(word, held[k]);
  const std::uint32_t bits = device::block_max(finite_max_of(word, row, {thread, stride, vecs}), scratch);
  grid.barrier_wait(std::move(zeroed));
  if (threadIdx.x == 0)
    device::atomic_max(scale_out, device::fast_dynamic_scale<Fp8>(device::magnitude<In>(bits), device::bound_of(upper_bound)));
  grid.sync();  // the scale is final

  const float scale = __ldcg(scale_out);
  const auto prepared = Op::prepare(scale);
  const auto finish = [&](const Slice& slice, const Vec<In>& raw) {
    if constexpr (kAligned)
      device::store_aligned(result + slice.first, quantized<Fp8>(raw, prepared), once);
    else
      row.store(slice, quantized<Fp8>(raw, prepared));
  };
  if (vecs > first_rest) {
    const std::uint32_t others = (vecs - 1 - first_rest) / stride;
    quantize_in_batches(
        row, first_rest + others * stride, 0 - stride, others + 1, [&](const Slice& slice) { return load(slice, once); },
        finish);
  }
  number = 0;
#pragma unroll 2
  for (std::uint32_t vec = first_kept; vec < min(vecs, first_rest); vec += stride, ++number)
    finish(row.slice(vec), kept[number * kCooperativeThreads]);
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    const std::uint32_t vec = thread + k * stride;
    if (vec < vecs) finish(row.slice(vec), held[k]);
  }
  if (prepared.divide) divide_share(row, scale, {thread, stride, vecs});
}

// --- Launches ----------

// Calls f(std::integral_constant<int, vecs>{}) for a power of two from kFirst to kMost.
template <int kFirst, int kMost, class F>
void visit_vecs(int vecs, const F& f) {
  if (vecs == kFirst) return f(std::integral_constant<int, kFirst>{});
  if constexpr (2 * kFirst <= kMost) visit_vecs<2 * kFirst, kMost>(vecs, f);
}

template <class Fp8, class In>
struct DynamicLauncher {
  static constexpr int kMostVecs = vecs_in_registers(DTypeOf<In>::value);

  const DynamicQuantize& problem;
  const Layout& layout;
  cudaStream_t stream;
  const In* input = static_cast<const In*>(problem.input.data);
  Fp8* result = static_cast<Fp8*>(problem.result.data);
  float* scale = static_cast<float*>(problem.scale.data);
  const float* upper_bound = problem.scale_ub ? static_cast<const float*>(problem.scale_ub->data) : nullptr;

  void run() const {
    if (layout.numel == 0 || !core::fits_one_pass(layout)) return two_passes();
    const core::DeviceLimits& limits = device_limits();
    const core::Chunk whole{layout};
    if (const auto plan = core::plan_dynamic(whole, problem.input, problem.result, limits, 0);
        plan.path == DynamicPath::AcrossGroups) {
      launch_across_groups(whole, plan);
      return check_launch(kOp);
    }
    core::for_each_uniform_part(layout, [&](const core::Chunk& part) {
      core::for_each_chunk(part, core::kMaxChunk, [&](const core::Chunk& chunk) {
        launch(chunk, core::plan_dynamic(chunk, problem.input, problem.result, limits, max_cluster()));
        check_launch(kOp);
      });
    });
  }

 private:
  static constexpr const char* kOp = "dynamic_scaled_fp8_quant";

  void two_passes() const {
    fill_groups(kOp, layout, scale, kMinScale<Fp8>, stream);
    if (layout.numel == 0) return;
    raise_to_amax(kOp, layout, problem.input, scale, DTypeOf<Fp8>::value, upper_bound, stream);
    quantize_with(kOp, layout, problem.input, problem.result, problem.scale, stream);
  }

  void launch(const core::Chunk& chunk, const core::DynamicPlan& plan) const {
    switch (plan.path) {
      case DynamicPath::PerGroup: return launch_groups(chunk, plan);
      case DynamicPath::Redundant: return launch_redundant(chunk, plan);
      case DynamicPath::Cluster: return launch_cluster(chunk, plan);
      case DynamicPath::Cooperative: return launch_cooperative(chunk, plan);
      case DynamicPath::AcrossGroups: return launch_across_groups(chunk, plan);
      case DynamicPath::TwoPasses: return two_passes();
    }
  }

  template <class Kernel, class... Arguments>
  void launch_dependent_on(const core::Chunk& chunk, const core::DynamicPlan& plan, Kernel kernel,
                           const Arguments&... arguments) const {
    const auto blocks = static_cast<unsigned>(plan.blocks);
    launch_dependent(kernel, blocks, plan.threads, stream, input + chunk.in, result + chunk.out, scale + chunk.scale,
                     upper_bound, arguments...);
  }

  void launch_groups(const core::Chunk& chunk, const core::DynamicPlan& plan) const {
    const auto groups = static_cast<std::uint32_t>(chunk.layout.numel / chunk.layout.inner().size);
    const auto vecs = static_cast<std::uint32_t>(plan.vecs_per_row);
    const int lanes_log2 = std::countr_zero(static_cast<unsigned>(plan.lanes_per_group));
    const IndexMap map = IndexMap::over(chunk.layout, chunk.layout.ndim - 1, vecs, groups);
    const auto start = [&](auto kernel, const auto&... arguments) { launch_dependent_on(chunk, plan, kernel, arguments...); };
    const bool dependent = launches_dependent(static_cast<unsigned>(plan.blocks));
    if (plan.lanes_per_group > 0) {
      if (plan.units)
        return start(plan.lanes_per_group == 8 ? quantize_units_contiguous<Fp8, In, 8> : quantize_units_contiguous<Fp8, In, 0>,
                     dependent, groups, vecs / 2, lanes_log2);
      if (plan.aligned) return start(quantize_groups<Fp8, In, 1, true, true>, map, lanes_log2);
      return start(quantize_elements<Fp8, In>, map, lanes_log2);
    }
    const auto start_blocks = [&]<int kVecs>(std::integral_constant<int, kVecs>) {
      if constexpr (kVecs == 1 || kVecs == 2)
        if (plan.aligned && plan.contiguous) return start(quantize_rows_contiguous<Fp8, In, kVecs>, dependent, vecs);
      if constexpr (kVecs > 0)
        if (!plan.aligned && plan.contiguous)
          return start(quantize_rows_of_any_length<Fp8, In, kVecs>, dependent, static_cast<std::uint32_t>(map.row_size),
                       static_cast<std::uint32_t>(chunk.layout.numel));
      start(plan.aligned ? quantize_groups<Fp8, In, kVecs, false, true> : quantize_groups<Fp8, In, kVecs, false, false>, map,
            0);
    };
    if (plan.vecs_per_thread == 0) return start_blocks(std::integral_constant<int, 0>{});
    visit_vecs<1, kMostVecs>(plan.vecs_per_thread, start_blocks);
  }

  void launch_across_groups(const core::Chunk& chunk, const core::DynamicPlan& plan) const {
    const GroupTile tile{.grid = GroupGrid(plan.grid, chunk.layout.numel, 1),
                         .groups_per_row = device::FastDiv(core::ceil_div(plan.grid.row, plan.grid.group))};
    launch_dependent_on(
        chunk, plan,
        plan.tile_units == 1 ? quantize_across_groups<Fp8, In, 1> : quantize_across_groups<Fp8, In, core::kManyTileUnits>,
        launches_dependent(static_cast<unsigned>(plan.blocks)), tile);
  }

  void launch_redundant(const core::Chunk& chunk, const core::DynamicPlan& plan) const {
    visit_vecs<2, kMostVecs>(plan.vecs_per_thread, [&](auto vecs) {
      const auto kernel = plan.aligned ? quantize_redundant<Fp8, In, vecs, true> : quantize_redundant<Fp8, In, vecs, false>;
      launch_dependent_on(chunk, plan, kernel, chunk.layout.inner().size, static_cast<std::uint32_t>(plan.vecs_per_row));
    });
  }

  // Blocks of 1024 threads in the largest cluster of the kernel that needs most registers; 0 where there are no clusters.
  static int max_cluster() {
    static PerDevice<int> sizes;
    return sizes.get([] {
      if (!device_limits().has_clusters) return 0;
      const auto kernel = quantize_cluster<Fp8, In, kMostVecs, false>;
      check_query(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
      cudaLaunchConfig_t config{};
      config.gridDim = kMaxClusterBlocks;
      config.blockDim = 1024;
      int size = 0;
      check_query(cudaOccupancyMaxPotentialClusterSize(&size, kernel, &config));
      return size < kMaxClusterBlocks ? size : kMaxClusterBlocks;
    });
  }

  void launch_cluster(const core::Chunk& chunk, const core::DynamicPlan& plan) const {
    visit_vecs<1, kMostVecs>(plan.vecs_per_thread, [&](auto vecs) {
      const auto kernel = plan.aligned ? quantize_cluster<Fp8, In, vecs, true> : quantize_cluster<Fp8, In, vecs, false>;
      static PerDevice<bool> allowed[2];
      allowed[plan.aligned].get([&] {
        check_query(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
        return true;
      });
      cudaLaunchAttribute cluster_size{};
      cluster_size.id = cudaLaunchAttributeClusterDimension;
      cluster_size.val.clusterDim = {static_cast<unsigned>(plan.blocks), 1, 1};
      cudaLaunchConfig_t config{};
      config.gridDim = static_cast<unsigned>(plan.blocks);
      config.blockDim = plan.threads;
      config.stream = stream;
      config.attrs = &cluster_size;
      config.numAttrs = 1;
      cudaLaunchKernelEx(&config, kernel, input + chunk.in, result + chunk.out, scale + chunk.scale, upper_bound,
                         chunk.layout.inner().size, static_cast<std::uint32_t>(plan.vecs_per_row));
    });
  }

  void launch_cooperative(const core::Chunk& chunk, const core::DynamicPlan& plan) const {
    const auto kernel = plan.aligned ? quantize_cooperative<Fp8, In, true> : quantize_cooperative<Fp8, In, false>;
    // The limit is the kernel's, not the launch's: set once, to the most that any plan asks for, it can't fall below what
    // another thread is about to launch with.
    static PerDevice<bool> raised[2];
    constexpr int kVecBytes = kCooperativeThreads * sizeof(Vec<In>);
    raised[plan.aligned].get([&] {
      const int most = core::max_shared_vecs(DTypeOf<In>::value, device_limits()) * kVecBytes;
      check_query(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
      return true;
    });
    const In* in = input + chunk.in;
    Fp8* out = result + chunk.out;
    float* scale_out = scale + chunk.scale;
    const float* bound = upper_bound;
    std::int64_t size = chunk.layout.inner().size;
    auto vecs = static_cast<std::uint32_t>(plan.vecs_per_row);
    int shared_vecs = plan.shared_vecs;
    void* arguments[] = {&in, &out, &scale_out, &bound, &size, &vecs, &shared_vecs};
    const cudaError_t error = cudaLaunchCooperativeKernel(reinterpret_cast<void*>(kernel), static_cast<unsigned>(plan.blocks),
                                                          plan.threads, arguments, shared_vecs * kVecBytes, stream);
    // Blocks are counted for the whole device; a context that owns a part of it can't hold them at once.
    if (error == cudaErrorCooperativeLaunchTooLarge) {
      (void)cudaGetLastError();
      two_passes();
    }
  }
};

template <class In>
void launch_dynamic(const DynamicQuantize& problem, const Layout& layout, cudaStream_t stream) {
  core::visit_quantized(problem.result.dtype,
                        [&]<class Fp8>(core::Type<Fp8>) { DynamicLauncher<Fp8, In>{problem, layout, stream}.run(); });
}
}  // namespace fp8kv::cuda
