// CacheLayout: the problems of the paged cache in the form that all backends work from. NHD, HND and other layouts of a cache
// are nothing but strides here. K and V of two sizes or types are two layouts, of one side each.
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
  int sides = 2;  // K and V; 1: only `k`, which is either of them
  // Heads that follow each other in memory on both sides, with one scale or with scales per channel that do so too, are merged
  // into one.
  std::int64_t num_tokens = 0;  // to append; for a gather, rows of key and value
  std::int64_t num_heads = 0;
  std::int64_t head_size = 0;
  std::int64_t num_blocks = 0;
  std::int64_t block_size = 0;
  DType row_dtype = DType::Float32;    // of key and value; quantized: that of the caches, a plain copy
  DType cache_dtype = DType::Float32;  // of the caches; not quantized: a plain copy, rounded where the types differ
  KVViews k;
  KVViews v;

  constexpr const KVViews& side(int index) const { return index == 0 ? k : v; }
  constexpr std::int64_t num_slots() const { return num_blocks * block_size; }
  constexpr bool has_channels() const { return k.has_channels() || v.has_channels(); }
  // All sides have scales per channel, and no offsets.
  constexpr bool only_channel_scales() const {
    const auto only_scales = [](const KVViews& kv) { return kv.scales.dim != 0 && !kv.offsets.data; };
    return only_scales(k) && (sides == 1 || only_scales(v));
  }
  constexpr bool empty() const { return num_tokens == 0 || num_heads == 0 || head_size == 0; }
};

// What backends handle one after the other: K and V together where their sizes and types are the same, else K, then V. All have
// the same tokens and slots.
struct CacheLayouts {
  CacheLayout parts[2];
  int count = 1;

  const CacheLayout& front() const { return parts[0]; }
  const CacheLayout* begin() const { return parts; }
  const CacheLayout* end() const { return parts + count; }
  constexpr bool empty() const { return parts[0].empty() && (count == 1 || parts[1].empty()); }
};

// Checks everything about a problem that can be checked without reading its elements, and normalizes it. Throws Error.
FP8KV_API CacheLayouts lower(const CacheAppend& problem);
FP8KV_API CacheLayouts lower(const CacheAppendDynamic& problem);
FP8KV_API CacheLayouts lower(const CacheGather& problem);

}  // namespace fp8kv::core
