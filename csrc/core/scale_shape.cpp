#include "core/scale_shape.h"

#include <algorithm>
#include <string>

#include "core/layout.h"

namespace fp8kv::core {
namespace {

std::string group_string(const GroupShape& g) {
  std::string text = "(";  // in steps: GCC 12 warns of its own operator+
  text += std::to_string(g.rows);
  return text + ", " + std::to_string(g.cols) + ")";
}

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

}  // namespace

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

}  // namespace fp8kv::core
