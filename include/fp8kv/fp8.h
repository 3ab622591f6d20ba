// The scalar codec: FP8, INT8, fp16 and bf16 to and from fp32, and the two rules of the library. The executable form of
// docs/numerics.md.
//
// Everything here is constexpr, needs no floating-point environment (integer arithmetic only, but for the one division and
// the one product the rules name), and gives the same bits on the host and on the device.
//
// Formats: OCP 8-bit Floating Point Specification (OFP8), revision 1.0.
//   E4M3  1 sign, 4 exponent (bias 7), 3 mantissa bits; largest finite 448; no infinity; NaN is S.1111.111
//   E5M2  1 sign, 5 exponent (bias 15), 2 mantissa bits; largest finite 57344; infinity S.11111.00; NaN S.11111.{01,10,11}
// INT8 is symmetric: integers from -127 to 127, no NaN and no infinity; -128 is read and never written. It is a format like the
// others, and stands for `Fp8` in every template here.
//
// Example:
//   static_assert(fp8kv::encode<fp8kv::E4M3>(1.0f).bits == 0x38);
//   static_assert(fp8kv::decode(fp8kv::E4M3{0x38}) == 1.0f);
#pragma once

#include <bit>
#include <cstdint>

#include "fp8kv/dtype.h"

namespace fp8kv {

template <class Fp8>
struct Fp8Traits;

template <>
struct Fp8Traits<E4M3> {
  static constexpr int kMantissaBits = 3;
  static constexpr int kExponentBias = 7;
  static constexpr bool kHasInfinity = false;
  static constexpr float kMax = 448.0f;
  static constexpr std::uint8_t kMaxBits = 0x7E;
  static constexpr std::uint8_t kNaNBits = 0x7F;
};

template <>
struct Fp8Traits<E5M2> {
  static constexpr int kMantissaBits = 2;
  static constexpr int kExponentBias = 15;
  static constexpr bool kHasInfinity = true;
  static constexpr float kMax = 57344.0f;
  static constexpr std::uint8_t kMaxBits = 0x7B;
  static constexpr std::uint8_t kNaNBits = 0x7F;
};

template <>
struct Fp8Traits<Int8> {
  static constexpr float kMax = 127.0f;
  static constexpr std::uint8_t kNaNBits = 0;
};

// The smallest scale the dynamic ops write: 1 / (max * 512), rounded to fp32.
template <class Fp8>
inline constexpr float kMinScale = 1.0f / (Fp8Traits<Fp8>::kMax * 512.0f);

FP8KV_HD constexpr bool is_nan(float x) { return (std::bit_cast<std::uint32_t>(x) & 0x7fffffffu) > 0x7f800000u; }
FP8KV_HD constexpr bool is_finite(float x) { return (std::bit_cast<std::uint32_t>(x) & 0x7fffffffu) < 0x7f800000u; }

// x / 2^shift rounded to nearest, ties to even; shift from 1 to 25, no carry beyond 32 bits.
FP8KV_HD constexpr std::uint32_t shift_to_even(std::uint32_t x, std::uint32_t shift) {
  const std::uint32_t odd = (x >> shift) & 1u;
  return (x + ((1u << (shift - 1)) - 1u) + odd) >> shift;
}

// Nearest FP8 value, ties to even; beyond the largest finite value, and for infinities, the largest finite value with the
// sign of x; any NaN gives the byte 0x7F.
template <class Fp8>
FP8KV_HD constexpr Fp8 encode(float x) {
  using Traits = Fp8Traits<Fp8>;
  constexpr int kShift = 23 - Traits::kMantissaBits;
  constexpr std::uint32_t kMinNormalExponent = 127 + 1 - Traits::kExponentBias;  // biased fp32 exponent of the smallest normal
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  const std::uint32_t sign = (bits >> 24) & 0x80u;
  if (magnitude > 0x7f800000u) return {Traits::kNaNBits};
  if (magnitude >= std::bit_cast<std::uint32_t>(Traits::kMax)) return {static_cast<std::uint8_t>(sign | Traits::kMaxBits)};
  const std::uint32_t exponent = magnitude >> 23;
  std::uint32_t significand = magnitude;  // with the exponent above it: a carry moves into the exponent by itself
  std::uint32_t shift = kShift;
  std::uint32_t base = (kMinNormalExponent - 1) << Traits::kMantissaBits;
  if (exponent < kMinNormalExponent) {  // an FP8 subnormal: the implicit bit becomes explicit
    shift += kMinNormalExponent - exponent;
    if (shift > 25) return {static_cast<std::uint8_t>(sign)};  // below half the smallest subnormal
    significand = (magnitude & 0x7fffffu) | 0x800000u;
    base = 0;
  }
  const std::uint32_t rounded = shift_to_even(significand, shift);
  return {static_cast<std::uint8_t>(sign | (rounded - base))};
}

// The nearest integer, ties to even, limited to -127 to 127; any NaN gives 0.
template <>
FP8KV_HD constexpr Int8 encode<Int8>(float x) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(x), magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {Fp8Traits<Int8>::kNaNBits};
  const std::uint32_t exponent = magnitude >> 23;
  std::uint32_t integer = 0;  // below 1/2
  if (magnitude >= std::bit_cast<std::uint32_t>(Fp8Traits<Int8>::kMax)) {
    integer = 127;
  } else if (exponent >= 126) {
    integer = shift_to_even((magnitude & 0x7fffffu) | 0x800000u, 150 - exponent);
  }
  return {static_cast<std::uint8_t>(bits >> 31 ? 0u - integer : integer)};
}

