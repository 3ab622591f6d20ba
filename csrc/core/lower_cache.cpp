// Validation of the problems of the paged cache and their CacheLayout.
#include "core/lower_cache.h"

#include <algorithm>
#include <string>

#include "core/formats.h"

namespace fp8kv {
namespace core {
namespace {

constexpr TensorView kAbsent{.ndim = 1};

// What the elements of the caches are; `wanted` and the tensors must agree.
DType cache_format(const Argument& key_cache, const Argument& value_cache, std::optional<DType> wanted, bool must_quantize) {
  const DType actual = key_cache.view.dtype, format = wanted.value_or(actual);
  const bool quantized = is_quantized(format);
  if (!quantized && (must_quantize || !is_real(format))) {
    const std::string types = "be " + (must_quantize ? names_of(QuantizedTypes{}) : names_of(RealTypes{} + QuantizedTypes{}));
    if (wanted) fail(key_cache.op, "kv_cache_dtype", types, name(format));
    fail(key_cache.op, key_cache.name, types + ", as kv_cache_dtype is not given", name(format));
  }
  const bool or_bytes = is_fp8(format);
  if (actual != format && !(or_bytes && actual == DType::UInt8))
    fail(key_cache.op, key_cache.name,
         std::string("be ") + name(format) + (or_bytes ? " or uint8" : "") + " as kv_cache_dtype is \"" +
             std::string(cache_format_name(format)) + "\"",
         name(actual));
  if (value_cache.view.dtype != actual)
    fail(value_cache.op, value_cache.name, std::string("be ") + name(actual) + " as key_cache is",
         name(value_cache.view.dtype));
  return format;
}

}  // namespace

void check_ndim(const Argument& a, int ndim, const char* form) {
  if (a.view.ndim != ndim) fail(a.op, a.name, std::string("have the shape ") + form, "shape " + shape_string(a.view));
}

void check_int32(const Argument& a) {
  if (a.view.dtype != DType::Int32) fail(a.op, a.name, "be int32", name(a.view.dtype));
}

void check_int32_or_int64(const Argument& a) {
  if (a.view.dtype != DType::Int32 && a.view.dtype != DType::Int64) fail(a.op, a.name, "be int32 or int64", name(a.view.dtype));
}

void check_companion(const Argument& a, const Argument& key, void (*check_dtype)(const Argument&)) {
  check_view(a);
  check_dtype(a);
  check_same_device(a, key);
}

CacheLayout lower_caches(const Argument& key_cache, const Argument& value_cache, std::optional<DType> kv_cache_dtype,
                         bool must_quantize, const Argument& key) {
  CacheLayout layout;
  layout.cache_dtype = cache_format(key_cache, value_cache, kv_cache_dtype, must_quantize);
  for (const Argument* a : {&key_cache, &value_cache}) check_same_device(*a, key);
  check_ndim(key_cache, 4, "[num_blocks, block_size, num_kv_heads, head_size]");
  check_same_shape(value_cache, key_cache);

  const std::int64_t* sizes = key_cache.view.sizes;
  layout.num_blocks = sizes[0], layout.block_size = sizes[1], layout.num_heads = sizes[2], layout.head_size = sizes[3];
  const auto view_of = [](const TensorView& cache) {
    const std::int64_t* s = cache.strides;
    return PagedView{cache.data, s[0], s[1], s[2], s[3]};
  };
  layout.k.cache = view_of(key_cache.view);
  layout.v.cache = view_of(value_cache.view);
  return layout;
}

CacheLayout lower_heads_and_caches(const Argument& key, const Argument& value, const Argument& key_cache,
                                   const Argument& value_cache, std::optional<DType> kv_cache_dtype, bool must_quantize) {
  for (const Argument* a : {&key, &value, &key_cache, &value_cache}) check_view(*a);
  check_real(key);
  if (value.view.dtype != key.view.dtype)
    fail(value.op, value.name, std::string("be ") + name(key.view.dtype) + " as key is", name(value.view.dtype));
  check_same_device(value, key);
  CacheLayout layout = lower_caches(key_cache, value_cache, kv_cache_dtype, must_quantize, key);
  layout.row_dtype = key.view.dtype;
  for (const Argument* a : {&key, &value}) {
    check_ndim(*a, 3, "[num_tokens, num_kv_heads, head_size]");
    if (a->view.sizes[1] != layout.num_heads || a->view.sizes[2] != layout.head_size)
      fail(a->op, a->name,
           "have num_kv_heads=" + std::to_string(layout.num_heads) + " and head_size=" + std::to_string(layout.head_size) +
               " as key_cache has",
           "shape " + shape_string(a->view));
  }
  const auto view_of = [](const TensorView& rows) {
    const std::int64_t* s = rows.strides;
    return HeadsView{rows.data, s[0], s[1], s[2]};
  };
  layout.k.rows = view_of(key.view);
  layout.v.rows = view_of(value.view);
  return layout;
}

void check_rows(const Argument& a, std::int64_t count, const char* each) {
  if (a.view.sizes[0] < count)
    fail(a.op, a.name, "have at least " + std::to_string(count) + " rows, one for each " + each,
         "shape " + shape_string(a.view));
}

std::int64_t count_tokens(const Argument& slot_mapping, const Argument& key, const Argument& value) {
  check_companion(slot_mapping, key, check_int32_or_int64);
  check_ndim(slot_mapping, 1, "[num_tokens]");
  const std::int64_t count = slot_mapping.view.sizes[0];
  for (const Argument* a : {&key, &value}) check_rows(*a, count);
  return count;
}

std::int64_t count_sequences(const Argument& block_table, const Argument& key) {
  check_companion(block_table, key, check_int32);
  check_ndim(block_table, 2, "[num_seqs, max_blocks]");
  return block_table.view.sizes[0];
}

void check_per_sequence(const Argument& a, std::int64_t num_seqs, const Argument& key) {
  check_companion(a, key, check_int32);
  check_ndim(a, 1, "[num_seqs]");
  if (a.view.sizes[0] != num_seqs)
    fail(a.op, a.name, "have num_seqs=" + std::to_string(num_seqs) + " elements, as block_table has rows",
         "shape " + shape_string(a.view));
}

void check_sums(const Argument& a, std::int64_t num_seqs, const Argument& key) {
  check_companion(a, key, check_int32);
  check_ndim(a, 1, "[num_seqs + 1]");
  if (a.view.sizes[0] != num_seqs + 1)
    fail(a.op, a.name, "have num_seqs + 1 = " + std::to_string(num_seqs + 1) + " elements, as block_table has num_seqs rows",
         "shape " + shape_string(a.view));
}

Argument optional_argument(const char* op, const char* name, const std::optional<TensorView>& view) {
  return {op, name, view ? *view : kAbsent};
}

bool is_given(const Argument& optional) { return &optional.view != &kAbsent; }

namespace {

// The form [num_blocks, block_size, num_kv_heads].
bool is_scale_cache(const TensorView& scale, const CacheLayout& layout) {
  return scale.ndim == 3 && scale.sizes[0] == layout.num_blocks && scale.sizes[1] == layout.block_size &&
         scale.sizes[2] == layout.num_heads;
}

bool is_per_channel(const TensorView& view, const CacheLayout& layout) {
  return view.ndim == 2 && view.sizes[0] == layout.num_heads && view.sizes[1] == layout.head_size;
}

// A stride that counts: that of a dimension of one element is 0.
std::int64_t used_stride(const TensorView& view, int dim) { return view.sizes[dim] > 1 ? view.strides[dim] : 0; }

// Scales of the form [num_blocks, block_size, num_kv_heads].
PagedScales scale_cache(const Argument& a, const CacheLayout& layout, const Argument& key) {
  check_companion(a, key, check_float32);
  if (!is_scale_cache(a.view, layout))
    fail(a.op, a.name,
         "have the shape [num_blocks=" + std::to_string(layout.num_blocks) +
             ", block_size=" + std::to_string(layout.block_size) + ", num_kv_heads=" + std::to_string(layout.num_heads) + "]",
         "shape " + shape_string(a.view));
  return {static_cast<float*>(a.view.data), a.view.strides[0], a.view.strides[1], a.view.strides[2]};
}

// -1 where there are several.
std::int64_t find_even_stride(const TensorView& view) {
  std::int64_t stride = 0, inner = 1;
  for (int i = view.ndim - 1; i >= 0; --i) {
    if (view.sizes[i] == 1) continue;
    if (inner == 1) stride = view.strides[i];
    if (view.strides[i] != stride * inner) return -1;
    inner *= view.sizes[i];
  }
  return stride;
}

}  // namespace

std::int64_t even_stride(const Argument& a) {
  const std::int64_t stride = find_even_stride(a.view);
  if (stride < 0)
    fail(a.op, a.name, "have even steps between its elements", "several strides in shape " + shape_string(a.view));
  return stride;
}

PagedScales lower_scales(const Argument& a, const CacheLayout& layout, const Argument& key, bool or_cache) {
  check_companion(a, key, check_float32);
  const TensorView& view = a.view;
  const std::int64_t count = view.numel();
  PagedScales scales{static_cast<float*>(view.data)};
  if (or_cache && is_scale_cache(view, layout)) {
    scales.block = used_stride(view, 0), scales.offset = used_stride(view, 1), scales.head = used_stride(view, 2);
  } else if (is_per_channel(view, layout)) {
    scales.head = used_stride(view, 0);
    if (is_quantized(layout.cache_dtype)) scales.dim = used_stride(view, 1);  // a plain copy looks at no scale
  } else if (count == 1 || count == layout.num_heads) {
    scales.head = even_stride(a);
  } else {
    fail(a.op, a.name,
         "have 1 or num_kv_heads=" + std::to_string(layout.num_heads) +
             " elements, or the shape [num_kv_heads, head_size=" + std::to_string(layout.head_size) + "]" +
             (or_cache ? " or [num_blocks=" + std::to_string(layout.num_blocks) +
                             ", block_size=" + std::to_string(layout.block_size) + ", num_kv_heads]"
                       : ""),
         "shape " + shape_string(view));
  }
  return scales;
}

OffsetView lower_offsets(const Argument& a, const CacheLayout& layout, const Argument& key, const char* caches) {
  if (!is_given(a)) return {};
  check_companion(a, key, check_float32);
  if (!is_quantized(layout.cache_dtype))
    fail(a.op, a.name, std::string("be None as ") + caches + " not quantized", "shape " + shape_string(a.view));
  if (!is_per_channel(a.view, layout))
    fail(a.op, a.name,
         "have the shape [num_kv_heads=" + std::to_string(layout.num_heads) +
             ", head_size=" + std::to_string(layout.head_size) + "]",
         "shape " + shape_string(a.view));
  return {static_cast<const float*>(a.view.data), a.view.strides[0], a.view.strides[1]};
}

void lower_parameters(KVViews& kv, const Argument& scale, const Argument& offset, const CacheLayout& layout,
                      const Argument& key, bool or_cache) {
  kv.scales = lower_scales(scale, layout, key, or_cache);
  kv.offsets = lower_offsets(offset, layout, key);
}

namespace {

void merge_heads(CacheLayout& layout) {
  const bool copies = !is_quantized(layout.cache_dtype);
  for (const KVViews* kv : {&layout.k, &layout.v}) {
    const PagedScales& scale = kv->scales;
    const OffsetView& offset = kv->offsets;
    if (!copies && (scale.block || scale.offset || scale.head != layout.head_size * scale.dim)) return;
    if (offset.data && offset.head != layout.head_size * offset.dim) return;
    if (kv->rows.head != layout.head_size * kv->rows.dim || kv->cache.head != layout.head_size * kv->cache.dim) return;
  }
  layout.head_size *= layout.num_heads;
  layout.num_heads = layout.num_heads > 0 ? 1 : 0;
}

}  // namespace

CacheLayout lower(const CacheAppend& p) {
  constexpr const char* op = "reshape_and_cache_flash";
  const Argument key{op, "key", p.key}, value{op, "value", p.value}, key_cache{op, "key_cache", p.key_cache},
      value_cache{op, "value_cache", p.value_cache}, slots{op, "slot_mapping", p.slot_mapping},
      k_scale{op, "k_scale", p.k_scale}, v_scale{op, "v_scale", p.v_scale};
  const Argument k_offset = optional_argument(op, "k_offset", p.k_offset),
                 v_offset = optional_argument(op, "v_offset", p.v_offset);
  CacheLayout layout = lower_heads_and_caches(key, value, key_cache, value_cache, p.kv_cache_dtype, false);
  layout.num_tokens = count_tokens(slots, key, value);
  lower_parameters(layout.k, k_scale, k_offset, layout, key);
  lower_parameters(layout.v, v_scale, v_offset, layout, key);
  check_written({&key_cache, &value_cache}, {&key, &value, &slots, &k_scale, &v_scale, &k_offset, &v_offset});
  merge_heads(layout);
  return layout;
}

CacheLayout lower(const CacheAppendDynamic& p) {
  constexpr const char* op = "reshape_and_cache_flash_dynamic";
  const Argument key{op, "key", p.key}, value{op, "value", p.value}, key_cache{op, "key_cache", p.key_cache},
      value_cache{op, "value_cache", p.value_cache}, slots{op, "slot_mapping", p.slot_mapping},
      k_scales{op, "k_scale_cache", p.k_scale_cache}, v_scales{op, "v_scale_cache", p.v_scale_cache};
  const Argument k_offset = optional_argument(op, "k_offset", p.k_offset),
                 v_offset = optional_argument(op, "v_offset", p.v_offset);
  CacheLayout layout = lower_heads_and_caches(key, value, key_cache, value_cache, p.kv_cache_dtype, true);
  layout.num_tokens = count_tokens(slots, key, value);
  layout.k.scales = scale_cache(k_scales, layout, key);
  layout.v.scales = scale_cache(v_scales, layout, key);
  layout.k.offsets = lower_offsets(k_offset, layout, key);
  layout.v.offsets = lower_offsets(v_offset, layout, key);
  check_written({&key_cache, &value_cache, &k_scales, &v_scales}, {&key, &value, &slots, &k_offset, &v_offset});
  return layout;
}

CacheLayout lower(const CacheGather& p) {
  constexpr const char* op = "gather_and_dequant_cache";
  const Argument key{op, "key", p.key}, value{op, "value", p.value}, key_cache{op, "key_cache", p.key_cache},
      value_cache{op, "value_cache", p.value_cache}, table{op, "block_table", p.block_table},
      cu_seq_lens{op, "cu_seq_lens", p.cu_seq_lens}, k_scale{op, "k_scale", p.k_scale}, v_scale{op, "v_scale", p.v_scale};
  const Argument k_offset = optional_argument(op, "k_offset", p.k_offset),
                 v_offset = optional_argument(op, "v_offset", p.v_offset);
  CacheLayout layout = lower_heads_and_caches(key, value, key_cache, value_cache, p.kv_cache_dtype, false);
  if (p.value.sizes[0] != p.key.sizes[0])
    fail(op, "value", "have as many rows as key, " + std::to_string(p.key.sizes[0]), "shape " + shape_string(p.value));
  layout.num_tokens = p.key.sizes[0];
  lower_parameters(layout.k, k_scale, k_offset, layout, key, true);
  lower_parameters(layout.v, v_scale, v_offset, layout, key, true);
  const std::int64_t num_seqs = count_sequences(table, key);
  check_sums(cu_seq_lens, num_seqs, key);
  check_written({&key, &value}, {&key_cache, &value_cache, &k_scale, &v_scale, &table, &cu_seq_lens, &k_offset, &v_offset});
  if (p.seq_starts) {
    const Argument starts{op, "seq_starts", *p.seq_starts};
    check_per_sequence(starts, num_seqs, key);
    for (const Argument* a : {&key, &value}) check_no_overlap(*a, starts);
  }
  merge_heads(layout);
  return layout;
}

}  // namespace core

void validate(const CacheAppend& problem) { core::lower(problem); }
void validate(const CacheAppendDynamic& problem) { core::lower(problem); }
void validate(const CacheGather& problem) { core::lower(problem); }

}  // namespace fp8kv
