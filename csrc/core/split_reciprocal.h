// Which scales can't be split. Quantization without division finds the quotient as fma(x, hi, x * lo) with hi + lo = 1 / scale
// (docs/numerics.md). For few significands of the scale the result may be on the wrong side of a boundary between two values.
#pragma once

#include <cstdint>

#include "fp8kv/fp8.h"

namespace fp8kv::core {

// For the bits of a normal scale. The boundaries of FP8 have significands of 5 bits: wrong may be what is 1 to 4 below a
// multiple of 2^20. Those of INT8 have 8 bits: 1 to 3 below a multiple of 2^17, or 2 above.
template <class Fp8>
FP8KV_HD constexpr bool splits_wrong(std::uint32_t scale) {
  return ((scale + 4u) & 0xfffffu) < 4u;
}
template <>
FP8KV_HD constexpr bool splits_wrong<Int8>(std::uint32_t scale) {
  return ((scale + 3u) & 0x1ffffu) < 3u || (scale & 0x1ffffu) == 2u;
}

}  // namespace fp8kv::core
