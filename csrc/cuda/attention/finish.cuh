// What is known of a query head after some of its positions, and the end of it: sink, lse, scale and offset of V, the type of
// the output. Logits are in units of log2(e) here, without what k_offset adds to all of
// them.
#pragma once

#include <cuda_bf16.h>

#include <cfloat>

#include "cuda/attention/schedule.cuh"
#include "device/mma.cuh"

namespace fp8kv::cuda::attention {

inline constexpr float kLog2e = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;
inline constexpr float kMaxGrowth = 8.0f;    // of a maximum, in powers of two, before what was summed up is scaled anew
inline constexpr float kNothing = -FLT_MAX;  // a maximum before any logit; exponentials of -infinity - kNothing are 0

// Exponentials of logits - maximum, added up: 0 where nothing was seen.
struct alignas(8) Softmax {
  float maximum = kNothing;
  float sum = 0.0f;

  __device__ bool saw_nothing() const { return sum == 0.0f; }
};

// A query row and head.
struct Column {
  int row;
  int head;
};

// Of a number that is not negative; -127 for 0 and subnormal numbers.
__device__ __forceinline__ int exponent_of(float x) { return static_cast<int>(__float_as_uint(x) >> 23) - 127; }

// 2^exponent as two factors, for exponents that fp32 has no normal number for.
struct PowerOfTwo {
  float first, second;

  __device__ explicit PowerOfTwo(int exponent) {
    first = __uint_as_float((exponent / 2 + 127u) << 23);
    second = __uint_as_float((exponent - exponent / 2 + 127u) << 23);
  }

  __device__ float times(float x) const { return x * first * second; }
};

__device__ __forceinline__ float load_element(const void* data, DType dtype, std::int64_t i) {
  switch (dtype) {
    case DType::Float32: return static_cast<const float*>(data)[i];
    case DType::Float16: return __half2float(static_cast<const __half*>(data)[i]);
    case DType::BFloat16: return decode(static_cast<const BFloat16*>(data)[i]);
    case DType::E4M3: return decode(static_cast<const E4M3*>(data)[i]);
    default: return decode(static_cast<const E5M2*>(data)[i]);
  }
}

__device__ __forceinline__ void store_element(void* data, DType dtype, std::int64_t i, float x) {
  switch (dtype) {
    case DType::Float32: static_cast<float*>(data)[i] = x; return;
    case DType::Float16: static_cast<__half*>(data)[i] = __float2half_rn(x); return;
    default: static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16_rn(x);
  }
}

// From the sums over all positions to the result of one query head.
class Finish {
 public:
  // The scale that all elements of V of a KV head have; 1 if there is none.
  __device__ static float value_scale_of(const AttentionLayout& layout, int kv_head) {
    const core::ChannelScales& scale = layout.v_scale;
    return scale.data && scale.dim == 0 && !scale.per_token() ? __ldg(scale.data + kv_head * scale.head) : 1.0f;
  }

  // `base`: what k_offset adds to all logits, in units of log2(e).
  __device__ Finish(const AttentionLayout& layout, const Column& column, int kv_head, const Softmax& softmax, float base)
      : Finish(layout, column, kv_head, softmax, base, value_scale_of(layout, kv_head)) {}
  __device__ Finish(const AttentionLayout& layout, const Column& column, int kv_head, const Softmax& softmax, float base,
                    float value_scale)
      : layout_(layout), column_(column), kv_head_(kv_head), value_scale_(value_scale) {
    const float sink = layout.sinks.data ? sink_of(layout, column.head) : -INFINITY;
    const bool has_sink = sink != -INFINITY;
    saw_nothing_ = softmax.saw_nothing();
    const float maximum = saw_nothing_ ? sink - base : has_sink ? fmaxf(softmax.maximum, sink - base) : softmax.maximum;
    const float kept = saw_nothing_ ? 0.0f : device::exp2_approximation(softmax.maximum - maximum);
    const float sum = softmax.sum * kept + (has_sink ? device::exp2_approximation(sink - base - maximum) : 0.0f);
    factor_ = __fdividef(kept, sum);
    seen_ = softmax.sum * factor_;
    lse_ = saw_nothing_ && !has_sink ? -INFINITY : (maximum + device::log2_approximation(sum) + base) * kLn2;
  }

  __device__ void store_lse() const {
    if (layout_.lse.data) layout_.lse.data[column_.row * layout_.lse.token + column_.head * layout_.lse.head] = lse_;
  }

  // An element of the output from the weighted sum of V.
  __device__ void store(std::int64_t dim, float sum) const {
    const float sums[1] = {sum};
    store(dim, sums);
  }
  // Neighboring elements, the first of which is `dim`.
  template <int kSize>
  __device__ void store(std::int64_t dim, const float (&sums)[kSize]) const {
    const core::HeadsView& out = layout_.out;
    const std::int64_t at = column_.row * out.token + column_.head * out.head + dim * out.dim;
    float values[kSize];
#pragma unroll
    for (int n = 0; n < kSize; ++n) values[n] = value(dim + n, sums[n]);
#pragma unroll
    for (int n = 0; n < kSize; ++n) store_element(out.data, layout_.out_dtype, at + n * out.dim, values[n]);
  }

 private:
  // Out of the way of calls without sinks.
  __device__ static float sink_of(const AttentionLayout& layout, int head) {
    return load_element(layout.sinks.data, layout.sinks.dtype, head * layout.sinks.stride) * kLog2e;
  }

  __device__ float value(std::int64_t dim, float sum) const {
    if (saw_nothing_) return 0.0f;
    const core::ChannelScales& scale = layout_.v_scale;
    const core::OffsetView& offset = layout_.v_offset;
    float x = sum * factor_ * value_scale_;
    if (scale.dim != 0) x *= __ldg(scale.data + kv_head_ * scale.head + dim * scale.dim);
    if (offset.data) x += seen_ * __ldg(offset.data + kv_head_ * offset.head + dim * offset.dim);
    return x;
  }

  const AttentionLayout& layout_;
  Column column_;
  int kv_head_;
  float value_scale_;
  bool saw_nothing_;
  float factor_, seen_, lse_;
};

}  // namespace fp8kv::cuda::attention
