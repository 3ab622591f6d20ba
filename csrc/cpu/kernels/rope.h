// RMSNorm and RoPE of heads.
#pragma once

#include "cpu/kernels/elementwise.h"

namespace fp8kv::cpu::FP8KV_ISA_NAMESPACE {
namespace {

constexpr int kPair = 2 * kLanes;  // elements stored per step

FP8KV_INLINE float norm_factor(float squares, std::int64_t count, const HeadTransform& t) {
  return 1.0f / __builtin_sqrtf(squares / static_cast<float>(count) + t.norm_eps);
}

FP8KV_INLINE void normalize(float* x, std::int64_t count, const HeadTransform& t) {
  F32 squares{};
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) squares += load(x + i) * load(x + i);
  float sum = 0.0f;
  for (int lane = 0; lane < kLanes; ++lane) sum += squares[lane];
  for (; i < count; ++i) sum += x[i] * x[i];
  const float factor = norm_factor(sum, count, t);
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

// Rounds two vectors to their type and stores them; NaN becomes the quiet NaN.
template <class Real>
FP8KV_INLINE void store_rounded(F32 a, F32 b, Real* out) {
  if (any_nan(a, b)) [[unlikely]]
    a = float_of(quiet(a)), b = float_of(quiet(b));
  store(out, a, b);
}

// Of any size and either kind of pairs, by way of `x`, which has room for the head.
template <class Real>
FP8KV_INLINE void transform_any(const Real* in, Real* out, std::int64_t columns, const HeadTransform& t, float* x) {
  std::int64_t i = 0;
  for (; i + kLanes <= columns; i += kLanes) store_vector(x + i, load(in + i));
  if (i < columns) {
    Real rest[kLanes] = {};
    for (std::int64_t k = i; k < columns; ++k) rest[k - i] = in[k];
    const F32 values = load(rest);
    for (std::int64_t k = i; k < columns; ++k) x[k] = values[k - i];
  }
  if (t.norm_weight && !t.norm_after_rope) normalize(x, columns, t);
  rotate(x, t);
  if (t.norm_weight && t.norm_after_rope) normalize(x, columns, t);
  for (i = 0; i + kPair <= columns; i += kPair) store_rounded(load(x + i), load(x + i + kLanes), out + i);
  if (i < columns) {
    float rest[kPair] = {};
    Real rounded[kPair];
    for (std::int64_t k = i; k < columns; ++k) rest[k - i] = x[k];
    store_rounded(load(rest), load(rest + kLanes), rounded);
    for (std::int64_t k = i; k < columns; ++k) out[k] = rounded[k - i];
  }
}

// The factors of the norm of kHeads heads, `stride` elements apart, whose sums and quotients don't wait for each other.
constexpr std::int64_t kHeads = 16;
template <class Real>
FP8KV_INLINE void norm_factors(const Real* in, std::int64_t stride, std::int64_t count, std::int64_t columns,
                               const HeadTransform& t, float (&factors)[kHeads]) {
  float lanes[kHeads][kLanes] = {}, sums[kHeads] = {};
  for (std::int64_t r = 0; r < count; ++r, in += stride) {
    F32 squares{};
    for (std::int64_t i = 0; i < columns; i += kLanes) {
      prefetch<Real, kLanes>(in + i);
      squares += load(in + i) * load(in + i);
    }
    store_vector(lanes[r], squares);
  }
  for (int lane = 0; lane < kLanes; ++lane)
    for (int r = 0; r < kHeads; ++r) sums[r] += lanes[r][lane];
  for (int r = 0; r < kHeads; ++r) factors[r] = norm_factor(sums[r], columns, t);
}

// The same where sizes are multiples of kPair, pairs are those of neox and the norm comes first, without leaving the registers.
template <bool kNorm, class Real>
FP8KV_INLINE void transform_vectors(const Real* in, Real* out, std::int64_t columns, const HeadTransform& t,
                                    [[maybe_unused]] F32 factor) {
  const auto element = [&](std::int64_t i) __attribute__((always_inline)) {
    return kNorm ? load(in + i) * factor * load(t.norm_weight + i) : load(in + i);
  };
  for (std::int64_t i = 0; i < t.pairs; i += kPair) {
    prefetch<Real, kPair>(in + i), prefetch<Real, kPair>(in + t.pairs + i);
    F32 first[2], second[2];
    for (int k = 0; k < 2; ++k) {
      const std::int64_t j = i + k * kLanes;
      const F32 a = element(j), b = element(t.pairs + j), cos = load(t.cos + j), sin = load(t.sin + j);
      first[k] = a * cos - b * sin;
      second[k] = b * cos + a * sin;
    }
    store_rounded(first[0], first[1], out + i);
    store_rounded(second[0], second[1], out + t.pairs + i);
  }
  for (std::int64_t i = 2 * t.pairs; i < columns; i += kPair) {
    prefetch<Real, kPair>(in + i);
    store_rounded(element(i), element(i + kLanes), out + i);
  }
}

template <class Real>
void transform_rows(const void* in_data, void* out_data, std::int64_t columns, const Rows& rows, const HeadTransform& t,
                    float* scratch) {
  const auto* in = static_cast<const Real*>(in_data);
  auto* out = static_cast<Real*>(out_data);
  const bool norm_first = !t.norm_weight || !t.norm_after_rope || t.pairs == 0;
  const bool whole_vectors = norm_first && (t.is_neox || t.pairs == 0) && t.pairs % kPair == 0 && columns % kPair == 0;
  if (!whole_vectors) {
    for (std::int64_t r = 0; r < rows.count; ++r) transform_any(in + r * rows.in, out + r * rows.out, columns, t, scratch);
  } else if (!t.norm_weight) {
    for (std::int64_t r = 0; r < rows.count; ++r)
      transform_vectors<false>(in + r * rows.in, out + r * rows.out, columns, t, F32{});
  } else {
    float factors[kHeads];
    for (std::int64_t first = 0; first < rows.count; first += kHeads) {
      const std::int64_t count = rows.count - first < kHeads ? rows.count - first : kHeads;
      norm_factors(in + first * rows.in, rows.in, count, columns, t, factors);
      for (std::int64_t r = first; r < first + count; ++r)
        transform_vectors<true>(in + r * rows.in, out + r * rows.out, columns, t, splat(factors[r - first]));
    }
  }
}

}  // namespace
}  // namespace fp8kv::cpu::FP8KV_ISA_NAMESPACE
