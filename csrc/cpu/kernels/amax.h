// The largest finite magnitude of rows and of columns.
#pragma once

#include <type_traits>

#include "cpu/kernels/codec.h"
#include "cpu/kernels/table.h"

namespace fp8kv::cpu::FP8KV_ISA_NAMESPACE {
namespace {

// The bits of |x| without its sign order like the values, so 16-bit types are compared as they are.
template <class T>
struct Magnitude {
  using Bits = std::int16_t;
  static constexpr Bits kMask = 0x7fff;
  static constexpr Bits kInfinity = std::is_same_v<T, Half> ? 0x7c00 : 0x7f80;
};
template <>
struct Magnitude<float> {
  using Bits = std::int32_t;
  static constexpr Bits kMask = kMagnitude;
  static constexpr Bits kInfinity = FP8KV_ISA_NAMESPACE::kInfinity;
};

// As fp32.
FP8KV_INLINE std::int32_t magnitude_bits(float, std::int32_t bits) { return bits; }
FP8KV_INLINE std::int32_t magnitude_bits(BFloat16, std::int16_t bits) { return bits << 16; }
FP8KV_INLINE std::int32_t magnitude_bits(Half, std::int16_t bits) {
  return bits < 0x400 ? __builtin_bit_cast(std::int32_t, bits * 0x1p-24f) : (bits << 13) + (112 << 23);
}

// In 16 or 32 bits; `columns` at least a vector.
template <class T>
FP8KV_INLINE typename Magnitude<T>::Bits amax_row(const T* in, std::int64_t columns) {
  using M = Magnitude<T>;
  typedef typename M::Bits Vector __attribute__((vector_size(4 * kLanes)));
  constexpr int kWidth = sizeof(Vector) / sizeof(T);
  Vector largest = {};
  const auto step = [&](const T* from) __attribute__((always_inline)) {
    const Vector x = load_vector<Vector>(from) & M::kMask;
    const Vector finite = x < M::kInfinity ? x : Vector{};
    largest = finite > largest ? finite : largest;
  };
  for (std::int64_t i = 0; i + kWidth <= columns; i += kWidth) {
    prefetch<T, kWidth>(in + i);
    step(in + i);
  }
  if (columns % kWidth) step(in + columns - kWidth);
  return largest_lane(largest);
}

template <class T>
void amax_rows(const void* in_data, std::int32_t* amax, std::int64_t columns, const Rows& rows) {
  constexpr int kWidth = 4 * kLanes / sizeof(T);
  const auto* in = static_cast<const T*>(in_data);
  for (std::int64_t r = 0; r < rows.count; ++r, in += rows.in) {
    if (columns >= kWidth) {
      amax[r] = magnitude_bits(T{}, amax_row(in, columns));
    } else {
      T x[kWidth] = {};
      for (int i = 0; i < columns; ++i) x[i] = in[i];
      amax[r] = magnitude_bits(T{}, amax_row(x, kWidth));
    }
  }
}

template <class T>
void amax_columns(const void* in_data, std::int32_t* amax, std::int64_t columns) {
  const auto* in = static_cast<const T*>(in_data);
  const auto step = [](const T* from, std::int32_t* to) __attribute__((always_inline)) {
    const I32 x = bits_of(load(from)) & kMagnitude;
    store_vector(to, max(select(x < kInfinity, x, I32{}), load_vector<I32>(to)));
  };
  if (columns < kLanes) {
    T x[kLanes] = {};
    std::int32_t y[kLanes] = {};
    for (int i = 0; i < columns; ++i) x[i] = in[i], y[i] = amax[i];
    step(x, y);
    for (int i = 0; i < columns; ++i) amax[i] = y[i];
    return;
  }
  for (std::int64_t i = 0; i + kLanes <= columns; i += kLanes) {
    prefetch<T, kLanes>(in + i);
    step(in + i, amax + i);
  }
  if (columns % kLanes) step(in + columns - kLanes, amax + columns - kLanes);
}

}  // namespace
}  // namespace fp8kv::cpu::FP8KV_ISA_NAMESPACE
