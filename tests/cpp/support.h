// What several tests share.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "fp8kv/error.h"
#include "fp8kv/views.h"

namespace fp8kv::testing_support {

// The sentence of the Error that `body` throws; "" when it throws none.
template <class Body>
std::string error_of(Body&& body) {
  try {
    body();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

// The sentence that refuses a problem; "" when it is sound.
template <class Problem>
std::string sentence(const Problem& problem) {
  return error_of([&] { validate(problem); });
}

using Sizes = std::vector<std::int64_t>;

// A view of memory that nobody looks into; row-major without strides.
inline TensorView view_at(std::uintptr_t address, DType dtype, const Sizes& sizes, const Sizes& strides = {}) {
  TensorView view{.data = reinterpret_cast<void*>(address), .dtype = dtype, .ndim = static_cast<int>(sizes.size())};
  std::int64_t stride = 1;
  for (int i = view.ndim - 1; i >= 0; --i) {
    if (i >= kMaxDims) continue;
    view.sizes[i] = sizes[i];
    view.strides[i] = strides.empty() ? stride : strides[i];
    if (strides.empty()) stride *= std::max<std::int64_t>(1, sizes[i]);
  }
  return view;
}

}  // namespace fp8kv::testing_support
