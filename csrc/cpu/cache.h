// Shared by the operations on the paged cache: slices of heads, and where the elements of a token lie.
#pragma once

#include <algorithm>
#include <optional>
#include <span>

#include "core/cache_layout.h"
#include "core/check_indices.h"
#include "core/layout.h"
#include "cpu/heads.h"
#include "cpu/parallel.h"
#include "cpu/rows.h"

namespace fp8kv::cpu {

using core::CacheLayout;
using core::CacheLayouts;
using core::HeadsView;
using core::KVViews;
using core::PagedScales;
using core::PagedView;

// --- Where a token's elements are ----------

// Some heads of K or V, and the same columns of each.
struct HeadRange {
  const KVViews& kv;
  std::int64_t head, heads;
  std::int64_t column, columns;
};

inline StridedElements in_heads(const CacheLayout& layout, const HeadRange& range, std::int64_t token) {
  const HeadsView& view = range.kv.rows;
  const StridedElements all{static_cast<std::byte*>(view.data), size_of(layout.row_dtype), view.dim};
  return all.at(token * view.token + range.head * view.head + range.column * view.dim);
}

inline StridedElements in_cache(const CacheLayout& layout, const HeadRange& range, std::int64_t block, std::int64_t offset) {
  const PagedView& view = range.kv.cache;
  const StridedElements all{static_cast<std::byte*>(view.data), size_of(layout.cache_dtype), view.dim};
  return all.at(block * view.block + offset * view.offset + range.head * view.head + range.column * view.dim);
}

// The scales of a range, at a slot.
inline PagedScales scales_of(const HeadRange& range, std::int64_t block = 0, std::int64_t offset = 0) {
  PagedScales view = range.kv.scales;
  view.data += block * view.block + offset * view.offset + range.head * view.head + range.column * view.dim;
  return view;
}

// The offsets of a range, if there are any.
inline std::optional<HeadOffsets> offsets_of(const CacheLayout& layout, const HeadRange& range) {
  core::OffsetView view = range.kv.offsets;
  if (!view.data) return std::nullopt;
  view.data += range.head * view.head + range.column * view.dim;
  return HeadOffsets(view, layout.row_dtype, range.heads, range.columns);
}

// --- Append ----------

// Where there is one head, it is divided at multiples of this many columns.
inline constexpr std::int64_t kColumns = 64;

// body(range) for slices of all sides that cover them; `divide_head` where one head may be divided. One thread handles all
// tokens of a range, in order: of several with one slot the last stays.
template <class Body>
void for_each_head_range(const CacheLayout& layout, bool divide_head, const ParallelFor& parallel_for, const Body& body) {
  const bool by_columns = divide_head && layout.num_heads == 1;
  const std::int64_t items = by_columns ? core::ceil_div(layout.head_size, kColumns) : layout.num_heads;  // of a side
  const std::int64_t elements = layout.num_tokens * layout.num_heads * layout.head_size;
  parallel(parallel_for, layout.sides * items, elements / items, [&](std::int64_t begin, std::int64_t end) {
    while (begin < end) {
      const KVViews& kv = layout.side(begin < items ? 0 : 1);
      const std::int64_t first = begin % items;
      std::int64_t count = std::min(items - first, end - begin);
      if (by_columns) {
        const std::int64_t column = first * kColumns;
        body(HeadRange{kv, 0, 1, column, std::min(layout.head_size - column, count * kColumns)});
      } else {
        count = std::min(count, kMaxRows);
        body(HeadRange{kv, first, count, 0, layout.head_size});
      }
      begin += count;
    }
  });
}

// Whether what is appended is larger than the caches of a core: then it is written past them.
inline bool streams(const CacheLayout& layout) {
  constexpr std::int64_t kCached = 1 << 20;
  return layout.sides * layout.num_tokens * layout.num_heads * layout.head_size >= kCached;
}

// Where a token goes.
struct Place {
  std::int64_t block = -1;  // -1: nowhere
  std::int64_t offset = 0;
};

// Asks for the pages of a range at a place. Inlined, or else GCC takes it for a function without effects and drops it.
[[gnu::always_inline]] inline void touch_pages(const CacheLayout& layout, const HeadRange& range, const Place& place) {
  constexpr std::int64_t kPage = 4096;
  const StridedElements first = in_cache(layout, range, place.block, place.offset);
  const std::int64_t bytes = range.kv.cache.head * first.size;
  const std::int64_t heads_per_page = bytes > 0 && bytes < kPage ? kPage / bytes : 1;
  for (std::int64_t h = 0; h < range.heads; h += heads_per_page) __builtin_prefetch(first.data + h * bytes, 1);
  if (range.kv.scales.block != 0) __builtin_prefetch(scales_of(range, place.block, place.offset).data, 1);
}

// body(token, place) for all tokens, with what is written at the places of the ranges.
//
// Slots may be scattered over more pages than the processor knows the addresses of. It looks up several at a time if they are
// asked for together, and one after the other if each is written to before the next.
template <class Body>
void for_each_token(const CacheLayout& layout, std::span<const HeadRange> ranges, const TensorView& slot_mapping,
                    const Body& body) {
  constexpr std::int64_t kTogether = 64;
  Place places[kTogether];
  const core::Indices slots(slot_mapping);
  for (std::int64_t first = 0; first < layout.num_tokens; first += kTogether) {
    const std::int64_t count = std::min(kTogether, layout.num_tokens - first);
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t slot = slots[first + i];
      places[i] = slot < 0 ? Place{} : Place{slot / layout.block_size, slot % layout.block_size};
    }
    for (const HeadRange& range : ranges)
      for (std::int64_t i = 0; i < count; ++i)
        if (places[i].block >= 0) touch_pages(layout, range, places[i]);
    for (std::int64_t i = 0; i < count; ++i) body(first + i, places[i]);
  }
}

}  // namespace fp8kv::cpu
