#include "core/check.h"

#include <algorithm>
#include <cstdlib>

#include "core/formats.h"

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

// Whether elements and the bytes from the first to the last can be counted in 64 bits.
bool countable(const TensorView& view) {
  const std::int64_t size = size_of(view.dtype);
  std::int64_t bytes = size, elements = 1;
  for (int i = 0; i < view.ndim; ++i) {
    const std::int64_t extent = std::max<std::int64_t>(1, view.sizes[i]);
    std::int64_t last = 0, step = 0;
    if (__builtin_mul_overflow(elements, extent, &elements) || __builtin_mul_overflow(view.strides[i], extent - 1, &last) ||
        __builtin_mul_overflow(last, size, &step) || __builtin_add_overflow(bytes, step, &bytes))
      return false;
  }
  return true;
}

std::string in_dimension(std::int64_t value, int dim) { return std::to_string(value) + " in dimension " + std::to_string(dim); }

// Whether two indices of a view are one element: whether sum(d_i * pitch_i) is 0 for differences d of indices that are not all
// 0. Searched from the largest pitch on, where what the others can make up for leaves few candidates.
class SelfOverlap {
 public:
  explicit SelfOverlap(const TensorView& view) {
    for (int i = 0; i < view.ndim; ++i) {
      if (view.sizes[i] <= 1) continue;
      int at = ndim_++;
      for (; at > 0 && stride_[at - 1] < view.strides[i]; --at) stride_[at] = stride_[at - 1], last_[at] = last_[at - 1];
      stride_[at] = view.strides[i];
      last_[at] = view.sizes[i] - 1;
    }
    for (int i = ndim_ - 1; i >= 0; --i) reach_[i] = reach_[i + 1] + stride_[i] * last_[i];
  }

  bool exists() {
    bool nested = true;  // the usual case: each pitch is larger than all that lies inside
    for (int i = 0; i < ndim_; ++i) nested &= stride_[i] > reach_[i + 1];
    return !nested && search(0, 0, false);
  }

 private:
  // With differences chosen for the dimensions before `dim` that sum up to `sum`.
  bool search(int dim, std::int64_t sum, bool any) {
    if (dim == ndim_) return any && sum == 0;
    if (++steps_ > kMaxSteps) return true;  // not proven
    const std::int64_t stride = stride_[dim], reach = reach_[dim + 1];
    if (stride == 0) return true;
    // -sum - reach <= d * stride <= -sum + reach
    const auto floor_div = [](std::int64_t a, std::int64_t b) { return a / b - (a % b < 0 ? 1 : 0); };
    const std::int64_t first = std::max(-last_[dim], -floor_div(sum + reach, stride));
    const std::int64_t last = std::min(last_[dim], floor_div(reach - sum, stride));
    for (std::int64_t d = any ? first : std::max<std::int64_t>(first, 0); d <= last; ++d)  // d and -d are the same pair
      if (search(dim + 1, sum + d * stride, any || d != 0)) return true;
    return false;
  }

  static constexpr int kMaxSteps = 1 << 16;
  int ndim_ = 0, steps_ = 0;
  std::int64_t stride_[kMaxDims] = {}, last_[kMaxDims] = {}, reach_[kMaxDims + 1] = {};
};

std::string strides_string(const TensorView& view) {
  TensorView strides = view;
  std::copy(view.strides, view.strides + view.ndim, strides.sizes);
  return shape_string(strides);
}

}  // namespace

void fail(const char* op, const char* argument, const std::string& expected, const std::string& actual) {
  throw Error(std::string("fp8kv::") + op + ": " + argument + " must " + expected + ", got " + actual);
}

