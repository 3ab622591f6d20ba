// The rules on shapes of scales (fp8kv/quantize.h): which element has which scale.
#pragma once

#include <optional>

#include "core/check.h"
#include "fp8kv/quantize.h"

namespace fp8kv::core {

// How the scale of an element follows from its index: per dimension, or over flat rows (see Layout).
struct ScaleMap {
  std::int64_t block[kMaxDims + 1];
  std::int64_t stride[kMaxDims + 1];
  std::int64_t flat_rows = 0;
  std::int64_t flat_scale = 0;
};

// The tensor that is read and the one that is written, of one shape.
struct InOut {
  TensorView input;
  TensorView result;
};

// Throws Error where the scale does not fit the input. May merge leading dimensions of `views`, so that groups of rows can
// cross them.
ScaleMap map_scale(const Argument& scale, InOut& views, const std::optional<GroupShape>& shape);

}  // namespace fp8kv::core
