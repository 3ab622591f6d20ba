#include "core/check_indices.h"

#include <algorithm>
#include <string>

#include "core/check.h"

namespace fp8kv::core {
namespace {

// That sums of lengths begin with 0 and are non-decreasing.
void check_sums(const char* op, const char* name, const Indices& sums, std::int64_t num_seqs) {
  if (sums[0] != 0) fail(op, name, "begin with 0", std::to_string(sums[0]));
  for (std::int64_t s = 0; s < num_seqs; ++s)
    if (sums[s + 1] < sums[s])
      fail(op, name, "be non-decreasing", std::to_string(sums[s + 1]) + " after " + std::to_string(sums[s]));
}

// That a tensor has all rows that sums of lengths count.
void check_rows(const char* op, const char* name, const TensorView& rows, const char* sums, std::int64_t count) {
  if (count > rows.sizes[0])
    fail(op, name, std::string("have at least ") + sums + "[-1]=" + std::to_string(count) + " rows",
         "shape " + shape_string(rows));
}

std::string in_sequence(std::int64_t s) { return " in sequence " + std::to_string(s); }

void check_at_least_0(const char* op, const char* name, std::int64_t value, std::int64_t s) {
  if (value < 0) fail(op, name, "be at least 0", std::to_string(value) + in_sequence(s));
}

// The block table, as far as sequences need it.
struct Table {
  const char* op;
  Indices blocks;
  std::int64_t max_blocks;
  std::int64_t block_size;
  std::int64_t num_blocks;

  // That row s has blocks for `count` positions.
  void check_capacity(std::int64_t s, std::int64_t count) const {
    if (count > 0 && (block_size == 0 || (count - 1) / block_size >= max_blocks))
      fail(op, "block_table",
           "have blocks for all positions, max_blocks * block_size = " + std::to_string(max_blocks * block_size),
           "a last position of " + std::to_string(count - 1) + in_sequence(s));
  }

  // That the positions [first, last] of sequence s, which check_capacity has accepted, lie in blocks of the cache.
  void check_blocks(std::int64_t s, std::int64_t first, std::int64_t last) const {
    for (std::int64_t b = first / block_size; b <= last / block_size; ++b)
      if (blocks(s, b) < 0 || blocks(s, b) >= num_blocks)
        fail(op, "block_table", "have blocks from 0 to num_blocks - 1 = " + std::to_string(num_blocks - 1),
             std::to_string(blocks(s, b)) + " at " + std::to_string(b) + in_sequence(s));
  }
};

}  // namespace

void check_slots(const char* op, const TensorView& slot_mapping, const CacheLayout& layout) {
  const Indices slots(slot_mapping);
  const std::int64_t count = slot_mapping.sizes[0], limit = layout.num_slots();
  for (std::int64_t i = 0; i < count; ++i)
    if (slots[i] >= limit)
      fail(op, "slot_mapping", "have slots below num_blocks * block_size = " + std::to_string(limit),
           std::to_string(slots[i]) + " for token " + std::to_string(i));
}

void check_positions(const char* op, const TensorView& view, const RopeLayout& layout) {
  const Indices positions(view);
  for (int axis = 0; axis < layout.sections.axes; ++axis) {
    for (std::int64_t i = 0; i < layout.cache.num_tokens; ++i) {
      const std::int64_t position = layout.sections.axes == 1 ? positions[i] : positions(axis, i);
      if (position < 0 || position >= layout.max_position)
        fail(op, "positions",
             "be from 0 to max_position - 1 = " + std::to_string(layout.max_position - 1) + ", rows of cos_sin_cache",
             std::to_string(position) + " for token " + std::to_string(i) +
                 (layout.sections.axes == 1 ? "" : " in row " + std::to_string(axis)));
    }
  }
}

void check_sequences(const CacheGather& p, const CacheLayout& layout) {
  constexpr const char* op = "gather_and_dequant_cache";
  const Indices cu_seq_lens(p.cu_seq_lens);
  const std::int64_t num_seqs = p.block_table.sizes[0];
  const Table table{op, Indices(p.block_table), p.block_table.sizes[1], layout.block_size, layout.num_blocks};
  check_sums(op, "cu_seq_lens", cu_seq_lens, num_seqs);
  check_rows(op, "key", p.key, "cu_seq_lens", cu_seq_lens[num_seqs]);
  for (std::int64_t s = 0; s < num_seqs; ++s) {
    const std::int64_t start = p.seq_starts ? Indices(*p.seq_starts)[s] : 0, length = cu_seq_lens[s + 1] - cu_seq_lens[s];
    if (length == 0) continue;
    check_at_least_0(op, "seq_starts", start, s);
    table.check_capacity(s, start + length);
    table.check_blocks(s, start, start + length - 1);
  }
}

void check_attention(const PagedAttention& p, const AttentionLayout& layout) {
  constexpr const char* op = "paged_attention";
  const Indices seq_lens(p.seq_lens);
  const Table table{op, Indices(p.block_table), layout.max_blocks, layout.block_size, layout.num_blocks};
  if (p.cu_query_lens) {
    const Indices sums(*p.cu_query_lens);
    check_sums(op, "cu_query_lens", sums, layout.num_seqs);
    const std::int64_t count = sums[layout.num_seqs];
    check_rows(op, "query", p.query, "cu_query_lens", count);
    check_rows(op, "out", p.out, "cu_query_lens", count);
    if (p.lse) check_rows(op, "lse", *p.lse, "cu_query_lens", count);
  }
  const auto query_len = [&](std::int64_t s) {
    if (!p.cu_query_lens) return std::int64_t{1};
    const Indices sums(*p.cu_query_lens);
    return sums[s + 1] - sums[s];
  };
  for (std::int64_t s = 0; s < layout.num_seqs; ++s) {
    const std::int64_t length = seq_lens[s], start = p.seq_starts ? Indices(*p.seq_starts)[s] : 0, queries = query_len(s);
    check_at_least_0(op, "seq_lens", length, s);
    check_at_least_0(op, "seq_starts", start, s);
    table.check_capacity(s, length);
    // The queries together see all positions from the first of a window to the last of the sequence.
    std::int64_t first = start;
    if (layout.sliding_window > 0)
      first = std::max(first, std::max<std::int64_t>(length - queries, 0) - layout.sliding_window + 1);
    if (queries > 0 && first < length) table.check_blocks(s, first, length - 1);
  }
}

}  // namespace fp8kv::core
