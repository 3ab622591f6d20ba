// Chunks of layouts: they cover every element once, each with its own scale.
#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "plan_support.h"

namespace fp8kv::core {
namespace {

using namespace testing_support;

// For every element in row-major order of the layout's dimensions: where it lies and which scale it has.
struct Element {
  std::int64_t in, out, scale;
  bool operator==(const Element&) const = default;
};

void list_elements(const Chunk& chunk, std::vector<Element>& elements) {
  const Layout& layout = chunk.layout;
  for (std::int64_t i = 0; i < layout.numel; ++i) {
    std::int64_t rest = i;
    Element e{chunk.in, chunk.out, chunk.scale};
    for (int d = layout.ndim - 1; d >= 0; --d) {
      const Layout::Dim& dim = layout.dims[d];
      const std::int64_t index = rest % dim.size;
      rest /= dim.size;
      e.in += index * dim.in;
      e.out += index * dim.out;
      e.scale += index / dim.block * dim.scale;
    }
    if (layout.flat_rows) e.scale += (chunk.flat_row + i / layout.inner().size) / layout.flat_rows * layout.flat_scale;
    elements.push_back(e);
  }
}

class Chunks : public testing::TestWithParam<std::int64_t> {};

INSTANTIATE_TEST_SUITE_P(Limits, Chunks, testing::Values(8, 16, 40, 104, 1000), testing::PrintToStringParamName());

TEST_P(Chunks, CoverEveryElementOnceInOrder) {
  StaticQuantize strided{.result = contiguous(address(1), DType::E4M3, {3, 5, 24}),
                         .input = contiguous(address(2), DType::BFloat16, {3, 5, 24}),
                         .scale = contiguous(address(3), DType::Float32, {4, 3}),
                         .group_shape = GroupShape{4, 8}};
  strided.input.strides[0] = 999;
  for (const StaticQuantize& p :
       {quantize_problem(13, 48, {-1, -1}), quantize_problem(13, 48, {1, -1}), quantize_problem(13, 48, {-1, 1}),
        quantize_problem(13, 48, {-1, 16}), quantize_problem(13, 50, {5, 7}), strided}) {
    const Layout layout = lower(p);
    std::vector<Element> expected, actual;
    list_elements({layout}, expected);
    for_each_chunk({layout}, GetParam(), [&](const Chunk& chunk) {
      EXPECT_LE(chunk.layout.numel, GetParam());
      list_elements(chunk, actual);
    });
    EXPECT_EQ(actual, expected);
  }
}

TEST(UniformParts, WholeBlocksAndTheRestAreTheWholeLayout) {
  for (const StaticQuantize& p :
       {quantize_problem(13, 50, {-1, 16}), quantize_problem(1, 50, {1, 16}), quantize_problem(7, 47, {5, 16})}) {
    const Layout layout = lower(p);
    std::vector<Element> expected, actual;
    list_elements({layout}, expected);
    int parts = 0;
    for_each_uniform_part(layout, [&](const Chunk& part) {
      ++parts;
      EXPECT_EQ(part.layout.inner().scale, 0);
      list_elements(part, actual);
    });
    EXPECT_EQ(parts, 2);
    const auto by_place = [](const Element& a, const Element& b) { return a.in < b.in; };
    std::sort(expected.begin(), expected.end(), by_place);
    std::sort(actual.begin(), actual.end(), by_place);
    EXPECT_EQ(actual, expected);
  }
}

TEST(UniformParts, OtherLayoutsAreOnePart) {
  for (const StaticQuantize& p : {quantize_problem(13, 48, {-1, 16}), quantize_problem(13, 50, {-1, 1}),
                                  quantize_problem(13, 50, {1, -1}), quantize_problem(13, 50, {-1, 7})}) {
    int parts = 0;
    for_each_uniform_part(lower(p), [&](const Chunk&) { ++parts; });
    EXPECT_EQ(parts, 1);
  }
}

}  // namespace
}  // namespace fp8kv::core
