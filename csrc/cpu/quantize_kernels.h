// The kernels of quantization for one instruction set; quantize_generic.cpp, quantize_avx2.cpp and quantize_avx512.cpp each
// include this file once.
#pragma once

#include <type_traits>

#include "quantize_table.h"
#include "simd_codec.h"

namespace fp8kv::cpu::FP8KV_ISA_NAMESPACE {
namespace {

constexpr int kUnit = 4 * kLanes;  // elements handled at a time

// --- The two operations on a unit --------------------------------

// x / s without dividing: 1 / s = high + low with high rounded down and low > 0, so that both terms of x * high + x * low have
// the sign of x. It isn't always the fp32 quotient, but on the same side of every boundary between FP8 values, for the scales
// that are `ordinary` (docs/numerics.md); the others take the division. With a `high` further below 1 / s, more scales would go
// wrong.
struct Reciprocal {
  // Lanes of -1 for ordinary scales.
  FP8KV_INLINE I32 ordinary(F32 scale) {
    constexpr std::int32_t kFirst = 0x00800000, kLast = 0x6f800000;  // 2^-126, 2^96
    const I32 bits = bits_of(scale);
    if constexpr (!kHasFma) return I32{};
    return (bits >= kFirst) & (bits <= kLast) & (((bits + 4) & 0xfffff) >= 4);
  }
  FP8KV_INLINE F32 high(F32 scale) {
    const F32 nearest = 1.0f / scale;
    return float_of(bits_of(nearest) - (remainder(nearest, scale) > 0.0f ? I32{} : splat(1)));
  }
  FP8KV_INLINE F32 low(F32 scale, F32 high) { return remainder(high, scale) * high; }

  // Of rows.
  FP8KV_INLINE void prepare(RowScales& scales, std::int64_t count) {
    for (std::int64_t i = 0; i < count; i += kLanes) {
      for (std::int64_t rest = count; rest < i + kLanes; ++rest) scales.scale[rest] = 1.0f;
      const F32 scale = load(scales.scale + i), high_of_scale = high(scale);
      store_vector(scales.high + i, high_of_scale);
      store_vector(scales.low + i, low(scale, high_of_scale));
      store_vector(scales.ordinary + i, ordinary(scale));
    }
  }
  FP8KV_INLINE bool ordinary(const RowScales& scales, std::int64_t i) { return scales.ordinary[i] != 0; }
  FP8KV_INLINE float high(const RowScales& scales, std::int64_t i) { return scales.high[i]; }
  FP8KV_INLINE float low(const RowScales& scales, std::int64_t i) { return scales.low[i]; }

 private:
  FP8KV_INLINE F32 remainder(F32 reciprocal, F32 scale) { return multiply_add(-reciprocal, scale, splat(1.0f)); }
};

template <class Real, class Fp8>
struct Quantize {
  using In = Real;
  using Out = Fp8;
  using Split = Reciprocal;

  FP8KV_INLINE_MEMBER void plain(const In* in, Out* out, const F32 (&scale)[4]) const {
    F32 x[4];
    for (int k = 0; k < 4; ++k) x[k] = load(in + k * kLanes) / scale[k];
    store(out, x, encoder);
  }

  // False, and nothing done, when there is a NaN.
  FP8KV_INLINE_MEMBER bool fast(const In* in, Out* out, const F32 (&high)[4], const F32 (&low)[4]) const {
    F32 x[4];
    for (int k = 0; k < 4; ++k) {
      const F32 value = load(in + k * kLanes);
      x[k] = multiply_add(value, high[k], value * low[k]);
    }
    if (any_nan(x)) return false;
    store_numbers(out, x, encoder);
    return true;
  }

  const Encoder<Fp8> encoder;
};

// Nothing to prepare: finite scales leave finite elements free of NaN.
struct Factor {
  FP8KV_INLINE I32 ordinary(F32 scale) { return (bits_of(scale) & kMagnitude) < kInfinity; }
  FP8KV_INLINE F32 high(F32 scale) { return scale; }
  FP8KV_INLINE F32 low(F32, F32) { return F32{}; }

