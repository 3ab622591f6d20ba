// The arithmetic of attention on fp32 rows. Rows are padded with zeros to a multiple of kAttentionPadding elements.
#pragma once

#include "cpu/kernels/codec.h"
#include "cpu/kernels/table.h"

namespace fp8kv::cpu::FP8KV_ISA_NAMESPACE {
namespace {

static_assert(kAttentionPadding % kLanes == 0);

// exp(x) for x <= 0, to about 2 units in the last place; 0 below the smallest normal; NaN stays. The polynomial is that of
// Taylor, on [-ln(2) / 2, ln(2) / 2].
FP8KV_INLINE F32 exp_of(F32 x) {
  constexpr float kLog2e = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f, kLowest = -87.0f;
  constexpr float kMagic = 0x1.8p23f;  // a sum with it is rounded to an integer
  const F32 limited = float_of(select(x < kLowest, bits_of(splat(kLowest)), bits_of(x)));
  const F32 rounded = limited * kLog2e + kMagic;
  const F32 n = rounded - kMagic;
  const F32 r = multiply_add(n, splat(-kLn2Low), multiply_add(n, splat(-kLn2High), limited));
  F32 y = splat(1.0f / 5040.0f);
  for (float factor : {1.0f / 720.0f, 1.0f / 120.0f, 1.0f / 24.0f, 1.0f / 6.0f, 0.5f, 1.0f, 1.0f})
    y = multiply_add(y, r, splat(factor));
  const I32 power = (bits_of(rounded) - __builtin_bit_cast(std::int32_t, kMagic)) << 23;
  const I32 result = select(x < kLowest, I32{}, bits_of(y) + power);
  return float_of(select(x != x, bits_of(x), result));
}

FP8KV_INLINE float sum_of_lanes(F32 x) {
  float sum = 0.0f;
  for (int i = 0; i < kLanes; ++i) sum += x[i];
  return sum;
}

// The products of kRows rows of queries with kKeys keys.
template <int kRows, int kKeys>
FP8KV_INLINE void score_block(const float* queries, const float* keys, float* scores, std::int64_t columns,
                              std::int64_t scores_stride) {
  F32 sums[kRows][kKeys] = {};
  for (std::int64_t i = 0; i < columns; i += kLanes) {
    F32 key[kKeys];
    for (int k = 0; k < kKeys; ++k) key[k] = load(keys + k * columns + i);
    for (int r = 0; r < kRows; ++r) {
      const F32 query = load(queries + r * columns + i);
      for (int k = 0; k < kKeys; ++k) sums[r][k] = multiply_add(query, key[k], sums[r][k]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int k = 0; k < kKeys; ++k) scores[r * scores_stride + k] = sum_of_lanes(sums[r][k]);
}

template <int kRows>
FP8KV_INLINE void score_rows(const float* queries, const float* keys, float* scores, std::int64_t num_keys,
                             std::int64_t columns, std::int64_t scores_stride) {
  std::int64_t k = 0;
  for (; k + 4 <= num_keys; k += 4) score_block<kRows, 4>(queries, keys + k * columns, scores + k, columns, scores_stride);
  for (; k < num_keys; ++k) score_block<kRows, 1>(queries, keys + k * columns, scores + k, columns, scores_stride);
}

void attention_scores(const float* queries, const float* keys, float* scores, std::int64_t num_rows, std::int64_t num_keys,
                      std::int64_t columns, std::int64_t scores_stride) {
  std::int64_t r = 0;
  for (; r + 4 <= num_rows; r += 4)
    score_rows<4>(queries + r * columns, keys, scores + r * scores_stride, num_keys, columns, scores_stride);
  for (; r < num_rows; ++r)
    score_rows<1>(queries + r * columns, keys, scores + r * scores_stride, num_keys, columns, scores_stride);
}

float attention_exponentials(float* x, std::int64_t count, float maximum) {
  F32 sums{};
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const F32 y = exp_of(load(x + i) - maximum);
    store_vector(x + i, y);
    sums += y;
  }
  if (i < count) {
    float rest[kLanes];
    for (int k = 0; k < kLanes; ++k) rest[k] = i + k < count ? x[i + k] - maximum : -100.0f;  // whose exponential counts as 0
    const F32 y = exp_of(load(rest));
    sums += y;
    for (std::int64_t k = i; k < count; ++k) x[k] = y[k - i];
  }
  return sum_of_lanes(sums);
}

// kVectors vectors of columns stay in registers while all values pass by.
template <int kVectors>
FP8KV_INLINE void accumulate_columns(const float* weights, const float* values, float* out, float factor,
                                     std::int64_t num_values, std::int64_t columns) {
  F32 sums[kVectors];
  for (int k = 0; k < kVectors; ++k) sums[k] = load(out + k * kLanes) * factor;
  for (std::int64_t v = 0; v < num_values; ++v) {
    const F32 weight = splat(weights[v]);
    for (int k = 0; k < kVectors; ++k) sums[k] = multiply_add(weight, load(values + v * columns + k * kLanes), sums[k]);
  }
  for (int k = 0; k < kVectors; ++k) store_vector(out + k * kLanes, sums[k]);
}

void attention_accumulate(const float* weights, const float* values, float* out, float factor, std::int64_t num_values,
                          std::int64_t columns) {
  std::int64_t i = 0;
  for (; i + 8 * kLanes <= columns; i += 8 * kLanes)
    accumulate_columns<8>(weights, values + i, out + i, factor, num_values, columns);
  for (; i < columns; i += kLanes) accumulate_columns<1>(weights, values + i, out + i, factor, num_values, columns);
}

}  // namespace
}  // namespace fp8kv::cpu::FP8KV_ISA_NAMESPACE
