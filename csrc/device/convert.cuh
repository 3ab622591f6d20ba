// From one format to another: packed conversions between a Vec and 8 fp32 values, one instruction per function, and the
// operations on these values with scales. Architectures before 8.9, which have no FP8 instructions, use the scalar codec and
// give the same bytes.
#pragma once

#include <cuda_fp16.h>

#include <type_traits>

#include "core/formats.h"
#include "core/split_reciprocal.h"
#include "device/vec.cuh"

namespace fp8kv::device {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
#define FP8KV_HAS_FP8_CVT 1
#else
#define FP8KV_HAS_FP8_CVT 0
#endif

// Two fp32 values to two bytes of a quantized type, `low` in the lower byte; to nearest even, saturating, NaN to the byte of
// the format.
template <class T>
__device__ __forceinline__ std::uint32_t encode2(float low, float high) {
  return encode<T>(low).bits | static_cast<std::uint32_t>(encode<T>(high).bits) << 8;
}

// Two bytes of a quantized type to two fp32 values, exactly.
template <class T>
__device__ __forceinline__ float2 decode2(std::uint32_t pair) {
  return {decode(T{static_cast<std::uint8_t>(pair)}), decode(T{static_cast<std::uint8_t>(pair >> 8)})};
}

#if FP8KV_HAS_FP8_CVT
template <>
__device__ __forceinline__ std::uint32_t encode2<E4M3>(float low, float high) {
  std::uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  return pair;
}
template <>
__device__ __forceinline__ std::uint32_t encode2<E5M2>(float low, float high) {
  std::uint16_t pair;
  asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  return pair;
}
template <>
__device__ __forceinline__ float2 decode2<E4M3>(std::uint32_t pair) {
  std::uint32_t halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(static_cast<std::uint16_t>(pair)));
  return __half22float2(*reinterpret_cast<const __half2*>(&halves));
}
template <>
__device__ __forceinline__ float2 decode2<E5M2>(std::uint32_t pair) {
  std::uint32_t halves;
  asm("cvt.rn.f16x2.e5m2x2 %0, %1;" : "=r"(halves) : "h"(static_cast<std::uint16_t>(pair)));
  return __half22float2(*reinterpret_cast<const __half2*>(&halves));
}
#endif

// The nearest integer, ties to even; -127 and 0 for all below and NaN.
__device__ __forceinline__ std::int32_t int8_of(float x) {
  std::int32_t integer;
  asm("{\n"
      ".reg .f32 limited;\n"
      "max.NaN.f32 limited, %1, 0fC2FE0000;\n"  // -127
      "cvt.rni.s32.f32 %0, limited;\n"
      "}"
      : "=r"(integer)
      : "f"(x));
  return integer;
}
template <>
__device__ __forceinline__ std::uint32_t encode2<Int8>(float low, float high) {
  std::uint32_t pair;
  asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, 0;" : "=r"(pair) : "r"(int8_of(high)), "r"(int8_of(low)));
  return pair;
}
// With 128 more, a byte is the last one of 2^23 + 128 + x.
template <>
__device__ __forceinline__ float2 decode2<Int8>(std::uint32_t pair) {
  constexpr std::uint32_t kBits = 0x4b000000u;  // of 2^23
  constexpr float kBias = 0x1p23f + 128.0f;
  const std::uint32_t biased = pair ^ 0x8080u;
  return {__fsub_rn(__uint_as_float(__byte_perm(biased, kBits, 0x7440)), kBias),
          __fsub_rn(__uint_as_float(__byte_perm(biased, kBits, 0x7441)), kBias)};
}

__device__ __forceinline__ std::uint32_t half2_of(float low, float high) {
  std::uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

__device__ __forceinline__ std::uint32_t bfloat2_of(float low, float high) {
  std::uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// The conversions above write NaN as 0x7fff; the library writes `canonical`.
__device__ __forceinline__ std::uint32_t canonical_nan2(std::uint32_t pair, std::uint32_t canonical) {
  const std::uint32_t is_nan = __vcmpeq2(pair, 0x7fff7fffu);
  return (pair & ~is_nan) | (canonical & is_nan);
}

// Of a quantized type; those of the others follow.
template <class T>
__device__ __forceinline__ void unpack(const Vec<T>& vec, float (&values)[kVecSize]) {
  static_assert(core::kIsQuantized<T>);
#pragma unroll
  for (int i = 0; i < kVecSize / 2; ++i) {
    const float2 pair = decode2<T>(vec.words[i / 2] >> (16 * (i % 2)) & 0xffffu);
    values[2 * i] = pair.x;
    values[2 * i + 1] = pair.y;
  }
}

template <>
__device__ __forceinline__ void unpack(const Vec<float>& vec, float (&values)[kVecSize]) {
#pragma unroll
  for (int i = 0; i < kVecSize; ++i) values[i] = __uint_as_float(vec.words[i]);
}

template <>
__device__ __forceinline__ void unpack(const Vec<BFloat16>& vec, float (&values)[kVecSize]) {
#pragma unroll
  for (int i = 0; i < kVecSize / 2; ++i) {
    values[2 * i] = __uint_as_float(vec.words[i] << 16);
    values[2 * i + 1] = __uint_as_float(vec.words[i] & 0xffff0000u);
  }
}

template <>
__device__ __forceinline__ void unpack(const Vec<Half>& vec, float (&values)[kVecSize]) {
#pragma unroll
  for (int i = 0; i < kVecSize / 2; ++i) {
    const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&vec.words[i]));
    values[2 * i] = pair.x;
    values[2 * i + 1] = pair.y;
  }
}

