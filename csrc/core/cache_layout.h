// CacheLayout: the problems of the paged cache in the form that all backends work from. NHD, HND and other layouts of a cache
// are nothing but strides here.
#pragma once

#include <cstdint>

#include "fp8kv/kv_cache.h"

namespace fp8kv::core {

// Views of K and V. Strides count elements.
struct HeadsView {  // [token, head, dim]
  void* data = nullptr;
  std::int64_t token = 0;
  std::int64_t head = 0;
  std::int64_t dim = 1;
};
struct PagedView {  // [block, offset, head, dim]
  void* data = nullptr;
  std::int64_t block = 0;
  std::int64_t offset = 0;
  std::int64_t head = 0;
  std::int64_t dim = 1;
};
// Scales by strides: all 0 per tensor; `head` only, per head; `head` and `dim`, per channel; `block`, `offset` and `head`, per
// token and head.
struct PagedScales {
  float* data = nullptr;
  std::int64_t block = 0;
  std::int64_t offset = 0;
  std::int64_t head = 0;
  std::int64_t dim = 0;

  constexpr bool per_token() const { return block != 0 || offset != 0; }
};
struct OffsetView {  // [num_kv_heads, head_size]; nullptr: none
  const float* data = nullptr;
  std::int64_t head = 0;
  std::int64_t dim = 0;
};
struct KVViews {  // of K or V
  HeadsView rows;
  PagedView cache;
  PagedScales scales;
  OffsetView offsets;

  // Whether channels have scales or offsets of their own.
  constexpr bool has_channels() const { return scales.dim != 0 || offsets.data; }
};

struct CacheLayout {
  // Heads that follow each other in memory on both sides, with one scale or with scales per channel that do so too, are merged
  // into one.
  std::int64_t num_tokens = 0;  // to append; for a gather, rows of key and value
  std::int64_t num_heads = 0;
  std::int64_t head_size = 0;
  std::int64_t num_blocks = 0;
  std::int64_t block_size = 0;
  DType row_dtype = DType::Float32;    // of key and value
  DType cache_dtype = DType::Float32;  // of the caches; not quantized: a plain copy, rounded where the types differ
  KVViews k;
  KVViews v;

  constexpr std::int64_t num_slots() const { return num_blocks * block_size; }
  constexpr bool has_channels() const { return k.has_channels() || v.has_channels(); }
  // K and V have scales per channel, and no offsets.
  constexpr bool only_channel_scales() const {
    return k.scales.dim != 0 && v.scales.dim != 0 && !k.offsets.data && !v.offsets.data;
  }
  constexpr bool empty() const { return num_tokens == 0 || num_heads == 0 || head_size == 0; }
};

// Checks everything about a problem that can be checked without reading its elements, and normalizes it. Throws Error.
FP8KV_API CacheLayout lower(const CacheAppend& problem);
FP8KV_API CacheLayout lower(const CacheAppendDynamic& problem);
FP8KV_API CacheLayout lower(const CacheGather& problem);

}  // namespace fp8kv::core
