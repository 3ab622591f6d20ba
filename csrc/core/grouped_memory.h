// How a block of the grouped attention kernel (csrc/cuda/attention/grouped.cu) divides its shared memory: for the kernel, and
// for the plan, which has to know whether it fits.
#pragma once

#include "core/attention_layout.h"

namespace fp8kv::core {

// Whether V is the first elements of the heads of K.
inline bool values_in_keys(const AttentionLayout& l) {
  const PagedView &k = l.key_cache, &v = l.value_cache;
  return v.data == k.data && v.block == k.block && v.offset == k.offset && v.head == k.head && v.dim == k.dim &&
         l.v_cache_dtype == l.cache_dtype && l.v_head_size <= l.head_size;
}

// The queries and a tile of K and of V in fp16, the bytes of the next tile, logits, weights; for each column the factor and the
// base of its logits and what its sums are scaled with; for each position of two tiles the scales of K and V and whether the
// cache has it. Rows of fp16 are padded so that those of a matrix of 8 x 8 begin in different banks. Offsets count bytes.
struct GroupedMemory {
  static constexpr int kTile = 32;  // positions
  static constexpr int kWarps = 8;
  static constexpr int kMaxValueSize = 512;

  int key_pitch, value_pitch, keys, values, key_bytes, value_bytes, logits, weights, columns, positions, size;

  // Elements of V, as warps divide them.
  static constexpr int padded_value_size(int v_head_size) { return v_head_size <= 128 ? 128 : kMaxValueSize; }
  // Blocks that the registers of a multiprocessor are enough for.
  static constexpr int blocks_at_once(int columns, int v_head_size) {
    const int sums = columns * padded_value_size(v_head_size);
    return sums <= 16 * 128 ? 3 : sums <= 64 * 128 ? 2 : 1;
  }
  // Parts of the elements of K, whose products different warps add up.
  static constexpr int key_parts(int columns) { return columns >= 32 ? 1 : 32 / columns; }
  static constexpr int kLogitPitch = kTile + 4;   // fp32
  static constexpr int kWeightPitch = kTile + 8;  // fp16

  constexpr GroupedMemory(int head_size, int v_head_size, int num_columns, bool values_in_keys)
      : key_pitch(2 * head_size + 16),
        value_pitch(values_in_keys ? key_pitch : 2 * padded_value_size(v_head_size) + 16),
        keys(num_columns * key_pitch),
        values(values_in_keys ? keys : keys + kTile * key_pitch),
        key_bytes(values + kTile * value_pitch),
        value_bytes(key_bytes + kTile * head_size),
        logits(value_bytes + (values_in_keys ? 0 : kTile * v_head_size)),
        weights(logits + key_parts(num_columns) * num_columns * kLogitPitch * 4),
        columns(weights + num_columns * kWeightPitch * 2),
        positions(columns + num_columns * 4 * 4),
        size(positions + 2 * kTile * 3 * 4) {}
};

}  // namespace fp8kv::core
