// How the grouped attention kernel (csrc/cuda/attention/grouped.cu) divides its work between warps, and a block its shared
// memory: for the kernel, and for the plan, which has to know whether it fits.
#pragma once

#include "core/attention_layout.h"
#include "core/attention_memory.h"

namespace fp8kv::core {

// Whether V is the first elements of the heads of K.
inline bool values_in_keys(const AttentionLayout& l) {
  const PagedView &k = l.key_cache, &v = l.value_cache;
  return v.data == k.data && v.block == k.block && v.offset == k.offset && v.head == k.head && v.dim == k.dim &&
         l.v_cache_dtype == l.cache_dtype && l.v_head_size <= l.head_size;
}

// Whether 8 elements of the query are one access (plan_attention.cpp).
FP8KV_API bool query_vecs_aligned(const AttentionLayout& layout);

// A block of so many columns, with heads of V padded to `value_size` elements, which its warps share.
struct GroupedShape {
  static constexpr int kPositions = 32;  // of a tile
  static constexpr int kValueSizes[] = {128, 512};

  static constexpr int value_size(std::int64_t v_head_size) { return v_head_size <= kValueSizes[0] ? 128 : 512; }
  static constexpr int warps(int columns, int value_size) { return columns >= 32 && value_size > 128 ? 16 : 8; }
  // A warp multiplies K with 16 columns at most, and a part of its elements where others have these columns too.
  static constexpr int key_parts(int columns, int value_size) {
    return warps(columns, value_size) / (columns <= 16 ? 1 : columns / 16);
  }
  // That the registers of a multiprocessor are enough for.
  static constexpr int blocks_at_once(int columns, int value_size) {
    const int sums = columns * value_size;
    return sums <= 16 * 128 ? 3 : sums <= 64 * 128 ? 2 : 1;
  }
};

// The queries and a tile of K and of V in fp16, the bytes of the next tiles, logits, weights; for each column the factor and
// the base of its logits and what its sums are scaled with; for each position of some tiles the scales of K and V and whether
// the cache has it. Rows of fp16 are padded so that those of a matrix of 8 x 8 begin in different banks. All count bytes.
struct GroupedMemory {
  static constexpr int kMostStages = 3;                              // tiles that are on their way
  static constexpr int kLogitPitch = GroupedShape::kPositions + 4;   // fp32
  static constexpr int kWeightPitch = GroupedShape::kPositions + 8;  // fp16

  int stages, stage, key_pitch, value_pitch, keys, values, bytes, logits, weights, columns, positions, size;

  constexpr GroupedMemory(int head_size, int v_head_size, int num_columns, bool values_in_keys, int num_stages)
      : stages(num_stages),
        stage(GroupedShape::kPositions * (head_size + (values_in_keys ? 0 : v_head_size))),
        key_pitch(2 * head_size + 16),
        value_pitch(values_in_keys ? key_pitch : 2 * GroupedShape::value_size(v_head_size) + 16),
        keys(num_columns * key_pitch),
        values(values_in_keys ? keys : keys + GroupedShape::kPositions * key_pitch),
        bytes(values + GroupedShape::kPositions * value_pitch),
        logits(bytes + stages * stage),
        weights(logits +
                GroupedShape::key_parts(num_columns, GroupedShape::value_size(v_head_size)) * num_columns * kLogitPitch * 4),
        columns(weights + num_columns * kWeightPitch * 2),
        positions(columns + num_columns * 4 * 4),
        size(positions + (kMostStages + 1) * GroupedShape::kPositions * 3 * 4) {}
};

// With as many stages as let all blocks that the registers are enough for share the memory of a multiprocessor; with one stage
// it may be more than there is.
inline GroupedMemory grouped_memory(const AttentionLayout& l, int columns, int shared_memory) {
  const auto head_size = static_cast<int>(l.head_size), v_head_size = static_cast<int>(l.v_head_size);
  const int blocks = GroupedShape::blocks_at_once(columns, GroupedShape::value_size(v_head_size));
  for (int stages = GroupedMemory::kMostStages; stages > 1; --stages) {
    const GroupedMemory memory(head_size, v_head_size, columns, values_in_keys(l), stages);
    if (blocks * (memory.size + kReservedMemory) <= shared_memory) return memory;
  }
  return {head_size, v_head_size, columns, values_in_keys(l), 1};
}

}  // namespace fp8kv::core
