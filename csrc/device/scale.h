// Scales prepared for use: the exact quotient x / scale without a division an element.
#pragma once

#include <type_traits>

#include "convert.h"

namespace fp8kv::device {

__device__ __forceinline__ float reciprocal_approximation(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Quantizes by a split reciprocal: 1 / scale = hi + lo, with hi strictly below it and so lo > 0, and the quotient is
// fma(x, hi, x * lo). Both terms have the sign of x, so infinities, NaN, signed zero and overflow come out right. The quotient
// lies on the same side of every FP8 rounding boundary as the IEEE division for scales from 2^-126 to 2^96, unless the 24-bit
// significand of the scale is 1 to 4 below a multiple of 2^20 (docs/numerics.md; a test proves it over all significands). Those
// scales, and all outside the window, divide.
template <class Fp8>
struct QuantizeOp {
  struct Prepared {
    float hi;
    float lo;
    float scale;
    bool divide;
  };

  static __device__ __forceinline__ Prepared prepare(float scale) {
    constexpr std::uint32_t kLowest = 0x00800000u, kHighest = 0x6f800000u;  // 2^-126, 2^96
    const std::uint32_t bits = __float_as_uint(scale);
    // Within the window one Newton step gives the reciprocal rounded to nearest; hi is that or the next one below. With a hi
    // further below, more scales would have to divide.
    const float guess = reciprocal_approximation(scale);
    const float nearest = __fmaf_rn(guess, __fmaf_rn(-scale, guess, 1.0f), guess);
    const bool below = __fmaf_rn(-nearest, scale, 1.0f) > 0.0f;
    const float hi = below ? nearest : __uint_as_float(__float_as_uint(nearest) - 1u);
    const float lo = __fmul_rn(__fmaf_rn(-hi, scale, 1.0f), hi);
    return {hi, lo, scale, bits - kLowest > kHighest - kLowest || ((bits + 4u) & 0xfffffu) < 4u};
  }

  static __device__ __forceinline__ float apply(const Prepared& p, float x) { return __fmaf_rn(x, p.hi, __fmul_rn(x, p.lo)); }
  static __device__ __forceinline__ float divide(const Prepared& p, float x) { return __fdiv_rn(x, p.scale); }
};

// Infinity where there is none.
__device__ __forceinline__ float bound_of(const float* upper_bound) {
  return upper_bound ? __ldg(upper_bound) : __int_as_float(0x7f800000);
}

// dynamic_scale() of a finite amax. One correction makes the product with 1 / max the quotient wherever that is above the
// smallest scale; a test compares all values.
template <class Fp8>
__device__ __forceinline__ float scale_of(float amax, float upper_bound = std::bit_cast<float>(0x7f800000u)) {
  constexpr float kMax = Fp8Traits<Fp8>::kMax, kReciprocal = 1.0f / kMax;
  const float bounded = amax > upper_bound ? upper_bound : amax;
  const float guess = __fmul_rn(bounded, kReciprocal);
  const float scale = __fmaf_rn(__fmaf_rn(-kMax, guess, bounded), kReciprocal, guess);
  return fmaxf(scale, kMinScale<Fp8>);
}

struct DequantizeOp {
  struct Prepared {
    float scale;
    static constexpr bool divide = false;
  };
  static __device__ __forceinline__ Prepared prepare(float scale) { return {scale}; }
  static __device__ __forceinline__ float apply(const Prepared& p, float x) { return __fmul_rn(x, p.scale); }
  static __device__ __forceinline__ float divide(const Prepared& p, float x) { return apply(p, x); }
};

// Each of 8 values with its own scale, or all with one.
template <class Op>
__device__ __forceinline__ void apply(const typename Op::Prepared (&scales)[kUnit], float (&values)[kUnit]) {
  bool divide = false;
#pragma unroll
  for (int i = 0; i < kUnit; ++i) divide |= scales[i].divide;
  if (divide) {
#pragma unroll
    for (int i = 0; i < kUnit; ++i) values[i] = Op::divide(scales[i], values[i]);
    return;
  }
#pragma unroll
  for (int i = 0; i < kUnit; ++i) values[i] = Op::apply(scales[i], values[i]);
}

template <class Op>
__device__ __forceinline__ void apply(const typename Op::Prepared& scale, float (&values)[kUnit]) {
  if (scale.divide) {
#pragma unroll
    for (int i = 0; i < kUnit; ++i) values[i] = Op::divide(scale, values[i]);
    return;
  }
#pragma unroll
  for (int i = 0; i < kUnit; ++i) values[i] = Op::apply(scale, values[i]);
}

// A plain copy, rounded where the types differ.
struct CopyOp {
  struct Prepared {
    static constexpr bool divide = false;
  };
  static __device__ __forceinline__ Prepared prepare(float) { return {}; }
  static __device__ __forceinline__ float apply(const Prepared&, float x) { return x; }
  static __device__ __forceinline__ float divide(const Prepared&, float x) { return x; }
};

// From one side to the other: a unit with one scale, or an element. A copy within a type keeps all bits.
template <class Op, class Out, class In>
__device__ __forceinline__ Unit<Out> map_unit(const Unit<In>& raw, const typename Op::Prepared& scale) {
  if constexpr (std::is_same_v<In, Out>) {
    return raw;
  } else {
    float values[kUnit];
    unpack(raw, values);
    apply<Op>(scale, values);
    return pack<Out>(values);
  }
}

template <class Op, class Out, class In>
__device__ __forceinline__ Out map_element(In raw, const typename Op::Prepared& scale) {
  if constexpr (std::is_same_v<In, Out>) {
    return raw;
  } else {
    const float x = decode(raw);
    const float y = scale.divide ? Op::divide(scale, x) : Op::apply(scale, x);
    if constexpr (sizeof(Out) == 1)
      return {static_cast<std::uint8_t>(encode2<Out>(y, 0.0f))};
    else
      return from_float<Out>(y);
  }
}

}  // namespace fp8kv::device
