// Views: sizes, strides, and the words errors use for them.
#include <gtest/gtest.h>

#include "core/check.h"
#include "fp8kv/error.h"
#include "fp8kv/views.h"

namespace fp8kv {
namespace {

TEST(Views, ContiguousIsRowMajor) {
  float data[24];
  const TensorView view = contiguous(data, DType::Float32, {2, 3, 4});
  EXPECT_EQ(view.data, data);
  EXPECT_EQ(view.ndim, 3);
  EXPECT_EQ(view.numel(), 24);
  EXPECT_EQ(view.strides[0], 12);
  EXPECT_EQ(view.strides[1], 4);
  EXPECT_EQ(view.strides[2], 1);
}

TEST(Views, ScalarHasOneElement) {
  float data;
  const TensorView view = contiguous(&data, DType::Float32, {});
  EXPECT_EQ(view.ndim, 0);
  EXPECT_EQ(view.numel(), 1);
}

TEST(Views, EmptyDimensionCountsAsOneInStrides) {
  const TensorView view = contiguous(nullptr, DType::E4M3, {2, 0, 5});
  EXPECT_EQ(view.numel(), 0);
  EXPECT_EQ(view.strides[0], 5);
  EXPECT_EQ(view.strides[1], 5);
  EXPECT_EQ(view.strides[2], 1);
}

TEST(Views, SizesBeyond32BitsDoNotWrap) {
  const TensorView view = contiguous(nullptr, DType::E4M3, {1 << 20, 1 << 20, 4});
  EXPECT_EQ(view.numel(), std::int64_t{1} << 42);
  EXPECT_EQ(view.strides[0], std::int64_t{1} << 22);
}

TEST(Views, TooManyDimensionsKeepTheirCountOnly) {
  const TensorView view = contiguous(nullptr, DType::E4M3, {1, 2, 3, 4, 5, 6, 7, 8, 9});
  EXPECT_EQ(view.ndim, 9);
  EXPECT_EQ(shape_string(view), "[0, 0, 0, 0, 0, 0, 0, 0, ...]");
}

TEST(Views, ShapeStrings) {
  EXPECT_EQ(shape_string(contiguous(nullptr, DType::E4M3, {})), "[]");
  EXPECT_EQ(shape_string(contiguous(nullptr, DType::E4M3, {7})), "[7]");
  EXPECT_EQ(shape_string(contiguous(nullptr, DType::E4M3, {2, 0, 3})), "[2, 0, 3]");
}

TEST(Views, DeviceStrings) {
  EXPECT_EQ(device_string({}), "cpu");
  EXPECT_EQ(device_string({Device::Type::CUDA, 1}), "cuda:1");
  EXPECT_EQ(device_string({Device::Type::Other, 2}), "device:2");
}

TEST(Views, DevicesAreEqualByTypeAndIndexExceptOnTheCpu) {
  EXPECT_TRUE((Device{Device::Type::CPU, 0} == Device{Device::Type::CPU, 3}));
  EXPECT_TRUE((Device{Device::Type::CUDA, 1} == Device{Device::Type::CUDA, 1}));
  EXPECT_FALSE((Device{Device::Type::CUDA, 0} == Device{Device::Type::CUDA, 1}));
  EXPECT_FALSE((Device{Device::Type::CPU, 0} == Device{Device::Type::CUDA, 0}));
}

TEST(DTypes, NamesAndSizes) {
  struct Row {
    DType dtype;
    const char* name;
    int size;
  };
  constexpr Row kRows[] = {
      {DType::Float32, "float32", 4},
      {DType::Float16, "float16", 2},
      {DType::BFloat16, "bfloat16", 2},
      {DType::E4M3, "float8_e4m3fn", 1},
      {DType::E5M2, "float8_e5m2", 1},
      {DType::Float64, "float64", 8},
      {DType::E4M3Fnuz, "float8_e4m3fnuz", 1},
      {DType::E5M2Fnuz, "float8_e5m2fnuz", 1},
      {DType::UInt8, "uint8", 1},
      {DType::Int8, "int8", 1},
      {DType::Int16, "int16", 2},
      {DType::Int32, "int32", 4},
      {DType::Int64, "int64", 8},
      {DType::Bool, "bool", 1},
      {DType::Other, "an unsupported dtype", 0},
  };
  for (const Row& row : kRows) {
    EXPECT_STREQ(name(row.dtype), row.name);
    EXPECT_EQ(size_of(row.dtype), row.size) << row.name;
  }
}

TEST(Errors, SentenceNamesOpArgumentExpectationAndActual) {
  try {
    core::fail("some_op", "input", "be on the cpu", "cuda:0");
    FAIL() << "fail() returned";
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(), "fp8kv::some_op: input must be on the cpu, got cuda:0");
  }
}

}  // namespace
}  // namespace fp8kv