// NaN as the library writes it, in what the conversions above gave.
template <class T>
__device__ __forceinline__ void make_nan_canonical(Vec<T>& vec) {
  static_assert(sizeof(T) == 2);
  constexpr std::uint32_t kNaN = DTypeOf<T>::value == DType::Float16 ? 0x7e007e00u : 0x7fc07fc0u;
#pragma unroll
  for (int i = 0; i < kVecSize / 2; ++i) vec.words[i] = canonical_nan2(vec.words[i], kNaN);
}

// The same for several vectors, with one look whether there are any: the word for NaN is the largest signed one.
template <class T, int kCount>
__device__ __forceinline__ void make_nan_canonical(Vec<T> (&vecs)[kCount]) {
  std::uint32_t largest = 0;
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
#pragma unroll
    for (int i = 0; i < Vec<T>::kWords; ++i) largest = __vmaxs2(largest, vecs[k].words[i]);
  }
  if (((largest + 0x00010001u) & 0x80008000u) == 0) return;
#pragma unroll
  for (int k = 0; k < kCount; ++k) make_nan_canonical(vecs[k]);
}

// Of 16 bits, with NaN as the conversions give it: for values that are not stored.
template <class T>
__device__ __forceinline__ Vec<T> pack_any_nan(const float (&values)[kVecSize]) {
  static_assert(sizeof(T) == 2);
  Vec<T> vec;
#pragma unroll
  for (int i = 0; i < kVecSize / 2; ++i) {
    if constexpr (DTypeOf<T>::value == DType::Float16)
      vec.words[i] = half2_of(values[2 * i], values[2 * i + 1]);
    else
      vec.words[i] = bfloat2_of(values[2 * i], values[2 * i + 1]);
  }
  return vec;
}

template <class T>
__device__ __forceinline__ Vec<T> pack(const float (&values)[kVecSize]) {
  Vec<T> vec;
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < kVecSize; ++i) vec.words[i] = __float_as_uint(from_float<float>(values[i]));
  } else if constexpr (core::kIsQuantized<T>) {
#pragma unroll
    for (int i = 0; i < kVecSize / 4; ++i)
      vec.words[i] = encode2<T>(values[4 * i], values[4 * i + 1]) | encode2<T>(values[4 * i + 2], values[4 * i + 3]) << 16;
  } else {
    vec = pack_any_nan<T>(values);
    make_nan_canonical(vec);
  }
  return vec;
}

// --- Scales, prepared for use: the exact quotient x / scale without a division per element ----------

__device__ __forceinline__ float reciprocal_approximation(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Quantizes by a split reciprocal: 1 / scale = hi + lo, with hi strictly below it and so lo > 0, and the quotient is
// fma(x, hi, x * lo). Both terms have the sign of x, so infinities, NaN, signed zero and overflow come out right. The quotient
// lies on the same side of every rounding boundary of the format as the IEEE division for scales from 2^-126 to 2^96, but for
// the significands of core::splits_wrong (a test proves it over all of them). Those scales, and all outside the window, divide.
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
    return {hi, lo, scale, bits - kLowest > kHighest - kLowest || core::splits_wrong<Fp8>(bits)};
  }

  // Member by member: a choice between two structs would lie in memory.
  static __device__ __forceinline__ Prepared select(bool first, const Prepared& a, const Prepared& b) {
    return {first ? a.hi : b.hi, first ? a.lo : b.lo, first ? a.scale : b.scale, first ? a.divide : b.divide};
  }
  static __device__ __forceinline__ float apply(const Prepared& p, float x) { return __fmaf_rn(x, p.hi, __fmul_rn(x, p.lo)); }
  static __device__ __forceinline__ float divide(const Prepared& p, float x) { return __fdiv_rn(x, p.scale); }
};

