// The CPU backend, one instruction set after the other, against the scalar rules of fp8.h applied element by element. Groups
// are found here from their definition (docs/numerics.md), not from a Layout.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "cpu_support.h"
#include "fp8kv/fp8.h"
#include "fp8kv/quantize.h"
#include "fp8kv/runtime.h"

namespace fp8kv {
namespace {

using namespace testing_support;

// --- The reference --------------------------------

struct Grouping {
  Sizes input;
  Sizes scale;
  std::optional<GroupShape> group_shape;

  // The number, in row-major order of the scale, of the group of element `i` in row-major order of the input.
  std::int64_t group(std::int64_t i) const {
    if (group_shape) {
      const std::int64_t columns = input.empty() ? 1 : input.back();
      const std::int64_t rows = group_shape->rows == -1 ? product(input) : group_shape->rows;
      const std::int64_t cols = group_shape->cols == -1 ? columns : group_shape->cols;
      return i / columns / rows * ((columns + cols - 1) / cols) + i % columns / cols;
    }
    if (product(scale) == 1) return 0;
    std::int64_t index = 0, stride = 1;
    for (int d = static_cast<int>(input.size()) - 1; d >= 0; --d) {
      index += i % input[d] / (input[d] / scale[d]) * stride;
      stride *= scale[d];
      i /= input[d];
    }
    return index;
  }
};

void reference_quantize(Tensor& result, Tensor& input, Tensor& scale, const Grouping& grouping) {
  for (std::int64_t i = 0; i < input.numel(); ++i) {
    const float x = input.get_real(i), s = scale.get<float>(grouping.group(i));
    result.quantize(i, x, s);
  }
}

void reference_dequantize(Tensor& result, Tensor& input, Tensor& scale, const Grouping& grouping) {
  for (std::int64_t i = 0; i < input.numel(); ++i) result.set_real(i, input.get_real(i) * scale.get<float>(grouping.group(i)));
}

void reference_amax(Tensor& amax, Tensor& input, const Grouping& grouping) {
  for (std::int64_t i = 0; i < input.numel(); ++i) {
    const float x = input.get_real(i);
    const auto bits = is_finite(x) ? std::bit_cast<std::int32_t>(x) & 0x7fffffff : 0;
    const std::int64_t group = grouping.group(i);
    amax.set(group, std::max(amax.get<std::int32_t>(group), bits));
  }
}

void reference_dynamic_scales(Tensor& scale, Tensor& input, const Grouping& grouping, DType fp8, float upper_bound) {
  for (std::int64_t g = 0; g < scale.numel(); ++g) scale.set(g, 0.0f);
  reference_amax(scale, input, grouping);
  for (std::int64_t g = 0; g < scale.numel(); ++g) {
    const float amax = scale.get<float>(g);
    scale.set(g, dynamic_scale_of(fp8, amax, upper_bound));
  }
}

// --- Every instruction set --------------------------------

INSTANTIATE_TEST_SUITE_P(, CpuIsa, testing::ValuesIn(cpu::available()), isa_name);

// --- Layouts --------------------------------

struct Case {
  const char* name;
  Sizes sizes;
  Sizes scale;
  std::optional<GroupShape> group_shape{};
  Memory input = Memory::Contiguous;
  Memory result = Memory::Contiguous;
  Memory scales = Memory::Contiguous;
};

void PrintTo(const Case& c, std::ostream* os) { *os << c.name; }

const std::vector<Case>& cases() {
  static const std::vector<Case> all = {
      {.name = "scalar", .sizes = {}, .scale = {}},
      {.name = "one", .sizes = {1}, .scale = {1}},
      {.name = "vector_7", .sizes = {7}, .scale = {1}},
      {.name = "vector_63", .sizes = {63}, .scale = {1}},
      {.name = "vector_65", .sizes = {65}, .scale = {1}},
      {.name = "vector_1000", .sizes = {1000}, .scale = {}},
      {.name = "per_tensor_3d", .sizes = {3, 5, 37}, .scale = {1}},
      {.name = "per_tensor_long", .sizes = {3, 70001}, .scale = {1}},
      {.name = "per_tensor_padded", .sizes = {9, 45}, .scale = {1}, .input = Memory::Padded, .result = Memory::Padded},
      {.name = "per_tensor_sparse_input", .sizes = {9, 1045}, .scale = {1}, .input = Memory::Sparse},
      {.name = "per_tensor_sparse_result", .sizes = {9, 1045}, .scale = {1}, .result = Memory::Sparse},
      {.name = "per_tensor_transposed", .sizes = {33, 45}, .scale = {1}, .input = Memory::Reversed},
      {.name = "per_tensor_transposed_both",
       .sizes = {33, 45},
       .scale = {1},
       .input = Memory::Reversed,
       .result = Memory::Reversed},
      {.name = "per_token", .sizes = {13, 101}, .scale = {13}, .group_shape = GroupShape{1, -1}},
      {.name = "per_token_column_of_scales", .sizes = {13, 96}, .scale = {13, 1}, .group_shape = GroupShape{1, -1}},
      {.name = "per_token_3d", .sizes = {3, 4, 64}, .scale = {3, 4, 1}, .group_shape = GroupShape{1, -1}},
      {.name = "per_token_short", .sizes = {300, 3}, .scale = {300}, .group_shape = GroupShape{1, -1}},
      {.name = "per_token_strided_scales",
       .sizes = {13, 64},
       .scale = {13},
       .group_shape = GroupShape{1, -1},
       .input = Memory::Padded,
       .scales = Memory::Sparse},
      {.name = "per_token_transposed",
       .sizes = {40, 30},
       .scale = {40},
       .group_shape = GroupShape{1, -1},
       .input = Memory::Reversed,
       .result = Memory::Reversed},
      {.name = "per_token_long", .sizes = {2, 66000}, .scale = {2}, .group_shape = GroupShape{1, -1}},
      {.name = "per_token_beyond_the_cache", .sizes = {2, 140000}, .scale = {2}, .group_shape = GroupShape{1, -1}},
      {.name = "per_channel", .sizes = {17, 101}, .scale = {101}, .group_shape = GroupShape{-1, 1}},
      {.name = "per_channel_3d", .sizes = {3, 4, 160}, .scale = {1, 160}, .group_shape = GroupShape{-1, 1}},
      {.name = "per_channel_wide", .sizes = {3, 5003}, .scale = {5003}, .group_shape = GroupShape{-1, 1}},
      {.name = "per_channel_narrow", .sizes = {700, 5}, .scale = {5}, .group_shape = GroupShape{-1, 1}},
      {.name = "per_channel_strided_scales",
       .sizes = {17, 801},
       .scale = {801},
       .group_shape = GroupShape{-1, 1},
       .scales = Memory::Sparse},
      {.name = "per_channel_sparse",
       .sizes = {5, 1301},
       .scale = {1301},
       .group_shape = GroupShape{-1, 1},
       .input = Memory::Sparse,
       .result = Memory::Sparse},
      {.name = "per_channel_transposed",
       .sizes = {40, 30},
       .scale = {30},
       .group_shape = GroupShape{-1, 1},
       .input = Memory::Reversed,
       .result = Memory::Reversed},
      {.name = "per_head", .sizes = {11, 4 * 64}, .scale = {4}, .group_shape = GroupShape{-1, 64}},
      {.name = "per_head_odd", .sizes = {11, 4 * 36}, .scale = {1, 4}, .group_shape = GroupShape{-1, 36}},
      {.name = "per_head_ragged", .sizes = {11, 100}, .scale = {4}, .group_shape = GroupShape{-1, 32}},
      {.name = "per_head_blocks", .sizes = {7, 3, 80}, .scale = {1, 3, 1}},
      {.name = "per_head_padded",
       .sizes = {7, 3, 80},
       .scale = {1, 3, 1},
       .input = Memory::Padded,
       .result = Memory::Padded,
       .scales = Memory::Sparse},
      {.name = "per_head_transposed", .sizes = {7, 3, 80}, .scale = {1, 3, 1}, .result = Memory::Reversed},
      {.name = "blocks_1x128", .sizes = {5, 384}, .scale = {5, 3}, .group_shape = GroupShape{1, 128}},
      {.name = "blocks_1x128_ragged", .sizes = {5, 300}, .scale = {5, 3}, .group_shape = GroupShape{1, 128}},
      {.name = "blocks_1x3", .sizes = {5, 100}, .scale = {5, 34}, .group_shape = GroupShape{1, 3}},
      {.name = "blocks_1x1", .sizes = {5, 33}, .scale = {5, 33}, .group_shape = GroupShape{1, 1}},
      {.name = "blocks_32x32", .sizes = {64, 96}, .scale = {2, 3}, .group_shape = GroupShape{32, 32}},
      {.name = "blocks_32x32_ragged", .sizes = {70, 100}, .scale = {3, 4}, .group_shape = GroupShape{32, 32}},
      {.name = "blocks_3x5_ragged", .sizes = {10, 23}, .scale = {4, 5}, .group_shape = GroupShape{3, 5}},
      {.name = "blocks_3x5_sparse",
       .sizes = {10, 23},
       .scale = {4, 5},
       .group_shape = GroupShape{3, 5},
       .input = Memory::Sparse,
       .result = Memory::Padded,
       .scales = Memory::Sparse},
      {.name = "blocks_20_wide_sparse",
       .sizes = {10, 70},
       .scale = {10, 4},
       .group_shape = GroupShape{1, 20},
       .input = Memory::Sparse,
       .result = Memory::Sparse},
      {.name = "blocks_of_rows", .sizes = {10, 70}, .scale = {4}, .group_shape = GroupShape{3, -1}},
      {.name = "blocks_of_rows_across_dims", .sizes = {4, 5, 33}, .scale = {7}, .group_shape = GroupShape{3, -1}},
      {.name = "blocks_of_rows_across_strided_dims",
       .sizes = {4, 5, 33},
       .scale = {7},
       .group_shape = GroupShape{3, -1},
       .input = Memory::Padded},
      {.name = "blocks_across_strided_dims",
       .sizes = {4, 5, 33},
       .scale = {7, 5},
       .group_shape = GroupShape{3, 8},
       .input = Memory::Padded,
       .result = Memory::Sparse},
      {.name = "blocks_across_strided_dims_of_one_column",
       .sizes = {4, 5, 1},
       .scale = {7},
       .group_shape = GroupShape{3, -1},
       .input = Memory::Padded},
      {.name = "blocks_4d", .sizes = {4, 6, 10, 8}, .scale = {2, 3, 5, 2}},
      {.name = "blocks_4d_reversed", .sizes = {4, 6, 10, 8}, .scale = {2, 3, 5, 2}, .result = Memory::Reversed},
      {.name = "eight_dimensions",
       .sizes = {2, 1, 3, 2, 1, 2, 3, 5},
       .scale = {2, 1, 1, 2, 1, 1, 3, 1},
       .input = Memory::Padded},
      {.name = "no_rows", .sizes = {0, 16}, .scale = {1}},
      {.name = "no_rows_per_token", .sizes = {0, 16}, .scale = {0}, .group_shape = GroupShape{1, -1}},
      {.name = "no_rows_per_channel", .sizes = {0, 16}, .scale = {16}, .group_shape = GroupShape{-1, 1}},
      {.name = "no_columns_per_token",
       .sizes = {5, 0},
       .scale = {5},
       .group_shape = GroupShape{1, -1},
       .scales = Memory::Sparse},
  };
  return all;
}

using CaseParam = std::tuple<cpu::Isa, Case>;

class CpuQuantize : public Forced<testing::TestWithParam<CaseParam>> {
 protected:
  void SetUp() override {
    Forced::SetUp();
    cpu::force(std::get<0>(GetParam()));
  }

