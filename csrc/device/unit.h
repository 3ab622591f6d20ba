// A unit: 8 elements in registers, as they lie in memory; how to load and store one at any alignment.
#pragma once

#include <cstdint>

#include "fp8kv/dtype.h"
#include "fp8kv/plan.h"

namespace fp8kv::device {

template <class T>
struct Unit {
  static constexpr int kBytes = kUnit * sizeof(T);
  static constexpr int kWords = kBytes / 4;
  static constexpr int kAccess = kBytes < 16 ? kBytes : 16;  // bytes of one load or store
  std::uint32_t words[kWords];
};

// The loads are volatile so that they stay where the code has them: early, with the wait at the first use.
__device__ __forceinline__ void load16(std::uint32_t* words, const void* p) {
  asm volatile("ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "l"(p));
}

__device__ __forceinline__ void load8(std::uint32_t* words, const void* p) {
  asm volatile("ld.global.nc.v2.b32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "l"(p));
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
__device__ __forceinline__ Unit<T> load_aligned(const T* p) {
  Unit<T> unit;
  load_words<Unit<T>::kWords>(unit.words, p);
  return unit;
}

template <class T>
__device__ __forceinline__ void store_aligned(T* p, const Unit<T>& unit) {
  if constexpr (Unit<T>::kWords == 2) {
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(p), "r"(unit.words[0]), "r"(unit.words[1]) : "memory");
  } else {
#pragma unroll
    for (int i = 0; i < Unit<T>::kWords; i += 4)
      asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(reinterpret_cast<char*>(p) + 4 * i), "r"(unit.words[i]),
                   "r"(unit.words[i + 1]), "r"(unit.words[i + 2]), "r"(unit.words[i + 3])
                   : "memory");
  }
}

// Element `i` of a unit as its bits.
template <class T>
__device__ __forceinline__ std::uint32_t element_bits(const Unit<T>& unit, int i) {
  if constexpr (sizeof(T) == 4) return unit.words[i];
  if constexpr (sizeof(T) == 2) return (unit.words[i / 2] >> (16 * (i % 2))) & 0xffffu;
  return (unit.words[i / 4] >> (8 * (i % 4))) & 0xffu;
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

// The part [begin, end) of a unit that lies in its run; the whole unit in the middle of a run.
struct Range {
  int begin = 0;
  int end = kUnit;
  __device__ bool whole() const { return begin == 0 && end == kUnit; }
};

// Where a unit lies in its run, when units are cut at aligned addresses of the result.
struct Cut {
  std::int64_t first;  // of the unit, in elements from the begin of the run; may be negative
  Range range;
};

template <class Out>
__device__ __forceinline__ Cut cut_unit(const Out* run, std::uint32_t unit, std::int64_t size) {
  const auto phase = static_cast<int>(reinterpret_cast<std::uintptr_t>(run) / sizeof(Out) % kUnit);
  const std::int64_t first = std::int64_t{unit} * kUnit - phase;
  const std::int64_t left = size - first;
  return {first, {first < 0 ? phase : 0, left < kUnit ? static_cast<int>(left < 0 ? 0 : left) : kUnit}};
}

// Elements first + [0, 8) of the run of `size` elements at `run`, zero outside the run. Any alignment. In the middle of a run a
// misaligned unit is cut out of the aligned words around it; these never reach beyond the run.
template <class T>
__device__ __forceinline__ Unit<T> load_any(const T* run, std::int64_t first, std::int64_t size, Range range) {
  using Bits = typename BitsOf<T>::type;
  constexpr int kWords = Unit<T>::kWords;
  constexpr int kAccess = Unit<T>::kAccess;
  const T* p = run + first;
  const auto misalignment = static_cast<std::uint32_t>(reinterpret_cast<std::uintptr_t>(p) % kAccess);
  if (range.whole() && misalignment == 0) return load_aligned(p);

  Unit<T> unit;
  const char* base = reinterpret_cast<const char*>(p) - misalignment;
  const bool inside = base >= reinterpret_cast<const char*>(run) &&
                      base + Unit<T>::kBytes + kAccess <= reinterpret_cast<const char*>(run + size);
  if (range.whole() && inside) {
    std::uint32_t window[kWords + kAccess / 4];
    load_words<kWords>(window, base);
    load_words<kAccess / 4>(window + kWords, base + Unit<T>::kBytes);
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
    for (int i = 0; i < kWords; ++i) unit.words[i] = __funnelshift_r(window[i], window[i + 1], 8 * (misalignment & 3));
    return unit;
  }
#pragma unroll
  for (int i = 0; i < kWords; ++i) unit.words[i] = 0;
#pragma unroll
  for (int i = 0; i < kUnit; ++i) {
    if (i < range.begin || i >= range.end) continue;
    const std::uint32_t bits = __ldg(reinterpret_cast<const Bits*>(p) + i);
    constexpr int kPerWord = 4 / sizeof(T);
    unit.words[i / kPerWord] |= bits << (8 * sizeof(T) * (i % kPerWord));
  }
  return unit;
}

// Stores the part of a unit that lies in its run; p, the address of the unit's first element, is aligned.
template <class T>
__device__ __forceinline__ void store_range(T* p, const Unit<T>& unit, Range range) {
  using Bits = typename BitsOf<T>::type;
  if (range.whole()) return store_aligned(p, unit);
#pragma unroll
  for (int i = 0; i < kUnit; ++i)
    if (i >= range.begin && i < range.end) reinterpret_cast<Bits*>(p)[i] = static_cast<Bits>(element_bits(unit, i));
}

}  // namespace fp8kv::device