// Infinity where there is none.
__device__ __forceinline__ float bound_of(const float* upper_bound) {
  return upper_bound ? *upper_bound : __int_as_float(0x7f800000);
}

// dynamic_scale() of a finite amax. One correction makes the product with 1 / max the quotient wherever that is above the
// smallest scale; a test compares all values.
template <class Fp8>
__device__ __forceinline__ float fast_dynamic_scale(float amax, float upper_bound = std::bit_cast<float>(0x7f800000u)) {
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
  static __device__ __forceinline__ Prepared select(bool first, const Prepared& a, const Prepared& b) {
    return {first ? a.scale : b.scale};
  }
  static __device__ __forceinline__ float apply(const Prepared& p, float x) { return __fmul_rn(x, p.scale); }
  static __device__ __forceinline__ float divide(const Prepared& p, float x) { return apply(p, x); }
};

// Each of 8 values with its own scale, or all with one.
template <class Op>
__device__ __forceinline__ void apply(const typename Op::Prepared (&scales)[kVecSize], float (&values)[kVecSize]) {
  bool divide = false;
#pragma unroll
  for (int i = 0; i < kVecSize; ++i) divide |= scales[i].divide;
  if (divide) {
#pragma unroll
    for (int i = 0; i < kVecSize; ++i) values[i] = Op::divide(scales[i], values[i]);
    return;
  }
#pragma unroll
  for (int i = 0; i < kVecSize; ++i) values[i] = Op::apply(scales[i], values[i]);
}

template <class Op>
__device__ __forceinline__ void apply(const typename Op::Prepared& scale, float (&values)[kVecSize]) {
  if (scale.divide) {
#pragma unroll
    for (int i = 0; i < kVecSize; ++i) values[i] = Op::divide(scale, values[i]);
    return;
  }
#pragma unroll
  for (int i = 0; i < kVecSize; ++i) values[i] = Op::apply(scale, values[i]);
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

// From the input to the output type: a vector with one scale, or an element. A copy within a type keeps all bits.
template <class Op, class Out, class In>
__device__ __forceinline__ Vec<Out> convert_vec(const Vec<In>& raw, const typename Op::Prepared& scale) {
  if constexpr (std::is_same_v<In, Out>) {
    return raw;
  } else {
    float values[kVecSize];
    unpack(raw, values);
    apply<Op>(scale, values);
    return pack<Out>(values);
  }
}

template <class Out>
__device__ __forceinline__ Out pack_element(float x) {
  if constexpr (core::kIsQuantized<Out>)
    return {static_cast<std::uint8_t>(encode2<Out>(x, 0.0f))};
  else
    return from_float<Out>(x);
}

template <class Op, class Out, class In>
__device__ __forceinline__ Out convert_element(In raw, const typename Op::Prepared& scale) {
  if constexpr (std::is_same_v<In, Out>) {
    return raw;
  } else {
    const float x = decode(raw);
    return pack_element<Out>(scale.divide ? Op::divide(scale, x) : Op::apply(scale, x));
  }
}

// --- Channels: an offset next to the scale, subtracted before the quantization, added after the dequantization ----------

// For inputs of type In: what changes nothing, not even the sign of a zero.
template <class In>
inline constexpr float kNoOffset = core::kIsQuantized<In> ? -0.0f : 0.0f;

// Of a vector.
template <class Op>
struct Channels {
  typename Op::Prepared scales[kVecSize];
  float offsets[kVecSize];
};

template <class Op, class Out, class In>
__device__ __forceinline__ Vec<Out> convert_vec(const Vec<In>& raw, const Channels<Op>& channels) {
  float values[kVecSize];
  unpack(raw, values);
  if constexpr (core::kIsQuantized<Out>) {
#pragma unroll
    for (int i = 0; i < kVecSize; ++i) values[i] = __fsub_rn(values[i], channels.offsets[i]);
  }
  apply<Op>(channels.scales, values);
  if constexpr (core::kIsQuantized<In>) {
#pragma unroll
    for (int i = 0; i < kVecSize; ++i) values[i] = __fadd_rn(values[i], channels.offsets[i]);
  }
  return pack<Out>(values);
}

template <class Op, class Out, class In>
__device__ __forceinline__ Out convert_element(In raw, const typename Op::Prepared& scale, float offset) {
  if constexpr (core::kIsQuantized<Out>)
    return convert_element<Op, Out>(__fsub_rn(decode(raw), offset), scale);
  else
    return pack_element<Out>(__fadd_rn(convert_element<Op, float>(raw, scale), offset));
}

}  // namespace fp8kv::device
