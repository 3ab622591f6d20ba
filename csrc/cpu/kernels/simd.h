// Vectors of kLanes elements for the instruction set a file is compiled for.
//
// Everything lives in the namespace FP8KV_ISA_NAMESPACE and is always inlined, so that no function compiled for a wide
// instruction set can stand in for its namesake in another file. Arithmetic is that of GCC's vector extensions, which
// clang shares; an instruction is named only where the compiler can't be made to find it. (AVX-512 conversions are the masked
// ones: GCC 12 warns about its own headers for the others.)
#pragma once

#include <cstdint>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define FP8KV_INLINE static inline __attribute__((always_inline))
#define FP8KV_INLINE_MEMBER inline __attribute__((always_inline))

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
typedef std::int16_t I16 __attribute__((vector_size(4 * kLanes)));
typedef std::uint32_t U32 __attribute__((vector_size(4 * kLanes)));
typedef std::uint16_t U16 __attribute__((vector_size(2 * kLanes)));
typedef std::uint16_t U16x2 __attribute__((vector_size(4 * kLanes)));
typedef std::uint8_t U8 __attribute__((vector_size(kLanes)));
typedef std::int8_t I8 __attribute__((vector_size(kLanes)));
typedef std::uint8_t Bytes __attribute__((vector_size(4 * kLanes)));

FP8KV_INLINE I32 bits_of(F32 x) { return reinterpret_cast<I32>(x); }
FP8KV_INLINE F32 float_of(I32 bits) { return reinterpret_cast<F32>(bits); }
FP8KV_INLINE I32 splat(std::int32_t x) { return x - I32{}; }
FP8KV_INLINE F32 splat(float x) { return float_of(splat(__builtin_bit_cast(std::int32_t, x))); }
FP8KV_INLINE I32 select(I32 condition, I32 yes, I32 no) { return condition ? yes : no; }
FP8KV_INLINE I32 min(I32 a, I32 b) { return a < b ? a : b; }
FP8KV_INLINE I32 max(I32 a, I32 b) { return a > b ? a : b; }
FP8KV_INLINE I32 shift_right(I32 x, int count) { return reinterpret_cast<I32>(reinterpret_cast<U32>(x) >> count); }

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

// Past the caches, where `to` is aligned to the vector and the instruction set can. Other threads may see it late: fence first
// (parallel.h).
template <class Vector>
FP8KV_INLINE void stream_vector(void* to, Vector v) {
#if defined(__AVX512F__)
  _mm512_stream_si512(static_cast<__m512i*>(to), reinterpret_cast<__m512i>(v));
#elif defined(__AVX2__)
  _mm256_stream_si256(static_cast<__m256i*>(to), reinterpret_cast<__m256i>(v));
#else
  store_vector(to, v);
#endif
}

// Asks for the memory `ahead` bytes after kCount elements. The default is a page: processors don't look beyond one by
// themselves.
template <class T, int kCount>
FP8KV_INLINE void prefetch(const T* from, std::int64_t ahead = 4096) {
  constexpr int kLine = 64;
  const auto begin = reinterpret_cast<std::uintptr_t>(from) + ahead;  // as a number: it may be no address of anything
  for (int offset = 0; offset < static_cast<int>(kCount * sizeof(T)); offset += kLine)
    __builtin_prefetch(reinterpret_cast<const void*>(begin + offset));
}

// A constant that stays in a register or on the stack. GCC would rebuild it from an integer within the loop.
template <class Vector>
FP8KV_INLINE Vector constant(Vector v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__AVX2__)
  asm("" : "+x"(v));
#endif
  return v;
}

// --- Lanes of 32 bits from narrower ones, and back --------------------------------

// pack16 stores the low halves of the lanes of two vectors, in which what is above must be 0. pack8 gives four vectors of
// integers from -128 to 127 as bytes. pack8_signed gives four of integers from 0 to 127, with the signs of four others in
// bit 7. saturate8 gives words as the nearest bytes, for words_in_order to put in order.

