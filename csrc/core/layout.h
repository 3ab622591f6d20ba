// Layout: the quantization problems in the form that all backends work from, and how a problem becomes one.
#pragma once

#include <cstdint>

#include "fp8kv/quantize.h"

namespace fp8kv::core {

// A normalized problem: one list of dimensions, outermost first, with neighbors merged where memory and scales allow it.
// Element (i0, i1, ...) of the input lies at sum(i_d * in), of the result at sum(i_d * out), and its scale at
// sum((i_d / block) * scale), all counted in elements. The last dimension is the inner one; a row is all of its elements at one
// index of the others. Where both sides have stride 1 there and its scale stride is 0, a row is contiguous and has one scale.
struct Layout {
  struct Dim {
    std::int64_t size = 1;
    std::int64_t in = 0;
    std::int64_t out = 0;
    std::int64_t scale = 0;
    std::int64_t block = 1;  // elements along this dimension that share a scale
  };
  static constexpr int kMaxLayoutDims = kMaxDims + 1;

  std::int64_t numel = 0;
  std::int64_t num_groups = 0;
  int ndim = 1;  // at least 1
  Dim dims[kMaxLayoutDims];

  // The one case dimensions can't express: groups of several rows that cross the leading dimensions of a strided input. Then
  // dims are the input's own, their scale strides but the last are 0, and flat row / flat_rows * flat_scale is added.
  std::int64_t flat_rows = 0;  // 0: not used
  std::int64_t flat_scale = 0;

  // The scale tensor as a list of its own, for the ops that write it: group (g0, g1, ...) lies at sum(g_d * stride).
  int scale_ndim = 0;
  std::int64_t scale_sizes[kMaxDims] = {};
  std::int64_t scale_strides[kMaxDims] = {};

  constexpr const Dim& inner() const { return dims[ndim - 1]; }
};

// Checks everything about a problem that can be checked without reading its elements, and normalizes it. Throws Error.
FP8KV_API Layout lower(const StaticQuantize& problem);
FP8KV_API Layout lower(const DynamicQuantize& problem);
FP8KV_API Layout lower(const Dequantize& problem);
FP8KV_API Layout lower(const GroupAmax& problem);

// a / b rounded up, for a >= 0 and b > 0.
constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Both sides have stride 1 along a row.
constexpr bool contiguous_rows(const Layout& layout) { return layout.inner().in == 1 && layout.inner().out == 1; }

// Every row is a group of its own.
constexpr bool rows_are_groups(const Layout& layout) {
  if (layout.inner().scale != 0 || layout.flat_rows != 0) return false;
  for (int d = 0; d + 1 < layout.ndim; ++d)
    if (layout.dims[d].scale == 0 || layout.dims[d].block != 1) return false;
  return true;
}

}  // namespace fp8kv::core
