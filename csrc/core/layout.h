// What several layers ask of a Layout, and the rounding they count with.
#pragma once

#include <cstdint>

#include "fp8kv/quantize.h"

namespace fp8kv::core {

// a / b rounded up, for a >= 0 and b > 0.
constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Both sides have stride 1 along the run.
constexpr bool contiguous_runs(const Layout& layout) { return layout.run().in == 1 && layout.run().out == 1; }

// Every run is a group of its own.
constexpr bool runs_are_groups(const Layout& layout) {
  if (layout.run().scale != 0 || layout.flat_rows != 0) return false;
  for (int d = 0; d + 1 < layout.ndim; ++d)
    if (layout.dims[d].scale == 0 || layout.dims[d].block != 1) return false;
  return true;
}

}  // namespace fp8kv::core
