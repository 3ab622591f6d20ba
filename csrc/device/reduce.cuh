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

// The larger of two words of magnitude bits, of one element or of a pair.
template <class T>
__device__ __forceinline__ std::uint32_t larger_word(std::uint32_t a, std::uint32_t b) {
  return sizeof(T) == 4 ? max(a, b) : __vmaxu2(a, b);
}

// Raises a word of the largest magnitude bits to at least those of a vector.
template <class T>
__device__ __forceinline__ void raise_word(std::uint32_t& word, const Vec<T>& vec) {
#pragma unroll
  for (int i = 0; i < Vec<T>::kWords; ++i)
    word = larger_word<T>(word, vec.words[i] & (sizeof(T) == 4 ? 0x7fffffffu : 0x7fff7fffu));
}

// The first `left` elements of a vector raise the first word, the others the second.
template <class T>
__device__ __forceinline__ void raise_words(std::uint32_t (&words)[2], const Vec<T>& vec, int left) {
  constexpr std::uint32_t kMagnitude = sizeof(T) == 4 ? 0x7fffffffu : 0x7fff7fffu;
  const int left_bits = left * static_cast<int>(8 * sizeof(T));
#pragma unroll
  for (int i = 0; i < Vec<T>::kWords; ++i) {
    std::uint32_t first;  // as many of the lowest bits
    asm("bmsk.clamp.b32 %0, 0, %1;" : "=r"(first) : "r"(max(left_bits - 32 * i, 0)));
    words[0] = larger_word<T>(words[0], vec.words[i] & first & kMagnitude);
    words[1] = larger_word<T>(words[1], vec.words[i] & ~first & kMagnitude);
  }
}

template <class T>
__device__ __forceinline__ std::uint32_t largest_of_word(std::uint32_t word) {
  return sizeof(T) == 4 ? word : max(word & 0xffffu, word >> 16);
}

template <class T>
__device__ __forceinline__ std::uint32_t max_bits(const Vec<T>& vec) {
  std::uint32_t word = 0;
  raise_word(word, vec);
  return largest_of_word<T>(word);
}

// The magnitude bits of an element, 0 where it is not finite.
template <class T>
__device__ __forceinline__ std::uint32_t finite_bits(std::uint32_t element) {
  const std::uint32_t bits = element & (sizeof(T) == 4 ? 0x7fffffffu : 0x7fffu);
  return bits < kInfinityBits<T> ? bits : 0u;
}

template <class T>
__device__ __forceinline__ std::uint32_t finite_bits(const Vec<T>& vec, int i) {
  return finite_bits<T>(element_bits(vec, i));
}

// Of all finite elements of vectors.
template <class T, int kCount>
__device__ __forceinline__ std::uint32_t finite_max_bits(const Vec<T> (&vecs)[kCount]) {
  std::uint32_t word = 0;
#pragma unroll
  for (int k = 0; k < kCount; ++k) raise_word(word, vecs[k]);
  std::uint32_t m = largest_of_word<T>(word);
  if (m >= kInfinityBits<T>) {
    m = 0;
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
#pragma unroll
      for (int i = 0; i < kVecSize; ++i) m = max(m, finite_bits(vecs[k], i));
    }
  }
  return m;
}

template <class T>
__device__ __forceinline__ std::uint32_t finite_max_bits(const Vec<T>& vec) {
  const Vec<T> vecs[] = {vec};
  return finite_max_bits(vecs);
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

// Of `width` neighboring lanes, a power of two up to 32; all lanes of the warp take part. Without branches: beyond the width, a
// lane asks itself.
__device__ __forceinline__ std::uint32_t lanes_max(std::uint32_t value, int width) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value = max(value, __shfl_xor_sync(0xffffffffu, value, offset & (width - 1)));
  return value;
}

// Raises an fp32 value >= 0 in memory to at least `value`, comparing bits as signed integers.
__device__ __forceinline__ void atomic_max(float* address, float value) {
  atomicMax(reinterpret_cast<int*>(address), __float_as_int(value));
}

}  // namespace fp8kv::device
