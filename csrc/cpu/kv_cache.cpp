// The paged KV cache on the CPU: which kernel gets which rows. The arithmetic is in quantize_kernels.h.
#include "fp8kv/kv_cache.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <type_traits>

#include "fp8kv/fp8.h"
#include "indices.h"
#include "launch.h"
#include "layout.h"
#include "parallel.h"
#include "visit.h"

namespace fp8kv::cpu {
namespace {

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

void prepare_nothing(RowScales&, std::int64_t) {}

MapKernels row_kernels(DType in, DType out) {
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

Elements in_heads(const CacheLayout& layout, const Part& part, std::int64_t token) {
  const HeadsView& view = part.side.heads;
  const Elements all{static_cast<std::byte*>(view.data), size_of(layout.real), view.dim};
  return all.at(token * view.token + part.head * view.head + part.column * view.dim);
}

Elements in_cache(const CacheLayout& layout, const Part& part, std::int64_t block, std::int64_t offset) {
  const PagedView& view = part.side.cache;
  const Elements all{static_cast<std::byte*>(view.data), size_of(layout.element), view.dim};
  return all.at(block * view.block + offset * view.offset + part.head * view.head + part.column * view.dim);
}

float* scales_of(const Part& part, std::int64_t block, std::int64_t offset) {
  const PagedScales& view = part.side.scales;
  return view.data + block * view.block + offset * view.offset + part.head * view.head;
}

// --- Append --------------------------------

// Where there is one head, it is divided at multiples of this many columns.
constexpr std::int64_t kColumns = 64;

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

// --- Gather --------------------------------

// The sequence that a row of the result belongs to: the last that begins at or before it.
std::int64_t sequence_of(const core::Indices& sums, std::int64_t num_seqs, std::int64_t row) {
  std::int64_t low = 0, high = num_seqs;
  while (high - low > 1) {
    const std::int64_t middle = low + (high - low) / 2;
    (sums[middle] <= row ? low : high) = middle;
  }
  return low;
}

// body(row, block, offset) for the rows [begin, end) of the result.
template <class Body>
void for_each_row(const CacheGather& problem, const CacheLayout& layout, std::int64_t begin, std::int64_t end,
                  const Body& body) {
  const core::Indices sums(problem.cu_seq_lens), table(problem.block_table);
  for (std::int64_t s = sequence_of(sums, problem.block_table.sizes[0], begin); begin < end; ++s) {
    const std::int64_t start = problem.seq_starts ? core::Indices(*problem.seq_starts)[s] : 0, first = sums[s];
    for (const std::int64_t last = std::min(end, sums[s + 1]); begin < last; ++begin) {
      const std::int64_t position = start + begin - first;
      body(begin, table(s, position / layout.block_size), position % layout.block_size);
    }
  }
}

}  // namespace

void run(const CacheAppend& problem, const ParallelFor& parallel_for) {
  constexpr const char* op = "reshape_and_cache_flash";
  const CacheLayout layout = validate(problem);
  check_cpu(op, "key", problem.key);
  core::check_slots(op, problem.slot_mapping, layout);
  if (layout.empty()) return;
  const MapKernels map = row_kernels(layout.real, layout.element);
  for_each_part(layout, true, parallel_for, [&](const Part& part) {
    const std::int64_t step = part.side.scales.head;
    RowScales scales;
    prepare_rows(map, scales, scales_of(part, 0, 0), step, step == 0 ? 1 : part.heads);
    const Rows rows{part.heads, part.side.heads.head, part.side.cache.head, step == 0 ? 0 : 1};
    for_each_slot(layout, problem.slot_mapping, [&](std::int64_t token, std::int64_t block, std::int64_t offset) {
      map_rows(map, in_heads(layout, part, token), in_cache(layout, part, block, offset), part.columns, rows, scales);
    });
  });
}

void run(const CacheAppendDynamic& problem, const ParallelFor& parallel_for) {
  constexpr const char* op = "reshape_and_cache_flash_dynamic";
  constexpr float kNoBound = std::numeric_limits<float>::infinity();
  const CacheLayout layout = validate(problem);
  check_cpu(op, "key", problem.key);
  core::check_slots(op, problem.slot_mapping, layout);
  if (layout.empty()) return;
  const MapKernels map = row_kernels(layout.real, layout.element);
  const AmaxKernels& amax = kernels().amax[real_index(layout.real)];
  for_each_part(layout, false, parallel_for, [&](const Part& part) {
    const Rows rows{part.heads, part.side.heads.head, part.side.cache.head, part.side.scales.head};
    for_each_slot(layout, problem.slot_mapping, [&](std::int64_t token, std::int64_t block, std::int64_t offset) {
      const Elements from = in_heads(layout, part, token);
      float* scales = scales_of(part, block, offset);
      std::int32_t largest[kMaxRows];
      amax_rows(amax, from, largest, part.columns, rows);
      for (std::int64_t r = 0; r < rows.count; ++r)
        scales[r * rows.scale] = scale_of(layout.element, std::bit_cast<float>(largest[r]), kNoBound);
      map_rows(map, from, in_cache(layout, part, block, offset), part.columns, rows, scales);
    });
  });
}

void run(const CacheGather& problem, const ParallelFor& parallel_for) {
  const CacheLayout layout = validate(problem);
  check_cpu("gather_and_dequant_cache", "key_cache", problem.key_cache);
  core::check_sequences(problem, layout);
  if (layout.empty()) return;
  const MapKernels map = row_kernels(layout.element, layout.real);
  const std::int64_t count = core::Indices(problem.cu_seq_lens)[problem.block_table.sizes[0]];
  parallel(parallel_for, count, 2 * layout.num_heads * layout.head_size, [&](std::int64_t begin, std::int64_t end) {
    for (const CacheSide* side : {&layout.key, &layout.value}) {
      const Part part{*side, 0, layout.num_heads, 0, layout.head_size};
      const Rows rows{part.heads, side->cache.head, side->heads.head, side->scales.head};
      for_each_row(problem, layout, begin, end, [&](std::int64_t row, std::int64_t block, std::int64_t offset) {
        map_rows(map, in_cache(layout, part, block, offset), in_heads(layout, part, row), part.columns, rows,
                 scales_of(part, block, offset));
      });
    }
  });
}

}  // namespace fp8kv::cpu
