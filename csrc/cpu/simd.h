// Vectors of kLanes elements and the conversions the kernels need, for the instruction set a file is compiled for.
//
// Everything lives in the namespace FP8KV_ISA_NAMESPACE and is always inlined, so that no function compiled for a wide
// instruction set can stand in for its namesake in another file. Arithmetic is that of GCC's vector extensions, which
// clang shares; an instruction is named only where the compiler can't be made to find it. (AVX-512 conversions are the masked
// ones: GCC 12 warns about its own headers for the others.)
#pragma once

#include <cstdint>

#include "fp8kv/fp8.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define FP8KV_INLINE static inline __attribute__((always_inline))

namespace fp8kv::cpu::FP8KV_ISA_NAMESPACE {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float F32 __attribute__((vector_size(4 * kLanes)));
typedef std::int32_t I32 __attribute__((vector_size(4 * kLanes)));
typedef std::uint32_t U32 __attribute__((vector_size(4 * kLanes)));
typedef std::uint16_t U16 __attribute__((vector_size(2 * kLanes)));
typedef std::uint8_t U8 __attribute__((vector_size(kLanes)));

FP8KV_INLINE I32 bits_of(F32 x) { return reinterpret_cast<I32>(x); }
FP8KV_INLINE F32 float_of(I32 bits) { return reinterpret_cast<F32>(bits); }
FP8KV_INLINE I32 splat(std::int32_t x) { return x - I32{}; }
FP8KV_INLINE F32 splat(float x) { return float_of(splat(__builtin_bit_cast(std::int32_t, x))); }
FP8KV_INLINE I32 select(I32 condition, I32 yes, I32 no) { return condition ? yes : no; }
FP8KV_INLINE I32 min(I32 a, I32 b) { return a < b ? a : b; }
FP8KV_INLINE I32 max(I32 a, I32 b) { return a > b ? a : b; }

template <class Vector>
FP8KV_INLINE Vector load_vector(const void* from) {
  Vector v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

template <class Vector>
FP8KV_INLINE void store_vector(void* to, Vector v) {
  __builtin_memcpy(to, &v, sizeof v);
}

// --- Small floating-point formats, by integer arithmetic -----------------------------------------------------------------

// A format with a sign, an exponent that starts as IEEE 754's do (subnormals below kMinNormal), and kMantissaBits.
template <class T>
struct Format;

template <class Fp8>
  requires requires { Fp8Traits<Fp8>::kMax; }
struct Format<Fp8> {
  static constexpr int kMantissaBits = Fp8Traits<Fp8>::kMantissaBits;
  static constexpr std::int32_t kMinNormal = (128 - Fp8Traits<Fp8>::kExponentBias) << 23;  // as the bits of an fp32
  static constexpr std::int32_t kLargest = __builtin_bit_cast(std::int32_t, Fp8Traits<Fp8>::kMax);
};

template <>
struct Format<Half> {
  static constexpr int kMantissaBits = 10;
  static constexpr std::int32_t kMinNormal = 113 << 23;
  static constexpr std::int32_t kLargest = 143 << 23;  // 65536, whose code is that of infinity
};

constexpr std::int32_t kMagnitude = 0x7fffffff;
constexpr std::int32_t kInfinity = 0x7f800000;
constexpr std::int32_t kQuietNaN = 0x7fc00000;

// The code of a magnitude (the bits of an fp32 >= 0), rounded to nearest even and limited to kLargest. The sum with a power
// of two that is as much larger as the format's mantissa is shorter does the rounding; NaN is left to the caller.
template <class T>
FP8KV_INLINE I32 encode_magnitude(I32 magnitude) {
  using F = Format<T>;
  constexpr int kShift = 23 - F::kMantissaBits;
  const I32 limited = min(magnitude, splat(F::kLargest));
  const I32 exponent = max(limited & kInfinity, splat(F::kMinNormal));
  const I32 magic = exponent + (kShift << 23);
  const I32 rounded = bits_of(float_of(limited) + float_of(magic)) - magic;
  return rounded + ((exponent - F::kMinNormal) >> kShift);
}

// The fp32 of a finite code (without its sign). A subnormal gets an exponent of its own, from which the implicit bit that
// it doesn't have is subtracted.
template <class T>
FP8KV_INLINE I32 decode_magnitude(I32 code) {
  using F = Format<T>;
  constexpr int kShift = 23 - F::kMantissaBits;
  const I32 shifted = code << kShift;
  const I32 normal = shifted + (F::kMinNormal - (1 << 23));
  const I32 subnormal = bits_of(float_of(shifted + F::kMinNormal) - float_of(splat(F::kMinNormal)));
  return select(code < (1 << F::kMantissaBits), subnormal, normal);
}

// --- Wider and narrower lanes -----------------------------------------------------------------------------------------------

#if defined(__AVX512F__)
FP8KV_INLINE I32 widen(U16 x) { return reinterpret_cast<I32>(_mm512_maskz_cvtepu16_epi32(0xffff, reinterpret_cast<__m256i>(x))); }
FP8KV_INLINE I32 widen(U8 x) { return reinterpret_cast<I32>(_mm512_maskz_cvtepu8_epi32(0xffff, reinterpret_cast<__m128i>(x))); }
FP8KV_INLINE U16 narrow16(I32 x) {
  return reinterpret_cast<U16>(_mm512_maskz_cvtepi32_epi16(0xffff, reinterpret_cast<__m512i>(x)));
}
FP8KV_INLINE U8 narrow8(I32 x) { return reinterpret_cast<U8>(_mm512_maskz_cvtepi32_epi8(0xffff, reinterpret_cast<__m512i>(x))); }
#elif defined(__AVX2__)
FP8KV_INLINE I32 widen(U16 x) { return reinterpret_cast<I32>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(x))); }
FP8KV_INLINE I32 widen(U8 x) {
  return reinterpret_cast<I32>(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(reinterpret_cast<long long>(x))));
}
FP8KV_INLINE U16 narrow16(I32 x) {
  const __m256i packed = _mm256_packus_epi32(reinterpret_cast<__m256i>(x & 0xffff), __m256i{});
  return reinterpret_cast<U16>(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
}
FP8KV_INLINE U8 narrow8(I32 x) {
  const __m128i words = reinterpret_cast<__m128i>(narrow16(x & 0xff));
  return reinterpret_cast<U8>(_mm_cvtsi128_si64(_mm_packus_epi16(words, words)));
}
#else
FP8KV_INLINE I32 widen(U16 x) { return __builtin_convertvector(x, I32); }
FP8KV_INLINE I32 widen(U8 x) { return __builtin_convertvector(x, I32); }
FP8KV_INLINE U16 narrow16(I32 x) { return __builtin_convertvector(x, U16); }
FP8KV_INLINE U8 narrow8(I32 x) { return __builtin_convertvector(x, U8); }
#endif

// --- Elements to and from fp32 ---------------------------------------------------------------------------------------------

FP8KV_INLINE F32 load(const float* from) { return load_vector<F32>(from); }
FP8KV_INLINE F32 load(const BFloat16* from) { return float_of(widen(load_vector<U16>(from)) << 16); }

FP8KV_INLINE F32 load(const Half* from) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtph_ps(0xffff, load_vector<__m256i>(from));
#elif defined(__AVX2__)
  return _mm256_cvtph_ps(load_vector<__m128i>(from));
#else
  const I32 code = widen(load_vector<U16>(from));
  const I32 magnitude = code & 0x7fff;
  const I32 special = (magnitude << 13) | kInfinity;
  const I32 value = select(magnitude >= 0x7c00, special, decode_magnitude<Half>(magnitude));
  return float_of(value | (code & 0x8000) << 16);
#endif
}

