// Validation of the fused step and its RopeLayout.
#include <algorithm>
#include <array>
#include <string>

#include "core/formats.h"
#include "core/lower_cache.h"
#include "core/lower_query.h"

namespace fp8kv {
namespace core {
namespace {

void lower_query(RopeLayout& layout, const Argument& query, const Argument& query_out, const Argument& key) {
  for (const Argument* a : {&query, &query_out}) {
    check_view(*a);
    check_same_device(*a, key);
  }
  if (query.view.dtype != key.view.dtype)
    fail(query.op, "query", std::string("be ") + name(key.view.dtype) + " as key is", name(query.view.dtype));
  layout.num_heads = count_query_heads(query);
  layout.query = lower_query_rows(query, layout.num_heads, layout.cache);
  layout.query_out = lower_query_rows(query_out, layout.num_heads, layout.cache);
  for (const Argument* a : {&query, &query_out}) check_rows(*a, layout.cache.num_tokens);
  layout.query_out_dtype = real_or_as_caches(query_out, layout.cache.cache_dtype);
  check_group_of_heads(query, layout.num_heads, layout.cache);
}

// "[8, 12, 12]"
std::string list_string(const std::array<std::int64_t, 3>& list) {
  return "[" + std::to_string(list[0]) + ", " + std::to_string(list[1]) + ", " + std::to_string(list[2]) + "]";
}

// Once the sizes of positions and the table are known to be sound.
Sections lower_sections(const RopeAppend& p, const RopeLayout& layout, const Argument& indices) {
  if (!p.mrope_section) return {};
  const auto& [time, height, width] = *p.mrope_section;
  const std::int64_t count = layout.rotary_dim / 2;
  // Each on its own first, so that the sum can't overflow.
  const auto fits = [&](std::int64_t length) { return 0 <= length && length <= count; };
  if (!fits(time) || !fits(height) || !fits(width) || time + height + width != count)
    fail(indices.op, "mrope_section", "be lengths of at least 0 with the sum rotary_dim / 2 = " + std::to_string(count),
         list_string(*p.mrope_section));
  return {.axes = 3,
          .interleaved = p.mrope_interleaved,
          .height = p.mrope_interleaved ? 3 * height : time,
          .width = p.mrope_interleaved ? 3 * width : time + height};
}

void check_shape_of_positions(const Argument& indices, bool sections, std::int64_t num_tokens) {
  const bool three_rows = indices.view.ndim == 2 && indices.view.sizes[0] == 3;
  if (three_rows && !sections) fail(indices.op, "mrope_section", "be given with positions of shape [3, num_tokens]", "None");
  if (!sections) check_ndim(indices, 1, "[num_tokens]");
  if (sections && !three_rows)
    fail(indices.op, indices.name, "have the shape [3, num_tokens] with mrope_section", "shape " + shape_string(indices.view));
  if (indices.view.sizes[indices.view.ndim - 1] < num_tokens)
    fail(indices.op, indices.name,
         "have at least " + std::to_string(num_tokens) + (sections ? " columns" : " elements") + ", as slot_mapping has",
         "shape " + shape_string(indices.view));
}

void lower_rotation(RopeLayout& layout, const RopeAppend& p, const Argument& indices, const Argument& table,
                    const Argument& query, const Argument& key) {
  if (is_given(indices) != is_given(table))
    fail(query.op, is_given(indices) ? table.name : indices.name,
         std::string("be given with ") + (is_given(indices) ? indices.name : table.name), "None");
  if (!is_given(indices)) {
    if (p.mrope_section) fail(query.op, "mrope_section", "be None without positions", list_string(*p.mrope_section));
    return;
  }
  check_companion(indices, key, check_int32_or_int64);
  check_shape_of_positions(indices, p.mrope_section.has_value(), layout.cache.num_tokens);
  layout.cos_sin = lower_vector(table, query);
  check_ndim(table, 2, "[max_position, rotary_dim]");
  layout.max_position = table.view.sizes[0];
  layout.rotary_dim = table.view.sizes[1];
  layout.cos_sin_row = table.view.strides[0];
  if (layout.rotary_dim % 2 || layout.rotary_dim < 2 || layout.rotary_dim > layout.cache.head_size)
    fail(query.op, table.name, "have an even rotary_dim from 2 to head_size=" + std::to_string(layout.cache.head_size),
         "shape " + shape_string(table.view));
  layout.sections = lower_sections(p, layout, indices);
}

View1D norm_weight(const Argument& a, const RopeLayout& layout, const Argument& query) {
  if (!is_given(a)) return {};
  const View1D view = lower_vector(a, query);
  check_ndim(a, 1, "[head_size]");
  if (a.view.sizes[0] != layout.cache.head_size)
    fail(a.op, a.name, "have head_size=" + std::to_string(layout.cache.head_size) + " elements",
         "shape " + shape_string(a.view));
  return view;
}

}  // namespace

// --- lower_query.h ----------

std::int64_t count_query_heads(const Argument& query) {
  check_ndim(query, 3, "[num_tokens, num_heads, head_size]");
  return query.view.sizes[1];
}

void check_group_of_heads(const Argument& query, std::int64_t num_heads, const CacheLayout& cache) {
  if (cache.num_heads == 0 ? num_heads != 0 : num_heads % cache.num_heads != 0)
    fail(query.op, "query", "have a number of heads that is a multiple of num_kv_heads=" + std::to_string(cache.num_heads),
         "num_heads=" + std::to_string(num_heads));
}

HeadsView lower_query_rows(const Argument& a, std::int64_t num_heads, const CacheLayout& cache, const char* size) {
  check_ndim(a, 3, "[num_tokens, num_heads, head_size]");
  const std::int64_t *n = a.view.sizes, *s = a.view.strides;
  if (n[1] != num_heads || n[2] != cache.head_size)
    fail(a.op, a.name, "have num_heads=" + std::to_string(num_heads) + " and " + size + "=" + std::to_string(cache.head_size),
         "shape " + shape_string(a.view));
  return {a.view.data, s[0], s[1], s[2]};
}

DType real_or_as_caches(const Argument& a, DType cache, const char* caches) {
  const DType dtype = a.view.dtype;
  if (is_real(dtype)) return dtype;
  if (is_fp8(cache) && (dtype == cache || dtype == DType::UInt8)) return cache;
  fail(a.op, a.name,
       is_fp8(cache) ? std::string("be ") + name(cache) + " or uint8 as " + caches + ", or " + names_of(RealTypes{})
                     : "be " + names_of(RealTypes{}) + " as " + caches + " not FP8",
       name(dtype));
}

QueryScales lower_query_scales(const Argument& q_scale, std::int64_t num_heads, const CacheLayout& cache, const Argument& key) {
  check_companion(q_scale, key, check_float32);
  const std::int64_t count = q_scale.view.numel(), kv_heads = cache.num_heads;
  if (count != 1 && count != kv_heads && count != num_heads)
    fail(q_scale.op, "q_scale",
         "have 1, num_kv_heads=" + std::to_string(kv_heads) + " or num_heads=" + std::to_string(num_heads) + " elements",
         "shape " + shape_string(q_scale.view));
  return {static_cast<const float*>(q_scale.view.data), even_stride(q_scale),
          count > 0 ? std::max<std::int64_t>(1, num_heads / count) : 1};
}

View1D lower_vector(const Argument& a, const Argument& query) {
  check_view(a);
  if (a.view.dtype != DType::Float32 && a.view.dtype != query.view.dtype)
    fail(a.op, a.name, std::string("be float32 or ") + name(query.view.dtype) + " as query is", name(a.view.dtype));
  check_same_device(a, query);
  return {a.view.data, a.view.ndim > 0 ? a.view.strides[a.view.ndim - 1] : 1, a.view.dtype};
}

// --- rope_layout.h ----------

RopeLayout lower(const RopeAppend& p) {
  constexpr const char* op = "rope_quant_and_cache";
  const Argument query{op, "query", p.query}, key{op, "key", p.key}, value{op, "value", p.value},
      query_out{op, "query_out", p.query_out}, key_cache{op, "key_cache", p.key_cache},
      value_cache{op, "value_cache", p.value_cache}, slots{op, "slot_mapping", p.slot_mapping},
      q_scale{op, "q_scale", p.q_scale}, k_scale{op, "k_scale", p.k_scale}, v_scale{op, "v_scale", p.v_scale};
  const Argument positions = optional_argument(op, "positions", p.positions),
                 table = optional_argument(op, "cos_sin_cache", p.cos_sin_cache),
                 q_weight = optional_argument(op, "q_norm_weight", p.q_norm_weight),
                 k_weight = optional_argument(op, "k_norm_weight", p.k_norm_weight),
                 k_offset = optional_argument(op, "k_offset", p.k_offset),
                 v_offset = optional_argument(op, "v_offset", p.v_offset);
  RopeLayout layout;
  CacheLayout& cache = layout.cache;
  cache = lower_heads_and_caches(key, value, key_cache, value_cache, p.kv_cache_dtype, false);
  cache.num_tokens = count_tokens(slots, key, value);
  lower_parameters(cache.k, k_scale, k_offset, cache, key);
  lower_parameters(cache.v, v_scale, v_offset, cache, key);

  lower_query(layout, query, query_out, key);
  const QueryScales scales = lower_query_scales(q_scale, layout.num_heads, cache, key);
  layout.q_scale = scales.data, layout.q_scale_stride = scales.stride, layout.heads_per_scale = scales.heads_per_scale;
  layout.is_neox = p.is_neox;
  layout.norm_eps = p.norm_eps;
  layout.norm_after_rope = p.norm_after_rope;
  lower_rotation(layout, p, positions, table, query, key);
  layout.norm_weights[0] = norm_weight(q_weight, layout, query);
  layout.norm_weights[1] = norm_weight(k_weight, layout, query);

  check_written({&query_out, &key_cache, &value_cache}, {&query, &key, &value, &slots, &q_scale, &k_scale, &v_scale, &positions,
                                                         &table, &q_weight, &k_weight, &k_offset, &v_offset});
  return layout;
}

}  // namespace core

void validate(const RopeAppend& problem) { core::lower(problem); }

}  // namespace fp8kv
