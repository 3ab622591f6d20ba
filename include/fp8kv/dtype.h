// Element types and their traits.
//
// Inputs and outputs of 16 and 32 bits are Float32, Float16 or BFloat16; quantized elements are E4M3, E5M2 or Int8
// (docs/numerics.md). The others are unsupported types, listed so that errors can name them.
#pragma once

#include <cstdint>

// Marks a function that is compiled for the host and, by nvcc, for the device.
#if defined(__CUDACC__)
#define FP8KV_HD __host__ __device__
#else
#define FP8KV_HD
#endif

namespace fp8kv {

enum class DType : std::uint8_t {
  Float32,
  Float16,
  BFloat16,
  E4M3,  // torch.float8_e4m3fn
  E5M2,  // torch.float8_e5m2
  Float64,
  E4M3Fnuz,
  E5M2Fnuz,
  UInt8,
  Int8,
  Int16,
  Int32,
  Int64,
  Bool,
  Other,
};

// The name PyTorch prints, without "torch.".
constexpr const char* name(DType dtype) {
  switch (dtype) {
    case DType::Float32: return "float32";
    case DType::Float16: return "float16";
    case DType::BFloat16: return "bfloat16";
    case DType::E4M3: return "float8_e4m3fn";
    case DType::E5M2: return "float8_e5m2";
    case DType::Float64: return "float64";
    case DType::E4M3Fnuz: return "float8_e4m3fnuz";
    case DType::E5M2Fnuz: return "float8_e5m2fnuz";
    case DType::UInt8: return "uint8";
    case DType::Int8: return "int8";
    case DType::Int16: return "int16";
    case DType::Int32: return "int32";
    case DType::Int64: return "int64";
    case DType::Bool: return "bool";
    case DType::Other: break;
  }
  return "an unsupported dtype";
}

// Bytes of one element; 0 for Other.
constexpr int size_of(DType dtype) {
  switch (dtype) {
    case DType::Float64:
    case DType::Int64: return 8;
    case DType::Float32:
    case DType::Int32: return 4;
    case DType::Float16:
    case DType::BFloat16:
    case DType::Int16: return 2;
    case DType::Other: return 0;
    default: return 1;
  }
}

// Element types as C++ types: the bit pattern, without arithmetic. Conversions are in fp8.h.
struct Half {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};
struct E4M3 {
  std::uint8_t bits;
};
struct E5M2 {
  std::uint8_t bits;
};
struct Int8 {  // two's complement
  std::uint8_t bits;
};

template <class T>
struct DTypeOf;
template <>
struct DTypeOf<float> {
  static constexpr DType value = DType::Float32;
};
template <>
struct DTypeOf<Half> {
  static constexpr DType value = DType::Float16;
};
template <>
struct DTypeOf<BFloat16> {
  static constexpr DType value = DType::BFloat16;
};
template <>
struct DTypeOf<E4M3> {
  static constexpr DType value = DType::E4M3;
};
template <>
struct DTypeOf<E5M2> {
  static constexpr DType value = DType::E5M2;
};
template <>
struct DTypeOf<Int8> {
  static constexpr DType value = DType::Int8;
};

}  // namespace fp8kv
