// Validation of the problems of the paged cache and their CacheLayout.
#include "core/lower_cache.h"

#include <algorithm>
#include <string>

#include "core/formats.h"

namespace fp8kv {
namespace core {
namespace {

constexpr TensorView kAbsent{.ndim = 1};

constexpr const char* kCacheForm = "[num_blocks, block_size, num_kv_heads, head_size]";

HeadsView heads_view(const TensorView& rows) {
  const std::int64_t* s = rows.strides;
  return {rows.data, s[0], s[1], s[2]};
}

void set_sizes(CacheLayout& layout, const TensorView& cache) {
  const std::int64_t* n = cache.sizes;
  layout.num_blocks = n[0], layout.block_size = n[1], layout.num_heads = n[2], layout.head_size = n[3];
}

// That rows have the heads of a cache, which has given the layout its sizes.
void check_heads(const Argument& rows, const CacheLayout& layout, const char* cache) {
  check_ndim(rows, 3, "[num_tokens, num_kv_heads, head_size]");
  if (rows.view.sizes[1] != layout.num_heads || rows.view.sizes[2] != layout.head_size)
    fail(rows.op, rows.name,
         "have num_kv_heads=" + std::to_string(layout.num_heads) + " and head_size=" + std::to_string(layout.head_size) +
             " as " + cache + " has",
         "shape " + shape_string(rows.view));
}

}  // namespace

DType cache_format(const Argument& cache, std::optional<DType> wanted, bool must_quantize, const char* dtype_name) {
  const DType actual = cache.view.dtype, format = wanted.value_or(actual);
  const bool quantized = is_quantized(format);
  if (!quantized && (must_quantize || !is_real(format))) {
    const std::string types = "be " + (must_quantize ? names_of(QuantizedTypes{}) : names_of(RealTypes{} + QuantizedTypes{}));
    if (wanted) fail(cache.op, dtype_name, types, name(format));
    fail(cache.op, cache.name, types + ", as " + dtype_name + " is not given", name(format));
  }
  const bool or_bytes = is_fp8(format);
  if (actual != format && !(or_bytes && actual == DType::UInt8))
    fail(cache.op, cache.name,
         std::string("be ") + name(format) + (or_bytes ? " or uint8" : "") + " as " + dtype_name + " is \"" +
             std::string(cache_format_name(format)) + "\"",
         name(actual));
  return format;
}

void check_same_dtype(const Argument& a, const Argument& other, const char* unless) {
  if (a.view.dtype != other.view.dtype)
    fail(a.op, a.name, std::string("be ") + name(other.view.dtype) + " as " + other.name + " is" + unless, name(a.view.dtype));
}

void check_same_blocks(const Argument& value_cache, const Argument& key_cache) {
  const std::int64_t* n = key_cache.view.sizes;
  if (!std::equal(n, n + 3, value_cache.view.sizes))
    fail(value_cache.op, value_cache.name,
         "have num_blocks=" + std::to_string(n[0]) + ", block_size=" + std::to_string(n[1]) +
             " and num_kv_heads=" + std::to_string(n[2]) + " as key_cache has",
         "shape " + shape_string(value_cache.view));
}

PagedView paged_view(const TensorView& cache) {
  const std::int64_t* s = cache.strides;
  return {cache.data, s[0], s[1], s[2], s[3]};
}

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
  layout.cache_dtype = cache_format(key_cache, kv_cache_dtype, must_quantize);
  check_same_dtype(value_cache, key_cache);
  for (const Argument* a : {&key_cache, &value_cache}) check_same_device(*a, key);
  check_ndim(key_cache, 4, kCacheForm);
  check_same_shape(value_cache, key_cache);
  set_sizes(layout, key_cache.view);
  layout.k.cache = paged_view(key_cache.view);
  layout.v.cache = paged_view(value_cache.view);
  return layout;
}

CacheLayout lower_heads_and_caches(const Argument& key, const Argument& value, const Argument& key_cache,
                                   const Argument& value_cache, std::optional<DType> kv_cache_dtype, bool must_quantize) {
  for (const Argument* a : {&key, &value, &key_cache, &value_cache}) check_view(*a);
  check_real(key);
  check_same_dtype(value, key);
  check_same_device(value, key);
  CacheLayout layout = lower_caches(key_cache, value_cache, kv_cache_dtype, must_quantize, key);
  layout.row_dtype = key.view.dtype;
  for (const Argument* a : {&key, &value}) check_heads(*a, layout, "key_cache");
  layout.k.rows = heads_view(key.view);
  layout.v.rows = heads_view(value.view);
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
  if (stride < 0) fail(a.op, a.name, "be evenly strided", "several strides in shape " + shape_string(a.view));
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

// K and V of the operations that handle each by itself: layouts of one side.
struct Sides {
  CacheLayout k, v;

  Sides() { k.sides = v.sides = 1; }
};

// The arguments of a problem about its rows and caches.
struct RowsAndCaches {
  Argument key, value, key_cache, value_cache;
  std::optional<DType> kv_cache_dtype, v_cache_dtype;
};

template <class Problem>
RowsAndCaches rows_and_caches(const char* op, const Problem& p) {
  return {{op, "key", p.key}, {op, "value", p.value}, {op, "key_cache", p.key_cache}, {op, "value_cache", p.value_cache},
          p.kv_cache_dtype,   p.v_cache_dtype};
}

// What rows may be, besides unquantized.
enum class Stored { No, Yes };

// The format of rows: unquantized (of the type of `key`, if that is too), or with Stored::Yes that of a quantized
// cache.
DType rows_format(const Argument& rows, DType cache, Stored stored, const Argument& key) {
  const DType dtype = rows.view.dtype;
  const bool as_key = &rows != &key && is_real(key.view.dtype);
  if (as_key ? dtype == key.view.dtype : is_real(dtype)) return dtype;
  const bool may_be_stored = stored == Stored::Yes && is_quantized(cache) && size_of(dtype) == 1;
  if (may_be_stored && (dtype == cache || (is_fp8(cache) && dtype == DType::UInt8))) return cache;
  fail(rows.op, rows.name,
       "be " + (as_key ? std::string(name(key.view.dtype)) + " as key is" : names_of(RealTypes{})) +
           (may_be_stored ? std::string(", or ") + name(cache) + " to be stored as it is" : ""),
       name(dtype));
}

// Everything but the number of tokens, the scales and the offsets. The caches give the sizes; key and value must fit them.
Sides lower_sides(const RowsAndCaches& a, bool must_quantize, Stored stored) {
  for (const Argument* view : {&a.key, &a.value, &a.key_cache, &a.value_cache}) check_view(*view);
  Sides sides;
  auto& [k, v] = sides;
  k.cache_dtype = v.cache_dtype = cache_format(a.key_cache, a.kv_cache_dtype, must_quantize);
  if (a.v_cache_dtype)
    v.cache_dtype = cache_format(a.value_cache, a.v_cache_dtype, must_quantize, "v_cache_dtype");
  else
    check_same_dtype(a.value_cache, a.key_cache, ", as v_cache_dtype is not given");
  k.row_dtype = rows_format(a.key, k.cache_dtype, stored, a.key);
  v.row_dtype = rows_format(a.value, v.cache_dtype, stored, a.key);
  for (const Argument* other : {&a.value, &a.key_cache, &a.value_cache}) check_same_device(*other, a.key);

  for (const Argument* cache : {&a.key_cache, &a.value_cache}) check_ndim(*cache, 4, kCacheForm);
  check_same_blocks(a.value_cache, a.key_cache);
  set_sizes(k, a.key_cache.view), set_sizes(v, a.value_cache.view);
  check_heads(a.key, k, a.key_cache.name), check_heads(a.value, v, a.value_cache.name);
  k.k.cache = paged_view(a.key_cache.view), k.k.rows = heads_view(a.key.view);
  v.k.cache = paged_view(a.value_cache.view), v.k.rows = heads_view(a.value.view);
  return sides;
}

// Scales and offsets of a side for the operations that append or gather with given ones. Rows that are stored as they are use
// none.
void lower_given(CacheLayout& side, const char* cache, const Argument& scale, const Argument& offset, const Argument& key,
                 bool or_cache = false) {
  if (is_given(offset) && !is_quantized(side.cache_dtype))
    fail(offset.op, offset.name, std::string("be None as ") + cache + " is not quantized",
         "shape " + shape_string(offset.view));
  lower_parameters(side.k, scale, offset, side, key, or_cache);
  if (is_quantized(side.row_dtype)) side.k.scales.dim = 0, side.k.offsets = {};
}

void merge_heads(CacheLayout& layout) {
  const bool copies = is_quantized(layout.row_dtype) || !is_quantized(layout.cache_dtype);
  for (int s = 0; s < layout.sides; ++s) {
    const KVViews& kv = layout.side(s);
    const PagedScales& scale = kv.scales;
    const OffsetView& offset = kv.offsets;
    if (!copies && (scale.block || scale.offset || scale.head != layout.head_size * scale.dim)) return;
    if (offset.data && offset.head != layout.head_size * offset.dim) return;
    if (kv.rows.head != layout.head_size * kv.rows.dim || kv.cache.head != layout.head_size * kv.cache.dim) return;
  }
  layout.head_size *= layout.num_heads;
  layout.num_heads = layout.num_heads > 0 ? 1 : 0;
}

// One layout if K and V have the same sizes and types, else one each.
CacheLayouts together(const Sides& sides, std::int64_t num_tokens, bool merges_heads) {
  const auto& [k, v] = sides;
  CacheLayouts layouts{{k, v}, 2};
  if (k.head_size == v.head_size && k.row_dtype == v.row_dtype && k.cache_dtype == v.cache_dtype) {
    layouts.count = 1;
    layouts.parts[0].sides = 2;
    layouts.parts[0].v = v.k;
  }
  for (CacheLayout& part : layouts.parts) {
    part.num_tokens = num_tokens;
    if (merges_heads) merge_heads(part);
  }
  return layouts;
}

}  // namespace

CacheLayouts lower(const CacheAppend& p) {
  constexpr const char* op = "reshape_and_cache_flash";
  const RowsAndCaches a = rows_and_caches(op, p);
  const Argument slots{op, "slot_mapping", p.slot_mapping}, k_scale{op, "k_scale", p.k_scale},
      v_scale{op, "v_scale", p.v_scale};
  const Argument k_offset = optional_argument(op, "k_offset", p.k_offset),
                 v_offset = optional_argument(op, "v_offset", p.v_offset);
  Sides sides = lower_sides(a, false, Stored::Yes);
  const std::int64_t num_tokens = count_tokens(slots, a.key, a.value);
  lower_given(sides.k, a.key_cache.name, k_scale, k_offset, a.key);
  lower_given(sides.v, a.value_cache.name, v_scale, v_offset, a.key);
  check_written({&a.key_cache, &a.value_cache}, {&a.key, &a.value, &slots, &k_scale, &v_scale, &k_offset, &v_offset});
  return together(sides, num_tokens, true);
}

CacheLayouts lower(const CacheAppendDynamic& p) {
  constexpr const char* op = "reshape_and_cache_flash_dynamic";
  const RowsAndCaches a = rows_and_caches(op, p);
  const Argument slots{op, "slot_mapping", p.slot_mapping}, k_scales{op, "k_scale_cache", p.k_scale_cache},
      v_scales{op, "v_scale_cache", p.v_scale_cache};
  const Argument k_offset = optional_argument(op, "k_offset", p.k_offset),
                 v_offset = optional_argument(op, "v_offset", p.v_offset);
  Sides sides = lower_sides(a, true, Stored::No);
  const std::int64_t num_tokens = count_tokens(slots, a.key, a.value);
  sides.k.k.scales = scale_cache(k_scales, sides.k, a.key);
  sides.v.k.scales = scale_cache(v_scales, sides.v, a.key);
  sides.k.k.offsets = lower_offsets(k_offset, sides.k, a.key);
  sides.v.k.offsets = lower_offsets(v_offset, sides.v, a.key);
  // Without V its scales are not written, and may be those of K.
  check_written({&a.key_cache, &a.value_cache, &k_scales, sides.v.head_size > 0 ? &v_scales : &a.value_cache},
                {&a.key, &a.value, &slots, &k_offset, &v_offset});
  return together(sides, num_tokens, false);
}

CacheLayouts lower(const CacheGather& p) {
  constexpr const char* op = "gather_and_dequant_cache";
  const RowsAndCaches a = rows_and_caches(op, p);
  const Argument table{op, "block_table", p.block_table}, cu_seq_lens{op, "cu_seq_lens", p.cu_seq_lens},
      k_scale{op, "k_scale", p.k_scale}, v_scale{op, "v_scale", p.v_scale};
  const Argument k_offset = optional_argument(op, "k_offset", p.k_offset),
                 v_offset = optional_argument(op, "v_offset", p.v_offset);
  Sides sides = lower_sides(a, false, Stored::No);
  if (p.value.sizes[0] != p.key.sizes[0])
    fail(op, "value", "have as many rows as key, " + std::to_string(p.key.sizes[0]), "shape " + shape_string(p.value));
  lower_given(sides.k, a.key_cache.name, k_scale, k_offset, a.key, true);
  lower_given(sides.v, a.value_cache.name, v_scale, v_offset, a.key, true);
  const std::int64_t num_seqs = count_sequences(table, a.key);
  check_sums(cu_seq_lens, num_seqs, a.key);
  check_written({&a.key, &a.value},
                {&a.key_cache, &a.value_cache, &k_scale, &v_scale, &table, &cu_seq_lens, &k_offset, &v_offset});
  if (p.seq_starts) {
    const Argument starts{op, "seq_starts", *p.seq_starts};
    check_per_sequence(starts, num_seqs, a.key);
    for (const Argument* rows : {&a.key, &a.value}) check_no_overlap(*rows, starts);
  }
  return together(sides, p.key.sizes[0], true);
}

}  // namespace core

void validate(const CacheAppend& problem) { core::lower(problem); }
void validate(const CacheAppendDynamic& problem) { core::lower(problem); }
void validate(const CacheGather& problem) { core::lower(problem); }

}  // namespace fp8kv
