#include "core/check_indices.h"

#include <string>

#include "core/check.h"

namespace fp8kv::core {

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
  for (std::int64_t i = 0; i < layout.cache.num_tokens; ++i)
    if (positions[i] < 0 || positions[i] >= layout.max_position)
      fail(op, "positions",
           "be from 0 to max_position - 1 = " + std::to_string(layout.max_position - 1) + ", rows of cos_sin_cache",
           std::to_string(positions[i]) + " for token " + std::to_string(i));
}

void check_sequences(const CacheGather& p, const CacheLayout& layout) {
  constexpr const char* op = "gather_and_dequant_cache";
  const Indices cu_seq_lens(p.cu_seq_lens), table(p.block_table);
  const std::int64_t num_seqs = p.block_table.sizes[0], max_blocks = p.block_table.sizes[1], rows = p.key.sizes[0];
  if (cu_seq_lens[0] != 0) fail(op, "cu_seq_lens", "begin with 0", std::to_string(cu_seq_lens[0]));
  for (std::int64_t s = 0; s < num_seqs; ++s)
    if (cu_seq_lens[s + 1] < cu_seq_lens[s])
      fail(op, "cu_seq_lens", "never fall", std::to_string(cu_seq_lens[s + 1]) + " after " + std::to_string(cu_seq_lens[s]));
  if (cu_seq_lens[num_seqs] > rows)
    fail(op, "key", "have at least cu_seq_lens[-1]=" + std::to_string(cu_seq_lens[num_seqs]) + " rows",
         "shape " + shape_string(p.key));

  for (std::int64_t s = 0; s < num_seqs; ++s) {
    const std::int64_t start = p.seq_starts ? Indices(*p.seq_starts)[s] : 0, length = cu_seq_lens[s + 1] - cu_seq_lens[s];
    if (length == 0) continue;
    const auto here = [s] { return " in sequence " + std::to_string(s); };
    if (start < 0) fail(op, "seq_starts", "be at least 0", std::to_string(start) + here());
    if (layout.block_size == 0 || start + length > max_blocks * layout.block_size)
      fail(op, "block_table",
           "have blocks for all positions, max_blocks * block_size = " + std::to_string(max_blocks * layout.block_size),
           "a last position of " + std::to_string(start + length - 1) + here());
    for (std::int64_t b = start / layout.block_size; b <= (start + length - 1) / layout.block_size; ++b)
      if (table(s, b) < 0 || table(s, b) >= layout.num_blocks)
        fail(op, "block_table", "have blocks from 0 to num_blocks - 1 = " + std::to_string(layout.num_blocks - 1),
             std::to_string(table(s, b)) + " at " + std::to_string(b) + here());
  }
}

}  // namespace fp8kv::core