// The exact value of an FP8 byte; NaN bytes give a quiet NaN, infinities of E5M2 give infinities.
template <class Fp8>
FP8KV_HD constexpr float decode_bits(std::uint8_t byte) {
  using Traits = Fp8Traits<Fp8>;
  constexpr int kShift = 23 - Traits::kMantissaBits;
  const std::uint32_t sign = static_cast<std::uint32_t>(byte & 0x80u) << 24;
  const std::uint32_t magnitude = byte & 0x7fu;
  if (magnitude == 0) return std::bit_cast<float>(sign);
  if (magnitude > Traits::kMaxBits) {
    const bool infinite = Traits::kHasInfinity && magnitude == Traits::kMaxBits + 1u;
    return std::bit_cast<float>(infinite ? (sign | 0x7f800000u) : 0x7fc00000u);
  }
  std::uint32_t exponent = magnitude >> Traits::kMantissaBits;
  std::uint32_t mantissa = magnitude & ((1u << Traits::kMantissaBits) - 1u);
  if (exponent == 0) {  // subnormal: shift the leading one up to the implicit bit
    exponent = 1;
    while ((mantissa >> Traits::kMantissaBits) == 0) {
      mantissa <<= 1;
      --exponent;  // wraps below 0 on purpose; the bias added next brings it back
    }
    mantissa &= (1u << Traits::kMantissaBits) - 1u;
  }
  return std::bit_cast<float>(sign | ((exponent + 127u - Traits::kExponentBias) << 23) | (mantissa << kShift));
}

FP8KV_HD constexpr float decode(E4M3 x) { return decode_bits<E4M3>(x.bits); }
FP8KV_HD constexpr float decode(E5M2 x) { return decode_bits<E5M2>(x.bits); }
FP8KV_HD constexpr float decode(Int8 x) { return static_cast<float>(static_cast<std::int8_t>(x.bits)); }

// fp16 and bf16: exact to fp32; to nearest, ties to even from fp32. A NaN becomes the positive quiet NaN without payload
// (0x7fc00000, 0x7fc0, 0x7e00): processors disagree about the sign and payload of a NaN, this library does not.
FP8KV_HD constexpr float decode(float x) { return x; }
FP8KV_HD constexpr float decode(BFloat16 x) { return std::bit_cast<float>(static_cast<std::uint32_t>(x.bits) << 16); }
FP8KV_HD constexpr float decode(Half x) {
  const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000u) << 16;
  std::uint32_t exponent = (x.bits >> 10) & 0x1fu;
  std::uint32_t mantissa = x.bits & 0x3ffu;
  if (exponent == 0x1f) return std::bit_cast<float>(sign | 0x7f800000u | (mantissa << 13));
  if (exponent == 0) {
    if (mantissa == 0) return std::bit_cast<float>(sign);
    exponent = 1;
    while ((mantissa & 0x400u) == 0) {
      mantissa <<= 1;
      --exponent;
    }
    mantissa &= 0x3ffu;
  }
  return std::bit_cast<float>(sign | ((exponent + 112u) << 23) | (mantissa << 13));
}

template <class Real>
FP8KV_HD constexpr Real from_float(float x);

template <>
FP8KV_HD constexpr float from_float<float>(float x) {
  return is_nan(x) ? std::bit_cast<float>(0x7fc00000u) : x;
}

template <>
FP8KV_HD constexpr BFloat16 from_float<BFloat16>(float x) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
  if (is_nan(x)) return {0x7fc0};
  return {static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

template <>
FP8KV_HD constexpr Half from_float<Half>(float x) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {0x7e00};
  if (magnitude >= 0x477ff000u) return {static_cast<std::uint16_t>(sign | 0x7c00u)};  // rounds to 65536 or more
  std::uint32_t significand = magnitude;
  std::uint32_t shift = 13;
  std::uint32_t base = 112u << 10;
  if (magnitude < 0x38800000u) {
    shift += 113u - (magnitude >> 23);
    if (shift > 25) return {static_cast<std::uint16_t>(sign)};
    significand = (magnitude & 0x7fffffu) | 0x800000u;
    base = 0;
  }
  const std::uint32_t rounded = shift_to_even(significand, shift);
  return {static_cast<std::uint16_t>(sign | (rounded - base))};
}

// The quantization rule: round_to_nearest_even(clamp(fp32(x) / scale, -max, +max)).
template <class Fp8>
FP8KV_HD constexpr Fp8 quantize(float x, float scale) {
  return encode<Fp8>(x / scale);
}

// The dequantization rule: one fp32 product, then one rounding to the output type.
template <class Real, class Fp8>
FP8KV_HD constexpr Real dequantize(Fp8 q, float scale) {
  return from_float<Real>(decode(q) * scale);
}

// The dynamic scale of a group whose largest finite magnitude is amax. Never decreasing in amax, so that the largest of
// partial results is the result of the whole. `upper_bound` is infinity when there is none; a NaN bound is ignored.
template <class Fp8>
FP8KV_HD constexpr float dynamic_scale(float amax, float upper_bound) {
  const float bounded = amax > upper_bound ? upper_bound : amax;
  const float scale = bounded / Fp8Traits<Fp8>::kMax;
  return scale > kMinScale<Fp8> ? scale : kMinScale<Fp8>;
}

}  // namespace fp8kv
