// RopeLayout: the fused step (fp8kv/rope.h) in the form that all backends work from.
#pragma once

#include "core/cache_layout.h"
#include "fp8kv/rope.h"

namespace fp8kv::core {

struct View1D {  // Float32 or the type of query; nullptr: none
  const void* data = nullptr;
  std::int64_t stride = 1;
  DType dtype = DType::Float32;
};

// Which of a token's positions a frequency takes: its only one, or time, height or width.
struct Sections {
  int axes = 1;  // positions of a token: 1 or 3
  bool interleaved = false;
  std::int64_t height = 0;  // the first frequency of height; interleaved: the first that is no longer of height
  std::int64_t width = 0;

  // With three axes.
  constexpr int axis_of(std::int64_t frequency) const {
    if (!interleaved) return frequency < height ? 0 : frequency < width ? 1 : 2;
    const int axis = static_cast<int>(frequency % 3);
    return axis > 0 && frequency < (axis == 1 ? height : width) ? axis : 0;
  }
};

struct RopeLayout {
  CacheLayout cache;  // heads are never merged
  std::int64_t num_heads = 0;
  HeadsView query;
  HeadsView query_out;
  DType query_out_dtype = DType::Float32;  // quantized: with q_scale
  const float* q_scale = nullptr;
  std::int64_t q_scale_stride = 0;   // from one scale to the next
  std::int64_t heads_per_scale = 1;  // neighboring query heads that share one
  std::int64_t rotary_dim = 0;       // 0 without positions
  std::int64_t max_position = 0;
  View1D cos_sin;  // row 0
  std::int64_t cos_sin_row = 0;
  bool is_neox = true;
  Sections sections;
  View1D norm_weights[2];  // of Q and K
  float norm_eps = 0.0f;
  bool norm_after_rope = false;

  constexpr bool empty() const { return cache.num_tokens == 0 || cache.head_size == 0 || num_heads + cache.num_heads == 0; }
  constexpr bool has_norm() const { return norm_weights[0].data || norm_weights[1].data; }
  // Whether there is more than most calls have: three positions, a norm after RoPE, scales or offsets per channel.
  constexpr bool extended() const {
    return sections.axes > 1 || (norm_after_rope && rotary_dim > 0 && has_norm()) || cache.has_channels();
  }
  constexpr bool transforms(int which) const { return rotary_dim > 0 || norm_weights[which].data; }  // 0: Q, 1: K
};

// Checks everything about a problem that can be checked without reading its elements, and normalizes it. Throws Error.
FP8KV_API RopeLayout lower(const RopeAppend& problem);

}  // namespace fp8kv::core