  const Case& layout() const { return std::get<1>(GetParam()); }
  Grouping grouping() const { return {layout().sizes, layout().scale, layout().group_shape}; }
};

std::string case_name(const testing::TestParamInfo<CaseParam>& info) {
  return std::string(cpu::name(std::get<0>(info.param))) + "_" + std::get<1>(info.param).name;
}

INSTANTIATE_TEST_SUITE_P(, CpuQuantize, testing::Combine(testing::ValuesIn(cpu::available()), testing::ValuesIn(cases())),
                         case_name);

// The op that finds amax always has a group shape.
class CpuGroupAmax : public CpuQuantize {};

std::vector<Case> cases_with_group_shape() {
  std::vector<Case> some;
  for (const Case& c : cases())
    if (c.group_shape) some.push_back(c);
  return some;
}

INSTANTIATE_TEST_SUITE_P(, CpuGroupAmax,
                         testing::Combine(testing::ValuesIn(cpu::available()), testing::ValuesIn(cases_with_group_shape())),
                         case_name);

TEST_P(CpuQuantize, Static) {
  const Case& c = layout();
  for (DType real : kReals) {
    for (DType fp8 : kQuantized) {
      SCOPED_TRACE(pair_name(real, fp8));
      Tensor input(real, c.sizes, c.input, 3), result(fp8, c.sizes, c.result, 5), scale(DType::Float32, c.scale, c.scales, 1);
      fill(input, 1);
      fill_scales(scale, 2);
      Tensor expected = result;
      reference_quantize(expected, input, scale, grouping());
      cpu::run(StaticQuantize{result.view(), input.view(), scale.view(), c.group_shape});
      EXPECT_EQ(difference(result, expected), "");
    }
  }
}

TEST_P(CpuQuantize, Dequantize) {
  const Case& c = layout();
  for (DType real : kReals) {
    for (DType fp8 : kQuantized) {
      SCOPED_TRACE(pair_name(fp8, real));
      Tensor input(fp8, c.sizes, c.input, 3), result(real, c.sizes, c.result, 5), scale(DType::Float32, c.scale, c.scales, 1);
      fill(input, 3);
      fill_scales(scale, 4);
      Tensor expected = result;
      reference_dequantize(expected, input, scale, grouping());
      cpu::run(Dequantize{result.view(), input.view(), scale.view(), c.group_shape});
      EXPECT_EQ(difference(result, expected), "");
    }
  }
}

TEST_P(CpuQuantize, Dynamic) {
  const Case& c = layout();
  for (DType real : kReals) {
    for (DType fp8 : kQuantized) {
      SCOPED_TRACE(pair_name(real, fp8));
      Tensor input(real, c.sizes, c.input, 3), result(fp8, c.sizes, c.result, 5), scale(DType::Float32, c.scale, c.scales, 1);
      fill(input, 5);
      Tensor expected = result, expected_scale = scale;
      reference_dynamic_scales(expected_scale, input, grouping(), fp8, kInf);
      reference_quantize(expected, input, expected_scale, grouping());
      cpu::run(
          DynamicQuantize{.result = result.view(), .input = input.view(), .scale = scale.view(), .group_shape = c.group_shape});
      EXPECT_EQ(difference(scale, expected_scale), "") << "scales";
      EXPECT_EQ(difference(result, expected), "");
    }
  }
}

TEST_P(CpuGroupAmax, RaisesTheRunningMaximum) {
  const Case& c = layout();
  for (DType real : kReals) {
    SCOPED_TRACE(name(real));
    Tensor input(real, c.sizes, c.input, 3), amax(DType::Float32, c.scale, c.scales, 1);
    fill(input, 6);
    fill_scales(amax, 7);  // a running maximum may be anything
    Tensor expected = amax;
    reference_amax(expected, input, grouping());
    cpu::run(GroupAmax{amax.view(), input.view(), *c.group_shape});
    EXPECT_EQ(difference(amax, expected), "");
  }
}

// --- Threads --------------------------------

INSTANTIATE_TEST_SUITE_P(, CpuThreads, testing::Combine(testing::ValuesIn(cpu::available()), testing::ValuesIn(kSpreads)),
                         spread_name);

TEST_P(CpuThreads, RangesGiveTheSameBytesAsTheWhole) {
  const cpu::ParallelFor& spread = std::get<1>(GetParam()).parallel_for;
  const Case kCases[] = {
      {.name = "per tensor", .sizes = {301, 1001}, .scale = {1}, .group_shape = GroupShape{-1, -1}},
      {.name = "per token", .sizes = {301, 1001}, .scale = {301}, .group_shape = GroupShape{1, -1}},
      {.name = "per channel", .sizes = {301, 5001}, .scale = {5001}, .group_shape = GroupShape{-1, 1}},
      {.name = "per head", .sizes = {501, 16 * 72}, .scale = {16}, .group_shape = GroupShape{-1, 72}},
      {.name = "blocks", .sizes = {301, 1001}, .scale = {10, 8}, .group_shape = GroupShape{32, 128}},
      {.name = "blocks across rows",
       .sizes = {30, 11, 1001},
       .scale = {66, 8},
       .group_shape = GroupShape{5, 128},
       .input = Memory::Padded},
  };
  for (const Case& c : kCases) {
    SCOPED_TRACE(c.name);
    const Grouping grouping{c.sizes, c.scale, c.group_shape};
    Tensor input(DType::BFloat16, c.sizes, c.input), result(DType::E4M3, c.sizes), scale(DType::Float32, c.scale);
    fill(input, 8);
    Tensor expected = result, expected_scale = scale, back(DType::Float16, c.sizes);
    reference_dynamic_scales(expected_scale, input, grouping, DType::E4M3, kInf);
    reference_quantize(expected, input, expected_scale, grouping);
    cpu::run(
        DynamicQuantize{.result = result.view(), .input = input.view(), .scale = scale.view(), .group_shape = c.group_shape},
        spread);
    EXPECT_EQ(difference(scale, expected_scale), "") << "dynamic scales";
    EXPECT_EQ(difference(result, expected), "") << "dynamic";

    Tensor again(DType::E4M3, c.sizes);
    cpu::run(StaticQuantize{again.view(), input.view(), scale.view(), c.group_shape}, spread);
    EXPECT_EQ(difference(again, expected), "") << "static";

    Tensor expected_back = back;
    reference_dequantize(expected_back, result, scale, grouping);
    cpu::run(Dequantize{back.view(), result.view(), scale.view(), c.group_shape}, spread);
    EXPECT_EQ(difference(back, expected_back), "") << "dequantize";

    Tensor amax(DType::Float32, c.scale), expected_amax(DType::Float32, c.scale);
    for (std::int64_t g = 0; g < amax.numel(); ++g) amax.set(g, 0.0f), expected_amax.set(g, 0.0f);
    reference_amax(expected_amax, input, grouping);
    cpu::run(GroupAmax{amax.view(), input.view(), *c.group_shape}, spread);
    EXPECT_EQ(difference(amax, expected_amax), "") << "amax";
  }
}

// --- Numbers --------------------------------

TEST_P(CpuIsa, QuantizesEveryPatternWithHostileScales) {
  for (DType real : kReals) {
    Tensor input = every_pattern(real, 12);
    for (DType fp8 : kQuantized) {
      for (float s : hostile_scales()) {
        Tensor result(fp8, {65536}), scale(DType::Float32, {});
        scale.set(0, s);
        Tensor expected = result;
        reference_quantize(expected, input, scale, {{65536}, {}, {}});
        cpu::run(StaticQuantize{result.view(), input.view(), scale.view()});
        ASSERT_EQ(difference(result, expected), "") << pair_name(real, fp8) << " with scale " << s;
      }
    }
  }
}

TEST_P(CpuIsa, QuantizesEveryPatternWithHostileScalesPerColumn) {
  const std::vector<float> scales = hostile_scales();
  const auto columns = static_cast<std::int64_t>(scales.size());
  for (DType real : kReals) {
    Tensor patterns = every_pattern(real, 13);
    Tensor input(real, {65536, columns}), scale(DType::Float32, {columns});
    for (std::int64_t i = 0; i < 65536 * columns; ++i) std::memcpy(input.at(i), patterns.at(i / columns), size_of(real));
    for (std::int64_t i = 0; i < columns; ++i) scale.set(i, scales[i]);
    for (DType fp8 : kQuantized) {
      Tensor result(fp8, {65536, columns});
      Tensor expected = result;
      reference_quantize(expected, input, scale, {{65536, columns}, {columns}, GroupShape{-1, 1}});
      cpu::run(StaticQuantize{result.view(), input.view(), scale.view(), GroupShape{-1, 1}});
      ASSERT_EQ(difference(result, expected), "") << pair_name(real, fp8);
    }
  }
}

// Scales and, for each, inputs whose quotients lie at and next to the boundaries between FP8 values of one binade, where a
// product with a reciprocal goes wrong. The quotients lie around 2^exponent. Those of INT8 have 8 bits.
class Boundaries {
 public:
  Boundaries(DType fp8, std::int64_t max_scales)
      : significands_(fp8 == DType::E4M3   ? 16
                      : fp8 == DType::E5M2 ? 8
                                           : 128),
        fp8_(fp8),
        input_(DType::Float32, {max_scales, significands_ * kAround}),
        scale_(DType::Float32, {max_scales}),
        result_(fp8, input_.sizes()) {}

