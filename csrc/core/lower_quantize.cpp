// Validation of the quantization problems and their Layout.
#include <algorithm>

#include "core/check.h"
#include "core/formats.h"
#include "core/layout.h"
#include "core/scale_shape.h"

namespace fp8kv {
namespace core {
namespace {

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
