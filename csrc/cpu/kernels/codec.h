// Elements to and from fp32, a vector at a time: the rules of fp8kv/fp8.h in integer arithmetic without branches.
#pragma once

#include <type_traits>

#include "cpu/kernels/simd.h"
#include "fp8kv/fp8.h"

namespace fp8kv::cpu::FP8KV_ISA_NAMESPACE {

constexpr std::int32_t kMagnitude = 0x7fffffff;
constexpr std::int32_t kInfinity = 0x7f800000;
constexpr std::int32_t kQuietNaN = 0x7fc00000;

FP8KV_INLINE I32 is_nan(I32 bits) { return (bits & kMagnitude) > kInfinity; }

// A format with a sign, an exponent that starts as IEEE 754's do (subnormals below kMinNormal), and kMantissaBits.
template <class T>
struct Format {  // E4M3, E5M2
  static constexpr int kMantissaBits = Fp8Traits<T>::kMantissaBits;
  static constexpr int kMinExponent = 128 - Fp8Traits<T>::kExponentBias;  // of the smallest normal, as a biased fp32 exponent
  static constexpr float kLargest = Fp8Traits<T>::kMax;
  static constexpr std::int32_t kCodeMask = 0x7f;
};

template <>
struct Format<Half> {
  static constexpr int kMantissaBits = 10;
  static constexpr int kMinExponent = 113;
  static constexpr float kLargest = 65536.0f;  // its code is that of infinity
  static constexpr std::int32_t kCodeMask = 0x7fff;
};

// From fp32 magnitudes to codes: |x| rounded to nearest even and limited to kLargest; anything for NaN.
//
// With `power` the power of two at or below |x| (at least the smallest normal), the sum of |x| and 2^kShift * power is rounded
// to multiples of 2^-kMantissaBits * power: as the format demands, subnormals included. The mantissa of the sum then counts
// these, and its exponent, shifted down, is the exponent of the code but for a constant, which kMagic adds to the mantissa.
template <class T>
class Encoder {
 public:
  FP8KV_INLINE_MEMBER I32 magnitude(F32 x) const {
    const F32 limited = limit_magnitude(x, limit_);
    const F32 power = float_of(max(bits_of(limited), min_normal_) & infinity_);
    const I32 sum = bits_of(multiply_add(power, magic_, limited));  // the product is exact: one rounding in any case
    return (sum + shift_right(kMagicFits ? sum : sum & infinity_, kShift)) & code_mask_;
  }

 private:
  using F = Format<T>;
  static constexpr int kShift = 23 - F::kMantissaBits;
  static constexpr std::int32_t kOffset = -((F::kMinExponent + kShift) << F::kMantissaBits) & F::kCodeMask;
  static constexpr float kMagic = __builtin_bit_cast(float, (127 + kShift) << 23 | kOffset);
  static constexpr bool kMagicFits = kOffset + (2 << F::kMantissaBits) < 1 << kShift;  // the mantissa is gone after the shift

  const F32 limit_ = constant(splat(F::kLargest)), magic_ = constant(splat(kMagic));
  const I32 min_normal_ = constant(splat(F::kMinExponent << 23)), infinity_ = constant(splat(kInfinity));
  const I32 code_mask_ = constant(splat(F::kCodeMask));
};

// The same for lanes whose codes become words, two to a lane, and are limited only as bytes.
template <class T>
class WordEncoder {
 public:
  // The code in the low halves, anything in the high ones.
  FP8KV_INLINE_MEMBER I32 low(F32 magnitude) const {
    const I32 sum = rounded(magnitude);
    return sum + shift_right(sum, kShift);
  }
  // The other way round.
  FP8KV_INLINE_MEMBER I32 high(F32 magnitude) const {
    const I32 sum = rounded(magnitude);
    return (sum << 16) + shift_right(sum, kShift - 16);
  }

 private:
  using F = Format<T>;
  static constexpr int kShift = 23 - F::kMantissaBits;
  static constexpr std::int32_t kOffset = -((F::kMinExponent + kShift) << F::kMantissaBits) & 0xffff;
  static constexpr float kMagic = __builtin_bit_cast(float, (127 + kShift) << 23 | kOffset);
  static_assert(kOffset + (2 << F::kMantissaBits) < 1 << 16);

  FP8KV_INLINE_MEMBER I32 rounded(F32 magnitude) const {
    const F32 power = float_of(max(bits_of(magnitude), min_normal_) & infinity_);
    return bits_of(multiply_add(power, magic_, magnitude));
  }

  const F32 magic_ = constant(splat(kMagic));
  const I32 min_normal_ = constant(splat(F::kMinExponent << 23)), infinity_ = constant(splat(kInfinity));
};

// From fp32 to integers; anything for NaN. A sum with kMagic is rounded to an integer, which its low bits then hold.
template <>
class Encoder<Int8> {
 public:
  FP8KV_INLINE_MEMBER I32 integer(F32 x) const { return bits_of(limit_both_ways(x, limit_) + magic_) - bits_of(magic_); }

