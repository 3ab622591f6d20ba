// Views of memory owned by the caller: a pointer, an element type, a device, sizes and strides. No framework.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>

#include "fp8kv/dtype.h"

namespace fp8kv {

inline constexpr int kMaxDims = 8;

struct Device {
  enum class Type : std::uint8_t { CPU, CUDA, Other };
  Type type = Type::CPU;
  int index = 0;

  constexpr bool operator==(const Device& other) const {
    return type == other.type && (type == Type::CPU || index == other.index);
  }
};

// An N-dimensional strided array. Element (i0, i1, ...) lies at data + size_of(dtype) * (i0*strides[0] + i1*strides[1] + ...).
// Sizes and strides count elements; a stride may be anything >= 0. Only the first min(ndim, kMaxDims) entries are set.
struct TensorView {
  void* data = nullptr;
  DType dtype = DType::Float32;
  Device device{};
  int ndim = 0;
  std::int64_t sizes[kMaxDims] = {};
  std::int64_t strides[kMaxDims] = {};

  constexpr std::int64_t numel() const {
    std::int64_t count = 1;
    for (int i = 0; i < ndim && i < kMaxDims; ++i) count *= sizes[i];
    return count;
  }
};

// A row-major view. Example: contiguous(ptr, DType::BFloat16, {num_tokens, hidden_size}).
inline TensorView contiguous(const void* data, DType dtype, std::initializer_list<std::int64_t> sizes, Device device = {}) {
  TensorView view{.data = const_cast<void*>(data), .dtype = dtype, .device = device, .ndim = static_cast<int>(sizes.size())};
  if (view.ndim > kMaxDims) return view;  // every validate() refuses it with a sentence
  int i = 0;
  for (std::int64_t size : sizes) view.sizes[i++] = size;
  std::int64_t stride = 1;
  for (i = view.ndim - 1; i >= 0; --i) {
    view.strides[i] = stride;
    stride *= view.sizes[i] > 1 ? view.sizes[i] : 1;
  }
  return view;
}

// "[2, 3]"; "[]" for a scalar.
inline std::string shape_string(const TensorView& view) {
  std::string text = "[";
  for (int i = 0; i < view.ndim && i < kMaxDims; ++i) text += (i ? ", " : "") + std::to_string(view.sizes[i]);
  return text + (view.ndim > kMaxDims ? ", ...]" : "]");
}

// "cpu" or "cuda:0".
inline std::string device_string(Device device) {
  if (device.type == Device::Type::CPU) return "cpu";
  return (device.type == Device::Type::CUDA ? "cuda:" : "device:") + std::to_string(device.index);
}

}  // namespace fp8kv
