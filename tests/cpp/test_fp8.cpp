// The scalar codec against the definitions of the formats. Expected values come from an oracle of its own, in double.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <thread>
#include <vector>

#include "fp8kv/fp8.h"

#if defined(FP8KV_TEST_HAVE_CUDA_FP8)
#include <cuda_fp8.h>
#endif

namespace fp8kv {
namespace {

// --- At compile time --------------------------------

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

static_assert(encode<E4M3>(1.0f).bits == 0x38);
static_assert(encode<E4M3>(-448.0f).bits == 0xFE);
static_assert(encode<E4M3>(kInf).bits == 0x7E);
static_assert(encode<E4M3>(kNaN).bits == 0x7F);
static_assert(encode<E4M3>(-kNaN).bits == 0x7F);
static_assert(encode<E4M3>(-0.0f).bits == 0x80);
static_assert(encode<E5M2>(1.0f).bits == 0x3C);
static_assert(encode<E5M2>(kInf).bits == 0x7B);
static_assert(encode<E5M2>(-kInf).bits == 0xFB);
static_assert(encode<E5M2>(kNaN).bits == 0x7F);
static_assert(decode(E4M3{0x38}) == 1.0f);
static_assert(decode(E5M2{0x3C}) == 1.0f);
static_assert(decode(BFloat16{0x3f80}) == 1.0f);
static_assert(decode(Half{0x3c00}) == 1.0f);
// Where the product with the rounded reciprocal gives another byte than the division.
static_assert(quantize<E4M3>(13 * 0x1p-13f, std::bit_cast<float>(0x3fcfffffu)).bits == 0x01);
static_assert(encode<E4M3>(13 * 0x1p-13f * (1.0f / std::bit_cast<float>(0x3fcfffffu))).bits == 0x00);
static_assert(dequantize<float>(E4M3{0x38}, 3.0f) == 3.0f);
static_assert(kMinScale<E4M3> == 1.0f / 229376.0f);
static_assert(encode<Int8>(-1.5f).bits == 0xFE && encode<Int8>(2.5f).bits == 0x02 && encode<Int8>(-0.0f).bits == 0x00);
static_assert(encode<Int8>(kInf).bits == 0x7F && encode<Int8>(-kInf).bits == 0x81 && encode<Int8>(kNaN).bits == 0x00);
static_assert(decode(Int8{0x80}) == -128.0f && decode(Int8{0x81}) == -127.0f && decode(Int8{0x7F}) == 127.0f);
static_assert(dequantize<float>(Int8{0xFF}, 0.5f) == -0.5f);
static_assert(kMinScale<Int8> == 1.0f / 65024.0f);
static_assert(kMinScale<E5M2> == 1.0f / 29360128.0f);

// --- The oracle: a format from its parameters --------------------------------

struct Definition {
  int exponent_bits, mantissa_bits, bias;
  int codes;  // positive finite values, 0 included

  double value(int code) const {
    const int exponent = code >> mantissa_bits, mantissa = code & ((1 << mantissa_bits) - 1);
    if (exponent == 0) return std::ldexp(mantissa, 1 - bias - mantissa_bits);
    return std::ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits);
  }
};

constexpr Definition kE4M3{4, 3, 7, 0x7F};
constexpr Definition kE5M2{5, 2, 15, 0x7C};
constexpr Definition kHalf{5, 10, 15, 0x7C00};
constexpr Definition kBFloat16{8, 7, 127, 0x7F80};

template <class Fp8>
constexpr const Definition& definition() {
  if constexpr (std::is_same_v<Fp8, E4M3>) return kE4M3;
  if constexpr (std::is_same_v<Fp8, E5M2>) return kE5M2;
  if constexpr (std::is_same_v<Fp8, Half>) return kHalf;
  if constexpr (std::is_same_v<Fp8, BFloat16>) return kBFloat16;
}

// Between code i and code i + 1.
std::vector<double> midpoints(const Definition& d) {
  std::vector<double> points;
  for (int code = 0; code + 1 < d.codes; ++code) points.push_back((d.value(code) + d.value(code + 1)) / 2);
  return points;
}

// A place in a sorted list of midpoints, which moves on as x grows.
class Cursor {
 public:
  Cursor(const std::vector<double>& points, double first)
      : points_(points), code_(static_cast<int>(std::lower_bound(points.begin(), points.end(), first) - points.begin())) {}

  int code(double x) {
    const int count = static_cast<int>(points_.size());
    while (code_ < count && x > points_[code_]) ++code_;
    return code_ < count && x == points_[code_] && code_ % 2 == 1 ? code_ + 1 : code_;
  }

