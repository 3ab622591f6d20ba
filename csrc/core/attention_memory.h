// How a block of the tiled attention kernel (csrc/cuda/attention/tiled.cuh) divides its shared memory: for the kernel, and for
// the plan, which has to know whether it fits.
#pragma once

#include <algorithm>

namespace fp8kv::core {

inline constexpr int kTile = 16;       // neighboring positions of a sequence, which lie in one block of the cache
inline constexpr int kRingTiles = 3;   // that a warp has in shared memory
inline constexpr int kColumnTile = 8;  // columns of a matrix product

// A tile: rows of K, rows of V, the scales of its positions where each has its own, and whether it exists. Rows of V are padded
// where their chunks of 16 bytes can't be permuted to keep lanes off each other's banks.
struct TileBytes {
  int key_pitch, value_pitch, values, scales, missing, size;

  constexpr TileBytes(int head_size, bool per_token)
      : key_pitch(head_size),
        value_pitch((head_size & (head_size - 1)) == 0 ? head_size : head_size + 16),
        values(kTile * key_pitch),
        scales(values + kTile * value_pitch),
        missing(scales + (per_token ? 2 * kTile * 4 : 0)),
        size(missing + 16) {}
};

// The rings of all warps, and at the end of an item the sums of all warps in their place; a maximum and a sum for each column
// of a warp; a factor and a base for each column of the block; and where a warp has several column tiles, the queries.
struct AttentionMemory {
  int sums_pitch, softmax, scales, queries, size;

  // `columns`: of the block, over all of its KV heads.
  constexpr AttentionMemory(int head_size, int column_tiles, bool per_token, int warps, int columns)
      : sums_pitch((head_size + 4) * 4),
        softmax(std::max(warps * kRingTiles * TileBytes(head_size, per_token).size,
                         warps * column_tiles * kColumnTile * sums_pitch)),
        scales(softmax + warps * column_tiles * kColumnTile * 8),
        queries(scales + columns * 8),
        size(queries + (column_tiles > 1 ? columns * head_size * 2 : 0)) {}
};

}  // namespace fp8kv::core