 private:
  static constexpr float kMagic = 0x1.8p23f;
  const F32 limit_ = constant(splat(Fp8Traits<Int8>::kMax)), magic_ = constant(splat(kMagic));
};

// The fp32 bits of a finite code without its sign. A subnormal gets an exponent of its own, from which the implicit bit that it
// doesn't have is subtracted.
template <class T>
FP8KV_INLINE I32 decode_magnitude(I32 code) {
  using F = Format<T>;
  constexpr std::int32_t kMinNormal = F::kMinExponent << 23;
  const I32 shifted = code << (23 - F::kMantissaBits);
  const I32 normal = shifted + (kMinNormal - (1 << 23));
  const I32 subnormal = bits_of(float_of(shifted + kMinNormal) - splat(__builtin_bit_cast(float, kMinNormal)));
  return select(code < (1 << F::kMantissaBits), subnormal, normal);
}

// --- Loads --------------------------------

FP8KV_INLINE F32 load(const float* from) { return load_vector<F32>(from); }
FP8KV_INLINE F32 load(const BFloat16* from) { return float_of(widen_high(load_vector<U16>(from))); }

FP8KV_INLINE F32 load(const Half* from) {
  if constexpr (kHasHalf) return widen_half(load_vector<U16>(from));
  const I32 code = widen(load_vector<U16>(from));
  const I32 magnitude = code & 0x7fff;
  const I32 value = select(magnitude < 0x7c00, decode_magnitude<Half>(magnitude), (magnitude << 13) | kInfinity);
  return float_of(value | (code & 0x8000) << 16);
}

// FP8 of any kind: NaN gives the quiet NaN.
template <class Fp8, int kLastNumber = Fp8Traits<Fp8>::kMaxBits + Fp8Traits<Fp8>::kHasInfinity>
FP8KV_INLINE F32 load(const Fp8* from) {
  const I32 code = widen(load_vector<U8>(from));
  const I32 magnitude = code & 0x7f;
  I32 value = decode_magnitude<Fp8>(magnitude);
  if constexpr (kLastNumber > Fp8Traits<Fp8>::kMaxBits) value = select(magnitude == kLastNumber, splat(kInfinity), value);
  value = value | (code & 0x80) << 24;
  return float_of(select(magnitude > kLastNumber, splat(kQuietNaN), value));
}

FP8KV_INLINE F32 load(const Int8* from) { return __builtin_convertvector(widen(load_vector<I8>(from)), F32); }

// Whether a tile, four vectors, holds finite numbers only.
template <class Fp8>
FP8KV_INLINE bool all_finite(const Fp8* from) {
  return !any_magnitude_above(load_vector<Bytes>(from), Fp8Traits<Fp8>::kMaxBits);
}
FP8KV_INLINE bool all_finite(const Int8*) { return true; }

// The same as load() where all are finite. fp16 has the exponent of E5M2, and that of E4M3 but for a factor.
FP8KV_INLINE F32 load_number(const E5M2* from) {
  if constexpr (!kHasHalf) return load(from);
  return widen_half(widen_signed(load_vector<U8>(from)) << 8);
}
FP8KV_INLINE F32 load_number(const E4M3* from) {
  if constexpr (!kHasHalf) return load(from);
  constexpr std::uint16_t kSignAndCode = 0xbf80;
  return widen_half((widen_signed(load_vector<U8>(from)) << 7) & kSignAndCode) * 256.0f;
}

FP8KV_INLINE F32 load_number(const Int8* from) { return load(from); }

// --- Four vectors to codes --------------------------------

// Without NaN.
template <class Fp8>
FP8KV_INLINE Bytes encode_numbers(const F32 (&x)[4], const Encoder<Fp8>& encoder) {
  I32 code[4], sign[4];
  for (int k = 0; k < 4; ++k) code[k] = encoder.magnitude(x[k]), sign[k] = bits_of(x[k]);
  return pack8_signed(code, sign);
}

// Of any kind.
template <class Fp8>
FP8KV_INLINE Bytes encode(const F32 (&x)[4], const Encoder<Fp8>& encoder) {
  I32 code[4], sign[4];
  for (int k = 0; k < 4; ++k) {
    const I32 nan = is_nan(bits_of(x[k]));
    code[k] = select(nan, splat(Fp8Traits<Fp8>::kNaNBits), encoder.magnitude(x[k]));
    sign[k] = select(nan, I32{}, bits_of(x[k]));
  }
  return pack8_signed(code, sign);
}

FP8KV_INLINE Bytes encode_numbers(const F32 (&x)[4], const Encoder<Int8>& encoder) {
  I32 code[4];
  for (int k = 0; k < 4; ++k) code[k] = encoder.integer(x[k]);
  return pack8(code);
}
FP8KV_INLINE Bytes encode(const F32 (&x)[4], const Encoder<Int8>& encoder) {
  I32 code[4];
  for (int k = 0; k < 4; ++k) code[k] = select(is_nan(bits_of(x[k])), I32{}, encoder.integer(x[k]));
  return pack8(code);
}

// --- Stores of two and of four vectors --------------------------------

FP8KV_INLINE I32 quiet(F32 x) { return select(is_nan(bits_of(x)), splat(kQuietNaN), bits_of(x)); }

FP8KV_INLINE void store(float* to, F32 a, F32 b) { store_vector(to, a), store_vector(to + kLanes, b); }

// A NaN must be the quiet NaN.
FP8KV_INLINE void store(BFloat16* to, F32 a, F32 b) { pack16_rounded(&to->bits, bits_of(a), bits_of(b)); }

FP8KV_INLINE void store(Half* to, F32 a, F32 b) {
  if constexpr (kHasHalf) {
    store_vector(to, narrow_half(a)), store_vector(to + kLanes, narrow_half(b));
  } else {
    const Encoder<Half> encoder;
    const auto code = [&](F32 x) __attribute__((always_inline)) {
      const I32 number = encoder.magnitude(x) | (shift_right(bits_of(x), 16) & 0x8000);
      return select(is_nan(bits_of(x)), splat(0x7e00), number);
    };
    pack16(&to->bits, code(a), code(b));
  }
}

template <class Real>
FP8KV_INLINE void store(Real* to, const F32 (&x)[4]) {
  store(to, x[0], x[1]), store(to + 2 * kLanes, x[2], x[3]);
}

}  // namespace fp8kv::cpu::FP8KV_ISA_NAMESPACE
