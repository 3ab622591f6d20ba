// Packed conversions between a Unit and 8 fp32 values. One instruction a function; architectures before 8.9, which have no FP8
// instructions, use the scalar codec and give the same bytes.
#pragma once

#include <cuda_fp16.h>

#include "fp8kv/fp8.h"
#include "unit.h"

namespace fp8kv::device {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
#define FP8KV_HAS_FP8_CVT 1
#else
#define FP8KV_HAS_FP8_CVT 0
#endif

// Two fp32 values to two FP8 bytes, `low` in the lower byte; to nearest even, saturating, NaN to 0x7F.
template <class Fp8>
__device__ __forceinline__ std::uint32_t encode2(float low, float high) {
#if FP8KV_HAS_FP8_CVT
  std::uint16_t pair;
  if constexpr (Fp8Traits<Fp8>::kMantissaBits == 3)
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  else
    asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return encode<Fp8>(low).bits | static_cast<std::uint32_t>(encode<Fp8>(high).bits) << 8;
#endif
}

// Two FP8 bytes to two fp32 values, exactly.
template <class Fp8>
__device__ __forceinline__ float2 decode2(std::uint32_t pair) {
#if FP8KV_HAS_FP8_CVT
  std::uint32_t halves;
  if constexpr (Fp8Traits<Fp8>::kMantissaBits == 3)
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(static_cast<std::uint16_t>(pair)));
  else
    asm("cvt.rn.f16x2.e5m2x2 %0, %1;" : "=r"(halves) : "h"(static_cast<std::uint16_t>(pair)));
  return __half22float2(*reinterpret_cast<const __half2*>(&halves));
#else
  return {decode_bits<Fp8>(pair & 0xff), decode_bits<Fp8>(pair >> 8 & 0xff)};
#endif
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

template <class T>
__device__ __forceinline__ void unpack(const Unit<T>& unit, float (&values)[kUnit]);

template <>
__device__ __forceinline__ void unpack(const Unit<float>& unit, float (&values)[kUnit]) {
#pragma unroll
  for (int i = 0; i < kUnit; ++i) values[i] = __uint_as_float(unit.words[i]);
}

template <>
__device__ __forceinline__ void unpack(const Unit<BFloat16>& unit, float (&values)[kUnit]) {
#pragma unroll
  for (int i = 0; i < kUnit / 2; ++i) {
    values[2 * i] = __uint_as_float(unit.words[i] << 16);
    values[2 * i + 1] = __uint_as_float(unit.words[i] & 0xffff0000u);
  }
}

template <>
__device__ __forceinline__ void unpack(const Unit<Half>& unit, float (&values)[kUnit]) {
#pragma unroll
  for (int i = 0; i < kUnit / 2; ++i) {
    const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&unit.words[i]));
    values[2 * i] = pair.x;
    values[2 * i + 1] = pair.y;
  }
}

template <class Fp8>
__device__ __forceinline__ void unpack_fp8(const Unit<Fp8>& unit, float (&values)[kUnit]) {
#pragma unroll
  for (int i = 0; i < kUnit / 2; ++i) {
    const float2 pair = decode2<Fp8>(unit.words[i / 2] >> (16 * (i % 2)) & 0xffffu);
    values[2 * i] = pair.x;
    values[2 * i + 1] = pair.y;
  }
}

template <>
__device__ __forceinline__ void unpack(const Unit<E4M3>& unit, float (&values)[kUnit]) {
  unpack_fp8(unit, values);
}

template <>
__device__ __forceinline__ void unpack(const Unit<E5M2>& unit, float (&values)[kUnit]) {
  unpack_fp8(unit, values);
}

// NaN as the library writes it, in what the conversions above gave.
template <class T>
__device__ __forceinline__ void make_nan_canonical(Unit<T>& unit) {
  static_assert(sizeof(T) == 2);
  constexpr std::uint32_t kNaN = DTypeOf<T>::value == DType::Float16 ? 0x7e007e00u : 0x7fc07fc0u;
#pragma unroll
  for (int i = 0; i < kUnit / 2; ++i) unit.words[i] = canonical_nan2(unit.words[i], kNaN);
}

// Of 16 bits, with NaN as the conversions give it: for what is not stored.
template <class T>
__device__ __forceinline__ Unit<T> pack_any_nan(const float (&values)[kUnit]) {
  static_assert(sizeof(T) == 2);
  Unit<T> unit;
#pragma unroll
  for (int i = 0; i < kUnit / 2; ++i) {
    if constexpr (DTypeOf<T>::value == DType::Float16)
      unit.words[i] = half2_of(values[2 * i], values[2 * i + 1]);
    else
      unit.words[i] = bfloat2_of(values[2 * i], values[2 * i + 1]);
  }
  return unit;
}

template <class T>
__device__ __forceinline__ Unit<T> pack(const float (&values)[kUnit]) {
  Unit<T> unit;
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < kUnit; ++i) unit.words[i] = __float_as_uint(from_float<float>(values[i]));
  } else if constexpr (sizeof(T) == 1) {
#pragma unroll
    for (int i = 0; i < kUnit / 4; ++i)
      unit.words[i] = encode2<T>(values[4 * i], values[4 * i + 1]) | encode2<T>(values[4 * i + 2], values[4 * i + 3]) << 16;
  } else {
    unit = pack_any_nan<T>(values);
    make_nan_canonical(unit);
  }
  return unit;
}

}  // namespace fp8kv::device
