// RMSNorm and RoPE of heads.
#pragma once

#include "cpu/kernels/elementwise.h"

namespace fp8kv::cpu::FP8KV_ISA_NAMESPACE {
namespace {

FP8KV_INLINE void normalize(float* x, std::int64_t count, const HeadTransform& t) {
  F32 squares{};
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) squares += load(x + i) * load(x + i);
  float sum = 0.0f;
  for (int lane = 0; lane < kLanes; ++lane) sum += squares[lane];
  for (; i < count; ++i) sum += x[i] * x[i];
  const float factor = 1.0f / __builtin_sqrtf(sum / static_cast<float>(count) + t.norm_eps);
  for (i = 0; i + kLanes <= count; i += kLanes) store_vector(x + i, load(x + i) * factor * load(t.norm_weight + i));
  for (; i < count; ++i) x[i] = x[i] * factor * t.norm_weight[i];
}

FP8KV_INLINE void rotate(float& a, float& b, float cos, float sin) {
  const float first = a * cos - b * sin;
  b = b * cos + a * sin;
  a = first;
}

FP8KV_INLINE void rotate(float* x, const HeadTransform& t) {
  std::int64_t i = 0;
  if (!t.is_neox) {
    for (; i < t.pairs; ++i) rotate(x[2 * i], x[2 * i + 1], t.cos[i], t.sin[i]);
    return;
  }
  float* y = x + t.pairs;
  for (; i + kLanes <= t.pairs; i += kLanes) {
    const F32 a = load(x + i), b = load(y + i), cos = load(t.cos + i), sin = load(t.sin + i);
    store_vector(x + i, a * cos - b * sin);
    store_vector(y + i, b * cos + a * sin);
  }
  for (; i < t.pairs; ++i) rotate(x[i], y[i], t.cos[i], t.sin[i]);
}

// Rounds a tile to its type and stores it; NaN becomes the quiet NaN.
template <class Real>
FP8KV_INLINE void store_rounded(const float* x, Real* out) {
  F32 tile[4];
  for (int k = 0; k < 4; ++k) tile[k] = float_of(quiet(load(x + k * kLanes)));
  store(out, tile);
}

template <class Real>
void transform_rows(const void* in_data, void* out_data, std::int64_t columns, const Rows& rows, const HeadTransform& t,
                    float* x) {
  const auto* in = static_cast<const Real*>(in_data);
  auto* out = static_cast<Real*>(out_data);
  for (std::int64_t r = 0; r < rows.count; ++r, in += rows.in, out += rows.out) {
    std::int64_t i = 0;
    for (; i + kLanes <= columns; i += kLanes) store_vector(x + i, load(in + i));
    if (i < columns) {
      Real rest[kLanes] = {};
      for (std::int64_t k = i; k < columns; ++k) rest[k - i] = in[k];
      const F32 values = load(rest);
      for (std::int64_t k = i; k < columns; ++k) x[k] = values[k - i];
    }
    if (t.norm_weight) normalize(x, columns, t);
    rotate(x, t);
    for (i = 0; i + kTile <= columns; i += kTile) store_rounded(x + i, out + i);
    if (i < columns) {
      float rest[kTile] = {};
      Real rounded[kTile];
      for (std::int64_t k = i; k < columns; ++k) rest[k - i] = x[k];
      store_rounded(rest, rounded);
      for (std::int64_t k = i; k < columns; ++k) out[k] = rounded[k - i];
    }
  }
}

}  // namespace
}  // namespace fp8kv::cpu::FP8KV_ISA_NAMESPACE
