#include "check.h"

namespace fp8kv::core {
namespace {

// The bytes of a view as nested rows: pitches in bytes, the largest first. extent[i] is the number of bytes from the first to
// the last of the dimensions from i on.
struct Footprint {
  int ndim = 0;
  std::int64_t pitch[kMaxDims] = {};
  std::int64_t extent[kMaxDims + 1] = {};
};

Footprint footprint(const TensorView& view) {
  Footprint f;
  std::int64_t count[kMaxDims];
  for (int i = 0; i < view.ndim; ++i) {
    const std::int64_t pitch = view.strides[i] * size_of(view.dtype);
    if (view.sizes[i] <= 1 || pitch == 0) continue;
    int at = f.ndim++;
    for (; at > 0 && f.pitch[at - 1] < pitch; --at) f.pitch[at] = f.pitch[at - 1], count[at] = count[at - 1];
    f.pitch[at] = pitch;
    count[at] = view.sizes[i];
  }
  f.extent[f.ndim] = size_of(view.dtype);
  for (int i = f.ndim - 1; i >= 0; --i) f.extent[i] = f.extent[i + 1] + f.pitch[i] * (count[i] - 1);
  return f;
}

// Of the dimensions of both from `dim` on, where b begins `offset` bytes after a.
bool may_overlap(const Footprint& a, const Footprint& b, int dim, std::int64_t offset) {
  if (offset >= a.extent[dim] || -offset >= b.extent[dim]) return false;
  if (dim == a.ndim || dim == b.ndim || a.pitch[dim] != b.pitch[dim]) return true;
  const std::int64_t pitch = a.pitch[dim];
  if (a.extent[dim + 1] > pitch || b.extent[dim + 1] > pitch) return true;
  // A row of b lies across at most two rows of a.
  const std::int64_t phase = (offset % pitch + pitch) % pitch;
  return may_overlap(a, b, dim + 1, phase) || may_overlap(a, b, dim + 1, phase - pitch);
}

// From the first byte to the last; of an empty view anything.
std::int64_t extent(const TensorView& view) {
  std::int64_t elements = 1;
  for (int i = 0; i < view.ndim; ++i) elements += view.strides[i] * (view.sizes[i] - 1);
  return elements * size_of(view.dtype);
}

}  // namespace

bool may_overlap(const TensorView& a, const TensorView& b) {
  const auto offset =
      static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(b.data) - reinterpret_cast<std::uintptr_t>(a.data));
  if (offset >= 0 ? offset >= extent(a) : -offset >= extent(b)) return false;  // the first ends before the other begins
  if (a.numel() == 0 || b.numel() == 0) return false;
  return may_overlap(footprint(a), footprint(b), 0, offset);
}

}  // namespace fp8kv::core
