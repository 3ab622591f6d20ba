// From a DType at run time to an element type at compile time.
#pragma once

#include <string>

#include "core/formats.h"
#include "fp8kv/error.h"

namespace fp8kv::core {

template <class T>
struct Type {
  using type = T;
};

// Calls f(Type<T>{}) for the T of the list that `dtype` names.
template <class F, class... Ts>
void visit(TypeList<Ts...>, DType dtype, F&& f) {
  const bool found = ((DTypeOf<Ts>::value == dtype && (f(Type<Ts>{}), true)) || ...);
  if (!found) throw Error(std::string("fp8kv: no kernel for elements of ") + name(dtype));
}

template <class F>
void visit_real(DType dtype, F&& f) {
  visit(RealTypes{}, dtype, f);
}

template <class F>
void visit_quantized(DType dtype, F&& f) {
  visit(QuantizedTypes{}, dtype, f);
}

template <class F>
void visit_fp8(DType dtype, F&& f) {
  visit(Fp8Types{}, dtype, f);
}

// The smallest scale that dynamic quantization to a format writes.
inline float min_scale(DType dtype) {
  float scale = 0.0f;
  visit_quantized(dtype, [&]<class T>(Type<T>) { scale = kMinScale<T>; });
  return scale;
}

}  // namespace fp8kv::core
