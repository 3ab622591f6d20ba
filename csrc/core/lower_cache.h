// Checks and conversions of cache arguments that several problems have: defined in lower_cache.cpp, used by lower_rope.cpp and
// lower_attention.cpp too.
#pragma once

#include <optional>

#include "core/cache_layout.h"
#include "core/check.h"

namespace fp8kv::core {

void check_ndim(const Argument& a, int ndim, const char* form);
void check_int32(const Argument& a);
void check_int32_or_int64(const Argument& a);

// A scale or an index tensor: a sound view, of a dtype, on the device of `key`.
void check_companion(const Argument& a, const Argument& key, void (*check_dtype)(const Argument&));

// At least `count` rows, one for each of something.
void check_rows(const Argument& a, std::int64_t count, const char* each = "element of slot_mapping");

// The format of a cache; `wanted`, the argument `dtype_name`, and the tensor must agree.
DType cache_format(const Argument& cache, std::optional<DType> wanted, bool must_quantize,
                   const char* dtype_name = "kv_cache_dtype");
void check_same_dtype(const Argument& a, const Argument& other, const char* unless = "");
// That both have the same blocks and heads, whose sizes may differ.
void check_same_blocks(const Argument& value_cache, const Argument& key_cache);
PagedView paged_view(const TensorView& cache);

// The formats, sizes and views of caches that check_view has accepted. `key` gives the device.
CacheLayout lower_caches(const Argument& key_cache, const Argument& value_cache, std::optional<DType> kv_cache_dtype,
                         bool must_quantize, const Argument& key);

// Everything but the number of tokens and the scales. The caches give the sizes; key and value must fit them.
CacheLayout lower_heads_and_caches(const Argument& key, const Argument& value, const Argument& key_cache,
                                   const Argument& value_cache, std::optional<DType> kv_cache_dtype, bool must_quantize);

// The number of tokens, which key and value must have at least.
std::int64_t count_tokens(const Argument& slot_mapping, const Argument& key, const Argument& value);

// The number of sequences, which are rows of the block table.
std::int64_t count_sequences(const Argument& block_table, const Argument& key);

// Int32 with an element per sequence; sums of them with one more.
void check_per_sequence(const Argument& a, std::int64_t num_seqs, const Argument& key);
void check_sums(const Argument& a, std::int64_t num_seqs, const Argument& key);

// The one stride between elements in row-major order.
std::int64_t even_stride(const Argument& a);

// Scales of 1 or num_kv_heads elements, or one per channel; with `or_cache`, also one per token and head. `key` gives the
// device.
PagedScales lower_scales(const Argument& a, const CacheLayout& layout, const Argument& key, bool or_cache);

// Offsets, one per channel, if they are given. `caches`: what messages call what they are of.
OffsetView lower_offsets(const Argument& a, const CacheLayout& layout, const Argument& key,
                         const char* caches = "the caches are");

// Scales and offsets of K or V for the operations that append or gather.
void lower_parameters(KVViews& kv, const Argument& scale, const Argument& offset, const CacheLayout& layout,
                      const Argument& key, bool or_cache = false);

// An argument that may be absent: then a view of no element, which overlaps nothing.
Argument optional_argument(const char* op, const char* name, const std::optional<TensorView>& view);
bool is_given(const Argument& optional);

}  // namespace fp8kv::core
