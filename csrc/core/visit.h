// From a DType at run time to an element type at compile time.
#pragma once

#include "fp8kv/dtype.h"
#include "fp8kv/error.h"

namespace fp8kv::core {

template <class T>
struct Type {
  using type = T;
};

// Calls f(Type<float>{}), f(Type<Half>{}) or f(Type<BFloat16>{}).
template <class F>
void visit_real(DType dtype, F&& f) {
  switch (dtype) {
    case DType::Float32: return f(Type<float>{});
    case DType::Float16: return f(Type<Half>{});
    case DType::BFloat16: return f(Type<BFloat16>{});
    default: throw Error(std::string("fp8kv: no kernel for elements of ") + name(dtype));
  }
}

// Calls f(Type<E4M3>{}) or f(Type<E5M2>{}).
template <class F>
void visit_fp8(DType dtype, F&& f) {
  switch (dtype) {
    case DType::E4M3: return f(Type<E4M3>{});
    case DType::E5M2: return f(Type<E5M2>{});
    default: throw Error(std::string("fp8kv: no kernel for elements of ") + name(dtype));
  }
}

}  // namespace fp8kv::core
