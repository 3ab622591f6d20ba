// Vec: 8 elements in registers, as they lie in memory; loads and stores at any alignment.
#pragma once

#include <cstdint>

#include "core/plan.h"
#include "fp8kv/dtype.h"

namespace fp8kv::device {

using core::kVecSize;

template <class T>
struct Vec {
  static constexpr int kBytes = kVecSize * sizeof(T);
  static constexpr int kWords = kBytes / 4;
  static constexpr int kAccess = kBytes < 16 ? kBytes : 16;  // bytes of one load or store
  std::uint32_t words[kWords];
};

// The loads are volatile so that they stay where the code has them: early, with the wait at the first use. They are not
// ld.global.nc (__ldg, __restrict__), which ptxas moves before griddepcontrol.wait (pdl.cuh).
__device__ __forceinline__ void load16(std::uint32_t* words, const void* p) {
  asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "l"(p));
}

__device__ __forceinline__ void load8(std::uint32_t* words, const void* p) {
  asm volatile("ld.global.v2.b32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "l"(p));
}

// kWords words from an address aligned to min(16, bytes).
template <int kWords>
__device__ __forceinline__ void load_words(std::uint32_t* words, const void* p) {
  const char* bytes = static_cast<const char*>(p);
  if constexpr (kWords == 2) {
    load8(words, p);
  } else {
#pragma unroll
    for (int i = 0; i < kWords; i += 4) load16(words + i, bytes + 4 * i);
  }
}

template <class T>
__device__ __forceinline__ Vec<T> load_aligned(const T* p) {
  Vec<T> vec;
  load_words<Vec<T>::kWords>(vec.words, p);
  return vec;
}

template <class T>
__device__ __forceinline__ void store_aligned(T* p, const Vec<T>& vec) {
  if constexpr (Vec<T>::kWords == 2) {
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(p), "r"(vec.words[0]), "r"(vec.words[1]) : "memory");
  } else {
#pragma unroll
    for (int i = 0; i < Vec<T>::kWords; i += 4)
      asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(reinterpret_cast<char*>(p) + 4 * i), "r"(vec.words[i]),
                   "r"(vec.words[i + 1]), "r"(vec.words[i + 2]), "r"(vec.words[i + 3])
                   : "memory");
  }
}

// Neighboring vectors, from an address aligned to 16 bytes on.
template <class T, int kCount>
__device__ __forceinline__ void load_aligned(const T* p, Vec<T> (&vecs)[kCount]) {
  static_assert(Vec<T>::kBytes % 16 == 0 || kCount == 2);
  if constexpr (Vec<T>::kBytes % 16 == 0) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) vecs[k] = load_aligned(p + k * kVecSize);
  } else {
    std::uint32_t words[4];
    load16(words, p);
    vecs[0] = {words[0], words[1]};
    vecs[1] = {words[2], words[3]};
  }
}

template <class T, int kCount>
__device__ __forceinline__ void store_aligned(T* p, const Vec<T> (&vecs)[kCount]) {
  static_assert(Vec<T>::kBytes % 16 == 0 || kCount == 2);
  if constexpr (Vec<T>::kBytes % 16 == 0) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) store_aligned(p + k * kVecSize, vecs[k]);
  } else {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(vecs[0].words[0]), "r"(vecs[0].words[1]),
                 "r"(vecs[1].words[0]), "r"(vecs[1].words[1])
                 : "memory");
  }
}

// How the L2 cache treats what is accessed: as usual, or as the first to give up.
__device__ __forceinline__ std::uint64_t cache_policy(bool once) {
  std::uint64_t usual, first;
  asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(usual));
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(first));
  return once ? first : usual;
}

template <class T>
__device__ __forceinline__ Vec<T> load_aligned(const T* p, std::uint64_t policy) {
  Vec<T> vec;
#pragma unroll
  for (int i = 0; i < Vec<T>::kWords; i += 4)
    asm volatile("ld.global.L2::cache_hint.v4.b32 {%0, %1, %2, %3}, [%4], %5;"
                 : "=r"(vec.words[i]), "=r"(vec.words[i + 1]), "=r"(vec.words[i + 2]), "=r"(vec.words[i + 3])
                 : "l"(reinterpret_cast<const char*>(p) + 4 * i), "l"(policy));
  return vec;
}

template <class T>
__device__ __forceinline__ void store_aligned(T* p, const Vec<T>& vec, std::uint64_t policy) {
  static_assert(Vec<T>::kWords == 2);
  asm volatile("st.global.L2::cache_hint.v2.b32 [%0], {%1, %2}, %3;" ::"l"(p), "r"(vec.words[0]), "r"(vec.words[1]), "l"(policy)
               : "memory");
}

