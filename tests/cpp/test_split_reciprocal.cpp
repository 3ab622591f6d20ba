// The quotient by a split reciprocal against the division, on the host.
//
// Before its last rounding the split quotient is x / s but for less than 2^-44 of it. So where the two round to different sides
// of a boundary, x / s is that close to the middle between the boundary and an fp32 neighbor. With s as an integer S of 24
// bits, the boundary as an integer M of e + 1 bits, and the integer r = x - M * S, |r| * 2^(24 - e) is within 32 of S. As e is
// at most 7, S is within 32 of a multiple of 2^17. All those are tried here, and a sample of the others; all others, on the
// device, in test_cuda_scale.cu.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <type_traits>
#include <vector>

#include "core/split_reciprocal.h"

namespace fp8kv {
namespace {

float float_of(std::uint32_t bits) { return std::bit_cast<float>(bits); }
std::uint32_t bits_of(float x) { return std::bit_cast<std::uint32_t>(x); }

// As QuantizeOp of device/convert.cuh and Reciprocal of cpu/kernels/elementwise.h.
struct Split {
  float hi, lo;

  explicit Split(float scale) {
    const float nearest = 1.0f / scale;
    const bool below = std::fma(-nearest, scale, 1.0f) > 0.0f;
    hi = below ? nearest : float_of(bits_of(nearest) - 1u);
    lo = std::fma(-hi, scale, 1.0f) * hi;
  }
  float quotient(float x) const { return std::fma(x, hi, x * lo); }
};

// The boundaries of INT8; of FP8 those of a binade and, with them, the values between them.
template <class Fp8>
std::vector<float> boundaries() {
  std::vector<float> all;
  if constexpr (std::is_same_v<Fp8, Int8>) {
    for (int i = 0; i < 127; ++i) all.push_back(static_cast<float>(i) + 0.5f);
  } else {
    for (int i = 16; i < 32; ++i) all.push_back(static_cast<float>(i) / 16);
  }
  return all;
}

// Whether all quotients beside boundaries have the byte of the division.
template <class Fp8>
bool splits_right(float scale, int steps) {
  static const std::vector<float> all = boundaries<Fp8>();
  const Split split(scale);
  return std::ranges::all_of(all, [&](float boundary) {
    for (int step = -steps; step <= steps; ++step) {
      const float x = float_of(bits_of(boundary * scale) + step);
      if (encode<Fp8>(split.quotient(x)).bits != encode<Fp8>(x / scale).bits) return false;
    }
    return true;
  });
}

// Significands, as the bits of scales in [1, 2), that are near a multiple of 2^17.
std::vector<std::uint32_t> suspects() {
  std::vector<std::uint32_t> all;
  for (std::uint32_t multiple = 0; multiple < 64; ++multiple)
    for (std::uint32_t near = 0; near <= 64; ++near) all.push_back(0x3f800000u | ((multiple << 17) + near - 32) % 0x800000u);
  return all;
}

template <class Fp8>
class SplitReciprocal : public testing::Test {};
struct Names {
  template <class T>
  static std::string GetName(int) {
    return name(DTypeOf<T>::value);
  }
};
using Formats = testing::Types<E4M3, E5M2, Int8>;
TYPED_TEST_SUITE(SplitReciprocal, Formats, Names);

TYPED_TEST(SplitReciprocal, GivesTheBytesOfTheDivisionBesideBoundaries) {
  for (std::uint32_t bits : suspects()) {
    if (core::splits_wrong<TypeParam>(bits)) continue;
    for (float power : {1.0f, 0x1p-126f, 0x1p-60f, 0x1p60f, 0x1p95f})
      EXPECT_TRUE(splits_right<TypeParam>(float_of(bits) * power, 3)) << std::hex << bits << " * " << power;
  }
}

TYPED_TEST(SplitReciprocal, GivesTheBytesOfTheDivisionForAnySignificand) {
  int mistakes = 0;
  for (std::uint32_t bits = 0x3f800000u; bits < 0x40000000u; bits += 61)
    mistakes += !core::splits_wrong<TypeParam>(bits) && !splits_right<TypeParam>(float_of(bits), 1);
  EXPECT_EQ(mistakes, 0);
}

TEST(SplitReciprocalOfInt8, IsWrongForNineSignificands) {
  std::vector<std::uint32_t> wrong;
  for (std::uint32_t bits : suspects())
    if (!splits_right<Int8>(float_of(bits), 3)) wrong.push_back((bits & 0x7fffffu) | 0x800000u);
  std::ranges::sort(wrong);
  EXPECT_EQ(wrong, (std::vector<std::uint32_t>{0x91ffffu, 0xa3fffeu, 0xc3fffeu, 0xc7fffeu, 0xdffffdu, 0xebfffdu, 0xec0002u,
                                               0xf7fffdu, 0xffffffu}));
}

}  // namespace
}  // namespace fp8kv
