// The paged KV cache on the CPU: which kernel gets which rows. The arithmetic is in kernels/.
#include <limits>

#include "core/dispatch.h"
#include "cpu/cache.h"

namespace fp8kv::cpu {
namespace {

// The sequence that a row of the result belongs to: the last that begins at or before it.
std::int64_t sequence_of(const core::Indices& cu_seq_lens, std::int64_t num_seqs, std::int64_t row) {
  std::int64_t low = 0, high = num_seqs;
  while (high - low > 1) {
    const std::int64_t middle = low + (high - low) / 2;
    (cu_seq_lens[middle] <= row ? low : high) = middle;
  }
  return low;
}

// body(row, block, offset) for the rows [begin, end) of the result.
template <class Body>
void for_each_row(const CacheGather& problem, const CacheLayout& layout, std::int64_t begin, std::int64_t end,
                  const Body& body) {
  const core::Indices cu_seq_lens(problem.cu_seq_lens), table(problem.block_table);
  for (std::int64_t s = sequence_of(cu_seq_lens, problem.block_table.sizes[0], begin); begin < end; ++s) {
    const std::int64_t start = problem.seq_starts ? core::Indices(*problem.seq_starts)[s] : 0, first = cu_seq_lens[s];
    for (const std::int64_t last = std::min(end, cu_seq_lens[s + 1]); begin < last; ++begin) {
      const std::int64_t position = start + begin - first;
      body(begin, table(s, position / layout.block_size), position % layout.block_size);
    }
  }
}

// The following handle one layout of a problem whose indices have been checked.

void append(const CacheAppend& problem, const CacheLayout& layout, const ParallelFor& parallel_for) {
  if (layout.empty()) return;
  for_each_head_range(layout, true, parallel_for, [&](const HeadRange& range) {
    std::optional<HeadOffsets> offsets = offsets_of(layout, range);
    const HeadScales scales(kernels_for(offsets ? DType::Float32 : layout.row_dtype, layout.cache_dtype), scales_of(range),
                            range.heads, range.columns);
    for_each_token(layout, {&range, 1}, problem.slot_mapping, [&](std::int64_t token, const Place& place) {
      if (place.block < 0) return;
      StridedElements from = in_heads(layout, range, token);
      std::int64_t from_head = range.kv.rows.head;
      if (offsets) from = offsets->subtract_from(from, from_head), from_head = range.columns;
      scales.convert(from, in_cache(layout, range, place.block, place.offset), from_head, range.kv.cache.head, streams(layout));
    });
  });
}

void append(const CacheAppendDynamic& problem, const CacheLayout& layout, const ParallelFor& parallel_for) {
  constexpr float kNoBound = std::numeric_limits<float>::infinity();
  if (layout.empty()) return;
  for_each_head_range(layout, false, parallel_for, [&](const HeadRange& range) {
    std::optional<HeadOffsets> offsets = offsets_of(layout, range);
    const DType from_dtype = offsets ? DType::Float32 : layout.row_dtype;
    const ElementwiseKernels elementwise = kernels_for(from_dtype, layout.cache_dtype);
    const AmaxKernels& amax = kernels().amax[core::real_index(from_dtype)];
    const Rows rows{range.heads, offsets ? range.columns : range.kv.rows.head, range.kv.cache.head, range.kv.scales.head,
                    streams(layout)};
    for_each_token(layout, {&range, 1}, problem.slot_mapping, [&](std::int64_t token, const Place& place) {
      if (place.block < 0) return;
      StridedElements from = in_heads(layout, range, token);
      if (offsets) from = offsets->subtract_from(from, range.kv.rows.head);
      quantize_strided_rows(elementwise, amax, from, in_cache(layout, range, place.block, place.offset), range.columns, rows,
                            scales_of(range, place.block, place.offset).data, kNoBound);
    });
  });
}

void gather(const CacheGather& problem, const CacheLayout& layout, const ParallelFor& parallel_for) {
  if (layout.empty()) return;
  const std::int64_t count = core::Indices(problem.cu_seq_lens)[problem.block_table.sizes[0]];
  parallel(parallel_for, count, layout.sides * layout.num_heads * layout.head_size, [&](std::int64_t begin, std::int64_t end) {
    for (int s = 0; s < layout.sides; ++s) {
      const KVViews& kv = layout.side(s);
      const HeadRange range{kv, 0, layout.num_heads, 0, layout.head_size};
      std::optional<HeadOffsets> offsets = offsets_of(layout, range);
      const ElementwiseKernels elementwise = kernels_for(layout.cache_dtype, offsets ? DType::Float32 : layout.row_dtype);
      std::optional<HeadScales> channels;
      if (kv.scales.dim != 0) channels.emplace(elementwise, scales_of(range), range.heads, range.columns);
      const Rows rows{range.heads, kv.cache.head, offsets ? range.columns : kv.rows.head, kv.scales.head};
      for_each_row(problem, layout, begin, end, [&](std::int64_t row, std::int64_t block, std::int64_t offset) {
        const StridedElements from = in_cache(layout, range, block, offset), out = in_heads(layout, range, row);
        const StridedElements to = offsets ? offsets->heads() : out;
        if (channels)
          channels->convert(from, to, rows.in, rows.out);
        else
          convert_strided_rows(elementwise, from, to, range.columns, rows, scales_of(range, block, offset).data);
        if (offsets) offsets->add_to(out, kv.rows.head);
      });
    }
  });
}

}  // namespace

void run(const CacheAppend& problem, const ParallelFor& parallel_for) {
  constexpr const char* op = "reshape_and_cache_flash";
  const CacheLayouts layouts = core::lower(problem);
  core::check_on_device({op, "key", problem.key}, Device{});
  core::check_slots(op, problem.slot_mapping, layouts.front());
  for (const CacheLayout& layout : layouts) append(problem, layout, parallel_for);
}

void run(const CacheAppendDynamic& problem, const ParallelFor& parallel_for) {
  constexpr const char* op = "reshape_and_cache_flash_dynamic";
  const CacheLayouts layouts = core::lower(problem);
  core::check_on_device({op, "key", problem.key}, Device{});
  core::check_slots(op, problem.slot_mapping, layouts.front());
  for (const CacheLayout& layout : layouts) append(problem, layout, parallel_for);
}

void run(const CacheGather& problem, const ParallelFor& parallel_for) {
  const CacheLayouts layouts = core::lower(problem);
  core::check_on_device({"gather_and_dequant_cache", "key_cache", problem.key_cache}, Device{});
  core::check_sequences(problem, layouts.front());
  for (const CacheLayout& layout : layouts) gather(problem, layout, parallel_for);
}

}  // namespace fp8kv::cpu
