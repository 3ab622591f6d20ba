// AttentionLayout: attention on the paged cache (fp8kv/attention.h) in the form that all backends work from.
#pragma once

#include <cstdint>

#include "core/cache_layout.h"
#include "core/rope_layout.h"
#include "fp8kv/attention.h"

namespace fp8kv::core {

using ChannelScales = PagedScales;  // per tensor, head or channel, or per token and head

struct LseView {  // [token, head]; nullptr: none
  float* data = nullptr;
  std::int64_t token = 0;
  std::int64_t head = 0;
};

struct AttentionLayout {
  std::int64_t num_rows = 0;  // of query, out and lse: the smallest number of rows among them
  std::int64_t num_seqs = 0;
  std::int64_t num_heads = 0;
  std::int64_t num_kv_heads = 0;
  std::int64_t head_size = 0;    // of query and K
  std::int64_t v_head_size = 0;  // of V and out
  std::int64_t num_blocks = 0;
  std::int64_t block_size = 0;
  std::int64_t max_blocks = 0;         // columns of the block table
  std::int64_t capacity = 0;           // positions that it can hold, of those that Int32 can count
  DType query_dtype = DType::Float32;  // quantized: with q_scale
  DType out_dtype = DType::Float32;
  DType cache_dtype = DType::Float32;    // of K; not quantized: scales and offsets are not used
  DType v_cache_dtype = DType::Float32;  // of V; likewise
  HeadsView query;
  HeadsView out;
  PagedView key_cache;
  PagedView value_cache;
  ChannelScales k_scale;  // of quantized caches only; else data is nullptr
  ChannelScales v_scale;
  OffsetView k_offset;
  OffsetView v_offset;
  const float* q_scale = nullptr;  // nullptr: 1
  std::int64_t q_scale_stride = 0;
  std::int64_t heads_per_q_scale = 1;  // neighboring query heads that share one
  View1D block_table;                  // Int32: stride between columns
  std::int64_t block_table_row = 0;    // stride between rows
  View1D seq_lens;
  View1D cu_query_lens;  // data nullptr: row s is the one query of sequence s
  View1D seq_starts;     // data nullptr: all 0
  View1D sinks;          // data nullptr: none
  LseView lse;
  float softmax_scale = 1.0f;
  float softcap = 0.0f;
  std::int64_t sliding_window = 0;
  std::int64_t max_query_len = 1;
  std::int64_t max_seq_len = 0;  // at least 1 where the table holds anything
  std::int64_t num_splits = 0;

  constexpr bool of_one_kind() const { return head_size == v_head_size && cache_dtype == v_cache_dtype; }  // K and V
  constexpr std::int64_t heads_per_kv_head() const { return num_kv_heads > 0 ? num_heads / num_kv_heads : 0; }
  constexpr bool empty() const { return num_seqs == 0 || num_rows == 0 || num_heads == 0 || head_size == 0; }
};

// Checks everything about a problem that can be checked without reading its elements, and normalizes it. Throws Error.
FP8KV_API AttentionLayout lower(const PagedAttention& problem);

}  // namespace fp8kv::core