 private:
  const std::vector<double>& points_;
  int code_;
};

float float_of(std::uint32_t bits) { return std::bit_cast<float>(bits); }
std::uint32_t bits_of(float x) { return std::bit_cast<std::uint32_t>(x); }

// --- FP8 --------------------------------

template <class Fp8>
class Fp8Codec : public testing::Test {};

struct Fp8Names {
  template <class T>
  static std::string GetName(int) {
    return std::is_same_v<T, E4M3> ? "e4m3" : "e5m2";
  }
};

using Fp8Types = testing::Types<E4M3, E5M2>;
TYPED_TEST_SUITE(Fp8Codec, Fp8Types, Fp8Names);

TYPED_TEST(Fp8Codec, DecodesEveryByteAsTheFormatDefines) {
  const Definition& d = definition<TypeParam>();
  for (int byte = 0; byte < 256; ++byte) {
    const int code = byte & 0x7f;
    const float value = decode(TypeParam{static_cast<std::uint8_t>(byte)});
    if (code < d.codes) {
      EXPECT_EQ(value, byte & 0x80 ? -d.value(code) : d.value(code)) << byte;
      EXPECT_EQ(std::signbit(value), byte >= 0x80) << byte;
    } else if (std::is_same_v<TypeParam, E5M2> && code == 0x7C) {
      EXPECT_EQ(value, byte & 0x80 ? -kInf : kInf);
    } else {
      EXPECT_EQ(bits_of(value), 0x7fc00000u) << byte;
    }
  }
}

TYPED_TEST(Fp8Codec, FiniteBytesSurviveARoundTrip) {
  for (int byte = 0; byte < 256; ++byte) {
    if ((byte & 0x7f) >= definition<TypeParam>().codes) continue;
    EXPECT_EQ(encode<TypeParam>(decode(TypeParam{static_cast<std::uint8_t>(byte)})).bits, byte);
  }
}

TYPED_TEST(Fp8Codec, TraitsAgreeWithTheFormat) {
  using Traits = Fp8Traits<TypeParam>;
  const Definition& d = definition<TypeParam>();
  EXPECT_EQ(Traits::kMax, d.value(d.codes - 1));
  EXPECT_EQ(Traits::kMaxBits, d.codes - 1);
  EXPECT_EQ(Traits::kMantissaBits, d.mantissa_bits);
  EXPECT_EQ(Traits::kExponentBias, d.bias);
  EXPECT_EQ(kMinScale<TypeParam>, static_cast<float>(1.0 / (512.0 * d.value(d.codes - 1))));
}

// The first wrong input in [begin, end), as the bits of a non-negative fp32; `end` when there is none. Both signs.
template <class Fp8>
std::uint32_t first_mistake(std::uint32_t begin, std::uint32_t end) {
  const std::vector<double> points = midpoints(definition<Fp8>());
  constexpr std::uint32_t kInfBits = 0x7f800000u;
  Cursor cursor(points, float_of(begin));
  for (std::uint32_t bits = begin; bits < std::min(end, kInfBits); ++bits) {
    const int code = cursor.code(float_of(bits));
    if (encode<Fp8>(float_of(bits)).bits != code) return bits;
    if (encode<Fp8>(float_of(bits | 0x80000000u)).bits != (code | 0x80)) return bits;
  }
  const int largest = definition<Fp8>().codes - 1;
  for (std::uint32_t bits = std::max(begin, kInfBits); bits < end; ++bits) {
    const int positive = bits == kInfBits ? largest : 0x7F, negative = bits == kInfBits ? largest | 0x80 : 0x7F;
    if (encode<Fp8>(float_of(bits)).bits != positive) return bits;
    if (encode<Fp8>(float_of(bits | 0x80000000u)).bits != negative) return bits;
  }
  return end;
}

TYPED_TEST(Fp8Codec, EncodesEveryFp32AsTheNearestValueWithTiesToEven) {
  constexpr std::uint32_t kHalfway = 0x3b000000u;  // where the two halves take about the same time
  std::uint32_t low = 0;
  std::thread other([&] { low = first_mistake<TypeParam>(0, kHalfway); });
  const std::uint32_t high = first_mistake<TypeParam>(kHalfway, 0x80000000u);
  other.join();
  EXPECT_EQ(low, kHalfway) << "wrong for +-" << float_of(low);
  EXPECT_EQ(high, 0x80000000u) << "wrong for +-" << float_of(high);
}

// --- INT8 --------------------------------

TEST(Int8Codec, DecodesEveryByteAsTwosComplement) {
  for (int byte = 0; byte < 256; ++byte)
    EXPECT_EQ(decode(Int8{static_cast<std::uint8_t>(byte)}), byte < 128 ? byte : byte - 256);
}

TEST(Int8Codec, EncodesTheNearestIntegerWithTiesToEven) {
  std::uint64_t mistakes = 0;
  const auto check = [&](std::uint32_t bits) {
    const float x = float_of(bits);
    const double rounded = std::nearbyint(double{x});  // the default rounding
    const int expected = std::isnan(x) ? 0 : rounded > 127 ? 127 : static_cast<int>(rounded);
    mistakes += encode<Int8>(x).bits != expected;
    mistakes += encode<Int8>(float_of(bits | 0x80000000u)).bits != static_cast<std::uint8_t>(-expected);
  };
  for (std::uint32_t bits = 0; bits < 0x80000000u; bits += 61) check(bits);
  for (int i = 1; i < 300; ++i)  // integers and ties
    for (std::uint32_t near = 0; near < 9; ++near) check(bits_of(0.5f * static_cast<float>(i)) + near - 4);
  EXPECT_EQ(mistakes, 0u);
}

#if defined(FP8KV_TEST_HAVE_CUDA_FP8)
TYPED_TEST(Fp8Codec, AgreesWithCudaOnTheHost) {
  constexpr auto kKind = std::is_same_v<TypeParam, E4M3> ? __NV_E4M3 : __NV_E5M2;
  std::uint64_t mistakes = 0;
  for (std::uint64_t bits = 0; bits < (std::uint64_t{1} << 32); bits += 11) {
    const float x = float_of(static_cast<std::uint32_t>(bits));
    if (is_nan(x)) continue;  // CUDA's choice of a NaN byte is its own
    mistakes += encode<TypeParam>(x).bits != __nv_cvt_float_to_fp8(x, __NV_SATFINITE, kKind);
  }
  EXPECT_EQ(mistakes, 0u);
}
#endif

// --- fp16 and bf16 --------------------------------

template <class T>
class RealCodec : public testing::Test {};

struct RealNames {
  template <class T>
  static std::string GetName(int) {
    return name(DTypeOf<T>::value);
  }
};

using RealTypes = testing::Types<Half, BFloat16>;
TYPED_TEST_SUITE(RealCodec, RealTypes, RealNames);

TYPED_TEST(RealCodec, DecodesEveryPatternAsTheFormatDefines) {
  const Definition& d = definition<TypeParam>();
  for (int pattern = 0; pattern < 65536; ++pattern) {
    const int code = pattern & 0x7fff;
    const float value = decode(TypeParam{static_cast<std::uint16_t>(pattern)});
    EXPECT_EQ(std::signbit(value), pattern >= 0x8000) << pattern;
    if (code > d.codes) {
      EXPECT_TRUE(std::isnan(value)) << pattern;
    } else {
      EXPECT_EQ(std::fabs(value), code == d.codes ? kInf : d.value(code)) << pattern;
    }
  }
}

TYPED_TEST(RealCodec, EveryPatternSurvivesARoundTripExceptThatNaNsBecomeOne) {
  const int nan = std::is_same_v<TypeParam, Half> ? 0x7e00 : 0x7fc0;
  for (int pattern = 0; pattern < 65536; ++pattern) {
    const bool is_number = (pattern & 0x7fff) <= definition<TypeParam>().codes;
    const float value = decode(TypeParam{static_cast<std::uint16_t>(pattern)});
    EXPECT_EQ(from_float<TypeParam>(value).bits, is_number ? pattern : nan);
  }
}

TYPED_TEST(RealCodec, RoundsEveryBoundaryToNearestEven) {
  const Definition& d = definition<TypeParam>();
  for (int code = 0; code < d.codes; ++code) {
    // The step beyond the largest finite value leads to infinity, as if there were one more exponent.
    const double next = code + 1 < d.codes ? d.value(code + 1) : 2 * d.value(code) - d.value(code - 1);
    const double midpoint = (d.value(code) + next) / 2;
    const float at = static_cast<float>(midpoint);
    ASSERT_EQ(at, midpoint) << code;  // fp32 holds all of them exactly
    for (int sign : {0, 0x8000}) {
      const float s = sign ? -1.0f : 1.0f;
      EXPECT_EQ(from_float<TypeParam>(s * at).bits, sign | (code + code % 2)) << code;
      EXPECT_EQ(from_float<TypeParam>(s * std::nextafter(at, 0.0f)).bits, sign | code) << code;
      EXPECT_EQ(from_float<TypeParam>(s * std::nextafter(at, kInf)).bits, sign | (code + 1)) << code;
    }
  }
}

TYPED_TEST(RealCodec, RoundsEveryFp32BetweenItsNeighbours) {
  const std::vector<double> points = midpoints(definition<TypeParam>());
  Cursor cursor(points, 0.0);
  const double overflow = definition<TypeParam>().value(definition<TypeParam>().codes - 1) + points.back() -
                          definition<TypeParam>().value(definition<TypeParam>().codes - 2);
  std::uint64_t mistakes = 0;
  for (std::uint32_t bits = 0; bits < 0x7f800000u; bits += 61) {
    const double x = float_of(bits);
    const int code = x >= overflow ? definition<TypeParam>().codes : cursor.code(x);
    mistakes += from_float<TypeParam>(float_of(bits)).bits != code;
  }
  EXPECT_EQ(mistakes, 0u);
}

TEST(FloatCodec, KeepsEverythingButTheNaNPattern) {
  EXPECT_EQ(bits_of(from_float<float>(-0.0f)), 0x80000000u);
  EXPECT_EQ(bits_of(from_float<float>(float_of(1))), 1u);
  EXPECT_EQ(bits_of(from_float<float>(-kInf)), 0xff800000u);
  EXPECT_EQ(bits_of(from_float<float>(float_of(0xffc12345u))), 0x7fc00000u);
}

// --- The rules --------------------------------

TEST(Rules, QuantizeSpecialScales) {
  EXPECT_EQ(quantize<E4M3>(1.0f, 0.0f).bits, 0x7E);
  EXPECT_EQ(quantize<E4M3>(-1.0f, 0.0f).bits, 0xFE);
  EXPECT_EQ(quantize<E4M3>(0.0f, 0.0f).bits, 0x7F);
  EXPECT_EQ(quantize<E4M3>(1.0f, kInf).bits, 0x00);
  EXPECT_EQ(quantize<E4M3>(-1.0f, kInf).bits, 0x80);
  EXPECT_EQ(quantize<E4M3>(kInf, kInf).bits, 0x7F);
  EXPECT_EQ(quantize<E4M3>(1.0f, -1.0f).bits, 0xB8);
  EXPECT_EQ(quantize<E4M3>(1.0f, kNaN).bits, 0x7F);
  EXPECT_EQ(quantize<E5M2>(float_of(1), float_of(1)).bits, 0x3C);
  EXPECT_EQ(quantize<Int8>(1.0f, 0.0f).bits, 0x7F);
  EXPECT_EQ(quantize<Int8>(-1.0f, 0.0f).bits, 0x81);
  EXPECT_EQ(quantize<Int8>(0.0f, 0.0f).bits, 0x00);
  EXPECT_EQ(quantize<Int8>(1.0f, kInf).bits, 0x00);
  EXPECT_EQ(quantize<Int8>(kInf, kInf).bits, 0x00);
  EXPECT_EQ(quantize<Int8>(1.0f, -1.0f).bits, 0xFF);
}

TEST(Rules, DequantizeRoundsTwice) {
  // 1.125 * (1 + 2^-7 + 2^-23): the fp32 product is rounded before the output type is.
  const float scale = 1.0f + 0x1p-7f + 0x1p-23f;
  EXPECT_EQ(dequantize<float>(E4M3{0x39}, scale), 1.125f * scale);
  EXPECT_EQ(dequantize<BFloat16>(E4M3{0x39}, scale).bits, from_float<BFloat16>(1.125f * scale).bits);
  EXPECT_EQ(dequantize<Half>(E5M2{0x7C}, 1.0f).bits, 0x7c00);
  EXPECT_EQ(dequantize<Half>(E5M2{0xFC}, 0.0f).bits, 0x7e00);
  EXPECT_EQ(dequantize<BFloat16>(E4M3{0xFF}, 1.0f).bits, 0x7fc0);
}

TEST(Rules, DynamicScaleIsBoundedOnBothSides) {
  EXPECT_EQ(dynamic_scale<E4M3>(448.0f, kInf), 1.0f);
  EXPECT_EQ(dynamic_scale<E4M3>(0.0f, kInf), kMinScale<E4M3>);
  EXPECT_EQ(dynamic_scale<E4M3>(896.0f, 448.0f), 1.0f);
  EXPECT_EQ(dynamic_scale<E4M3>(448.0f, 896.0f), 1.0f);
  EXPECT_EQ(dynamic_scale<E4M3>(448.0f, kNaN), 1.0f);
  EXPECT_EQ(dynamic_scale<E4M3>(448.0f, -1.0f), kMinScale<E4M3>);
  EXPECT_EQ(dynamic_scale<E5M2>(57344.0f, kInf), 1.0f);
  EXPECT_EQ(dynamic_scale<Int8>(254.0f, kInf), 2.0f);
  EXPECT_EQ(dynamic_scale<Int8>(0.0f, kInf), kMinScale<Int8>);
  EXPECT_EQ(dynamic_scale<E5M2>(0.0f, kInf), kMinScale<E5M2>);
}

}  // namespace
}  // namespace fp8kv
