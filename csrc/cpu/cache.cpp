// The paged KV cache on the CPU: which kernel gets which rows. The arithmetic is in kernels/.
#include <bit>
#include <limits>

#include "core/dispatch.h"
#include "cpu/cache.h"

namespace fp8kv::cpu {
namespace {

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
  const CacheLayout layout = core::lower(problem);
  check_cpu(op, "key", problem.key);
  core::check_slots(op, problem.slot_mapping, layout);
  if (layout.empty()) return;
  const ElementwiseKernels map = kernels_for(layout.real, layout.element);
  for_each_head_slice(layout, true, parallel_for, [&](const HeadSlice& slice) {
    const std::int64_t step = slice.kv.scales.head;
    RowScales scales;
    prepare_rows(map, scales, scales_of(slice, 0, 0), step, step == 0 ? 1 : slice.heads);
    const Rows rows{slice.heads, slice.kv.rows.head, slice.kv.cache.head, step == 0 ? 0 : 1};
    for_each_slot(layout, problem.slot_mapping, [&](std::int64_t token, std::int64_t block, std::int64_t offset) {
      convert_rows(map, in_heads(layout, slice, token), in_cache(layout, slice, block, offset), slice.columns, rows, scales);
    });
  });
}

void run(const CacheAppendDynamic& problem, const ParallelFor& parallel_for) {
  constexpr const char* op = "reshape_and_cache_flash_dynamic";
  constexpr float kNoBound = std::numeric_limits<float>::infinity();
  const CacheLayout layout = core::lower(problem);
  check_cpu(op, "key", problem.key);
  core::check_slots(op, problem.slot_mapping, layout);
  if (layout.empty()) return;
  const ElementwiseKernels map = kernels_for(layout.real, layout.element);
  const AmaxKernels& amax = kernels().amax[core::real_index(layout.real)];
  for_each_head_slice(layout, false, parallel_for, [&](const HeadSlice& slice) {
    const Rows rows{slice.heads, slice.kv.rows.head, slice.kv.cache.head, slice.kv.scales.head};
    for_each_slot(layout, problem.slot_mapping, [&](std::int64_t token, std::int64_t block, std::int64_t offset) {
      const StridedSpan from = in_heads(layout, slice, token);
      float* scales = scales_of(slice, block, offset);
      std::int32_t largest[kMaxRows];
      amax_rows(amax, from, largest, slice.columns, rows);
      for (std::int64_t r = 0; r < rows.count; ++r)
        scales[r * rows.scale] = dynamic_scale_of(layout.element, std::bit_cast<float>(largest[r]), kNoBound);
      convert_rows(map, from, in_cache(layout, slice, block, offset), slice.columns, rows, scales);
    });
  });
}

void run(const CacheGather& problem, const ParallelFor& parallel_for) {
  const CacheLayout layout = core::lower(problem);
  check_cpu("gather_and_dequant_cache", "key_cache", problem.key_cache);
  core::check_sequences(problem, layout);
  if (layout.empty()) return;
  const ElementwiseKernels map = kernels_for(layout.element, layout.real);
  const std::int64_t count = core::Indices(problem.cu_seq_lens)[problem.block_table.sizes[0]];
  parallel(parallel_for, count, 2 * layout.num_heads * layout.head_size, [&](std::int64_t begin, std::int64_t end) {
    for (const KVViews* kv : {&layout.k, &layout.v}) {
      const HeadSlice slice{*kv, 0, layout.num_heads, 0, layout.head_size};
      const Rows rows{slice.heads, kv->cache.head, kv->rows.head, kv->scales.head};
      for_each_row(problem, layout, begin, end, [&](std::int64_t row, std::int64_t block, std::int64_t offset) {
        convert_rows(map, in_cache(layout, slice, block, offset), in_heads(layout, slice, row), slice.columns, rows,
                     scales_of(slice, block, offset));
      });
    }
  });
}

}  // namespace fp8kv::cpu
