// The lists of element types, and the way from a DType to a C++ type.
#include <gtest/gtest.h>

#include <algorithm>
#include <set>
#include <string>
#include <type_traits>
#include <vector>

#include "core/dispatch.h"
#include "core/formats.h"
#include "support.h"

namespace fp8kv::core {
namespace {

using testing_support::error_of;

constexpr DType kAll[] = {DType::Float32, DType::Float16,  DType::BFloat16, DType::E4M3,  DType::E5M2,
                          DType::Float64, DType::E4M3Fnuz, DType::E5M2Fnuz, DType::UInt8, DType::Int8,
                          DType::Int16,   DType::Int32,    DType::Int64,    DType::Bool,  DType::Other};

TEST(Formats, PlacesInTheLists) {
  struct Row {
    DType dtype;
    int real, quantized;
  };
  constexpr Row kListed[] = {{DType::Float32, 0, -1}, {DType::Float16, 1, -1}, {DType::BFloat16, 2, -1},
                             {DType::E4M3, -1, 0},    {DType::E5M2, -1, 1},    {DType::Int8, -1, 2}};
  for (DType dtype : kAll) {
    const auto* row = std::find_if(std::begin(kListed), std::end(kListed), [=](const Row& r) { return r.dtype == dtype; });
    const Row expected = row == std::end(kListed) ? Row{dtype, -1, -1} : *row;
    EXPECT_EQ(real_index(dtype), expected.real) << name(dtype);
    EXPECT_EQ(quantized_index(dtype), expected.quantized) << name(dtype);
    EXPECT_EQ(is_real(dtype), expected.real >= 0) << name(dtype);
    EXPECT_EQ(is_quantized(dtype), expected.quantized >= 0) << name(dtype);
    EXPECT_EQ(is_fp8(dtype), dtype == DType::E4M3 || dtype == DType::E5M2) << name(dtype);
  }
}

TEST(Formats, NamesInSentences) {
  EXPECT_EQ(names_of(TypeList<>{}), "");
  EXPECT_EQ(names_of(TypeList<float>{}), "float32");
  EXPECT_EQ(names_of(QuantizedTypes{}), "float8_e4m3fn, float8_e5m2 or int8");
  EXPECT_EQ(names_of(RealTypes{}), "float32, float16 or bfloat16");
}

TEST(Formats, VisitCallsWithTheTypeOfTheDType) {
  for (DType dtype : {DType::Float32, DType::Float16, DType::BFloat16}) {
    int calls = 0;
    visit_real(dtype, [&]<class T>(Type<T>) {
      ++calls;
      EXPECT_EQ(DTypeOf<T>::value, dtype);
    });
    EXPECT_EQ(calls, 1) << name(dtype);
  }
  for (DType dtype : {DType::E4M3, DType::E5M2, DType::Int8}) {
    int calls = 0;
    const auto count = [&]<class T>(Type<T>) {
      ++calls;
      EXPECT_EQ(DTypeOf<T>::value, dtype);
    };
    visit_quantized(dtype, count);
    if (is_fp8(dtype)) visit_fp8(dtype, count);
    EXPECT_EQ(calls, is_fp8(dtype) ? 2 : 1) << name(dtype);
  }
}

TEST(Formats, VisitThrowsForTypesThatAreNotInTheList) {
  const auto expected = [](DType dtype) { return std::string("fp8kv: no kernel for elements of ") + name(dtype); };
  const auto never = [](auto) { FAIL() << "called"; };
  for (DType dtype : kAll) {
    EXPECT_EQ(error_of([&] { visit(TypeList<>{}, dtype, never); }), expected(dtype));
    if (!is_real(dtype)) {
      EXPECT_EQ(error_of([&] { visit_real(dtype, never); }), expected(dtype));
    }
    if (!is_quantized(dtype)) {
      EXPECT_EQ(error_of([&] { visit_quantized(dtype, never); }), expected(dtype));
    }
    if (!is_fp8(dtype)) {
      EXPECT_EQ(error_of([&] { visit_fp8(dtype, never); }), expected(dtype));
    }
    if (!is_quantized(dtype)) {
      EXPECT_EQ(error_of([&] { min_scale(dtype); }), expected(dtype));
    }
  }
}

TEST(Formats, SmallestScales) {
  EXPECT_EQ(min_scale(DType::E4M3), 1.0f / (448.0f * 512.0f));
  EXPECT_EQ(min_scale(DType::E5M2), 1.0f / (57344.0f * 512.0f));
  EXPECT_EQ(min_scale(DType::Int8), 1.0f / (127.0f * 512.0f));
}

TEST(Formats, NamesOfCacheFormats) {
  const std::pair<const char*, DType> kExpected[] = {
      {"float16", DType::Float16}, {"bfloat16", DType::BFloat16}, {"float32", DType::Float32}, {"fp8", DType::E4M3},
      {"fp8_e4m3", DType::E4M3},   {"fp8_e5m2", DType::E5M2},     {"int8", DType::Int8},
  };
  ASSERT_EQ(std::size(kCacheFormats), std::size(kExpected));
  for (std::size_t i = 0; i < std::size(kExpected); ++i) {
    EXPECT_EQ(kCacheFormats[i].name, kExpected[i].first);
    EXPECT_EQ(kCacheFormats[i].dtype, kExpected[i].second) << kExpected[i].first;
  }
}

TEST(Formats, MessagesCallACacheFormatByItsFirstName) {
  EXPECT_EQ(cache_format_name(DType::E4M3), "fp8");
  EXPECT_EQ(cache_format_name(DType::E5M2), "fp8_e5m2");
  EXPECT_EQ(cache_format_name(DType::BFloat16), "bfloat16");
  EXPECT_EQ(cache_format_name(DType::UInt8), "uint8") << "not a format";
}

TEST(Formats, EveryListedTypeHasACacheFormatOfItsOwnAndNoNameIsTwice) {
  std::set<std::string_view> names;
  std::set<DType> dtypes;
  for (const CacheFormat& format : kCacheFormats) names.insert(format.name), dtypes.insert(format.dtype);
  EXPECT_EQ(names.size(), std::size(kCacheFormats));
  for (DType dtype : kAll) EXPECT_EQ(dtypes.count(dtype) == 1, is_real(dtype) || is_quantized(dtype)) << name(dtype);
}

}  // namespace
}  // namespace fp8kv::core