  FP8KV_INLINE void prepare(RowScales&, std::int64_t) {}
  FP8KV_INLINE bool ordinary(const RowScales& scales, std::int64_t i) {
    return (__builtin_bit_cast(std::int32_t, scales.scale[i]) & kMagnitude) < kInfinity;
  }
  FP8KV_INLINE float high(const RowScales& scales, std::int64_t i) { return scales.scale[i]; }
  FP8KV_INLINE float low(const RowScales&, std::int64_t) { return 0.0f; }
};

template <class Fp8, class Real>
struct Dequantize {
  using In = Fp8;
  using Out = Real;
  using Split = Factor;

  FP8KV_INLINE_MEMBER void plain(const In* in, Out* out, const F32 (&scale)[4]) const {
    F32 x[4];
    for (int k = 0; k < 4; ++k) x[k] = float_of(quiet(load(in + k * kLanes) * scale[k]));
    store(out, x);
  }

  FP8KV_INLINE_MEMBER bool fast(const In* in, Out* out, const F32 (&scale)[4], const F32 (&)[4]) const {
    if (any_magnitude_above(load_vector<Bytes>(in), Fp8Traits<Fp8>::kMaxBits)) return false;
    F32 x[4];
    for (int k = 0; k < 4; ++k) x[k] = load_number(in + k * kLanes) * scale[k];
    store(out, x);
    return true;
  }
};

// --- Pieces --------------------------------

FP8KV_INLINE void splat4(F32 (&to)[4], float x) {
  for (int k = 0; k < 4; ++k) to[k] = splat(x);
}
FP8KV_INLINE void load4(F32 (&to)[4], const float* from) {
  for (int k = 0; k < 4; ++k) to[k] = load(from + k * kLanes);
}

// step(i) for units that cover [0, count), count >= kUnit. The last may overlap the one before: the same bytes again.
template <class Step>
FP8KV_INLINE void for_each_unit(std::int64_t count, const Step& step) {
  std::int64_t i = 0;
  for (; i + kUnit <= count; i += kUnit) step(i);
  if (i < count) step(count - kUnit);
}

// What the fast path leaves over, out of its way. `stride` is 0 where all elements have one scale.
template <class Op>
[[gnu::noinline, gnu::cold]] void map_plain(const typename Op::In* in, typename Op::Out* out, std::int64_t count,
                                            const float* scale, std::int64_t stride) {
  const Op op;
  for_each_unit(count, [&](std::int64_t i) __attribute__((always_inline)) {
    F32 scales[4];
    stride == 0 ? splat4(scales, *scale) : load4(scales, scale + i);
    op.plain(in + i, out + i, scales);
  });
}

template <class Op>
FP8KV_INLINE void map_row(const Op& op, const typename Op::In* in, typename Op::Out* out, std::int64_t count,
                          const RowScales& scales, std::int64_t number) {
  const float* scale = scales.scale + number;
  if (!Op::Split::ordinary(scales, number)) [[unlikely]]
    return map_plain<Op>(in, out, count, scale, 0);
  F32 high[4], low[4];
  splat4(high, Op::Split::high(scales, number)), splat4(low, Op::Split::low(scales, number));
  for_each_unit(count, [&](std::int64_t i) __attribute__((always_inline)) {
    prefetch<typename Op::In, kUnit>(in + i);
    if (!op.fast(in + i, out + i, high, low)) [[unlikely]]
      map_plain<Op>(in + i, out + i, kUnit, scale, 0);
  });
}

// Less than a unit: through a unit on the stack.
template <class Op, class MapUnit>
FP8KV_INLINE void map_short(const typename Op::In* in, typename Op::Out* out, std::int64_t count, const MapUnit& map_unit) {
  typename Op::In x[kUnit] = {};
  typename Op::Out y[kUnit];
  for (int i = 0; i < count; ++i) x[i] = in[i];
  map_unit(x, y);
  for (int i = 0; i < count; ++i) out[i] = y[i];
}

template <class Op>
void prepare_rows(RowScales& scales, std::int64_t count) {
  Op::Split::prepare(scales, count);
}

template <class Op>
void map_rows(const void* in_data, void* out_data, std::int64_t columns, const Rows& rows, const RowScales& scales,
              std::int64_t first) {
  const auto* in = static_cast<const typename Op::In*>(in_data);
  auto* out = static_cast<typename Op::Out*>(out_data);
  const Op op;
  for (std::int64_t r = 0; r < rows.count; ++r, in += rows.in, out += rows.out, first += rows.scale) {
    if (columns >= kUnit) {
      map_row(op, in, out, columns, scales, first);
    } else {
      map_short<Op>(in, out, columns, [&](auto* x, auto* y) { map_row(op, x, y, kUnit, scales, first); });
    }
  }
}

template <class Op>
void prepare_columns(ColumnScales& scales, std::int64_t count) {
  for (std::int64_t i = count; i < count + kUnit; ++i) scales.scale[i] = 1.0f;
  I32 ordinary = splat(-1);
  for (std::int64_t i = 0; i < count + kUnit - kLanes + 1; i += kLanes) {
    const F32 scale = load(scales.scale + i);
    const F32 high = Op::Split::high(scale);
    ordinary &= Op::Split::ordinary(scale);
    store_vector(scales.high + i, high);
    store_vector(scales.low + i, Op::Split::low(scale, high));
  }
  scales.ordinary = true;
  for (int i = 0; i < kLanes; ++i) scales.ordinary &= ordinary[i] != 0;
}

template <class Op>
FP8KV_INLINE void map_row_of_columns(const Op& op, const typename Op::In* in, typename Op::Out* out, std::int64_t count,
                                     const ColumnScales& scales, std::int64_t first) {
  if (!scales.ordinary) [[unlikely]]
    return map_plain<Op>(in, out, count, scales.scale + first, 1);
  for_each_unit(count, [&](std::int64_t i) __attribute__((always_inline)) {
    F32 high[4], low[4];
    load4(high, scales.high + first + i);
    load4(low, scales.low + first + i);
    prefetch<typename Op::In, kUnit>(in + i);
    if (!op.fast(in + i, out + i, high, low)) [[unlikely]]
      map_plain<Op>(in + i, out + i, kUnit, scales.scale + first + i, 1);
  });
}

template <class Op>
void map_columns(const void* in_data, void* out_data, std::int64_t columns, const ColumnScales& scales, std::int64_t first) {
  const auto* in = static_cast<const typename Op::In*>(in_data);
  auto* out = static_cast<typename Op::Out*>(out_data);
  const Op op;
  if (columns >= kUnit) return map_row_of_columns(op, in, out, columns, scales, first);
  map_short<Op>(in, out, columns, [&](auto* x, auto* y) { map_row_of_columns(op, x, y, kUnit, scales, first); });
}

// --- Largest finite magnitudes --------------------------------

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

// --- The table --------------------------------

template <class Op>
constexpr MapKernels map_kernels = {prepare_rows<Op>, map_rows<Op>, prepare_columns<Op>, map_columns<Op>};

template <class T>
constexpr AmaxKernels amax_kernels = {amax_rows<T>, amax_columns<T>};

// --- Norm and RoPE --------------------------------

FP8KV_INLINE void normalize(float* x, std::int64_t count, const HeadTransform& t) {
  F32 squares{};
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) squares += load(x + i) * load(x + i);
  float sum = 0.0f;
  for (int lane = 0; lane < kLanes; ++lane) sum += squares[lane];
  for (; i < count; ++i) sum += x[i] * x[i];
  const float factor = 1.0f / __builtin_sqrtf(sum / static_cast<float>(count) + t.norm_eps);
  for (i = 0; i + kLanes <= count; i += kLanes) store_vector(x + i, load(x + i) * factor * load(t.norm_weight + i));
  for (; i < count; ++i) x[i] = x[i] * factor * t.norm_weight[i];
}

FP8KV_INLINE void rotate(float& a, float& b, float cos, float sin) {
  const float first = a * cos - b * sin;
  b = b * cos + a * sin;
  a = first;
}

FP8KV_INLINE void rotate(float* x, const HeadTransform& t) {
  std::int64_t i = 0;
  if (!t.is_neox) {
    for (; i < t.pairs; ++i) rotate(x[2 * i], x[2 * i + 1], t.cos[i], t.sin[i]);
    return;
  }
  float* y = x + t.pairs;
  for (; i + kLanes <= t.pairs; i += kLanes) {
    const F32 a = load(x + i), b = load(y + i), cos = load(t.cos + i), sin = load(t.sin + i);
    store_vector(x + i, a * cos - b * sin);
    store_vector(y + i, b * cos + a * sin);
  }
  for (; i < t.pairs; ++i) rotate(x[i], y[i], t.cos[i], t.sin[i]);
}

// A unit.
template <class Real>
FP8KV_INLINE void store_rounded(const float* x, Real* out) {
  F32 unit[4];
  for (int k = 0; k < 4; ++k) unit[k] = float_of(quiet(load(x + k * kLanes)));
  store(out, unit);
}

template <class Real>
void transform_rows(const void* in_data, void* out_data, std::int64_t columns, const Rows& rows, const HeadTransform& t,
                    float* x) {
  const auto* in = static_cast<const Real*>(in_data);
  auto* out = static_cast<Real*>(out_data);
  for (std::int64_t r = 0; r < rows.count; ++r, in += rows.in, out += rows.out) {
    std::int64_t i = 0;
    for (; i + kLanes <= columns; i += kLanes) store_vector(x + i, load(in + i));
    if (i < columns) {
      Real rest[kLanes] = {};
      for (std::int64_t k = i; k < columns; ++k) rest[k - i] = in[k];
      const F32 values = load(rest);
      for (std::int64_t k = i; k < columns; ++k) x[k] = values[k - i];
    }
    if (t.norm_weight) normalize(x, columns, t);
    rotate(x, t);
    for (i = 0; i + kUnit <= columns; i += kUnit) store_rounded(x + i, out + i);
    if (i < columns) {
      float rest[kUnit] = {};
      Real rounded[kUnit];
      for (std::int64_t k = i; k < columns; ++k) rest[k - i] = x[k];
      store_rounded(rest, rounded);
      for (std::int64_t k = i; k < columns; ++k) out[k] = rounded[k - i];
    }
  }
}

}  // namespace

const QuantizeTable quantize_table = {
    .quantize = {{map_kernels<Quantize<float, E4M3>>, map_kernels<Quantize<float, E5M2>>},
                 {map_kernels<Quantize<Half, E4M3>>, map_kernels<Quantize<Half, E5M2>>},
                 {map_kernels<Quantize<BFloat16, E4M3>>, map_kernels<Quantize<BFloat16, E5M2>>}},
    .dequantize = {{map_kernels<Dequantize<E4M3, float>>, map_kernels<Dequantize<E4M3, Half>>,
                    map_kernels<Dequantize<E4M3, BFloat16>>},
                   {map_kernels<Dequantize<E5M2, float>>, map_kernels<Dequantize<E5M2, Half>>,
                    map_kernels<Dequantize<E5M2, BFloat16>>}},
    .amax = {amax_kernels<float>, amax_kernels<Half>, amax_kernels<BFloat16>},
    .transform = {transform_rows<float>, transform_rows<Half>, transform_rows<BFloat16>},
};

}  // namespace fp8kv::cpu::FP8KV_ISA_NAMESPACE
