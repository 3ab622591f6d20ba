// Validation of the quantization problems and their Layout: the one place that knows the rules on scale shapes.
#include <algorithm>

#include "core/check.h"
#include "core/layout.h"

namespace fp8kv {
namespace core {
namespace {

// How the scale of an element follows from its index: per dimension, or over flat rows (see Layout).
struct ScaleMap {
  std::int64_t block[kMaxDims + 1];
  std::int64_t stride[kMaxDims + 1];
  std::int64_t flat_rows = 0;
  std::int64_t flat_scale = 0;
};

std::string group_string(const GroupShape& g) { return "(" + std::to_string(g.rows) + ", " + std::to_string(g.cols) + ")"; }

// The matrix view of an input and the groups that a GroupShape divides it into.
struct GroupGrid {
  std::int64_t rows = 1, cols = 1;              // M, N
  std::int64_t group_rows = 1, group_cols = 1;  // extents, never more than M, N
  std::int64_t count_rows = 1, count_cols = 1;  // R, C
};

GroupGrid divide_into_groups(const char* op, const TensorView& input, const GroupShape& shape) {
  const auto valid = [](std::int64_t extent) { return extent == -1 || extent >= 1; };
  if (!valid(shape.rows) || !valid(shape.cols))
    fail(op, "group_shape", "have two extents, each -1 or at least 1", group_string(shape));
  GroupGrid g;
  for (int i = 0; i + 1 < input.ndim; ++i) g.rows *= input.sizes[i];
  g.cols = input.ndim ? input.sizes[input.ndim - 1] : 1;
  const auto extent = [](std::int64_t size, std::int64_t wanted) {
    return std::max<std::int64_t>(1, wanted == -1 ? size : std::min(wanted, size));
  };
  g.group_rows = extent(g.rows, shape.rows);
  g.group_cols = extent(g.cols, shape.cols);
  g.count_rows = shape.rows == -1 ? 1 : ceil_div(g.rows, g.group_rows);
  g.count_cols = shape.cols == -1 ? 1 : ceil_div(g.cols, g.group_cols);
  return g;
}

bool leading_sizes_match(const TensorView& scale, const TensorView& input) {
  return scale.ndim == input.ndim && std::equal(scale.sizes, scale.sizes + scale.ndim - 1, input.sizes);
}

// The one dimension of `scale` before its last that is larger than 1 and counts `rows`; -1 where there is no such form.
// A dimension of its own is not needed for rows == 1: any leading size of 1 will do.
int row_dim(const TensorView& scale, std::int64_t rows) {
  int found = -1;
  for (int i = 0; i + 1 < scale.ndim; ++i) {
    if (scale.sizes[i] == 1 && !(rows == 1 && found < 0)) continue;
    if (found >= 0 && scale.sizes[found] != 1) return -1;
    found = i;
  }
  return found >= 0 && scale.sizes[found] == rows ? found : -1;
}

std::string expected_shapes(const GroupGrid& g, const TensorView& input, const GroupShape& shape) {
  const std::string r = std::to_string(g.count_rows), c = std::to_string(g.count_cols);
  std::string text;
  if (g.count_rows == 1 && g.count_cols == 1)
    text = "have 1 element";
  else if (g.count_cols == 1)
    text = "have shape [" + r + "] or [" + r + ", 1]";
  else if (g.count_rows == 1)
    text = "have shape [" + c + "] or [1, " + c + "]";
  else
    text = "have shape [" + r + ", " + c + "]";
  return text + " for group_shape " + group_string(shape) + " and an input of shape " + shape_string(input);
}

// What is read and what is written; their shapes are the same.
struct InOut {
  TensorView input;
  TensorView result;
};

// Makes leading dimensions that lie one after the other in memory in both views into one, so that groups of rows may cross
// them.
void merge_leading(InOut& views) {
  TensorView in = views.input, out = views.result;
  int count = 0;
  for (int i = 0; i < views.input.ndim; ++i) {
    const std::int64_t size = views.input.sizes[i];
    const std::int64_t in_stride = views.input.strides[i], out_stride = views.result.strides[i];
    const bool is_row = i + 1 < views.input.ndim;
    if (is_row && size == 1) continue;
    const int previous = count - 1;
    if (is_row && count > 0 && in.strides[previous] == in_stride * size && out.strides[previous] == out_stride * size) {
      in.sizes[previous] = out.sizes[previous] = in.sizes[previous] * size;
      in.strides[previous] = in_stride, out.strides[previous] = out_stride;
    } else {
      in.sizes[count] = out.sizes[count] = size;
      in.strides[count] = in_stride, out.strides[count] = out_stride;
      ++count;
    }
  }
  in.ndim = out.ndim = count;
  views = {in, out};
}

// Distributes groups of `g.group_rows` flat rows over the leading dimensions.
void map_rows(ScaleMap& map, const GroupGrid& g, const TensorView& input, std::int64_t row_stride) {
  std::int64_t inside = g.group_rows;  // rows of one group still to be covered, from the inside out
  std::int64_t stride = row_stride;
  for (int i = input.ndim - 2; i >= 0; --i) {
    const std::int64_t size = input.sizes[i];
    if (inside == 1) {
      map.stride[i] = stride;
      stride *= size;
    } else if (inside % size == 0) {
      inside /= size;
    } else if (size % inside == 0 || i == 0) {
      map.block[i] = inside;
      map.stride[i] = stride;
      stride *= ceil_div(size, inside);
      inside = 1;
    } else {
      std::fill(map.stride, map.stride + input.ndim - 1, 0);
      std::fill(map.block, map.block + input.ndim - 1, 1);
      map.flat_rows = g.group_rows;
      map.flat_scale = row_stride;
      return;
    }
  }
}

// The rules on scale shapes of quantize.h.
ScaleMap map_scale(const Argument& scale, InOut& views, const std::optional<GroupShape>& shape) {
  const TensorView& s = scale.view;
  const TensorView& input = views.input;
  ScaleMap map;
  std::fill(std::begin(map.block), std::end(map.block), 1);
  std::fill(std::begin(map.stride), std::end(map.stride), 0);
  const std::int64_t count = s.numel();

  if (!shape) {
    if (count == 1) return map;
    if (s.ndim == 1)
      fail(scale.op, scale.name, "come with a group_shape when it has one dimension and more than one element",
           "shape " + shape_string(s) + " and no group_shape");
    bool divides = s.ndim == input.ndim;
    for (int i = 0; divides && i < s.ndim; ++i)
      divides = s.sizes[i] == 0 ? input.sizes[i] == 0 : input.sizes[i] % s.sizes[i] == 0;
    if (!divides)
      fail(scale.op, scale.name,
           "have 1 element, or come with a group_shape, or have sizes that divide those of the input, " + shape_string(input),
           "shape " + shape_string(s));
    for (int i = 0; i < s.ndim; ++i) {
      if (s.sizes[i] <= 1) continue;
      map.block[i] = std::max<std::int64_t>(1, input.sizes[i] / s.sizes[i]);
      map.stride[i] = s.strides[i];
    }
    return map;
  }

  const GroupGrid g = divide_into_groups(scale.op, input, *shape);
  if (g.count_rows == 1 && g.count_cols == 1) {
    if (count != 1) fail(scale.op, scale.name, expected_shapes(g, input, *shape), "shape " + shape_string(s));
    return map;
  }
  std::int64_t row_stride = 0, col_stride = 0;
  if (s.ndim == 1 && s.sizes[0] == g.count_rows * g.count_cols && (g.count_rows == 1 || g.count_cols == 1)) {
    (g.count_cols == 1 ? row_stride : col_stride) = s.strides[0];
  } else if (s.ndim >= 2 && s.sizes[s.ndim - 1] == g.count_cols && row_dim(s, g.count_rows) >= 0) {
    row_stride = s.strides[row_dim(s, g.count_rows)];
    col_stride = s.strides[s.ndim - 1];
  } else if (s.ndim >= 2 && s.sizes[s.ndim - 1] == g.count_cols && shape->rows == 1 && leading_sizes_match(s, input)) {
    for (int i = 0; i + 1 < s.ndim; ++i) map.stride[i] = s.strides[i];
    col_stride = s.strides[s.ndim - 1];
  } else {
    fail(scale.op, scale.name, expected_shapes(g, input, *shape), "shape " + shape_string(s));
  }
  if (input.numel() == 0) return map;
  if (g.count_rows > 1 && row_stride != 0) {
    merge_leading(views);
    map_rows(map, g, input, row_stride);
  }
  if (g.count_cols > 1) {
    map.block[input.ndim - 1] = g.group_cols;
    map.stride[input.ndim - 1] = col_stride;
  }
  return map;
}

bool mergeable(const Layout::Dim& outer, const Layout::Dim& inner) {
  if (outer.in != inner.in * inner.size || outer.out != inner.out * inner.size) return false;
  if (outer.scale == 0 && inner.scale == 0) return true;
  return outer.scale != 0 && outer.block == 1 && inner.block == 1 && outer.scale == inner.scale * inner.size;
}

// Blocks of a scale shorter than this are not worth a dimension of their own: the scale is looked up for every element.
constexpr std::int64_t kShortestBlock = 8;

Layout make_layout(const InOut& views, const TensorView& scale, const ScaleMap& map) {
  const auto& [input, result] = views;
  Layout layout;
  layout.numel = input.numel();
  layout.num_groups = scale.numel();
  layout.ndim = 0;
  layout.scale_ndim = scale.ndim;
  std::copy(scale.sizes, scale.sizes + scale.ndim, layout.scale_sizes);
  std::copy(scale.strides, scale.strides + scale.ndim, layout.scale_strides);
  layout.flat_rows = map.flat_rows;
  layout.flat_scale = map.flat_scale;

  Layout::Dim dims[Layout::kMaxLayoutDims];
  int count = 0;
  for (int i = 0; i < input.ndim; ++i) {
    if (input.sizes[i] == 1 && !(map.flat_rows && i == input.ndim - 1)) continue;
    Layout::Dim dim{input.sizes[i], input.strides[i], result.strides[i], map.stride[i], map.block[i]};
    if (dim.scale == 0 || dim.block >= dim.size) dim.scale = 0, dim.block = 1;
    dims[count++] = dim;
  }
  if (count == 0) dims[count++] = {1, 1, 1, 0, 1};

  if (!map.flat_rows) {
    // Memory order, so that the inner one is the dimension with the smallest strides, whatever order the caller's view has.
    std::stable_sort(dims, dims + count,
                     [](const Layout::Dim& a, const Layout::Dim& b) { return a.out != b.out ? a.out > b.out : a.in > b.in; });
    const Layout::Dim last = dims[count - 1];
    if (last.scale != 0 && last.block >= kShortestBlock && last.size % last.block == 0) {
      dims[count - 1] = {last.size / last.block, last.in * last.block, last.out * last.block, last.scale, 1};
      dims[count++] = {last.block, last.in, last.out, 0, 1};
    }
  }
  for (int i = 0; i < count; ++i) {
    if (!map.flat_rows && layout.ndim > 0 && mergeable(layout.dims[layout.ndim - 1], dims[i])) {
      const std::int64_t size = layout.dims[layout.ndim - 1].size * dims[i].size;
      layout.dims[layout.ndim - 1] = dims[i];
      layout.dims[layout.ndim - 1].size = size;
    } else {
      layout.dims[layout.ndim++] = dims[i];
    }
  }
  return layout;
}

// What StaticQuantize, DynamicQuantize and Dequantize have in common, once dtypes are known to be right.
Layout lower_elementwise(const Argument& result, const Argument& input, const Argument& scale,
                         const std::optional<GroupShape>& group_shape) {
  for (const Argument* a : {&result, &input, &scale}) check_view(*a);
  check_float32(scale);
  check_same_device(result, input);
  check_same_device(scale, input);
  check_same_shape(result, input);
  InOut views{input.view, result.view};
  const ScaleMap map = map_scale(scale, views, group_shape);
  check_no_self_overlap(result);
  check_no_overlap(result, input);
  check_no_overlap(result, scale);
  return make_layout(views, scale.view, map);
}

}  // namespace

Layout lower(const StaticQuantize& p) {
  constexpr const char* op = "static_scaled_fp8_quant";
  const Argument result{op, "result", p.result}, input{op, "input", p.input}, scale{op, "scale", p.scale};
  check_real(input);
  check_quantized(result);
  return lower_elementwise(result, input, scale, p.group_shape);
}

Layout lower(const DynamicQuantize& p) {
  constexpr const char* op = "dynamic_scaled_fp8_quant";
  const Argument result{op, "result", p.result}, input{op, "input", p.input}, scale{op, "scale", p.scale};
  check_real(input);
  check_quantized(result);
  const Layout layout = lower_elementwise(result, input, scale, p.group_shape);
  check_no_self_overlap(scale);
  check_no_overlap(scale, input);
  if (p.scale_ub) {
    const Argument bound{op, "scale_ub", *p.scale_ub};
    check_view(bound);
    check_float32(bound);
    check_same_device(bound, input);
    if (bound.view.numel() != 1) fail(op, "scale_ub", "have 1 element", "shape " + shape_string(bound.view));
    check_no_overlap(result, bound);
    check_no_overlap(scale, bound);
  }
  return layout;
}

Layout lower(const Dequantize& p) {
  constexpr const char* op = "scaled_fp8_dequant";
  const Argument result{op, "result", p.result}, input{op, "input", p.input}, scale{op, "scale", p.scale};
  check_quantized(input);
  check_real(result);
  return lower_elementwise(result, input, scale, p.group_shape);
}

Layout lower(const GroupAmax& p) {
  constexpr const char* op = "group_amax";
  const Argument amax{op, "amax", p.amax}, input{op, "input", p.input};
  check_real(input);
  check_view(amax);
  check_view(input);
  check_float32(amax);
  check_same_device(amax, input);
  InOut views{input.view, input.view};
  const ScaleMap map = map_scale(amax, views, p.group_shape);
  check_no_self_overlap(amax);
  check_no_overlap(amax, input);
  return make_layout(views, amax.view, map);
}

}  // namespace core

void validate(const StaticQuantize& problem) { core::lower(problem); }
void validate(const DynamicQuantize& problem) { core::lower(problem); }
void validate(const Dequantize& problem) { core::lower(problem); }
void validate(const GroupAmax& problem) { core::lower(problem); }

}  // namespace fp8kv
