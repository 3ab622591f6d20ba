// The kernels of quantization for one instruction set; quantize_generic.cpp, quantize_avx2.cpp and quantize_avx512.cpp each
// include this file once.
#pragma once

#include "quantize_table.h"
#include "simd.h"

namespace fp8kv::cpu::FP8KV_ISA_NAMESPACE {
namespace {

// --- Quantize and dequantize ---------------------------------------------------------------------------------------------------

struct Divide {
  FP8KV_INLINE F32 apply(F32 x, F32 scale) { return x / scale; }
};

struct Multiply {
  FP8KV_INLINE F32 apply(F32 x, F32 scale) { return x * scale; }
};

enum class Scales { One, Columns };

// A piece shorter than a vector, through a vector of its own.
template <class Step, class In, class Out>
FP8KV_INLINE void map_short(const In* in, Out* out, std::int64_t count, const float* scale, bool columns) {
  In x[kLanes] = {};
  Out y[kLanes];
  float s[kLanes];
  for (int i = 0; i < kLanes; ++i) s[i] = scale[columns && i < count ? i : 0];
  for (int i = 0; i < count; ++i) x[i] = in[i];
  store(y, Step::apply(load(x), load(s)));
  for (int i = 0; i < count; ++i) out[i] = y[i];
}

template <class Step, Scales kScales, class In, class Out>
void map(const void* in_data, void* out_data, std::int64_t count, const float* scale) {
  const auto* in = static_cast<const In*>(in_data);
  auto* out = static_cast<Out*>(out_data);
  if (count < kLanes) return map_short<Step>(in, out, count, scale, kScales == Scales::Columns);
  const F32 one = splat(*scale);
  const auto step = [&](std::int64_t i) __attribute__((always_inline)) {
    store(out + i, Step::apply(load(in + i), kScales == Scales::Columns ? load(scale + i) : one));
  };
  for (std::int64_t i = 0; i + kLanes <= count; i += kLanes) step(i);
  if (count % kLanes) step(count - kLanes);  // overlaps the one before: the same bytes again
}

// --- Largest finite magnitudes -------------------------------------------------------------------------------------------------

// The bits of |x| without its sign order like the values, so 16-bit types are compared as they are.
template <class T>
struct Magnitude {
  using Bits = std::int16_t;
  static constexpr Bits kMask = 0x7fff;
};
template <>
struct Magnitude<float> {
  using Bits = std::int32_t;
  static constexpr Bits kMask = kMagnitude;
};

template <class T>
constexpr typename Magnitude<T>::Bits kInfinityBits = 0x7c00;
template <>
constexpr std::int16_t kInfinityBits<BFloat16> = 0x7f80;
template <>
constexpr std::int32_t kInfinityBits<float> = kInfinity;

// The fp32 bits of a non-negative T.
template <class T>
FP8KV_INLINE std::int32_t widen_magnitude(typename Magnitude<T>::Bits bits) {
  T x[kLanes] = {};
  __builtin_memcpy(&x[0], &bits, sizeof bits);
  return bits_of(load(x))[0];
}

template <class T>
std::int32_t amax(const void* in_data, std::int64_t count) {
  using Bits = typename Magnitude<T>::Bits;
  typedef Bits Vector __attribute__((vector_size(4 * kLanes)));
  constexpr int kWidth = sizeof(Vector) / sizeof(Bits);
  const auto* in = static_cast<const T*>(in_data);
  Vector largest = {};
  const auto step = [&](const T* from) __attribute__((always_inline)) {
    const Vector x = load_vector<Vector>(from) & Magnitude<T>::kMask;
    const Vector finite = x < kInfinityBits<T> ? x : Vector{};
    largest = finite > largest ? finite : largest;
  };
  if (count < kWidth) {
    T x[kWidth] = {};
    for (int i = 0; i < count; ++i) x[i] = in[i];
    step(x);
  } else {
    for (std::int64_t i = 0; i + kWidth <= count; i += kWidth) step(in + i);
    if (count % kWidth) step(in + count - kWidth);
  }
  Bits result = 0;
  for (int i = 0; i < kWidth; ++i) result = largest[i] > result ? largest[i] : result;
  return widen_magnitude<T>(result);
}

template <class T>
void amax_columns(const void* in_data, std::int64_t count, std::int32_t* largest) {
  const auto* in = static_cast<const T*>(in_data);
  const auto step = [](const T* from, std::int32_t* to) __attribute__((always_inline)) {
    const I32 x = bits_of(load(from)) & kMagnitude;
    store_vector(to, max(select(x < kInfinity, x, I32{}), load_vector<I32>(to)));
  };
  if (count < kLanes) {
    T x[kLanes] = {};
    std::int32_t y[kLanes] = {};
    for (int i = 0; i < count; ++i) x[i] = in[i], y[i] = largest[i];
    step(x, y);
    for (int i = 0; i < count; ++i) largest[i] = y[i];
    return;
  }
  for (std::int64_t i = 0; i + kLanes <= count; i += kLanes) step(in + i, largest + i);
  if (count % kLanes) step(in + count - kLanes, largest + count - kLanes);
}

// --- The table -----------------------------------------------------------------------------------------------------------------

template <class In, class Out>
constexpr MapKernels quantize_kernels = {map<Divide, Scales::One, In, Out>, map<Divide, Scales::Columns, In, Out>};

template <class In, class Out>
constexpr MapKernels dequantize_kernels = {map<Multiply, Scales::One, In, Out>, map<Multiply, Scales::Columns, In, Out>};

}  // namespace

const QuantizeTable quantize_table = {
    .quantize = {{quantize_kernels<float, E4M3>, quantize_kernels<float, E5M2>},
                 {quantize_kernels<Half, E4M3>, quantize_kernels<Half, E5M2>},
                 {quantize_kernels<BFloat16, E4M3>, quantize_kernels<BFloat16, E5M2>}},
    .dequantize = {{dequantize_kernels<E4M3, float>, dequantize_kernels<E4M3, Half>, dequantize_kernels<E4M3, BFloat16>},
                   {dequantize_kernels<E5M2, float>, dequantize_kernels<E5M2, Half>, dequantize_kernels<E5M2, BFloat16>}},
    .amax = {amax<float>, amax<Half>, amax<BFloat16>},
    .amax_columns = {amax_columns<float>, amax_columns<Half>, amax_columns<BFloat16>},
};

}  // namespace fp8kv::cpu::FP8KV_ISA_NAMESPACE
