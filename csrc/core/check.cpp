#include "check.h"

namespace fp8kv::core {
namespace {

// The bytes a view touches, as an outermost dimension of `pitch` times `count` over an inner range of `inner` bytes.
struct Footprint {
  std::uintptr_t begin;
  std::int64_t inner;
  std::int64_t pitch;
  std::int64_t count;

  std::uintptr_t end() const { return begin + static_cast<std::uintptr_t>(pitch * (count - 1) + inner); }
};

Footprint footprint(const TensorView& view) {
  Footprint f{reinterpret_cast<std::uintptr_t>(view.data), size_of(view.dtype), 0, 1};
  for (int i = 0; i < view.ndim; ++i) {
    const std::int64_t pitch = view.strides[i] * size_of(view.dtype);
    if (view.sizes[i] <= 1 || pitch == 0) continue;
    if (pitch > f.pitch) {
      f.inner += f.pitch * (f.count - 1);
      f.pitch = pitch;
      f.count = view.sizes[i];
    } else {
      f.inner += pitch * (view.sizes[i] - 1);
    }
  }
  return f;
}

}  // namespace

bool may_overlap(const TensorView& a, const TensorView& b) {
  if (a.numel() == 0 || b.numel() == 0) return false;
  Footprint first = footprint(a);
  Footprint second = footprint(b);
  if (first.begin > second.begin) std::swap(first, second);
  if (first.end() <= second.begin) return false;
  if (first.pitch != second.pitch || first.pitch == 0) return true;
  const auto offset = static_cast<std::int64_t>((second.begin - first.begin) % static_cast<std::uintptr_t>(first.pitch));
  return offset < first.inner || offset + second.inner > first.pitch;
}

}  // namespace fp8kv::core
