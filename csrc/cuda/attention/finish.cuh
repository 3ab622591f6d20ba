// What is known of a query head after some of its positions, how such partial results are merged, and the end of it: sink, lse,
// scale and offset of V, the type of the output. Logits are in units of log2(e) here, without what k_offset adds to all of
// them.
#pragma once

#include <cfloat>

#include "cuda/attention/schedule.cuh"
#include "device/mma.cuh"

namespace fp8kv::cuda::attention {

inline constexpr float kLog2e = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;
inline constexpr float kNothing = -FLT_MAX;  // a maximum before any logit; exponentials of -infinity - kNothing are 0

// Exponentials of logits - maximum, added up: 0 where nothing was seen.
struct Softmax {
  float maximum = kNothing;
  float sum = 0.0f;

  __device__ bool saw_nothing() const { return sum == 0.0f; }
};

// What a block does at a time: a sequence, some of its queries, some KV heads, a range of its tiles.
struct Item {
  Sequence sequence;
  int index;         // of the sequence
  int first_head;    // KV head
  int first_column;  // of those of the sequence and a KV head
  int num_columns;
  Positions tiles;
  int slot;  // of the workspace; -1: the block has all tiles
};

// An item of the current sequence by its number, without tiles.
__device__ __forceinline__ Item item_of(const AttentionLayout& l, const AttentionPlan& plan, const Schedule& schedule,
                                        unsigned number) {
  const unsigned column_blocks = schedule.num_items() / static_cast<unsigned>(plan.head_groups);
  const unsigned head_group = number / column_blocks;
  Item item{.sequence = schedule.sequence(), .index = schedule.index(), .slot = -1};
  item.first_head = static_cast<int>(head_group) * plan.heads;
  item.first_column = static_cast<int>(number - head_group * column_blocks) * plan.columns;
  const int columns = item.sequence.num_queries * static_cast<int>(l.heads_per_kv_head());
  item.num_columns = min(plan.columns, columns - item.first_column);
  return item;
}

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
    case DType::Float16: return decode(static_cast<const Half*>(data)[i]);
    case DType::BFloat16: return decode(static_cast<const BFloat16*>(data)[i]);
    case DType::E4M3: return decode(static_cast<const E4M3*>(data)[i]);
    default: return decode(static_cast<const E5M2*>(data)[i]);
  }
}

__device__ __forceinline__ void store_element(void* data, DType dtype, std::int64_t i, float x) {
  switch (dtype) {
    case DType::Float32: static_cast<float*>(data)[i] = from_float<float>(x); return;
    case DType::Float16: static_cast<Half*>(data)[i] = from_float<Half>(x); return;
    default: static_cast<BFloat16*>(data)[i] = from_float<BFloat16>(x);
  }
}

// From the sums over all positions to the result of one query head.
class Finish {
 public:
  // `base`: what k_offset adds to all logits, in units of log2(e).
  __device__ Finish(const AttentionLayout& layout, const Column& column, const Softmax& softmax, float base)
      : layout_(layout), column_(column), kv_head_(column.head / static_cast<int>(layout.heads_per_kv_head())) {
    const float sink = layout.sinks.data
                           ? load_element(layout.sinks.data, layout.sinks.dtype, column.head * layout.sinks.stride) * kLog2e
                           : -INFINITY;
    const bool has_sink = sink != -INFINITY;
    saw_nothing_ = softmax.saw_nothing();
    const float maximum = saw_nothing_ ? sink - base : has_sink ? fmaxf(softmax.maximum, sink - base) : softmax.maximum;
    const float kept = saw_nothing_ ? 0.0f : exp2f(softmax.maximum - maximum);
    const float sum = softmax.sum * kept + (has_sink ? exp2f(sink - base - maximum) : 0.0f);
    factor_ = kept / sum;
    seen_ = softmax.sum * factor_;
    lse_ = saw_nothing_ && !has_sink ? -INFINITY : (maximum + log2f(sum) + base) * kLn2;
  }

  __device__ void store_lse() const {
    if (layout_.lse.data) layout_.lse.data[column_.row * layout_.lse.token + column_.head * layout_.lse.head] = lse_;
  }

  // An element of the output from the weighted sum of V.
  __device__ void store(std::int64_t dim, float sum) const {
    const core::HeadsView& out = layout_.out;
    store_element(out.data, layout_.out_dtype, column_.row * out.token + column_.head * out.head + dim * out.dim,
                  value(dim, sum));
  }

  // Elements dim to dim + 3.
  __device__ void store(std::int64_t dim, const float4& sums, bool vectors) const {
    const float values[4] = {value(dim, sums.x), value(dim + 1, sums.y), value(dim + 2, sums.z), value(dim + 3, sums.w)};
    const core::HeadsView& out = layout_.out;
    const std::int64_t at = column_.row * out.token + column_.head * out.head + dim * out.dim;
    if (!vectors) {
#pragma unroll
      for (int i = 0; i < 4; ++i) store_element(out.data, layout_.out_dtype, at + i * out.dim, values[i]);
    } else if (layout_.out_dtype == DType::Float32) {
      store_all<float>(at, values);
    } else if (layout_.out_dtype == DType::Float16) {
      store_all<Half>(at, values);
    } else {
      store_all<BFloat16>(at, values);
    }
  }

 private:
  __device__ float value(std::int64_t dim, float sum) const {
    if (saw_nothing_) return 0.0f;
    const core::ChannelScales& scale = layout_.v_scale;
    const core::OffsetView& offset = layout_.v_offset;
    float x = sum * factor_;
    if (scale.data && !scale.per_token()) x *= __ldg(scale.data + kv_head_ * scale.head + dim * scale.dim);
    if (offset.data) x += seen_ * __ldg(offset.data + kv_head_ * offset.head + dim * offset.dim);
    return x;
  }

  template <class Out>
  __device__ void store_all(std::int64_t at, const float (&values)[4]) const {
    struct alignas(4 * sizeof(Out)) Four {
      Out values[4];
    };
    Four four;
#pragma unroll
    for (int i = 0; i < 4; ++i) four.values[i] = from_float<Out>(values[i]);
    *reinterpret_cast<Four*>(static_cast<Out*>(layout_.out.data) + at) = four;
  }

  const AttentionLayout& layout_;
  Column column_;
  int kv_head_;
  bool saw_nothing_;
  float factor_, seen_, lse_;
};

// Partial results in the workspace. A slot has, for each column of an item, head_size weighted sums of V, and after all of
// these, for each column, a maximum, a sum and a base.
struct Slots {
  float* data;
  std::int64_t columns;  // of all KV heads of an item
  std::int64_t head_size;

  __device__ Slots(const AttentionLayout& layout, const AttentionPlan& plan, void* workspace)
      : data(static_cast<float*>(workspace)), columns(plan.heads * plan.columns), head_size(layout.head_size) {}

  __device__ float4* sums(std::int64_t slot, std::int64_t column) const {
    return reinterpret_cast<float4*>(data + slot * columns * (head_size + 4) + column * head_size);
  }
  __device__ float4* softmax(std::int64_t slot, std::int64_t column) const {
    return reinterpret_cast<float4*>(data + (slot * columns * (head_size + 4) + columns * head_size + column * 4));
  }
};

}  // namespace fp8kv::cuda::attention
