// Reductions: the largest finite magnitude of a vector, a warp, a block.
//
// Magnitudes are compared as bits without the sign, which have the order of the numbers, with infinity and NaN above all finite
// ones: such a maximum says that there is something to leave out, and a second, rarer look does that.
#pragma once

#include "device/vec.cuh"

namespace fp8kv::device {

template <class T>
inline constexpr std::uint32_t kInfinityBits = 0x7f800000u;
template <>
inline constexpr std::uint32_t kInfinityBits<BFloat16> = 0x7f80u;
template <>
inline constexpr std::uint32_t kInfinityBits<Half> = 0x7c00u;

template <class T>
__device__ __forceinline__ std::uint32_t max_bits(const Vec<T>& vec) {
  std::uint32_t m = 0;
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < Vec<T>::kWords; ++i) m = max(m, vec.words[i] & 0x7fffffffu);
    return m;
  } else {
#pragma unroll
    for (int i = 0; i < Vec<T>::kWords; ++i) m = __vmaxu2(m, vec.words[i] & 0x7fff7fffu);
    return max(m & 0xffffu, m >> 16);
  }
}

// The magnitude bits of element i, 0 where it is not finite.
template <class T>
__device__ __forceinline__ std::uint32_t finite_bits(const Vec<T>& vec, int i) {
  const std::uint32_t bits = element_bits(vec, i) & (sizeof(T) == 4 ? 0x7fffffffu : 0x7fffu);
  return bits < kInfinityBits<T> ? bits : 0u;
}

template <class T>
__device__ __forceinline__ std::uint32_t finite_max_bits(const Vec<T>& vec) {
  std::uint32_t m = max_bits(vec);
  if (m >= kInfinityBits<T>) {
    m = 0;
#pragma unroll
    for (int i = 0; i < kVecSize; ++i) m = max(m, finite_bits(vec, i));
  }
  return m;
}

// Magnitude bits as the fp32 number they stand for.
template <class T>
__device__ __forceinline__ float magnitude(std::uint32_t bits) {
  if constexpr (sizeof(T) == 4) {
    return __uint_as_float(bits);
  } else {
    return decode(T{static_cast<std::uint16_t>(bits)});
  }
}

// Of all threads of a block of at most 1024; every thread gets it. `scratch` holds 32 words. One barrier: a second use needs
// other scratch, or a barrier before it.
__device__ __forceinline__ std::uint32_t block_max(std::uint32_t value, std::uint32_t* scratch) {
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  value = __reduce_max_sync(0xffffffffu, value);
  if (lane == 0) scratch[warp] = value;
  __syncthreads();
  return __reduce_max_sync(0xffffffffu, lane < warps ? scratch[lane] : 0u);
}

// Of `width` neighboring lanes, a power of two up to 32; all lanes of the warp take part.
__device__ __forceinline__ std::uint32_t lanes_max(std::uint32_t value, int width) {
  for (int offset = width / 2; offset > 0; offset /= 2) value = max(value, __shfl_xor_sync(0xffffffffu, value, offset));
  return value;
}

// Raises an fp32 value >= 0 in memory to at least `value`, comparing bits as signed integers.
__device__ __forceinline__ void atomic_max(float* address, float value) {
  atomicMax(reinterpret_cast<int*>(address), __float_as_int(value));
}

}  // namespace fp8kv::device