#if defined(__AVX512F__)
constexpr int kFirstOrSecondAndThird = 0xf8;  // for ternarylogic
FP8KV_INLINE I32 widen(U16 x) {
  return reinterpret_cast<I32>(_mm512_maskz_cvtepu16_epi32(0xffff, reinterpret_cast<__m256i>(x)));
}
FP8KV_INLINE I32 widen(U8 x) { return reinterpret_cast<I32>(_mm512_maskz_cvtepu8_epi32(0xffff, reinterpret_cast<__m128i>(x))); }
FP8KV_INLINE I32 widen(I8 x) { return reinterpret_cast<I32>(_mm512_maskz_cvtepi8_epi32(0xffff, reinterpret_cast<__m128i>(x))); }
FP8KV_INLINE __m512i pack_words(I32 a, I32 b) {
  return _mm512_packs_epi32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b));
}
FP8KV_INLINE __m512i pack_bytes(const I32 (&x)[4]) {  // packing stays within 128 bits: out of order
  return _mm512_packs_epi16(pack_words(x[0], x[1]), pack_words(x[2], x[3]));
}
FP8KV_INLINE Bytes in_order(__m512i packed) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return reinterpret_cast<Bytes>(_mm512_maskz_permutexvar_epi32(0xffff, order, packed));
}
FP8KV_INLINE Bytes pack8(const I32 (&x)[4]) { return in_order(pack_bytes(x)); }
FP8KV_INLINE Bytes pack8_signed(const I32 (&x)[4], const I32 (&sign)[4]) {
  return in_order(_mm512_ternarylogic_epi32(pack_bytes(x), pack_bytes(sign), _mm512_set1_epi8(-128), kFirstOrSecondAndThird));
}
FP8KV_INLINE Bytes saturate8(I16 a, I16 b) {
  return reinterpret_cast<Bytes>(_mm512_packs_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
}
FP8KV_INLINE Bytes words_in_order(Bytes x) {
  const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
  return reinterpret_cast<Bytes>(_mm512_maskz_permutexvar_epi64(0xff, order, reinterpret_cast<__m512i>(x)));
}
FP8KV_INLINE void pack16(std::uint16_t* to, I32 a, I32 b) {
  const __m512i packed = _mm512_packus_epi32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b));
  store_vector(to, _mm512_maskz_permutexvar_epi64(0xff, _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), packed));
}
#elif defined(__AVX2__)
FP8KV_INLINE I32 widen(U16 x) { return reinterpret_cast<I32>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(x))); }
FP8KV_INLINE I32 widen(U8 x) {
  return reinterpret_cast<I32>(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(reinterpret_cast<long long>(x))));
}
FP8KV_INLINE I32 widen(I8 x) {
  return reinterpret_cast<I32>(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(reinterpret_cast<long long>(x))));
}
FP8KV_INLINE __m256i pack_words(I32 a, I32 b) {
  return _mm256_packs_epi32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b));
}
FP8KV_INLINE __m256i pack_bytes(const I32 (&x)[4]) {  // packing stays within 128 bits: out of order
  return _mm256_packs_epi16(pack_words(x[0], x[1]), pack_words(x[2], x[3]));
}
FP8KV_INLINE Bytes in_order(__m256i packed) {
  return reinterpret_cast<Bytes>(_mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
}
FP8KV_INLINE Bytes pack8(const I32 (&x)[4]) { return in_order(pack_bytes(x)); }
FP8KV_INLINE Bytes pack8_signed(const I32 (&x)[4], const I32 (&sign)[4]) {
  return in_order(_mm256_or_si256(pack_bytes(x), _mm256_and_si256(pack_bytes(sign), _mm256_set1_epi8(-128))));
}
FP8KV_INLINE Bytes saturate8(I16 a, I16 b) {
  return reinterpret_cast<Bytes>(_mm256_packs_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
}
FP8KV_INLINE Bytes words_in_order(Bytes x) {
  return reinterpret_cast<Bytes>(_mm256_permute4x64_epi64(reinterpret_cast<__m256i>(x), 0xd8));
}
FP8KV_INLINE void pack16(std::uint16_t* to, I32 a, I32 b) {
  const __m256i packed = _mm256_packus_epi32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b));
  store_vector(to, _mm256_permute4x64_epi64(packed, 0xd8));
}
#elif defined(__SSE2__)
FP8KV_INLINE I32 widen(U16 x) {
  return reinterpret_cast<I32>(_mm_unpacklo_epi16(_mm_cvtsi64_si128(reinterpret_cast<long long>(x)), __m128i{}));
}
FP8KV_INLINE I32 widen(U8 x) {
  const __m128i words = _mm_unpacklo_epi8(_mm_cvtsi32_si128(reinterpret_cast<int>(x)), __m128i{});
  return reinterpret_cast<I32>(_mm_unpacklo_epi16(words, __m128i{}));
}
FP8KV_INLINE I32 widen(I8 x) { return widen(reinterpret_cast<U8>(x)) << 24 >> 24; }
FP8KV_INLINE __m128i pack_words(I32 a, I32 b) {
  return _mm_packs_epi32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b));
}
FP8KV_INLINE __m128i pack_bytes(const I32 (&x)[4]) { return _mm_packs_epi16(pack_words(x[0], x[1]), pack_words(x[2], x[3])); }
FP8KV_INLINE Bytes pack8(const I32 (&x)[4]) { return reinterpret_cast<Bytes>(pack_bytes(x)); }
FP8KV_INLINE Bytes pack8_signed(const I32 (&x)[4], const I32 (&sign)[4]) {
  return reinterpret_cast<Bytes>(_mm_or_si128(pack_bytes(x), _mm_and_si128(pack_bytes(sign), _mm_set1_epi8(-128))));
}
FP8KV_INLINE Bytes saturate8(I16 a, I16 b) {
  return reinterpret_cast<Bytes>(_mm_packs_epi16(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
}
FP8KV_INLINE Bytes words_in_order(Bytes x) { return x; }
FP8KV_INLINE void pack16(std::uint16_t* to, I32 a, I32 b) {  // there is no packing of unsigned halves: make them signed
  store_vector(to, pack_words(a << 16 >> 16, b << 16 >> 16));
}
#else
FP8KV_INLINE I32 widen(U16 x) { return __builtin_convertvector(x, I32); }
FP8KV_INLINE I32 widen(U8 x) { return __builtin_convertvector(x, I32); }
FP8KV_INLINE I32 widen(I8 x) { return __builtin_convertvector(x, I32); }
FP8KV_INLINE Bytes pack8(const I32 (&x)[4]) {
  U8 bytes[4];
  for (int k = 0; k < 4; ++k) bytes[k] = __builtin_convertvector(x[k], U8);
  return load_vector<Bytes>(bytes);
}
FP8KV_INLINE Bytes saturate8(I16 a, I16 b) {
  std::int8_t bytes[4 * kLanes];
  for (int i = 0; i < 4 * kLanes; ++i) {
    const std::int16_t x = i < 2 * kLanes ? a[i] : b[i - 2 * kLanes];
    bytes[i] = static_cast<std::int8_t>(x < -128 ? -128 : x > 127 ? 127 : x);
  }
  return load_vector<Bytes>(bytes);
}
FP8KV_INLINE Bytes words_in_order(Bytes x) { return x; }
FP8KV_INLINE Bytes pack8_signed(const I32 (&x)[4], const I32 (&sign)[4]) {
  I32 codes[4];
  for (int k = 0; k < 4; ++k) codes[k] = x[k] | (shift_right(sign[k], 24) & 0x80);
  return pack8(codes);
}
FP8KV_INLINE void pack16(std::uint16_t* to, I32 a, I32 b) {
  store_vector(to, __builtin_convertvector(a, U16));
  store_vector(to + kLanes, __builtin_convertvector(b, U16));
}
#endif

// Words from 0 on as bytes of at most `limit`, a constant(), with the signs of others in bit 7.
FP8KV_INLINE Bytes pack8_signed(const I16 (&x)[2], const I16 (&sign)[2], Bytes limit) {
  const Bytes bytes = saturate8(x[0], x[1]), signs = saturate8(sign[0], sign[1]) & 0x80;
  return words_in_order((bytes < limit ? bytes : limit) | signs);
}

// Words as the high halves of lanes, in which what is below is 0.
FP8KV_INLINE I32 widen_high(U16 x) {
#if defined(__AVX512BW__)  // one instruction instead of two
  const U16x2 numbers = {0, 0, 0, 1, 0, 2, 0, 3, 0, 4, 0, 5, 0, 6, 0, 7, 0, 8, 0, 9, 0, 10, 0, 11, 0, 12, 0, 13, 0, 14, 0, 15};
  constexpr __mmask32 kHigh = 0xaaaaaaaa;
  return reinterpret_cast<I32>(_mm512_maskz_permutexvar_epi16(kHigh, reinterpret_cast<__m512i>(numbers),
                                                              _mm512_castsi256_si512(reinterpret_cast<__m256i>(x))));
#else
  return widen(x) << 16;
#endif
}

// Stores the high halves of the lanes of two vectors, rounded to nearest even by the low ones. They must not be all ones.
FP8KV_INLINE void pack16_rounded(std::uint16_t* to, I32 a, I32 b) {
#if defined(__AVX512BW__)  // on words, after packing: up if the low half is above 0x8000, or equal to it and the high one odd
  const U16x2 low_numbers = {0,  2,  4,  6,  8,  10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
                             32, 34, 36, 38, 40, 42, 44, 46, 48, 50, 52, 54, 56, 58, 60, 62};
  const __m512i low = _mm512_permutex2var_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(low_numbers),
                                                reinterpret_cast<__m512i>(b));
  const __m512i high = _mm512_permutex2var_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(low_numbers + 1),
                                                 reinterpret_cast<__m512i>(b));
  const __m512i one = _mm512_set1_epi16(1);
  const __m512i rest = _mm512_ternarylogic_epi32(low, high, one, kFirstOrSecondAndThird);
  const __mmask32 up = _mm512_cmpgt_epu16_mask(rest, _mm512_set1_epi16(-0x8000));
  store_vector(to, _mm512_mask_add_epi16(high, up, high, one));
#else
  const auto rounded = [](I32 x) __attribute__((always_inline)) { return shift_right(x + (((x >> 16) & 1) + 0x7fff), 16); };
  pack16(to, rounded(a), rounded(b));
#endif
}