  void set(std::int64_t row, float scale, int exponent) {
    scale_.set(row, scale);
    for (int m = 0; m < significands_; ++m) {  // values and midpoints
      const float significand = 1.0f + static_cast<float>(m) / static_cast<float>(significands_);
      const auto boundary = std::bit_cast<std::uint32_t>(std::ldexp(significand, exponent) * scale);
      for (int i = 0; i < kAround; ++i) input_.set(row * significands_ * kAround + m * kAround + i, boundary + i - kAround / 2);
    }
  }

  // The number of wrong bytes.
  std::int64_t mistakes() {
    cpu::run(StaticQuantize{result_.view(), input_.view(), scale_.view(), GroupShape{1, -1}});
    std::int64_t count = 0;
    core::visit_quantized(fp8_, [&]<class T>(core::Type<T>) { count = count_mistakes<T>(); });
    return count;
  }

 private:
  static constexpr int kAround = 5;  // inputs: the boundary, and two neighbors on each side

  template <class Fp8>
  std::int64_t count_mistakes() {
    const auto* x = reinterpret_cast<const float*>(input_.storage().data());
    const auto* s = reinterpret_cast<const float*>(scale_.storage().data());
    const auto* q = result_.storage().data();
    const std::int64_t columns = significands_ * kAround;
    std::int64_t count = 0;
    for (std::int64_t row = 0; row < scale_.numel(); ++row)
      for (std::int64_t i = row * columns; i < (row + 1) * columns; ++i) count += q[i] != quantize<Fp8>(x[i], s[row]).bits;
    return count;
  }

