// Validation of attention on the paged cache and its AttentionLayout.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <string>

#include "core/attention_layout.h"
#include "core/formats.h"
#include "core/lower_cache.h"
#include "core/lower_query.h"

namespace fp8kv {
namespace core {
namespace {

constexpr const char* kOp = "paged_attention";
constexpr std::int64_t kMaxLength = std::numeric_limits<std::int32_t>::max();  // of a sequence: lengths are Int32

Argument optional(const char* name, const std::optional<TensorView>& view) { return optional_argument(kOp, name, view); }

// --- Numbers ----------

std::string number(float value) {
  if (std::isnan(value)) return "nan";
  char text[32];
  std::snprintf(text, sizeof text, "%g", static_cast<double>(value));
  return text;
}

void check_at_least(const char* name, std::int64_t value, std::int64_t least) {
  if (value < least) fail(kOp, name, "be at least " + std::to_string(least), std::to_string(value));
}

void check_numbers(const PagedAttention& p) {
  if (!std::isfinite(p.softmax_scale)) fail(kOp, "softmax_scale", "be finite", number(p.softmax_scale));
  if (!std::isfinite(p.softcap) || p.softcap < 0) fail(kOp, "softcap", "be finite and at least 0", number(p.softcap));
  check_at_least("max_query_len", p.max_query_len, 1);
  check_at_least("max_seq_len", p.max_seq_len, 0);
  check_at_least("sliding_window", p.sliding_window, 0);
  check_at_least("num_splits", p.num_splits, 0);
}

// --- Tensors ----------

// V next to K: its element type, its head size and its view.
CacheLayout lower_values(const Argument& value_cache, std::optional<DType> wanted, const CacheLayout& keys,
                         const Argument& key_cache, const Argument& query) {
  CacheLayout values = keys;
  if (wanted)
    values.cache_dtype = cache_format(value_cache, wanted, false, "v_cache_dtype");
  else
    check_same_dtype(value_cache, key_cache);
  check_same_device(value_cache, query);
  check_ndim(value_cache, 4, "[num_blocks, block_size, num_kv_heads, v_head_size]");
  check_same_blocks(value_cache, key_cache);
  values.head_size = value_cache.view.sizes[3];
  if ((values.head_size == 0) != (keys.head_size == 0))
    fail(kOp, value_cache.name,
         std::string("have a head size of ") + (keys.head_size == 0 ? "0" : "at least 1") + " as key_cache has",
         "shape " + shape_string(value_cache.view));
  values.v.cache = paged_view(value_cache.view);
  return values;
}

View1D lower_sinks(const Argument& a, std::int64_t num_heads, const Argument& query) {
  check_view(a);
  if (!is_real(query.view.dtype)) check_float32(a);  // sinks are never FP8
  const View1D sinks = lower_vector(a, query);
  check_ndim(a, 1, "[num_heads]");
  if (a.view.sizes[0] != num_heads)
    fail(kOp, a.name, "have num_heads=" + std::to_string(num_heads) + " elements", "shape " + shape_string(a.view));
  return sinks;
}

LseView lower_lse(const Argument& a, std::int64_t num_heads, const Argument& query) {
  check_companion(a, query, check_float32);
  check_ndim(a, 2, "[num_tokens, num_heads]");
  if (a.view.sizes[1] != num_heads)
    fail(kOp, a.name, "have num_heads=" + std::to_string(num_heads) + " columns", "shape " + shape_string(a.view));
  return {static_cast<float*>(a.view.data), a.view.strides[0], a.view.strides[1]};
}

void check_uint8(const Argument& a) {
  if (a.view.dtype != DType::UInt8) fail(a.op, a.name, "be uint8", name(a.view.dtype));
}

void check_contiguous(const Argument& a) {
  std::int64_t inner = 1;
  for (int i = a.view.ndim - 1; i >= 0 && a.view.numel() > 0; --i) {
    if (a.view.sizes[i] > 1 && a.view.strides[i] != inner)
      fail(a.op, a.name, "be contiguous",
           "stride " + std::to_string(a.view.strides[i]) + " in dimension " + std::to_string(i) + " of shape " +
               shape_string(a.view));
    inner *= a.view.sizes[i];
  }
}

View1D int32_view(const TensorView& view) { return {view.data, view.strides[view.ndim - 1], DType::Int32}; }

// The longest sequence that the block table has room for and Int32 can count.
std::int64_t capacity(std::int64_t max_blocks, std::int64_t block_size) {
  std::int64_t positions = 0;
  return __builtin_mul_overflow(max_blocks, block_size, &positions) ? kMaxLength : std::min(positions, kMaxLength);
}

}  // namespace

AttentionLayout lower(const PagedAttention& p) {
  const Argument query{kOp, "query", p.query}, key_cache{kOp, "key_cache", p.key_cache},
      value_cache{kOp, "value_cache", p.value_cache}, out{kOp, "out", p.out}, table{kOp, "block_table", p.block_table},
      seq_lens{kOp, "seq_lens", p.seq_lens}, k_scale{kOp, "k_scale", p.k_scale}, v_scale{kOp, "v_scale", p.v_scale};
  const Argument cu_query_lens = optional("cu_query_lens", p.cu_query_lens), q_scale = optional("q_scale", p.q_scale),
                 seq_starts = optional("seq_starts", p.seq_starts), sinks = optional("sinks", p.sinks),
                 k_offset = optional("k_offset", p.k_offset), v_offset = optional("v_offset", p.v_offset),
                 lse = optional("lse", p.lse), workspace = optional("workspace", p.workspace);
  for (const Argument* a : {&query, &key_cache, &value_cache, &out}) check_view(*a);
  const CacheLayout keys = lower_caches(key_cache, key_cache, p.kv_cache_dtype, false, query);
  const CacheLayout values = lower_values(value_cache, p.v_cache_dtype, keys, key_cache, query);
  AttentionLayout layout;
  layout.num_kv_heads = keys.num_heads;
  layout.head_size = keys.head_size;
  layout.v_head_size = values.head_size;
  layout.num_blocks = keys.num_blocks;
  layout.block_size = keys.block_size;
  layout.cache_dtype = keys.cache_dtype;
  layout.v_cache_dtype = values.cache_dtype;
  layout.key_cache = keys.k.cache;
  layout.value_cache = values.v.cache;
  const bool one_dtype = keys.cache_dtype == values.cache_dtype;  // else messages tell K and V apart
  const char *of_keys = one_dtype ? "the caches are" : "key_cache is",
             *of_values = one_dtype ? "the caches are" : "value_cache is";

  layout.query_dtype = real_or_as_caches(query, keys.cache_dtype, of_keys);
  layout.num_heads = count_query_heads(query);
  layout.query = lower_query_rows(query, layout.num_heads, keys);
  check_group_of_heads(query, layout.num_heads, keys);
  check_real(out);
  check_same_device(out, query);
  layout.out_dtype = p.out.dtype;
  layout.out =
      lower_query_rows(out, layout.num_heads, values, keys.head_size == values.head_size ? "head_size" : "v_head_size");
  layout.num_rows = std::min(p.query.sizes[0], p.out.sizes[0]);
  if (p.lse) {
    layout.lse = lower_lse(lse, layout.num_heads, query);
    layout.num_rows = std::min(layout.num_rows, p.lse->sizes[0]);
  }

  layout.num_seqs = count_sequences(table, query);
  layout.max_blocks = p.block_table.sizes[1];
  layout.block_table = int32_view(p.block_table);
  layout.block_table_row = p.block_table.strides[0];
  check_per_sequence(seq_lens, layout.num_seqs, query);
  layout.seq_lens = int32_view(p.seq_lens);
  if (p.cu_query_lens) {
    check_sums(cu_query_lens, layout.num_seqs, query);
    layout.cu_query_lens = int32_view(*p.cu_query_lens);
  } else {
    for (const Argument* a : {&query, &out}) check_rows(*a, layout.num_seqs, "sequence");
    if (p.lse) check_rows(lse, layout.num_seqs, "sequence");
  }
  if (p.seq_starts) {
    check_per_sequence(seq_starts, layout.num_seqs, query);
    layout.seq_starts = int32_view(*p.seq_starts);
  }

  layout.k_scale = lower_scales(k_scale, keys, query, true);
  layout.v_scale = lower_scales(v_scale, values, query, true);
  if (!is_quantized(keys.cache_dtype)) layout.k_scale = {};
  if (!is_quantized(values.cache_dtype)) layout.v_scale = {};
  if (is_quantized(layout.query_dtype) != p.q_scale.has_value())
    fail(kOp, "q_scale",
         p.q_scale ? std::string("be None as query is ") + name(layout.query_dtype)
                   : std::string("be given as query is ") + name(p.query.dtype),
         p.q_scale ? "shape " + shape_string(*p.q_scale) : "None");
  if (p.q_scale) {
    const QueryScales scales = lower_query_scales(q_scale, layout.num_heads, keys, query);
    layout.q_scale = scales.data, layout.q_scale_stride = scales.stride, layout.heads_per_q_scale = scales.heads_per_scale;
  }
  if (p.sinks) layout.sinks = lower_sinks(sinks, layout.num_heads, query);
  layout.k_offset = lower_offsets(k_offset, keys, query, of_keys);
  layout.v_offset = lower_offsets(v_offset, values, query, of_values);
  if (p.workspace) check_companion(workspace, query, check_uint8);

  check_numbers(p);
  layout.softmax_scale = p.softmax_scale;
  layout.softcap = p.softcap;
  layout.sliding_window = std::min(p.sliding_window, kMaxLength);
  // Bounds that are larger than what the tensors can hold tell a plan nothing.
  layout.capacity = capacity(layout.max_blocks, layout.block_size);
  layout.max_seq_len = p.max_seq_len > 0 ? std::min(p.max_seq_len, layout.capacity) : layout.capacity;
  layout.max_query_len = p.cu_query_lens ? std::clamp<std::int64_t>(layout.num_rows, 1, p.max_query_len) : 1;
  layout.num_splits = p.num_splits;

  check_written({&out, &lse, &workspace}, {&query, &key_cache, &value_cache, &table, &seq_lens, &k_scale, &v_scale,
                                           &cu_query_lens, &q_scale, &seq_starts, &sinks, &k_offset, &v_offset});
  if (p.workspace) check_contiguous(workspace);
  return layout;
}

}  // namespace core

void validate(const PagedAttention& problem) { core::lower(problem); }

}  // namespace fp8kv