// --- What only some instruction sets have --------------------------------

#if defined(__FMA__)
constexpr bool kHasFma = true;
#else
constexpr bool kHasFma = false;
#endif

// a * b + c with one rounding where kHasFma, otherwise with two.
FP8KV_INLINE F32 multiply_add(F32 a, F32 b, F32 c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// min(|x|, limit) for a positive limit; anything for NaN.
FP8KV_INLINE F32 limit_magnitude(F32 x, F32 limit) {
#if defined(__AVX512DQ__)
  constexpr int kSmallerMagnitudeWithoutSign = 0b1010;
  return _mm512_maskz_range_ps(0xffff, x, limit, kSmallerMagnitudeWithoutSign);
#else
  return float_of(min(bits_of(x) & 0x7fffffff, bits_of(limit)));
#endif
}

// The same with the sign of x.
FP8KV_INLINE F32 limit_both_ways(F32 x, F32 limit) {
#if defined(__AVX512DQ__)
  constexpr int kSmallerMagnitude = 0b0010;
  return _mm512_maskz_range_ps(0xffff, x, limit, kSmallerMagnitude);
#else
  return float_of(bits_of(limit_magnitude(x, limit)) | (bits_of(x) & std::int32_t{-0x7fffffff - 1}));
#endif
}

FP8KV_INLINE bool any_nan(F32 a, F32 b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_UNORD_Q)) != 0;
#else
  const I32 nan = (a != a) | (b != b);
  std::int32_t any = 0;
  for (int i = 0; i < kLanes; ++i) any |= nan[i];
  return any != 0;
