// The paged KV cache on the CPU: which kernel gets which rows. The arithmetic is in quantize_kernels.h.
#include <bit>
#include <limits>

#include "cache.h"

namespace fp8kv::cpu {
namespace {

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
