// The element types that kernels exist for. Dispatch, kernel tables, error messages and the names of cache formats are made
// from the lists here, so that a new format is a row in this file and its codecs (docs/internals/add_a_format.md).
#pragma once

#include <string>
#include <string_view>

#include "fp8kv/fp8.h"

namespace fp8kv::core {

template <class... Ts>
struct TypeList {
  static constexpr int kSize = sizeof...(Ts);
};

template <class... Ts, class... Us>
constexpr TypeList<Ts..., Us...> operator+(TypeList<Ts...>, TypeList<Us...>) {
  return {};
}

// Types of unquantized values, and of quantized ones. Only in those of FP8 queries may be quantized, and only tensors of them
// may be UInt8.
using RealTypes = TypeList<float, Half, BFloat16>;
using Fp8Types = TypeList<E4M3, E5M2>;
using QuantizedTypes = decltype(Fp8Types{} + TypeList<Int8>{});

// What kv_cache_dtype calls the formats of a cache, in the order in which messages list them. The first name of a format is the
// one that messages call it.
struct CacheFormat {
  std::string_view name;
  DType dtype;
};
inline constexpr CacheFormat kCacheFormats[] = {
    {"float16", DType::Float16}, {"bfloat16", DType::BFloat16}, {"float32", DType::Float32}, {"fp8", DType::E4M3},
    {"fp8_e4m3", DType::E4M3},   {"fp8_e5m2", DType::E5M2},     {"int8", DType::Int8},
};

// The place of a type in a list; -1 if it is not there.
template <class... Ts>
constexpr int index_in(TypeList<Ts...>, DType dtype) {
  int index = -1, i = 0;
  ((DTypeOf<Ts>::value == dtype ? void(index = i) : void(), ++i), ...);
  return index;
}

constexpr int real_index(DType dtype) { return index_in(RealTypes{}, dtype); }
constexpr int quantized_index(DType dtype) { return index_in(QuantizedTypes{}, dtype); }
constexpr bool is_real(DType dtype) { return real_index(dtype) >= 0; }
constexpr bool is_quantized(DType dtype) { return quantized_index(dtype) >= 0; }
constexpr bool is_fp8(DType dtype) { return index_in(Fp8Types{}, dtype) >= 0; }

constexpr std::string_view cache_format_name(DType dtype) {
  for (const CacheFormat& format : kCacheFormats)
    if (format.dtype == dtype) return format.name;
  return name(dtype);
}

template <class T>
inline constexpr bool kIsQuantized = is_quantized(DTypeOf<T>::value);

// "float32, float16 or bfloat16".
template <class... Ts>
std::string names_of(TypeList<Ts...>) {
  std::string text;
  int i = 0;
  ((text += (i == 0 ? "" : i + 1 < int{sizeof...(Ts)} ? ", " : " or "), text += name(DTypeOf<Ts>::value), ++i), ...);
  return text;
}

}  // namespace fp8kv::core
