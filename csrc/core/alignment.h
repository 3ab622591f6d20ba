// What plans ask about vectors of kVecSize elements: whether each is one aligned access.
#pragma once

#include <algorithm>

#include "core/plan.h"

namespace fp8kv::core {

// An address from which vectors can be accessed: aligned to 8 bytes for FP8, 16 for wider types.
inline bool base_aligned(const void* data, DType dtype) {
  return reinterpret_cast<std::uintptr_t>(data) % std::min(16, kVecSize * size_of(dtype)) == 0;
}

// The address of the element `offset` of a view.
inline const void* address_of(const TensorView& view, std::int64_t offset) {
  return static_cast<const char*>(view.data) + offset * size_of(view.dtype);
}

inline bool base_aligned(const TensorView& view, std::int64_t offset) {
  return base_aligned(address_of(view, offset), view.dtype);
}

inline bool vecs_aligned(const Chunk& chunk, const TensorView& input, const TensorView& result) {
  const Layout& layout = chunk.layout;
  for (int d = 0; d + 1 < layout.ndim; ++d)
    if (layout.dims[d].in % kVecSize != 0 || layout.dims[d].out % kVecSize != 0) return false;
  return layout.inner().size % kVecSize == 0 && base_aligned(input, chunk.in) && base_aligned(result, chunk.out);
}

// Where vectors begin at aligned addresses of the result, a row may begin up to 7 elements into its first one.
inline std::int64_t vecs_covering(std::int64_t row, bool aligned) {
  return ceil_div(aligned ? row : row + kVecSize - 1, kVecSize);
}

// The input and the result are one contiguous range each.
inline bool contiguous(const Layout& layout) {
  for (int d = 0; d + 1 < layout.ndim; ++d) {
    const Layout::Dim &dim = layout.dims[d], &next = layout.dims[d + 1];
    if (dim.in != next.in * next.size || dim.out != next.out * next.size) return false;
  }
  return true;
}

}  // namespace fp8kv::core