#endif
}
FP8KV_INLINE bool any_nan(const F32 (&x)[4]) {
#if defined(__AVX512F__)
  return (_mm512_cmp_ps_mask(x[0], x[1], _CMP_UNORD_Q) | _mm512_cmp_ps_mask(x[2], x[3], _CMP_UNORD_Q)) != 0;
#elif defined(__AVX2__)
  const __m256 a = _mm256_cmp_ps(x[0], x[1], _CMP_UNORD_Q), b = _mm256_cmp_ps(x[2], x[3], _CMP_UNORD_Q);
  return _mm256_movemask_ps(_mm256_or_ps(a, b)) != 0;
#else
  I32 nan = {};
  for (int k = 0; k < 4; ++k) nan |= x[k] != x[k];
  std::int32_t any = 0;
  for (int i = 0; i < kLanes; ++i) any |= nan[i];
  return any != 0;
#endif
}

// Whether a byte without its sign bit is more than `limit`.
FP8KV_INLINE bool any_magnitude_above(Bytes x, std::uint8_t limit) {
  const Bytes magnitude = x & 0x7f;
#if defined(__AVX512BW__)
  return _mm512_cmpgt_epi8_mask(reinterpret_cast<__m512i>(magnitude), _mm512_set1_epi8(static_cast<char>(limit))) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_epi8(
      _mm256_cmpgt_epi8(reinterpret_cast<__m256i>(magnitude), _mm256_set1_epi8(static_cast<char>(limit))));
#else
  std::uint8_t any = 0;
  for (int i = 0; i < 4 * kLanes; ++i) any |= magnitude[i] > limit;
  return any != 0;
#endif
}

