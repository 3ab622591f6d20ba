// Validation of the quantization problems: every sentence, every accepted scale, and the Layout that backends work from.
// Nothing here reads or writes an element, so addresses are made up.
#include <gtest/gtest.h>

#include <sstream>
#include <string>
#include <vector>

#include "core/layout.h"
#include "problems.h"

namespace fp8kv::core {
namespace {

using namespace testing_support;

// --- Sentences --------------------------------

TEST(QuantizeErrors, InputDtype) {
  StaticQuantize p = static_problem({4, 8}, {1});
  p.input.dtype = DType::Float64;
  EXPECT_EQ(sentence(p), "fp8kv::static_scaled_fp8_quant: input must be float32, float16 or bfloat16, got float64");
  p.input.dtype = DType::Other;
  EXPECT_EQ(sentence(p),
            "fp8kv::static_scaled_fp8_quant: input must be float32, float16 or bfloat16, got an unsupported dtype");
}

TEST(QuantizeErrors, ResultDtype) {
  StaticQuantize p = static_problem({4, 8}, {1});
  p.result.dtype = DType::E4M3Fnuz;
  EXPECT_EQ(sentence(p),
            "fp8kv::static_scaled_fp8_quant: result must be float8_e4m3fn, float8_e5m2 or int8, got float8_e4m3fnuz");
  p.result.dtype = DType::UInt8;
  EXPECT_EQ(sentence(p), "fp8kv::static_scaled_fp8_quant: result must be float8_e4m3fn, float8_e5m2 or int8, got uint8");
}

TEST(QuantizeErrors, ScaleDtype) {
  StaticQuantize p = static_problem({4, 8}, {1});
  p.scale.dtype = DType::BFloat16;
  EXPECT_EQ(sentence(p), "fp8kv::static_scaled_fp8_quant: scale must be float32, got bfloat16");
}

TEST(QuantizeErrors, DequantizeDtypes) {
  Dequantize p = dequantize_problem({4, 8}, {1});
  EXPECT_EQ(sentence(p), "");
  p.input.dtype = DType::Int16;
  EXPECT_EQ(sentence(p), "fp8kv::scaled_fp8_dequant: input must be float8_e4m3fn, float8_e5m2 or int8, got int16");
  p.input.dtype = DType::Int8;
  EXPECT_EQ(sentence(p), "");
  p.input.dtype = DType::E4M3;
  p.result.dtype = DType::Int32;
  EXPECT_EQ(sentence(p), "fp8kv::scaled_fp8_dequant: result must be float32, float16 or bfloat16, got int32");
}

TEST(QuantizeErrors, Int8IsForBothDevices) {
  for (Device device : {Device{}, kCuda}) {
    StaticQuantize s = static_problem({4, 8}, {1});
    s.result.dtype = DType::Int8;
    for (TensorView* v : {&s.result, &s.input, &s.scale}) v->device = device;
    EXPECT_EQ(sentence(s), "");
    DynamicQuantize d = dynamic_problem({4, 8}, {1});
    d.result.dtype = DType::Int8;
    for (TensorView* v : {&d.result, &d.input, &d.scale}) v->device = device;
    EXPECT_EQ(sentence(d), "");
    Dequantize q = dequantize_problem({4, 8}, {1});
    q.input.dtype = DType::Int8;
    for (TensorView* v : {&q.result, &q.input, &q.scale}) v->device = device;
    EXPECT_EQ(sentence(q), "");
  }
}

TEST(QuantizeErrors, Devices) {
  StaticQuantize p = static_problem({4, 8}, {1});
  p.result.device = kCuda;
  EXPECT_EQ(sentence(p), "fp8kv::static_scaled_fp8_quant: result must be on the device of input, cpu, got cuda:0");
  p.input.device = kCuda;
  EXPECT_EQ(sentence(p), "fp8kv::static_scaled_fp8_quant: scale must be on the device of input, cuda:0, got cpu");
  p.scale.device = {Device::Type::CUDA, 1};
  EXPECT_EQ(sentence(p), "fp8kv::static_scaled_fp8_quant: scale must be on the device of input, cuda:0, got cuda:1");
  p.scale.device = kCuda;
  EXPECT_EQ(sentence(p), "");
}

TEST(QuantizeErrors, Shapes) {
  StaticQuantize p = static_problem({4, 8}, {1});
  p.result = result({8, 4});
  EXPECT_EQ(sentence(p), "fp8kv::static_scaled_fp8_quant: result must have the shape of input, [4, 8], got shape [8, 4]");
  p.result = result({32});
  EXPECT_EQ(sentence(p), "fp8kv::static_scaled_fp8_quant: result must have the shape of input, [4, 8], got shape [32]");
}

TEST(QuantizeErrors, GroupExtents) {
  const auto text = [](std::int64_t rows, std::int64_t cols) {
    return sentence(static_problem({4, 8}, {1}, GroupShape{rows, cols}));
  };
  const std::string start = "fp8kv::static_scaled_fp8_quant: group_shape must have two extents, each -1 or at least 1, got ";
  EXPECT_EQ(text(0, -1), start + "(0, -1)");
  EXPECT_EQ(text(-1, 0), start + "(-1, 0)");
  EXPECT_EQ(text(-2, 4), start + "(-2, 4)");
  EXPECT_EQ(text(1, -3), start + "(1, -3)");
}

TEST(QuantizeErrors, ScaleWithoutGroupShape) {
  EXPECT_EQ(sentence(static_problem({4, 8}, {8})),
            "fp8kv::static_scaled_fp8_quant: scale must come with a group_shape when it has one dimension and more than one "
            "element, got shape [8] and no group_shape");
  EXPECT_EQ(sentence(static_problem({8}, {8})),
            "fp8kv::static_scaled_fp8_quant: scale must come with a group_shape when it has one dimension and more than one "
            "element, got shape [8] and no group_shape");
  const std::string start =
      "fp8kv::static_scaled_fp8_quant: scale must have 1 element, or come with a group_shape, or have sizes that divide those "
      "of the input, [4, 6, 8], got shape ";
  EXPECT_EQ(sentence(static_problem({4, 6, 8}, {6, 8})), start + "[6, 8]");
  EXPECT_EQ(sentence(static_problem({4, 6, 8}, {4, 4, 8})), start + "[4, 4, 8]");
  EXPECT_EQ(sentence(static_problem({4, 6, 8}, {1, 6, 16})), start + "[1, 6, 16]");
  EXPECT_EQ(sentence(static_problem({4, 6, 8}, {1, 0, 1})), start + "[1, 0, 1]");
}

struct WrongScale {
  GroupShape group_shape;
  Sizes scale;
  const char* expected;
};

TEST(QuantizeErrors, ScaleShapeForGroupShape) {
  const WrongScale kCases[] = {
      {{-1, -1}, {2}, "have 1 element for group_shape (-1, -1) and an input of shape [10, 24], got shape [2]"},
      {{16, 32}, {10, 24}, "have 1 element for group_shape (16, 32) and an input of shape [10, 24], got shape [10, 24]"},
      {{1, -1}, {24}, "have shape [10] or [10, 1] for group_shape (1, -1) and an input of shape [10, 24], got shape [24]"},
      {{1, -1},
       {1, 10},
       "have shape [10] or [10, 1] for group_shape (1, -1) and an input of shape [10, 24], got shape [1, 10]"},
      {{-1, 1}, {10}, "have shape [24] or [1, 24] for group_shape (-1, 1) and an input of shape [10, 24], got shape [10]"},
      {{-1, 5}, {4}, "have shape [5] or [1, 5] for group_shape (-1, 5) and an input of shape [10, 24], got shape [4]"},
      {{4, 16}, {2, 1}, "have shape [3, 2] for group_shape (4, 16) and an input of shape [10, 24], got shape [2, 1]"},
      {{4, 16}, {6}, "have shape [3, 2] for group_shape (4, 16) and an input of shape [10, 24], got shape [6]"},
      {{4, 16}, {3, 3, 2}, "have shape [3, 2] for group_shape (4, 16) and an input of shape [10, 24], got shape [3, 3, 2]"},
  };
  for (const WrongScale& c : kCases)
    EXPECT_EQ(sentence(static_problem({10, 24}, c.scale, c.group_shape)),
              std::string("fp8kv::static_scaled_fp8_quant: scale must ") + c.expected);
}

TEST(QuantizeErrors, ResultOverInput) {
  StaticQuantize p = static_problem({4, 8}, {1});
  p.result.data = reinterpret_cast<void*>(kInput + 63);
  EXPECT_EQ(sentence(p), "fp8kv::static_scaled_fp8_quant: result must not overlap input, got views that share memory");
  p.result.data = reinterpret_cast<void*>(kInput + 64);
  EXPECT_EQ(sentence(p), "");
}

TEST(QuantizeErrors, ResultOverScale) {
  StaticQuantize p = static_problem({4, 8}, {1});
  p.scale.data = reinterpret_cast<void*>(kResult + 28);
  EXPECT_EQ(sentence(p), "fp8kv::static_scaled_fp8_quant: result must not overlap scale, got views that share memory");
}

TEST(QuantizeErrors, DynamicNamesItself) {
  DynamicQuantize p = dynamic_problem({4, 8}, {1});
  p.input.dtype = DType::Int64;
  EXPECT_EQ(sentence(p), "fp8kv::dynamic_scaled_fp8_quant: input must be float32, float16 or bfloat16, got int64");
}

TEST(QuantizeErrors, DynamicScaleIsWritten) {
  DynamicQuantize p = dynamic_problem({4, 8}, {1});
  p.scale.data = reinterpret_cast<void*>(kInput + 60);
  EXPECT_EQ(sentence(p), "fp8kv::dynamic_scaled_fp8_quant: scale must not overlap input, got views that share memory");
}

TEST(QuantizeErrors, UpperBound) {
  DynamicQuantize p = dynamic_problem({4, 8}, {1});
  const std::string start = "fp8kv::dynamic_scaled_fp8_quant: ";
  p.scale_ub = view_at(kBound, DType::Float32, {1, 1});
  EXPECT_EQ(sentence(p), "");
  p.scale_ub = view_at(kBound, DType::Float32, {2});
  EXPECT_EQ(sentence(p), start + "scale_ub must have 1 element, got shape [2]");
  p.scale_ub = view_at(kBound, DType::Float16, {1});
  EXPECT_EQ(sentence(p), start + "scale_ub must be float32, got float16");
  p.scale_ub = view_at(kResult, DType::Float32, {1});
  EXPECT_EQ(sentence(p), start + "result must not overlap scale_ub, got views that share memory");
  p.scale_ub = view_at(kScale, DType::Float32, {1});
  EXPECT_EQ(sentence(p), start + "scale must not overlap scale_ub, got views that share memory");
  p.scale_ub = view_at(kBound, DType::Float32, {1});
  p.scale_ub->device = kCuda;
  EXPECT_EQ(sentence(p), start + "scale_ub must be on the device of input, cpu, got cuda:0");
}

TEST(QuantizeErrors, GroupAmax) {
  const std::string start = "fp8kv::group_amax: ";
  GroupAmax p = amax_problem({4, 8}, {4}, {1, -1});
  EXPECT_EQ(sentence(p), "");
  p.input.dtype = DType::E4M3;
  EXPECT_EQ(sentence(p), start + "input must be float32, float16 or bfloat16, got float8_e4m3fn");
  p.input = input({4, 8});
  p.amax.dtype = DType::Float16;
  EXPECT_EQ(sentence(p), start + "amax must be float32, got float16");
  p.amax = scale({8});
  EXPECT_EQ(sentence(p),
            start + "amax must have shape [4] or [4, 1] for group_shape (1, -1) and an input of shape [4, 8], got shape [8]");
  p.amax = view_at(kInput + 48, DType::Float32, {4});
  EXPECT_EQ(sentence(p), start + "amax must not overlap input, got views that share memory");
  p.amax = scale({4});
  p.amax.device = kCuda;
  EXPECT_EQ(sentence(p), start + "amax must be on the device of input, cpu, got cuda:0");
}

// --- Overlap --------------------------------

TEST(QuantizeOverlap, ColumnsOfOneBufferAreApart) {
  // 16 bytes a row: 4 bf16 of input (8 bytes), then 8 bytes of result.
  StaticQuantize p = static_problem({6, 4}, {1});
  p.input = input({6, 4}, {8, 1});
  p.result = view_at(kInput + 8, DType::E4M3, {6, 4}, {16, 1});
  EXPECT_EQ(sentence(p), "");
  p.result.data = reinterpret_cast<void*>(kInput + 12);
  EXPECT_EQ(sentence(p), "");
  p.result.data = reinterpret_cast<void*>(kInput + 7);
  EXPECT_NE(sentence(p), "");
  p.result.data = reinterpret_cast<void*>(kInput + 13);  // reaches into the next row
  EXPECT_NE(sentence(p), "");
}

TEST(QuantizeOverlap, InterleavedViewsOfDifferentPitchAreRefused) {
  StaticQuantize p = static_problem({6, 4}, {1});
  p.input = input({6, 4}, {8, 1});
  p.result = view_at(kInput + 8, DType::E4M3, {6, 4}, {8, 1});
  EXPECT_NE(sentence(p), "");
}

TEST(QuantizeOverlap, EmptyViewsNeverOverlap) {
  StaticQuantize p = static_problem({0, 4}, {1});
  p.result.data = p.input.data;
  EXPECT_EQ(sentence(p), "");
}

TEST(QuantizeOverlap, AnExpandedInputMayBeRead) {
  StaticQuantize p = static_problem({4, 8}, {1});
  p.input = input({4, 8}, {0, 1});
  EXPECT_EQ(sentence(p), "");
}

TEST(QuantizeOverlap, AnExpandedScaleMayBeReadButNotWritten) {
  StaticQuantize p = static_problem({4, 8}, {4, 8}, GroupShape{1, 1});
  p.scale = scale({4, 8}, {0, 1});
  EXPECT_EQ(sentence(p), "");
  DynamicQuantize d = dynamic_problem({4, 8}, {4, 8}, GroupShape{1, 1});
  d.scale = scale({4, 8}, {0, 1});
  EXPECT_NE(sentence(d), "");
}

// --- Scales that are accepted, and the offset of every element's scale ------------------------------------------------

// The offsets of all elements of a Layout, in the order of the layout's dimensions.
struct Element {
  std::int64_t in, out, scale;
};

std::vector<Element> elements(const Layout& layout) {
  std::vector<Element> all;
  const std::int64_t columns = layout.inner().size;
  for (std::int64_t i = 0; i < layout.numel; ++i) {
    Element e{0, 0, layout.flat_rows ? i / columns / layout.flat_rows * layout.flat_scale : 0};
    std::int64_t rest = i;
    for (int d = layout.ndim - 1; d >= 0; --d) {
      const Layout::Dim& dim = layout.dims[d];
      const std::int64_t index = rest % dim.size;
      rest /= dim.size;
      e.in += index * dim.in;
      e.out += index * dim.out;
      e.scale += index / dim.block * dim.scale;
    }
    all.push_back(e);
  }
  return all;
}

// The scale offset of each element by its offset in the result, which must be hit once each.
std::vector<std::int64_t> scale_by_result(const Layout& layout, std::int64_t result_extent) {
  std::vector<std::int64_t> scales(result_extent, -1);
  for (const Element& e : elements(layout)) {
    EXPECT_EQ(scales.at(e.out), -1);
    scales.at(e.out) = e.scale;
  }
  return scales;
}

struct AcceptedScale {
  const char* name;
  Sizes input;
  Sizes scale;
  std::optional<GroupShape> group_shape;
};

void PrintTo(const AcceptedScale& c, std::ostream* os) { *os << c.name; }

class QuantizeScales : public testing::TestWithParam<AcceptedScale> {};

TEST_P(QuantizeScales, EveryElementFindsTheScaleOfItsGroup) {
  const AcceptedScale& c = GetParam();
  const Layout layout = lower(static_problem(c.input, c.scale, c.group_shape));
  std::int64_t numel = 1;
  for (std::int64_t size : c.input) numel *= size;
  ASSERT_EQ(layout.numel, numel);
  const std::vector<std::int64_t> found = scale_by_result(layout, numel);
  const std::int64_t columns = c.input.empty() ? 1 : c.input.back();
  for (std::int64_t i = 0; i < numel; ++i) {
    std::int64_t expected = 0;  // the scale is contiguous: its offset is its index
    if (c.group_shape) {
      const std::int64_t rows = c.group_shape->rows == -1 ? numel : c.group_shape->rows;
      const std::int64_t cols = c.group_shape->cols == -1 ? columns : c.group_shape->cols;
      expected = i / columns / rows * ((columns + cols - 1) / cols) + i % columns / cols;
    } else if (c.scale.size() == c.input.size()) {
      std::int64_t rest = i, stride = 1;
      for (int d = static_cast<int>(c.input.size()) - 1; d >= 0; --d) {
        expected += rest % c.input[d] / (c.input[d] / c.scale[d]) * stride;
        stride *= c.scale[d];
        rest /= c.input[d];
      }
    }
    ASSERT_EQ(found[i], expected) << "element " << i;
  }
}

INSTANTIATE_TEST_SUITE_P(, QuantizeScales,
                         testing::Values(AcceptedScale{"scalar_input", {}, {}, {}},
                                         AcceptedScale{"scalar_input_per_token", {}, {1}, GroupShape{1, -1}},
                                         AcceptedScale{"per_tensor_scalar", {4, 6}, {}, {}},
                                         AcceptedScale{"per_tensor_one", {4, 6}, {1}, {}},
                                         AcceptedScale{"per_tensor_ones", {4, 6}, {1, 1, 1}, {}},
                                         AcceptedScale{"per_tensor_group", {4, 6}, {1}, GroupShape{-1, -1}},
                                         AcceptedScale{"per_tensor_large_extents", {4, 6}, {1, 1}, GroupShape{4, 100}},
                                         AcceptedScale{"per_token", {4, 6}, {4}, GroupShape{1, -1}},
                                         AcceptedScale{"per_token_column", {4, 6}, {4, 1}, GroupShape{1, -1}},
                                         AcceptedScale{"per_token_leading_ones", {4, 6}, {1, 4, 1}, GroupShape{1, -1}},
                                         AcceptedScale{"per_token_wide_extent", {4, 6}, {4}, GroupShape{1, 6}},
                                         AcceptedScale{"per_token_3d_flat", {2, 3, 5}, {6}, GroupShape{1, -1}},
                                         AcceptedScale{"per_token_3d_leading", {2, 3, 5}, {2, 3, 1}, GroupShape{1, -1}},
                                         AcceptedScale{"per_token_vector", {5}, {1}, GroupShape{1, -1}},
                                         AcceptedScale{"per_channel", {4, 6}, {6}, GroupShape{-1, 1}},
                                         AcceptedScale{"per_channel_row", {4, 6}, {1, 6}, GroupShape{-1, 1}},
                                         AcceptedScale{"per_channel_vector", {6}, {6}, GroupShape{-1, 1}},
                                         AcceptedScale{"per_channel_one_column", {4, 1}, {1}, GroupShape{-1, 1}},
                                         AcceptedScale{"per_head", {4, 32}, {2}, GroupShape{-1, 16}},
                                         AcceptedScale{"per_head_row", {4, 32}, {1, 2}, GroupShape{-1, 16}},
                                         AcceptedScale{"per_head_ragged", {4, 40}, {3}, GroupShape{-1, 16}},
                                         AcceptedScale{"per_head_4d", {2, 3, 4, 32}, {1, 1, 4, 1}, {}},
                                         AcceptedScale{"per_head_blocks", {4, 6, 8}, {1, 6, 1}, {}},
                                         AcceptedScale{"per_head_pairs", {4, 6, 8}, {1, 3, 1}, {}},
                                         AcceptedScale{"blocks_3d", {4, 6, 8}, {2, 3, 4}, {}},
                                         AcceptedScale{"blocks_all", {2, 3, 4}, {2, 3, 4}, {}},
                                         AcceptedScale{"group_1x8", {4, 32}, {4, 4}, GroupShape{1, 8}},
                                         AcceptedScale{"group_1x8_leading", {2, 3, 16}, {2, 3, 2}, GroupShape{1, 8}},
                                         AcceptedScale{"group_1x8_flat_rows", {2, 3, 16}, {6, 2}, GroupShape{1, 8}},
                                         AcceptedScale{"group_1x8_one_row", {1, 32}, {4}, GroupShape{1, 8}},
                                         AcceptedScale{"group_4x16", {8, 32}, {2, 2}, GroupShape{4, 16}},
                                         AcceptedScale{"group_4x16_ragged", {10, 40}, {3, 3}, GroupShape{4, 16}},
                                         AcceptedScale{"group_rows_only", {10, 24}, {3}, GroupShape{4, -1}},
                                         AcceptedScale{"group_rows_only_column", {10, 24}, {3, 1}, GroupShape{4, -1}},
                                         AcceptedScale{"group_short_columns", {4, 10}, {4, 4}, GroupShape{1, 3}},
                                         AcceptedScale{"group_1x1", {4, 6}, {4, 6}, GroupShape{1, 1}},
                                         AcceptedScale{"group_rows_across_dims", {3, 4, 8}, {3, 1}, GroupShape{5, -1}},
                                         AcceptedScale{"group_rows_of_whole_dims", {3, 4, 8}, {2}, GroupShape{8, -1}},
                                         AcceptedScale{"group_rows_inside_dim", {3, 4, 8}, {6, 2}, GroupShape{2, 4}}),
                         [](const auto& info) { return std::string(info.param.name); });

// --- Layouts --------------------------------

std::string text(const Layout& layout) {
  std::ostringstream all;
  for (int d = 0; d < layout.ndim; ++d) {
    const Layout::Dim& dim = layout.dims[d];
    all << (d ? " " : "") << dim.size << ":" << dim.in << "," << dim.out << "," << dim.scale;
    if (dim.block != 1) all << "/" << dim.block;
  }
  if (layout.flat_rows) all << " flat " << layout.flat_rows << "*" << layout.flat_scale;
  return all.str();
}

std::string layout_text(const StaticQuantize& problem) { return text(lower(problem)); }

TEST(QuantizeLayout, ContiguousPerTensorIsOneRow) { EXPECT_EQ(layout_text(static_problem({2, 3, 4, 5}, {1})), "120:1,1,0"); }

TEST(QuantizeLayout, ScalarIsOneRowOfOne) { EXPECT_EQ(layout_text(static_problem({}, {})), "1:1,1,0"); }

TEST(QuantizeLayout, PerTokenHasARowPerScale) {
  EXPECT_EQ(layout_text(static_problem({2, 3, 40}, {6}, GroupShape{1, -1})), "6:40,40,1 40:1,1,0");
}

TEST(QuantizeLayout, PerChannelChangesScaleAlongTheRow) {
  EXPECT_EQ(layout_text(static_problem({2, 3, 40}, {40}, GroupShape{-1, 1})), "6:40,40,0 40:1,1,1");
}

TEST(QuantizeLayout, PerHeadRowsAreHeads) {
  EXPECT_EQ(layout_text(static_problem({6, 64}, {4}, GroupShape{-1, 16})), "6:64,64,0 4:16,16,1 16:1,1,0");
  EXPECT_EQ(layout_text(static_problem({6, 4, 16}, {1, 4, 1})), "6:64,64,0 4:16,16,1 16:1,1,0");
}

TEST(QuantizeLayout, BlocksOfOneRowAreRows) {
  EXPECT_EQ(layout_text(static_problem({6, 64}, {6, 4}, GroupShape{1, 16})), "24:16,16,1 16:1,1,0");
}

TEST(QuantizeLayout, SquareBlocksKeepTheirRows) {
  EXPECT_EQ(layout_text(static_problem({12, 64}, {3, 4}, GroupShape{4, 16})), "12:64,64,4/4 4:16,16,1 16:1,1,0");
}

TEST(QuantizeLayout, RaggedAndShortBlocksStayInTheRow) {
  EXPECT_EQ(layout_text(static_problem({6, 40}, {6, 3}, GroupShape{1, 16})), "6:40,40,3 40:1,1,1/16");
  EXPECT_EQ(layout_text(static_problem({6, 8}, {6, 2}, GroupShape{1, 4})), "6:8,8,2 8:1,1,1/4");
}

TEST(QuantizeLayout, RowIsTheDimensionWithTheSmallestStrideOfTheResult) {
  StaticQuantize p = static_problem({5, 7}, {1});
  p.input = input({5, 7}, {1, 5});
  p.result = result({5, 7}, {1, 5});
  EXPECT_EQ(layout_text(p), "35:1,1,0");
  p.result = result({5, 7});
  EXPECT_EQ(layout_text(p), "5:1,7,0 7:5,1,0");
}

TEST(QuantizeLayout, TransposedPerTokenChangesScaleAlongTheRow) {
  StaticQuantize p = static_problem({5, 7}, {5}, GroupShape{1, -1});
  p.input = input({5, 7}, {1, 5});
  p.result = result({5, 7}, {1, 5});
  EXPECT_EQ(layout_text(p), "7:5,5,0 5:1,1,1");
}

TEST(QuantizeLayout, PaddedRowsAreNotMerged) {
  StaticQuantize p = static_problem({2, 3, 8}, {1});
  p.input = input({2, 3, 8}, {48, 16, 1});
  EXPECT_EQ(layout_text(p), "6:16,8,0 8:1,1,0");
  p.input = input({2, 3, 8}, {64, 16, 1});
  EXPECT_EQ(layout_text(p), "2:64,24,0 3:16,8,0 8:1,1,0");
}

TEST(QuantizeLayout, GroupsOfRowsCrossMergedDimensions) {
  EXPECT_EQ(layout_text(static_problem({3, 4, 8}, {3}, GroupShape{5, -1})), "12:8,8,1/5 8:1,1,0");
}

TEST(QuantizeLayout, GroupsOfRowsAcrossStridedDimensionsCountFlatRows) {
  StaticQuantize p = static_problem({3, 4, 8}, {3}, GroupShape{5, -1});
  p.input = input({3, 4, 8}, {64, 8, 1});
  EXPECT_EQ(layout_text(p), "3:64,32,0 4:8,8,0 8:1,1,0 flat 5*1");
}

TEST(QuantizeLayout, StridedDimensionsThatGroupsDivideNeedNoFlatRows) {
  StaticQuantize p = static_problem({3, 4, 8}, {6}, GroupShape{2, -1});
  p.input = input({3, 4, 8}, {64, 8, 1});
  EXPECT_EQ(layout_text(p), "3:64,32,2 4:8,8,1/2 8:1,1,0");
  p = static_problem({3, 4, 8}, {2}, GroupShape{8, -1});
  p.input = input({3, 4, 8}, {64, 8, 1});
  EXPECT_EQ(layout_text(p), "3:64,32,1/2 32:1,1,0");
}

TEST(QuantizeLayout, ScaleStridesAreUsed) {
  StaticQuantize p = static_problem({6, 40}, {6}, GroupShape{1, -1});
  p.scale = scale({6}, {9});
  EXPECT_EQ(layout_text(p), "6:40,40,9 40:1,1,0");
  p = static_problem({6, 40}, {6, 40}, GroupShape{1, 1});
  p.scale = scale({6, 40}, {0, 2});
  EXPECT_EQ(layout_text(p), "6:40,40,0 40:1,1,2");
}

TEST(QuantizeLayout, GroupsAreCountedAndListed) {
  DynamicQuantize p = dynamic_problem({10, 24}, {3, 2}, GroupShape{4, 16});
  p.scale = scale({3, 2}, {7, 3});
  const Layout layout = lower(p);
  EXPECT_EQ(layout.num_groups, 6);
  ASSERT_EQ(layout.scale_ndim, 2);
  EXPECT_EQ(layout.scale_sizes[0], 3);
  EXPECT_EQ(layout.scale_sizes[1], 2);
  EXPECT_EQ(layout.scale_strides[0], 7);
  EXPECT_EQ(layout.scale_strides[1], 3);
}

TEST(QuantizeLayout, EmptyInputsKeepTheirGroups) {
  const Layout rows = lower(dynamic_problem({0, 24}, {0}, GroupShape{1, -1}));
  EXPECT_EQ(rows.numel, 0);
  EXPECT_EQ(rows.num_groups, 0);
  const Layout columns = lower(dynamic_problem({5, 0}, {5}, GroupShape{1, -1}));
  EXPECT_EQ(columns.numel, 0);
  EXPECT_EQ(columns.num_groups, 5);
  EXPECT_EQ(lower(dynamic_problem({0, 24}, {1})).num_groups, 1);
}

TEST(QuantizeLayout, HugeSizesDoNotOverflow) {
  const std::int64_t rows = std::int64_t{1} << 33;
  StaticQuantize p = static_problem({rows, 128}, {1});
  p.input.data = reinterpret_cast<void*>(std::uintptr_t{1} << 44);
  p.scale.data = reinterpret_cast<void*>(std::uintptr_t{1} << 46);
  EXPECT_EQ(layout_text(p), std::to_string(rows * 128) + ":1,1,0");
}

}  // namespace
}  // namespace fp8kv::core