  int significands_;
  DType fp8_;
  Tensor input_, scale_, result_;
};

TEST_P(CpuIsa, QuantizesLikeTheDivisionForEverySignificandOfTheScale) {
  if (GetParam() == cpu::Isa::Generic) return;  // it divides
  constexpr std::uint32_t kBatch = 1 << 14;
  for (DType fp8 : {DType::E4M3, DType::E5M2}) {
    Boundaries boundaries(fp8, kBatch);
    for (std::uint32_t first = 0x3f800000u; first < 0x40000000u; first += kBatch) {
      for (std::uint32_t i = 0; i < kBatch; ++i) boundaries.set(i, float_of(first + i), 0);
      ASSERT_EQ(boundaries.mistakes(), 0) << name(fp8) << ", scales from " << float_of(first);
    }
  }
}

// Integers have too many boundaries for every significand; the split quotient goes wrong within 3 of multiples of 2^17 only.
TEST_P(CpuIsa, QuantizesToInt8LikeTheDivisionForSignificandsWhereTheSplitQuotientMayGoWrong) {
  constexpr std::int64_t kReach = 16;
  Boundaries boundaries(DType::Int8, 2 * kReach);
  for (std::uint32_t multiple = 0x3f800000u; multiple <= 0x40000000u; multiple += 0x20000u)
    for (int exponent = -1; exponent <= 6; ++exponent) {
      for (std::int64_t i = 0; i < 2 * kReach; ++i)
        boundaries.set(i, float_of(multiple + static_cast<std::uint32_t>(i - kReach)), exponent);
      ASSERT_EQ(boundaries.mistakes(), 0) << "scales around " << float_of(multiple);
    }
}

TEST_P(CpuIsa, QuantizesLikeTheDivisionForEveryExponentOfTheScale) {
  std::mt19937 random(14);
  for (DType fp8 : kQuantized) {
    const int lowest = fp8 == DType::E4M3 ? -11 : fp8 == DType::E5M2 ? -18 : -1;
    const int highest = fp8 == DType::E4M3 ? 8 : fp8 == DType::E5M2 ? 15 : 6;
    Boundaries boundaries(fp8, highest - lowest + 1);
    for (int exponent = 1; exponent < 255; ++exponent) {
      for (int repeat = 0; repeat < 8; ++repeat) {
        std::uint32_t significand = random() & 0x7fffffu;
        if (repeat % 2 == 0) significand = (significand | (fp8 == DType::Int8 ? 0x1ffffu : 0xfffffu)) - random() % 16;
        const float scale = float_of(static_cast<std::uint32_t>(exponent) << 23 | significand);
        for (int q = lowest; q <= highest; ++q) boundaries.set(q - lowest, scale, q);
        ASSERT_EQ(boundaries.mistakes(), 0) << name(fp8) << ", scale " << scale;
      }
    }
  }
}

TEST_P(CpuIsa, DequantizesEveryByteWithHostileScales) {
  for (DType fp8 : kQuantized) {
    Tensor input(fp8, {256});
    for (std::int64_t i = 0; i < 256; ++i) input.set(i, static_cast<std::uint8_t>(i));
    std::vector<float> scales = hostile_scales();
    std::mt19937 random(15);
    for (int i = 0; i < 2000; ++i) scales.push_back(float_of(random()));
    for (DType real : kReals) {
      for (float s : scales) {
        Tensor result(real, {256}), scale(DType::Float32, {1});
        scale.set(0, s);
        Tensor expected = result;
        reference_dequantize(expected, input, scale, {{256}, {1}, {}});
        cpu::run(Dequantize{result.view(), input.view(), scale.view()});
        ASSERT_EQ(difference(result, expected), "") << pair_name(fp8, real) << " with scale " << s;
      }
    }
  }
}

TEST_P(CpuIsa, DynamicScaleClipsToItsUpperBound) {
  for (float bound : {1.0f, 100.0f, 0.0f, -3.0f, kInf, kNaN}) {
    Tensor input(DType::BFloat16, {6, 64}), result(DType::E4M3, {6, 64}), scale(DType::Float32, {6}), ub(DType::Float32, {});
    fill(input, 16);
    ub.set(0, bound);
    const Grouping grouping{{6, 64}, {6}, GroupShape{1, -1}};
    Tensor expected = result, expected_scale = scale;
    reference_dynamic_scales(expected_scale, input, grouping, DType::E4M3, bound);
    reference_quantize(expected, input, expected_scale, grouping);
    cpu::run(DynamicQuantize{.result = result.view(),
                             .input = input.view(),
                             .scale = scale.view(),
                             .scale_ub = ub.view(),
                             .group_shape = grouping.group_shape});
    EXPECT_EQ(difference(scale, expected_scale), "") << bound;
    EXPECT_EQ(difference(result, expected), "") << bound;
  }
}

TEST_P(CpuIsa, GroupsWithoutFiniteElementsGetTheSmallestScale) {
  for (float value : {0.0f, kNaN, kInf, -kInf}) {
    Tensor input(DType::Float32, {3, 40}), result(DType::E5M2, {3, 40}), scale(DType::Float32, {3});
    for (std::int64_t i = 0; i < 120; ++i) input.set(i, value);
    cpu::run(DynamicQuantize{
        .result = result.view(), .input = input.view(), .scale = scale.view(), .group_shape = GroupShape{1, -1}});
    for (std::int64_t g = 0; g < 3; ++g) EXPECT_EQ(scale.get<float>(g), kMinScale<E5M2>) << value;
    const std::uint8_t expected = value != value ? 0x7F : value == 0.0f ? 0x00 : value > 0 ? 0x7B : 0xFB;
    for (std::int64_t i = 0; i < 120; ++i) ASSERT_EQ(result.get<std::uint8_t>(i), expected) << value;
  }
}

TEST_P(CpuIsa, AmaxKeepsItsRunningMaximum) {
  Tensor input(DType::Float32, {4, 8}), amax(DType::Float32, {4});
  for (std::int64_t i = 0; i < 32; ++i) input.set(i, i % 8 == 3 ? -static_cast<float>(i) : 0.5f);
  const float before[] = {0.0f, 100.0f, kNaN, kInf};
  for (int g = 0; g < 4; ++g) amax.set(g, before[g]);
  cpu::run(GroupAmax{amax.view(), input.view(), GroupShape{1, -1}});
  EXPECT_EQ(amax.get<float>(0), 3.0f);
  EXPECT_EQ(amax.get<float>(1), 100.0f);
  EXPECT_TRUE(is_nan(amax.get<float>(2)));
  EXPECT_EQ(amax.get<float>(3), kInf);
}

// --- The floating-point environment --------------------------------

#if defined(__x86_64__)
TEST_P(CpuIsa, IgnoresFlushToZeroAndRoundingOfTheThread) {
  constexpr unsigned kFlushToZero = 0x8000, kDenormalsAreZero = 0x0040, kTowardsZero = 0x6000;
  const Grouping grouping{{64, 64}, {64}, GroupShape{1, -1}};
  Tensor input(DType::Float32, {64, 64}), scale(DType::Float32, {64});
  std::mt19937 random(17);
  for (std::int64_t i = 0; i < input.numel(); ++i) input.set(i, random() & 0x80ffffffu);  // subnormals and their neighbors
  for (std::int64_t i = 0; i < 64; ++i) scale.set(i, float_of(i % 2 ? 0x00012345u : 0x01000001u));
  for (DType fp8 : kQuantized) {
    Tensor result(fp8, {64, 64}), dynamic(fp8, {64, 64}), found(DType::Float32, {64}), back(DType::Float32, {64, 64});
    Tensor expected = result, expected_dynamic = dynamic, expected_found = found, expected_back = back;
    reference_quantize(expected, input, scale, grouping);
    reference_dynamic_scales(expected_found, input, grouping, fp8, kInf);
    reference_quantize(expected_dynamic, input, expected_found, grouping);
    reference_dequantize(expected_back, expected, scale, grouping);
    unsigned after = 0;
    {
      const Mxcsr set(kFlushToZero | kDenormalsAreZero | kTowardsZero);
      cpu::run(StaticQuantize{result.view(), input.view(), scale.view(), grouping.group_shape});
      cpu::run(DynamicQuantize{
          .result = dynamic.view(), .input = input.view(), .scale = found.view(), .group_shape = grouping.group_shape});
      cpu::run(Dequantize{back.view(), result.view(), scale.view(), grouping.group_shape});
      after = _mm_getcsr();
    }
    EXPECT_EQ(after & 0xffc0u, (kFlushToZero | kDenormalsAreZero | kTowardsZero | 0x1f80u)) << "not restored";
    EXPECT_EQ(difference(result, expected), "");
    EXPECT_EQ(difference(found, expected_found), "");
    EXPECT_EQ(difference(dynamic, expected_dynamic), "");
    EXPECT_EQ(difference(back, expected_back), "");
  }
}
#endif

// --- Errors --------------------------------

TEST(CpuErrors, OtherDevicesAreRefused) {
  constexpr Device kCuda{Device::Type::CUDA, 1};
  Tensor real(DType::Float32, {8}), fp8(DType::E4M3, {8}), scale(DType::Float32, {1});
  TensorView r = real.view(), q = fp8.view(), s = scale.view();
  r.device = q.device = s.device = kCuda;
  const std::string sentence = ": input must be on the cpu, got cuda:1";
  EXPECT_EQ(error_of([&] { cpu::run(StaticQuantize{q, r, s}); }), "fp8kv::static_scaled_fp8_quant" + sentence);
  EXPECT_EQ(error_of([&] { cpu::run(DynamicQuantize{q, r, s}); }), "fp8kv::dynamic_scaled_fp8_quant" + sentence);
  EXPECT_EQ(error_of([&] { cpu::run(Dequantize{r, q, s}); }), "fp8kv::scaled_fp8_dequant" + sentence);
  EXPECT_EQ(error_of([&] { cpu::run(GroupAmax{s, r}); }), "fp8kv::group_amax" + sentence);
}

TEST(CpuErrors, NothingIsWrittenWhenTheProblemIsRefused) {
  Tensor input(DType::Float32, {8, 4}), result(DType::E4M3, {8, 4}), scale(DType::Float32, {3});
  fill(input, 18);
  const Tensor result_before = result, scale_before = scale;
  EXPECT_THROW(cpu::run(DynamicQuantize{
                   .result = result.view(), .input = input.view(), .scale = scale.view(), .group_shape = GroupShape{1, -1}}),
               Error);
  EXPECT_EQ(difference(result, result_before), "");
  EXPECT_EQ(difference(scale, scale_before), "");
}

// A scale that is left out is a null pointer, not a scale of one element.
TEST(CpuErrors, AForgottenScaleOrInputIsRefused) {
  Tensor input(DType::Float32, {8, 4}), fp8(DType::E4M3, {8, 4});
  const std::string scale = ": scale must point to memory, got a null pointer of shape []";
  StaticQuantize quantize;
  quantize.result = fp8.view(), quantize.input = input.view();
  EXPECT_EQ(error_of([&] { cpu::run(quantize); }), "fp8kv::static_scaled_fp8_quant" + scale);
  DynamicQuantize dynamic;
  dynamic.result = fp8.view(), dynamic.input = input.view();
  EXPECT_EQ(error_of([&] { cpu::run(dynamic); }), "fp8kv::dynamic_scaled_fp8_quant" + scale);
  Dequantize dequantize;
  dequantize.result = input.view(), dequantize.input = fp8.view();
  EXPECT_EQ(error_of([&] { cpu::run(dequantize); }), "fp8kv::scaled_fp8_dequant" + scale);
  GroupAmax amax;
  amax.amax = input.view();
  EXPECT_EQ(error_of([&] { cpu::run(amax); }), "fp8kv::group_amax: input must point to memory, got a null pointer of shape []");
}

}  // namespace
}  // namespace fp8kv