// The largest of non-negative lanes.
FP8KV_INLINE std::int16_t largest_lane(I16 x) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
  const __m256i y = _mm256_max_epi16(_mm512_maskz_extracti64x4_epi64(0xf, reinterpret_cast<__m512i>(x), 0),
                                     _mm512_maskz_extracti64x4_epi64(0xf, reinterpret_cast<__m512i>(x), 1));
#else
  const auto y = reinterpret_cast<__m256i>(x);
#endif
  const __m128i z = _mm_max_epi16(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
  // The one instruction for this finds a minimum.
  const __m128i least = _mm_minpos_epu16(_mm_xor_si128(z, _mm_set1_epi16(-1)));
  return static_cast<std::int16_t>(~_mm_cvtsi128_si32(least));
#else
  std::int16_t largest = 0;
  for (int i = 0; i < 2 * kLanes; ++i) largest = x[i] > largest ? x[i] : largest;
  return largest;
#endif
}
FP8KV_INLINE std::int32_t largest_lane(I32 x) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
  const __m256i y = _mm256_max_epi32(_mm512_maskz_extracti64x4_epi64(0xf, reinterpret_cast<__m512i>(x), 0),
                                     _mm512_maskz_extracti64x4_epi64(0xf, reinterpret_cast<__m512i>(x), 1));
#else
  const auto y = reinterpret_cast<__m256i>(x);
#endif
  __m128i z = _mm_max_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
  z = _mm_max_epi32(z, _mm_shuffle_epi32(z, 0x4e));
  z = _mm_max_epi32(z, _mm_shuffle_epi32(z, 0xb1));
  return _mm_cvtsi128_si32(z);
#else
  std::int32_t largest = 0;
  for (int i = 0; i < kLanes; ++i) largest = x[i] > largest ? x[i] : largest;
  return largest;
#endif
}

// With the processor's instructions for fp16: bytes to 16 bits, repeating the sign; fp16 to fp32 and back, where a NaN
// stays a NaN.
#if defined(__F16C__)
constexpr bool kHasHalf = true;
FP8KV_INLINE U16 widen_signed(U8 x) {
#if defined(__AVX512F__)
  return reinterpret_cast<U16>(_mm256_cvtepi8_epi16(reinterpret_cast<__m128i>(x)));
#else
  return reinterpret_cast<U16>(_mm_cvtepi8_epi16(_mm_cvtsi64_si128(reinterpret_cast<long long>(x))));
#endif
}
FP8KV_INLINE F32 widen_half(U16 x) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtph_ps(0xffff, reinterpret_cast<__m256i>(x));
#else
  return _mm256_cvtph_ps(reinterpret_cast<__m128i>(x));
#endif
}
FP8KV_INLINE U16 narrow_half(F32 x) {
#if defined(__AVX512F__)
  return reinterpret_cast<U16>(_mm512_maskz_cvtps_ph(0xffff, x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  return reinterpret_cast<U16>(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#endif
}
#else
constexpr bool kHasHalf = false;
FP8KV_INLINE U16 widen_signed(U8) { return U16{}; }
FP8KV_INLINE F32 widen_half(U16) { return F32{}; }
FP8KV_INLINE U16 narrow_half(F32) { return U16{}; }
#endif

}  // namespace fp8kv::cpu::FP8KV_ISA_NAMESPACE