void check_view(const Argument& a) {
  const TensorView& view = a.view;
  if (view.ndim < 0 || view.ndim > kMaxDims)
    fail(a.op, a.name, "have at most " + std::to_string(kMaxDims) + " dimensions", std::to_string(view.ndim));
  for (int i = 0; i < view.ndim; ++i) {
    if (view.sizes[i] < 0) fail(a.op, a.name, "have sizes of at least 0", in_dimension(view.sizes[i], i));
    if (view.strides[i] < 0) fail(a.op, a.name, "have strides of at least 0", in_dimension(view.strides[i], i));
  }
  if (!countable(view))
    fail(a.op, a.name, "span fewer than 2^63 bytes", "shape " + shape_string(view) + " with strides " + strides_string(view));
  if (view.data == nullptr && view.numel() > 0)
    fail(a.op, a.name, "point to memory", "a null pointer of shape " + shape_string(view));
  const auto address = reinterpret_cast<std::uintptr_t>(view.data);
  const int size = size_of(view.dtype);
  if (size > 1 && address % size != 0)
    fail(a.op, a.name, "be aligned to its elements of " + std::to_string(size) + " bytes",
         "an address with remainder " + std::to_string(address % size));
}

void check_real(const Argument& a) {
  if (!is_real(a.view.dtype)) fail(a.op, a.name, "be " + names_of(RealTypes{}), name(a.view.dtype));
}

void check_quantized(const Argument& a) {
  if (!is_quantized(a.view.dtype)) fail(a.op, a.name, "be " + names_of(QuantizedTypes{}), name(a.view.dtype));
}

void check_float32(const Argument& a) {
  if (a.view.dtype != DType::Float32) fail(a.op, a.name, "be float32", name(a.view.dtype));
}

void check_on_device(const Argument& a, Device current) {
  const Device device = a.view.device;
  if (device.type != current.type)
    fail(a.op, a.name, current.type == Device::Type::CPU ? "be on the cpu" : "be on a CUDA device", device_string(device));
  if (!(device == current)) fail(a.op, a.name, "be on the current device, " + device_string(current), device_string(device));
}

void check_same_device(const Argument& a, const Argument& other) {
  if (!(a.view.device == other.view.device))
    fail(a.op, a.name, std::string("be on the device of ") + other.name + ", " + device_string(other.view.device),
         device_string(a.view.device));
}

void check_same_shape(const Argument& a, const Argument& other) {
  const bool same = a.view.ndim == other.view.ndim && std::equal(a.view.sizes, a.view.sizes + a.view.ndim, other.view.sizes);
  if (!same)
    fail(a.op, a.name, std::string("have the shape of ") + other.name + ", " + shape_string(other.view),
         "shape " + shape_string(a.view));
}

void check_no_self_overlap(const Argument& a) {
  constexpr const char* expected = "not overlap itself, as it is written";
  const TensorView& view = a.view;
  if (view.numel() == 0) return;
  for (int i = 0; i < view.ndim; ++i)
    if (view.sizes[i] > 1 && view.strides[i] == 0)
      fail(a.op, a.name, expected, "stride 0 in dimension " + std::to_string(i) + " of size " + std::to_string(view.sizes[i]));
  if (SelfOverlap(view).exists())
    fail(a.op, a.name, expected, "shape " + shape_string(view) + " with strides " + strides_string(view));
}

bool may_overlap(const TensorView& a, const TensorView& b) {
  const auto offset =
      static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(b.data) - reinterpret_cast<std::uintptr_t>(a.data));
  if (offset >= 0 ? offset >= extent(a) : -offset >= extent(b)) return false;  // the first ends before the other begins
  if (a.numel() == 0 || b.numel() == 0) return false;
  return may_overlap(footprint(a), footprint(b), 0, offset);
}

void check_no_overlap(const Argument& written, const Argument& other) {
  if (may_overlap(written.view, other.view))
    fail(written.op, written.name, std::string("not overlap ") + other.name, "views that share memory");
}

void check_written(std::initializer_list<const Argument*> written, std::initializer_list<const Argument*> read) {
  for (auto a = written.begin(); a != written.end(); ++a) {
    check_no_self_overlap(**a);
    for (auto b = a + 1; b != written.end(); ++b) check_no_overlap(**a, **b);
    for (const Argument* b : read) check_no_overlap(**a, *b);
  }
}

}  // namespace fp8kv::core