template <class Fp8>
  requires requires { Fp8Traits<Fp8>::kMax; }
FP8KV_INLINE F32 load(const Fp8* from) {
  using Traits = Fp8Traits<Fp8>;
  const I32 code = widen(load_vector<U8>(from));
  const I32 magnitude = code & 0x7f;
  I32 value = decode_magnitude<Fp8>(magnitude);
  if constexpr (Traits::kMantissaBits == 2) value = select(magnitude == 0x7c, splat(kInfinity), value);
  constexpr int kLastNumber = Traits::kMantissaBits == 2 ? 0x7c : Traits::kMaxBits;
  value = select(magnitude > kLastNumber, splat(kQuietNaN), value);
  return float_of(value | (code & 0x80) << 24);
}

FP8KV_INLINE I32 is_nan(I32 bits) { return (bits & kMagnitude) > kInfinity; }

FP8KV_INLINE void store(float* to, F32 x) {
  const I32 bits = bits_of(x);
  store_vector(to, select(is_nan(bits), splat(kQuietNaN), bits));
}

FP8KV_INLINE void store(BFloat16* to, F32 x) {
  const I32 bits = bits_of(x);
  const U32 raw = reinterpret_cast<U32>(bits);  // unsigned, as a NaN may wrap around
  const I32 rounded = reinterpret_cast<I32>((raw + 0x7fffu + ((raw >> 16) & 1u)) >> 16);
  const I32 code = select(is_nan(bits), splat(0x7fc0), rounded);
  store_vector(to, narrow16(code));
}

FP8KV_INLINE void store(Half* to, F32 x) {
  const I32 bits = bits_of(x);
#if defined(__AVX512F__)
  const F32 quiet = float_of(select(is_nan(bits), splat(kQuietNaN), bits));
  store_vector(to, _mm512_maskz_cvtps_ph(0xffff, quiet, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__)
  const F32 quiet = float_of(select(is_nan(bits), splat(kQuietNaN), bits));
  store_vector(to, _mm256_cvtps_ph(quiet, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  const I32 code = encode_magnitude<Half>(bits & kMagnitude) | ((bits >> 16) & 0x8000);
  store_vector(to, narrow16(select(is_nan(bits), splat(0x7e00), code)));
#endif
}

template <class Fp8>
  requires requires { Fp8Traits<Fp8>::kMax; }
FP8KV_INLINE void store(Fp8* to, F32 x) {
  const I32 bits = bits_of(x);
  const I32 code = encode_magnitude<Fp8>(bits & kMagnitude) | ((bits >> 24) & 0x80);
  store_vector(to, narrow8(select(is_nan(bits), splat(Fp8Traits<Fp8>::kNaNBits), code)));
}

}  // namespace fp8kv::cpu::FP8KV_ISA_NAMESPACE
