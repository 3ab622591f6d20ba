// The offsets of channels: what is quantized is x - offset, what is dequantized is q * scale + offset, in fp32.
#pragma once

#include "cpu/kernels/elementwise.h"

namespace fp8kv::cpu::FP8KV_ISA_NAMESPACE {
namespace {

template <class Real>
void subtract_offsets(const void* in_data, const float* offsets, float* out, std::int64_t count) {
  const auto* in = static_cast<const Real*>(in_data);
  std::int64_t i = 0;
  for (; i + kTile <= count; i += kTile) {
    prefetch<Real, kTile>(in + i);
    for (int k = 0; k < kTile; k += kLanes) store_vector(out + i + k, load(in + i + k) - load(offsets + i + k));
  }
  for (; i + kLanes <= count; i += kLanes) store_vector(out + i, load(in + i) - load(offsets + i));
  if (i == count) return;
  Real rest[kLanes] = {};
  for (std::int64_t k = i; k < count; ++k) rest[k - i] = in[k];
  const F32 values = load(rest);
  for (std::int64_t k = i; k < count; ++k) out[k] = values[k - i] - offsets[k];
}

template <class Real>
FP8KV_INLINE void add_to_tile(const float* in, const float* offsets, Real* out) {
  F32 x[4];
  for (int k = 0; k < 4; ++k) x[k] = float_of(quiet(load(in + k * kLanes) + load(offsets + k * kLanes)));
  store(out, x);
}

template <class Real>
void add_offsets(const float* in, const float* offsets, void* out_data, std::int64_t count) {
  auto* out = static_cast<Real*>(out_data);
  std::int64_t i = 0;
  for (; i + kTile <= count; i += kTile) add_to_tile(in + i, offsets + i, out + i);
  if (i == count) return;
  float x[kTile] = {}, y[kTile] = {};
  Real rest[kTile];
  for (std::int64_t k = i; k < count; ++k) x[k - i] = in[k], y[k - i] = offsets[k];
  add_to_tile(x, y, rest);
  for (std::int64_t k = i; k < count; ++k) out[k] = rest[k - i];
}

}  // namespace
}  // namespace fp8kv::cpu::FP8KV_ISA_NAMESPACE
