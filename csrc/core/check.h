// Checks shared by all validators. Each names the op and the argument in its sentence.
#pragma once

#include <algorithm>
#include <string>

#include "fp8kv/error.h"
#include "fp8kv/views.h"

namespace fp8kv::core {

// A tensor argument with the names its errors use.
struct Argument {
  const char* op;
  const char* name;
  const TensorView& view;
};

inline void check_dims(const Argument& a) {
  if (a.view.ndim > kMaxDims)
    fail(a.op, a.name, "have at most " + std::to_string(kMaxDims) + " dimensions", std::to_string(a.view.ndim));
}

inline void check_real(const Argument& a) {
  if (!is_real(a.view.dtype)) fail(a.op, a.name, "be float32, float16 or bfloat16", name(a.view.dtype));
}

inline void check_fp8(const Argument& a) {
  if (!is_fp8(a.view.dtype)) fail(a.op, a.name, "be float8_e4m3fn or float8_e5m2", name(a.view.dtype));
}

inline void check_float32(const Argument& a) {
  if (a.view.dtype != DType::Float32) fail(a.op, a.name, "be float32", name(a.view.dtype));
}

// PyTorch keeps every tensor aligned to its elements; plain pointers may not be.
inline void check_element_alignment(const Argument& a) {
  const auto address = reinterpret_cast<std::uintptr_t>(a.view.data);
  const int size = size_of(a.view.dtype);
  if (size > 1 && address % size != 0)
    fail(a.op, a.name, "be aligned to its elements of " + std::to_string(size) + " bytes",
         "an address with remainder " + std::to_string(address % size));
}

inline void check_argument(const Argument& a) {
  check_dims(a);
  check_element_alignment(a);
}

inline void check_same_device(const Argument& a, const Argument& other) {
  if (!(a.view.device == other.view.device))
    fail(a.op, a.name, std::string("be on the device of ") + other.name + ", " + device_string(other.view.device),
         device_string(a.view.device));
}

inline void check_same_shape(const Argument& a, const Argument& other) {
  const bool same = a.view.ndim == other.view.ndim && std::equal(a.view.sizes, a.view.sizes + a.view.ndim, other.view.sizes);
  if (!same)
    fail(a.op, a.name, std::string("have the shape of ") + other.name + ", " + shape_string(other.view),
         "shape " + shape_string(a.view));
}

// A written tensor in which two indices are certainly the same element, as in expand().
inline void check_writable(const Argument& a) {
  for (int i = 0; i < a.view.ndim; ++i)
    if (a.view.sizes[i] > 1 && a.view.strides[i] == 0)
      fail(a.op, a.name, "not overlap itself, as it is written",
           "stride 0 in dimension " + std::to_string(i) + " of size " + std::to_string(a.view.sizes[i]));
}

// False only where the two certainly share no byte: disjoint ranges, or rows of the same pitches that lie beside each other
// (slices of one tensor in any of its dimensions).
bool may_overlap(const TensorView& a, const TensorView& b);

inline void check_no_overlap(const Argument& written, const Argument& other) {
  if (may_overlap(written.view, other.view))
    fail(written.op, written.name, std::string("not overlap ") + other.name, "views that share memory");
}

}  // namespace fp8kv::core
