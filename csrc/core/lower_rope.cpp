// Validation of the fused step and its RopeLayout.
#include <algorithm>
#include <string>

#include "core/formats.h"
#include "core/lower_cache.h"
#include "core/rope_layout.h"

namespace fp8kv {
namespace core {
namespace {

// A tensor argument that may be absent.
struct Optional {
  const char* op;
  const char* name;
  const std::optional<TensorView>& view;

  Argument argument() const { return {op, name, *view}; }
};

// Weights and tables: Float32 or the type of query.
View1D vector(const Argument& a, const Argument& query) {
  check_view(a);
  if (a.view.dtype != DType::Float32 && a.view.dtype != query.view.dtype)
    fail(a.op, a.name, std::string("be float32 or ") + name(query.view.dtype) + " as query is", name(a.view.dtype));
  check_same_device(a, query);
  return {a.view.data, a.view.ndim > 0 ? a.view.strides[a.view.ndim - 1] : 1, a.view.dtype};
}

// Rows of heads, with as many tokens as slots at least.
HeadsView query_heads(const Argument& a, const RopeLayout& layout) {
  check_ndim(a, 3, "[num_tokens, num_heads, head_size]");
  const std::int64_t *n = a.view.sizes, *s = a.view.strides;
  if (n[1] != layout.num_heads || n[2] != layout.cache.head_size)
    fail(a.op, a.name,
         "have num_heads=" + std::to_string(layout.num_heads) + " and head_size=" + std::to_string(layout.cache.head_size),
         "shape " + shape_string(a.view));
  check_rows(a, layout.cache.num_tokens);
  return {a.view.data, s[0], s[1], s[2]};
}

// What query_out holds; a quantized tensor must be of the format of the caches.
DType query_out_dtype(const Argument& out, DType cache) {
  const DType dtype = out.view.dtype;
  if (is_real(dtype)) return dtype;
  if (is_quantized(cache) && (dtype == cache || dtype == DType::UInt8)) return cache;
  fail(out.op, out.name,
       is_quantized(cache) ? std::string("be ") + name(cache) + " or uint8 as the caches are, or " + names_of(RealTypes{})
                           : "be " + names_of(RealTypes{}) + " as the caches are not FP8",
       name(dtype));
}

void lower_query(RopeLayout& layout, const Argument& query, const Argument& query_out, const Argument& key) {
  for (const Argument* a : {&query, &query_out}) {
    check_view(*a);
    check_same_device(*a, key);
  }
  if (query.view.dtype != key.view.dtype)
    fail(query.op, "query", std::string("be ") + name(key.view.dtype) + " as key is", name(query.view.dtype));
  check_ndim(query, 3, "[num_tokens, num_heads, head_size]");
  layout.num_heads = query.view.sizes[1];
  layout.query = query_heads(query, layout);
  layout.query_out = query_heads(query_out, layout);
  layout.query_out_dtype = query_out_dtype(query_out, layout.cache.cache_dtype);
  const std::int64_t kv_heads = layout.cache.num_heads;
  if (kv_heads == 0 ? layout.num_heads != 0 : layout.num_heads % kv_heads != 0)
    fail(query.op, "query", "have a number of heads that is a multiple of num_kv_heads=" + std::to_string(kv_heads),
         "num_heads=" + std::to_string(layout.num_heads));
}

void lower_query_scales(RopeLayout& layout, const Argument& q_scale, const Argument& key) {
  check_companion(q_scale, key, check_float32);
  const std::int64_t count = q_scale.view.numel(), kv_heads = layout.cache.num_heads;
  if (count != 1 && count != kv_heads && count != layout.num_heads)
    fail(q_scale.op, "q_scale",
         "have 1, num_kv_heads=" + std::to_string(kv_heads) + " or num_heads=" + std::to_string(layout.num_heads) + " elements",
         "shape " + shape_string(q_scale.view));
  layout.q_scale = static_cast<const float*>(q_scale.view.data);
  layout.q_scale_stride = even_stride(q_scale);
  if (count > 0) layout.heads_per_scale = std::max<std::int64_t>(1, layout.num_heads / count);
}

void lower_rotation(RopeLayout& layout, const Optional& positions, const Optional& cos_sin, const Argument& query,
                    const Argument& key) {
  if (positions.view.has_value() != cos_sin.view.has_value())
    fail(query.op, positions.view ? cos_sin.name : positions.name,
         std::string("be given with ") + (positions.view ? positions.name : cos_sin.name), "None");
  if (!positions.view) return;
  const Argument indices = positions.argument(), table = cos_sin.argument();
  check_companion(indices, key, check_int32_or_int64);
  check_ndim(indices, 1, "[num_tokens]");
  if (indices.view.sizes[0] < layout.cache.num_tokens)
    fail(query.op, indices.name, "have at least " + std::to_string(layout.cache.num_tokens) + " elements, as slot_mapping has",
         "shape " + shape_string(indices.view));
  layout.cos_sin = vector(table, query);
  check_ndim(table, 2, "[max_position, rotary_dim]");
  layout.max_position = table.view.sizes[0];
  layout.rotary_dim = table.view.sizes[1];
  layout.cos_sin_row = table.view.strides[0];
  if (layout.rotary_dim % 2 || layout.rotary_dim < 2 || layout.rotary_dim > layout.cache.head_size)
    fail(query.op, table.name, "have an even rotary_dim from 2 to head_size=" + std::to_string(layout.cache.head_size),
         "shape " + shape_string(table.view));
}

View1D norm_weight(const Optional& weight, const RopeLayout& layout, const Argument& query) {
  if (!weight.view) return {};
  const Argument a = weight.argument();
  const View1D view = vector(a, query);
  check_ndim(a, 1, "[head_size]");
  if (a.view.sizes[0] != layout.cache.head_size)
    fail(a.op, a.name, "have head_size=" + std::to_string(layout.cache.head_size) + " elements",
         "shape " + shape_string(a.view));
  return view;
}

}  // namespace

RopeLayout lower(const RopeAppend& p) {
  constexpr const char* op = "rope_quant_and_cache";
  const Argument query{op, "query", p.query}, key{op, "key", p.key}, value{op, "value", p.value},
      query_out{op, "query_out", p.query_out}, key_cache{op, "key_cache", p.key_cache},
      value_cache{op, "value_cache", p.value_cache}, slots{op, "slot_mapping", p.slot_mapping},
      q_scale{op, "q_scale", p.q_scale}, k_scale{op, "k_scale", p.k_scale}, v_scale{op, "v_scale", p.v_scale};
  RopeLayout layout;
  CacheLayout& cache = layout.cache;
  cache = lower_heads_and_caches(key, value, key_cache, value_cache, p.kv_cache_dtype, false);
  cache.num_tokens = count_tokens(slots, key, value);
  cache.k.scales = lower_scales(k_scale, cache, key);
  cache.v.scales = lower_scales(v_scale, cache, key);

  lower_query(layout, query, query_out, key);
  lower_query_scales(layout, q_scale, key);
  layout.is_neox = p.is_neox;
  layout.norm_eps = p.norm_eps;
  const Optional positions{op, "positions", p.positions}, table{op, "cos_sin_cache", p.cos_sin_cache},
      q_weight{op, "q_norm_weight", p.q_norm_weight}, k_weight{op, "k_norm_weight", p.k_norm_weight};
  lower_rotation(layout, positions, table, query, key);
  layout.norm_weights[0] = norm_weight(q_weight, layout, query);
  layout.norm_weights[1] = norm_weight(k_weight, layout, query);

  check_written({&query_out, &key_cache, &value_cache}, {&query, &key, &value, &slots, &q_scale, &k_scale, &v_scale});
  for (const Optional* optional : {&positions, &table, &q_weight, &k_weight})
    if (optional->view)
      for (const Argument* a : {&query_out, &key_cache, &value_cache}) check_no_overlap(*a, optional->argument());
  return layout;
}

}  // namespace core

void validate(const RopeAppend& problem) { core::lower(problem); }

}  // namespace fp8kv
