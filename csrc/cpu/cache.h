// What the launchers of the paged cache share: plain copies beside the kernels of quantization, parts of heads, and places.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "fp8kv/fp8.h"
#include "fp8kv/kv_cache.h"
#include "indices.h"
#include "launch.h"
#include "layout.h"
#include "parallel.h"
#include "visit.h"

namespace fp8kv::cpu {

// --- Kernels --------------------------------

// A plain copy: the bits where the types are the same, otherwise rounded. It uses no scales.
template <class In, class Out>
void copy_rows(const void* in_data, void* out_data, std::int64_t columns, const Rows& rows, const RowScales&, std::int64_t) {
  const auto* in = static_cast<const In*>(in_data);
  auto* out = static_cast<Out*>(out_data);
  for (std::int64_t r = 0; r < rows.count; ++r, in += rows.in, out += rows.out) {
    if constexpr (std::is_same_v<In, Out>) {
      std::memcpy(out, in, columns * sizeof(In));
    } else {
      for (std::int64_t i = 0; i < columns; ++i) out[i] = from_float<Out>(decode(in[i]));
    }
  }
}

inline void prepare_nothing(RowScales&, std::int64_t) {}

inline MapKernels row_kernels(DType in, DType out) {
  if (is_fp8(out)) return kernels().quantize[real_index(in)][fp8_index(out)];
  if (is_fp8(in)) return kernels().dequantize[fp8_index(in)][real_index(out)];
  MapKernels copy{.prepare_rows = prepare_nothing, .rows = nullptr, .prepare_columns = nullptr, .columns = nullptr};
  core::visit_real(in, [&]<class In>(core::Type<In>) {
    core::visit_real(out, [&]<class Out>(core::Type<Out>) { copy.rows = copy_rows<In, Out>; });
  });
  return copy;
}

// --- Where a token's elements are --------------------------------

// Some heads of K or V, and the same columns of each.
struct Part {
  const CacheSide& side;
  std::int64_t head, heads;
  std::int64_t column, columns;
};

inline Elements in_heads(const CacheLayout& layout, const Part& part, std::int64_t token) {
  const HeadsView& view = part.side.heads;
  const Elements all{static_cast<std::byte*>(view.data), size_of(layout.real), view.dim};
  return all.at(token * view.token + part.head * view.head + part.column * view.dim);
}

inline Elements in_cache(const CacheLayout& layout, const Part& part, std::int64_t block, std::int64_t offset) {
  const PagedView& view = part.side.cache;
  const Elements all{static_cast<std::byte*>(view.data), size_of(layout.element), view.dim};
  return all.at(block * view.block + offset * view.offset + part.head * view.head + part.column * view.dim);
}

inline float* scales_of(const Part& part, std::int64_t block, std::int64_t offset) {
  const PagedScales& view = part.side.scales;
  return view.data + block * view.block + offset * view.offset + part.head * view.head;
}

// --- Append --------------------------------

// Where there is one head, it is divided at multiples of this many columns.
inline constexpr std::int64_t kColumns = 64;

// body(part) for parts of K and V that cover all; `divide_head` where one head may be divided. All tokens of a part are one
// thread's, in order: of several with one slot the last stays.
template <class Body>
void for_each_part(const CacheLayout& layout, bool divide_head, const ParallelFor& parallel_for, const Body& body) {
  const bool by_columns = divide_head && layout.num_heads == 1;
  const std::int64_t items = by_columns ? core::ceil_div(layout.head_size, kColumns) : layout.num_heads;  // of a side
  const std::int64_t elements = layout.num_tokens * layout.num_heads * layout.head_size;
  parallel(parallel_for, 2 * items, elements / items, [&](std::int64_t begin, std::int64_t end) {
    while (begin < end) {
      const CacheSide& side = begin < items ? layout.key : layout.value;
      const std::int64_t first = begin % items;
      std::int64_t count = std::min(items - first, end - begin);
      if (by_columns) {
        const std::int64_t column = first * kColumns;
        body(Part{side, 0, 1, column, std::min(layout.head_size - column, count * kColumns)});
      } else {
        count = std::min(count, kMaxRows);
        body(Part{side, first, count, 0, layout.head_size});
      }
      begin += count;
    }
  });
}

// body(token, block, offset) for the tokens that have a slot.
template <class Body>
void for_each_slot(const CacheLayout& layout, const TensorView& slot_mapping, const Body& body) {
  const core::Indices slots(slot_mapping);
  for (std::int64_t token = 0; token < layout.num_tokens; ++token)
    if (const std::int64_t slot = slots[token]; slot >= 0) body(token, slot / layout.block_size, slot % layout.block_size);
}

}  // namespace fp8kv::cpu