// The bits of element `i`.
template <class T>
__device__ __forceinline__ std::uint32_t element_bits(const Vec<T>& vec, int i) {
  if constexpr (sizeof(T) == 4) return vec.words[i];
  if constexpr (sizeof(T) == 2) return (vec.words[i / 2] >> (16 * (i % 2))) & 0xffffu;
  return (vec.words[i / 4] >> (8 * (i % 4))) & 0xffu;
}

template <class T>
struct BitsOf;
template <>
struct BitsOf<float> {
  using type = std::uint32_t;
};
template <>
struct BitsOf<Half> {
  using type = std::uint16_t;
};
template <>
struct BitsOf<BFloat16> {
  using type = std::uint16_t;
};
template <>
struct BitsOf<E4M3> {
  using type = std::uint8_t;
};
template <>
struct BitsOf<E5M2> {
  using type = std::uint8_t;
};
template <>
struct BitsOf<Int8> {
  using type = std::uint8_t;
};

// The elements [begin, end) of a vector that lie in its row; all of them in the middle of a row.
struct Range {
  int begin = 0;
  int end = kVecSize;
  __device__ bool whole() const { return begin == 0 && end == kVecSize; }
};

// Where a vector lies in its row, when vectors begin at aligned addresses of the result.
struct Slice {
  std::int64_t first;  // its first element, counted from the start of the row; may be negative
  Range range;
};

template <class Out>
__device__ __forceinline__ Slice slice_of(const Out* row, std::uint32_t vec, std::int64_t size) {
  const auto phase = static_cast<int>(reinterpret_cast<std::uintptr_t>(row) / sizeof(Out) % kVecSize);
  const std::int64_t first = std::int64_t{vec} * kVecSize - phase;
  const std::int64_t left = size - first;
  return {first, {first < 0 ? phase : 0, left < kVecSize ? static_cast<int>(left < 0 ? 0 : left) : kVecSize}};
}

// Elements first + [0, 8) of the row of `size` elements at `row`, zero outside the row. Any alignment. In the middle of a row a
// misaligned vector is shifted out of the aligned words around it; these never reach beyond the row.
template <class T>
__device__ __forceinline__ Vec<T> load_any(const T* row, std::int64_t first, std::int64_t size, Range range) {
  using Bits = typename BitsOf<T>::type;
  constexpr int kWords = Vec<T>::kWords;
  constexpr int kAccess = Vec<T>::kAccess;
  const T* p = row + first;
  const auto misalignment = static_cast<std::uint32_t>(reinterpret_cast<std::uintptr_t>(p) % kAccess);
  if (range.whole() && misalignment == 0) return load_aligned(p);

  Vec<T> vec;
  const char* base = reinterpret_cast<const char*>(p) - misalignment;
  const bool inside = base >= reinterpret_cast<const char*>(row) &&
                      base + Vec<T>::kBytes + kAccess <= reinterpret_cast<const char*>(row + size);
  if (range.whole() && inside) {
    std::uint32_t window[kWords + kAccess / 4];
    load_words<kWords>(window, base);
    load_words<kAccess / 4>(window + kWords, base + Vec<T>::kBytes);
    if constexpr (kAccess == 16) {
      if (misalignment & 8) {
#pragma unroll
        for (int i = 0; i < kWords + 2; ++i) window[i] = window[i + 2];
      }
    }
    if (misalignment & 4) {
#pragma unroll
      for (int i = 0; i < kWords + 1; ++i) window[i] = window[i + 1];
    }
#pragma unroll
    for (int i = 0; i < kWords; ++i) vec.words[i] = __funnelshift_r(window[i], window[i + 1], 8 * (misalignment & 3));
    return vec;
  }
#pragma unroll
  for (int i = 0; i < kWords; ++i) vec.words[i] = 0;
#pragma unroll
  for (int i = 0; i < kVecSize; ++i) {
    if (i < range.begin || i >= range.end) continue;
    const std::uint32_t bits = reinterpret_cast<const Bits*>(p)[i];
    constexpr int kPerWord = 4 / sizeof(T);
    vec.words[i / kPerWord] |= bits << (8 * sizeof(T) * (i % kPerWord));
  }
  return vec;
}

// Stores the elements of a vector that lie in its row; p, the address of its first element, is aligned.
template <class T>
__device__ __forceinline__ void store_range(T* p, const Vec<T>& vec, Range range) {
  using Bits = typename BitsOf<T>::type;
  if (range.whole()) return store_aligned(p, vec);
#pragma unroll
  for (int i = 0; i < kVecSize; ++i)
    if (i >= range.begin && i < range.end) reinterpret_cast<Bits*>(p)[i] = static_cast<Bits>(element_bits(vec, i));
}

}  // namespace fp8kv::device
