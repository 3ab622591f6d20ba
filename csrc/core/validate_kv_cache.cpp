#include <algorithm>
#include <string>

#include "check.h"
#include "fp8kv/kv_cache.h"

namespace fp8kv {
namespace {

using core::Argument;

std::string quoted(std::string_view text) { return "\"" + std::string(text) + "\""; }

void check_ndim(const Argument& a, int ndim, const char* form) {
  if (a.view.ndim != ndim) fail(a.op, a.name, std::string("have the shape ") + form, "shape " + shape_string(a.view));
}

// What scales and index tensors have in common.
void check_beside(const Argument& key, const Argument& a, void (*check_dtype)(const Argument&)) {
  core::check_dims(a);
  check_dtype(a);
  core::check_element_alignment(a);
  core::check_same_device(a, key);
}

void check_int32(const Argument& a) {
  if (a.view.dtype != DType::Int32) fail(a.op, a.name, "be int32", name(a.view.dtype));
}

void check_int32_or_int64(const Argument& a) {
  if (a.view.dtype != DType::Int32 && a.view.dtype != DType::Int64) fail(a.op, a.name, "be int32 or int64", name(a.view.dtype));
}

// What the elements of the caches are; the string and the tensors must say the same.
DType cache_element(const char* op, std::string_view format, const TensorView& key_cache, const TensorView& value_cache,
                    bool must_quantize) {
  struct Name {
    std::string_view text;
    DType element;
  };
  constexpr Name names[] = {{"fp8", DType::E4M3},       {"fp8_e4m3", DType::E4M3},   {"fp8_e5m2", DType::E5M2},
                            {"auto", DType::Other},     {"float16", DType::Float16}, {"bfloat16", DType::BFloat16},
                            {"float32", DType::Float32}};
  const Name* found = std::find_if(std::begin(names), std::end(names), [&](const Name& n) { return n.text == format; });
  if (found == std::end(names) || (must_quantize && !is_fp8(found->element)))
    fail(op, "kv_cache_dtype",
         must_quantize ? "be \"fp8\", \"fp8_e4m3\" or \"fp8_e5m2\""
                       : "be \"auto\", \"float16\", \"bfloat16\", \"float32\", \"fp8\", \"fp8_e4m3\" or \"fp8_e5m2\"",
         quoted(format));
  const bool any_real = found->element == DType::Other, fp8 = is_fp8(found->element);
  const DType actual = key_cache.dtype;
  if (any_real ? !is_real(actual) : actual != found->element && !(fp8 && actual == DType::UInt8))
    fail(op, "key_cache",
         "be " + std::string(any_real ? "float32, float16 or bfloat16" : name(found->element)) + (fp8 ? " or uint8" : "") +
             " as kv_cache_dtype is " + quoted(format),
         name(actual));
  if (value_cache.dtype != actual)
    fail(op, "value_cache", std::string("be ") + name(actual) + " as key_cache is", name(value_cache.dtype));
  return any_real ? actual : found->element;
}

// The caches give the sizes; key and value must fit them.
CacheLayout heads_and_caches(const Argument& key, const Argument& value, const Argument& key_cache, const Argument& value_cache,
                             std::string_view format, bool must_quantize) {
  for (const Argument* a : {&key, &value, &key_cache, &value_cache}) core::check_dims(*a);
  core::check_real(key);
  if (value.view.dtype != key.view.dtype)
    fail(value.op, value.name, std::string("be ") + name(key.view.dtype) + " as key is", name(value.view.dtype));
  CacheLayout layout;
  layout.real = key.view.dtype;
  layout.element = cache_element(key.op, format, key_cache.view, value_cache.view, must_quantize);
  for (const Argument* a : {&key, &value, &key_cache, &value_cache}) core::check_element_alignment(*a);
  for (const Argument* a : {&value, &key_cache, &value_cache}) core::check_same_device(*a, key);
  check_ndim(key_cache, 4, "[num_blocks, block_size, num_kv_heads, head_size]");
  core::check_same_shape(value_cache, key_cache);

  const std::int64_t* sizes = key_cache.view.sizes;
  layout.num_blocks = sizes[0], layout.block_size = sizes[1], layout.num_heads = sizes[2], layout.head_size = sizes[3];
  for (const Argument* a : {&key, &value}) {
    check_ndim(*a, 3, "[num_tokens, num_kv_heads, head_size]");
    if (a->view.sizes[1] != sizes[2] || a->view.sizes[2] != sizes[3])
      fail(a->op, a->name,
           "have num_kv_heads=" + std::to_string(sizes[2]) + " and head_size=" + std::to_string(sizes[3]) + " as key_cache has",
           "shape " + shape_string(a->view));
  }
  const auto side = [](const TensorView& heads, const TensorView& cache) {
    const std::int64_t *h = heads.strides, *c = cache.strides;
    return CacheSide{{heads.data, h[0], h[1], h[2]}, {cache.data, c[0], c[1], c[2], c[3]}, {}};
  };
  layout.key = side(key.view, key_cache.view);
  layout.value = side(value.view, value_cache.view);
  return layout;
}

void check_rows(const Argument& a, std::int64_t count) {
  if (a.view.sizes[0] < count)
    fail(a.op, a.name, "have at least " + std::to_string(count) + " rows, one for each element of slot_mapping",
         "shape " + shape_string(a.view));
}

// The number of tokens, which key and value must have at least.
std::int64_t count_tokens(const Argument& slot_mapping, const Argument& key, const Argument& value) {
  check_beside(key, slot_mapping, check_int32_or_int64);
  check_ndim(slot_mapping, 1, "[num_tokens]");
  const std::int64_t count = slot_mapping.view.sizes[0];
  for (const Argument* a : {&key, &value}) check_rows(*a, count);
  return count;
}

bool is_scale_cache(const TensorView& scale, const CacheLayout& layout) {
  return scale.ndim == 3 && scale.sizes[0] == layout.num_blocks && scale.sizes[1] == layout.block_size &&
         scale.sizes[2] == layout.num_heads;
}

// Scales of the form [num_blocks, block_size, num_kv_heads].
PagedScales scale_cache(const Argument& a, const CacheLayout& layout, const Argument& key) {
  check_beside(key, a, core::check_float32);
  if (!is_scale_cache(a.view, layout))
    fail(a.op, a.name,
         "have the shape [num_blocks=" + std::to_string(layout.num_blocks) +
             ", block_size=" + std::to_string(layout.block_size) + ", num_kv_heads=" + std::to_string(layout.num_heads) + "]",
         "shape " + shape_string(a.view));
  return {static_cast<float*>(a.view.data), a.view.strides[0], a.view.strides[1], a.view.strides[2]};
}

// The one step from each element to the next, in order; -1 where there are several.
std::int64_t even_step(const TensorView& view) {
  std::int64_t step = 0, inner = 1;
  for (int i = view.ndim - 1; i >= 0; --i) {
    if (view.sizes[i] == 1) continue;
    if (inner == 1) step = view.strides[i];
    if (view.strides[i] != step * inner) return -1;
    inner *= view.sizes[i];
  }
  return step;
}

std::int64_t checked_step(const Argument& a) {
  const std::int64_t step = even_step(a.view);
  if (step < 0) fail(a.op, a.name, "have even steps between its elements", "several strides in shape " + shape_string(a.view));
  return step;
}

// Weights and tables: Float32 or the type of query.
VectorView vector(const Argument& a, const Argument& query) {
  core::check_dims(a);
  if (a.view.dtype != DType::Float32 && a.view.dtype != query.view.dtype)
    fail(a.op, a.name, std::string("be float32 or ") + name(query.view.dtype) + " as query is", name(a.view.dtype));
  core::check_element_alignment(a);
  core::check_same_device(a, query);
  return {a.view.data, a.view.ndim > 0 ? a.view.strides[a.view.ndim - 1] : 1, a.view.dtype};
}

// Scales of 1 or num_kv_heads elements; with `or_cache`, also of the form of a scale cache.
PagedScales scales(const Argument& a, const CacheLayout& layout, const Argument& key, bool or_cache = false) {
  if (or_cache && a.view.numel() != 1 && is_scale_cache(a.view, layout)) return scale_cache(a, layout, key);
  check_beside(key, a, core::check_float32);
  const std::int64_t count = a.view.numel();
  if (count != 1 && count != layout.num_heads)
    fail(a.op, a.name,
         "have 1 or num_kv_heads=" + std::to_string(layout.num_heads) + " elements" +
             (or_cache ? ", or the shape [num_blocks=" + std::to_string(layout.num_blocks) +
                             ", block_size=" + std::to_string(layout.block_size) + ", num_kv_heads]"
                       : ""),
         "shape " + shape_string(a.view));
  return {static_cast<float*>(a.view.data), 0, 0, checked_step(a)};
}

void fold_heads(CacheLayout& layout) {
  const bool copies = !is_fp8(layout.element);
  for (const CacheSide* side : {&layout.key, &layout.value}) {
    const PagedScales& scale = side->scales;
    if (!copies && (scale.block || scale.offset || scale.head)) return;
    if (side->heads.head != layout.head_size * side->heads.dim || side->cache.head != layout.head_size * side->cache.dim)
      return;
  }
  layout.head_size *= layout.num_heads;
  layout.num_heads = layout.num_heads > 0 ? 1 : 0;
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

// What query_out holds; an FP8 tensor must be of the format of the caches.
DType query_element(const Argument& out, DType cache) {
  const DType dtype = out.view.dtype;
  if (is_real(dtype)) return dtype;
  if (is_fp8(cache) && (dtype == cache || dtype == DType::UInt8)) return cache;
  fail(out.op, out.name,
       is_fp8(cache) ? std::string("be ") + name(cache) + " or uint8 as the caches are, or float32, float16 or bfloat16"
                     : "be float32, float16 or bfloat16 as the caches are not FP8",
       name(dtype));
}

// Written tensors overlap neither themselves nor anything else.
void check_written(std::initializer_list<const Argument*> written, std::initializer_list<const Argument*> read) {
  for (auto a = written.begin(); a != written.end(); ++a) {
    core::check_writable(**a);
    for (auto b = a + 1; b != written.end(); ++b) core::check_no_overlap(**a, **b);
    for (const Argument* b : read) core::check_no_overlap(**a, *b);
  }
}

}  // namespace

CacheLayout validate(const CacheAppend& p) {
  constexpr const char* op = "reshape_and_cache_flash";
  const Argument key{op, "key", p.key}, value{op, "value", p.value}, key_cache{op, "key_cache", p.key_cache},
      value_cache{op, "value_cache", p.value_cache}, slots{op, "slot_mapping", p.slot_mapping},
      k_scale{op, "k_scale", p.k_scale}, v_scale{op, "v_scale", p.v_scale};
  CacheLayout layout = heads_and_caches(key, value, key_cache, value_cache, p.kv_cache_dtype, false);
  layout.num_tokens = count_tokens(slots, key, value);
  layout.key.scales = scales(k_scale, layout, key);
  layout.value.scales = scales(v_scale, layout, key);
  check_written({&key_cache, &value_cache}, {&key, &value, &slots, &k_scale, &v_scale});
  fold_heads(layout);
  return layout;
}

CacheLayout validate(const CacheAppendDynamic& p) {
  constexpr const char* op = "reshape_and_cache_flash_dynamic";
  const Argument key{op, "key", p.key}, value{op, "value", p.value}, key_cache{op, "key_cache", p.key_cache},
      value_cache{op, "value_cache", p.value_cache}, slots{op, "slot_mapping", p.slot_mapping},
      k_scales{op, "k_scale_cache", p.k_scale_cache}, v_scales{op, "v_scale_cache", p.v_scale_cache};
  CacheLayout layout = heads_and_caches(key, value, key_cache, value_cache, p.kv_cache_dtype, true);
  layout.num_tokens = count_tokens(slots, key, value);
  layout.key.scales = scale_cache(k_scales, layout, key);
  layout.value.scales = scale_cache(v_scales, layout, key);
  check_written({&key_cache, &value_cache, &k_scales, &v_scales}, {&key, &value, &slots});
  return layout;
}

CacheLayout validate(const CacheGather& p) {
  constexpr const char* op = "gather_and_dequant_cache";
  const Argument key{op, "key", p.key}, value{op, "value", p.value}, key_cache{op, "key_cache", p.key_cache},
      value_cache{op, "value_cache", p.value_cache}, table{op, "block_table", p.block_table},
      sums{op, "cu_seq_lens", p.cu_seq_lens}, k_scale{op, "k_scale", p.k_scale}, v_scale{op, "v_scale", p.v_scale};
  CacheLayout layout = heads_and_caches(key, value, key_cache, value_cache, p.kv_cache_dtype, false);
  if (p.value.sizes[0] != p.key.sizes[0])
    fail(op, "value", "have as many rows as key, " + std::to_string(p.key.sizes[0]), "shape " + shape_string(p.value));
  layout.num_tokens = p.key.sizes[0];
  layout.key.scales = scales(k_scale, layout, key, true);
  layout.value.scales = scales(v_scale, layout, key, true);
  for (const Argument* a : {&table, &sums}) check_beside(key, *a, check_int32);
  check_ndim(table, 2, "[num_seqs, max_blocks]");
  check_ndim(sums, 1, "[num_seqs + 1]");
  const std::int64_t num_seqs = p.block_table.sizes[0];
  if (p.cu_seq_lens.sizes[0] != num_seqs + 1)
    fail(op, "cu_seq_lens",
         "have num_seqs + 1 = " + std::to_string(num_seqs + 1) + " elements, as block_table has num_seqs rows",
         "shape " + shape_string(p.cu_seq_lens));
  check_written({&key, &value}, {&key_cache, &value_cache, &k_scale, &v_scale, &table, &sums});
  if (p.seq_starts) {
    const Argument starts{op, "seq_starts", *p.seq_starts};
    check_beside(key, starts, check_int32);
    check_ndim(starts, 1, "[num_seqs]");
    if (p.seq_starts->sizes[0] != num_seqs)
      fail(op, "seq_starts", "have num_seqs=" + std::to_string(num_seqs) + " elements, as block_table has rows",
           "shape " + shape_string(*p.seq_starts));
    for (const Argument* a : {&key, &value}) core::check_no_overlap(*a, starts);
  }
  fold_heads(layout);
  return layout;
}

RopeLayout validate(const RopeQuantAppend& p) {
  constexpr const char* op = "rope_quant_and_cache";
  const Argument query{op, "query", p.query}, key{op, "key", p.key}, value{op, "value", p.value},
      query_out{op, "query_out", p.query_out}, key_cache{op, "key_cache", p.key_cache},
      value_cache{op, "value_cache", p.value_cache}, slots{op, "slot_mapping", p.slot_mapping},
      q_scale{op, "q_scale", p.q_scale}, k_scale{op, "k_scale", p.k_scale}, v_scale{op, "v_scale", p.v_scale};
  RopeLayout layout;
  CacheLayout& cache = layout.cache;
  cache = heads_and_caches(key, value, key_cache, value_cache, p.kv_cache_dtype, false);
  cache.num_tokens = count_tokens(slots, key, value);
  cache.key.scales = scales(k_scale, cache, key);
  cache.value.scales = scales(v_scale, cache, key);

  for (const Argument* a : {&query, &query_out}) {
    core::check_argument(*a);
    core::check_same_device(*a, key);
  }
  if (p.query.dtype != p.key.dtype)
    fail(op, "query", std::string("be ") + name(p.key.dtype) + " as key is", name(p.query.dtype));
  check_ndim(query, 3, "[num_tokens, num_heads, head_size]");
  layout.num_heads = p.query.sizes[1];
  layout.query = query_heads(query, layout);
  layout.query_out = query_heads(query_out, layout);
  layout.query_element = query_element(query_out, cache.element);
  const std::int64_t kv_heads = cache.num_heads;
  if (kv_heads == 0 ? layout.num_heads != 0 : layout.num_heads % kv_heads != 0)
    fail(op, "query", "have a number of heads that is a multiple of num_kv_heads=" + std::to_string(kv_heads),
         "num_heads=" + std::to_string(layout.num_heads));

  check_beside(key, q_scale, core::check_float32);
  const std::int64_t count = p.q_scale.numel();
  if (count != 1 && count != kv_heads && count != layout.num_heads)
    fail(op, "q_scale",
         "have 1, num_kv_heads=" + std::to_string(kv_heads) + " or num_heads=" + std::to_string(layout.num_heads) + " elements",
         "shape " + shape_string(p.q_scale));
  layout.q_scale = static_cast<const float*>(p.q_scale.data);
  layout.q_scale_step = checked_step(q_scale);
  if (count > 0) layout.heads_per_scale = std::max<std::int64_t>(1, layout.num_heads / count);

  if (p.positions.has_value() != p.cos_sin_cache.has_value())
    fail(op, p.positions ? "cos_sin_cache" : "positions",
         std::string("be given with ") + (p.positions ? "positions" : "cos_sin_cache"), "None");
  layout.is_neox = p.is_neox;
  layout.norm_eps = p.norm_eps;
  const std::optional<TensorView>* extra[] = {&p.positions, &p.cos_sin_cache, &p.q_norm_weight, &p.k_norm_weight};
  constexpr const char* names[] = {"positions", "cos_sin_cache", "q_norm_weight", "k_norm_weight"};
  if (p.positions) {
    const Argument positions{op, names[0], *p.positions}, table{op, names[1], *p.cos_sin_cache};
    check_beside(key, positions, check_int32_or_int64);
    check_ndim(positions, 1, "[num_tokens]");
    if (p.positions->sizes[0] < cache.num_tokens)
      fail(op, "positions", "have at least " + std::to_string(cache.num_tokens) + " elements, as slot_mapping has",
           "shape " + shape_string(*p.positions));
    layout.cos_sin = vector(table, query);
    check_ndim(table, 2, "[max_position, rotary_dim]");
    layout.max_position = p.cos_sin_cache->sizes[0];
    layout.rotary_dim = p.cos_sin_cache->sizes[1];
    layout.cos_sin_row = p.cos_sin_cache->strides[0];
    if (layout.rotary_dim % 2 || layout.rotary_dim < 2 || layout.rotary_dim > cache.head_size)
      fail(op, "cos_sin_cache", "have an even rotary_dim from 2 to head_size=" + std::to_string(cache.head_size),
           "shape " + shape_string(*p.cos_sin_cache));
  }
  for (int side = 0; side < 2; ++side) {
    const std::optional<TensorView>& weight = *extra[2 + side];
    if (!weight) continue;
    const Argument a{op, names[2 + side], *weight};
    layout.norm_weights[side] = vector(a, query);
    check_ndim(a, 1, "[head_size]");
    if (weight->sizes[0] != cache.head_size)
      fail(op, a.name, "have head_size=" + std::to_string(cache.head_size) + " elements", "shape " + shape_string(*weight));
  }

  check_written({&query_out, &key_cache, &value_cache}, {&query, &key, &value, &slots, &q_scale, &k_scale, &v_scale});
  for (int i = 0; i < 4; ++i)
    if (*extra[i])
      for (const Argument* a : {&query_out, &key_cache, &value_cache}) core::check_no_overlap(*a, {op, names[i], **extra[i]});
  return layout;
}

}  // namespace fp8kv
