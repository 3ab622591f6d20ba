// Index tensors in host memory, and the checks that need their elements.
#pragma once

#include "core/attention_layout.h"

namespace fp8kv::core {

// An Int32 or Int64 tensor of one dimension, or a row of one with two.
class Indices {
 public:
  explicit Indices(const TensorView& view)
      : data_(view.data), stride_(view.strides[view.ndim - 1]), row_(view.strides[0]), wide_(view.dtype == DType::Int64) {}

  std::int64_t operator[](std::int64_t i) const { return at(i * stride_); }
  std::int64_t operator()(std::int64_t row, std::int64_t i) const { return at(row * row_ + i * stride_); }

 private:
  std::int64_t at(std::int64_t offset) const {
    return wide_ ? static_cast<const std::int64_t*>(data_)[offset] : static_cast<const std::int32_t*>(data_)[offset];
  }

  const void* data_;
  std::int64_t stride_;
  std::int64_t row_;
  bool wide_;
};

// Throws Error if a slot lies beyond the cache. Negative ones do not.
FP8KV_API void check_slots(const char* op, const TensorView& slot_mapping, const CacheLayout& layout);

// Throws Error if a position is not in the table.
FP8KV_API void check_positions(const char* op, const TensorView& positions, const RopeLayout& layout);

// Throws Error if the sums do not begin with 0, fall, or exceed the rows of key; if a sequence starts below 0 or is longer than
// its row of the table; if an entry of the table that is needed is no block of the cache.
FP8KV_API void check_sequences(const CacheGather& problem, const CacheLayout& layout);

// Throws Error if the sums of query lengths do not begin with 0, fall, or exceed the rows of query, out or lse; if a sequence
// starts below 0, or its length is negative or more than its row of the table holds; if an entry of the table with a position
// that is seen is no block of the cache.
FP8KV_API void check_attention(const PagedAttention& problem, const AttentionLayout& layout);

}  // namespace fp8kv::core
