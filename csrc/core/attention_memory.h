// How a block of the tiled attention kernel (csrc/cuda/attention/tiled.cuh) divides its shared memory: for the kernel, and for
// the plan, which has to know whether it fits.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fp8kv::core {

inline constexpr int kTile = 16;              // neighboring positions of a sequence, which lie in one block of the cache
inline constexpr int kColumnTile = 8;         // columns of a matrix product
inline constexpr int kReservedMemory = 1024;  // bytes of shared memory that every block costs beyond its own
inline constexpr int kInboxBarrier = 16;      // bytes
inline constexpr int kMaxParts = 0xffff;      // of an item that several blocks share

// That a warp takes at once: two where it would wait for its own products, few of which are independent of each other.
constexpr int tiles_at_once(int head_size, int column_tiles) { return column_tiles > 1 && head_size <= 128 ? 2 : 1; }
// That a warp has in shared memory.
constexpr int ring_tiles(int head_size, int column_tiles) { return tiles_at_once(head_size, column_tiles) == 2 ? 4 : 3; }

// A tile: rows of K, rows of V, and the scales of its positions where each has its own. Rows of V are padded so
// that their chunks of 16 bytes can be permuted to keep lanes off each other's banks. Tiles are aligned to 128 bytes: where a
// copy divides a sector of 32 bytes in two, it is read from the L2 cache twice.
struct TileBytes {
  int key_pitch, value_pitch, values, scales, size;

  constexpr TileBytes(int head_size, bool per_token)
      : key_pitch(head_size),
        value_pitch(head_size <= 64 ? head_size : (head_size + 127) / 128 * 128),
        values(kTile * key_pitch),
        scales(values + kTile * value_pitch),
        size((scales + (per_token ? 2 * kTile * 4 : 0) + 127) / 128 * 128) {}
};

// Elements of a column that a warp merges at once.
constexpr int piece_of(int head_size) { return head_size % 64 == 0 ? 64 : 32; }

// The rings of all warps, and at the end of an item the sums of all warps in their place; a maximum and a sum for each column
// of a warp; a factor and a base for each column of the block; where a warp has several column tiles, the queries; for each
// tile of the rings, whether the cache has it; what the block does; and in clusters, what the block receives: of each piece
// that it merges, sums, a maximum and a sum from each block, behind a barrier.
struct AttentionMemory {
  static constexpr int kWorkBytes = 128;
  int sums_pitch, softmax, scales, queries, missing, work, size, inbox_size;

  // `columns`: of the block.
  constexpr AttentionMemory(int head_size, int column_tiles, bool per_token, int warps, int columns)
      : sums_pitch((head_size + 4) * 4),
        softmax(std::max(warps * ring_tiles(head_size, column_tiles) * TileBytes(head_size, per_token).size,
                         warps * column_tiles * kColumnTile * sums_pitch)),
        scales(softmax + warps * column_tiles * kColumnTile * 8),
        queries(scales + columns * 8),
        missing(queries + (column_tiles > 1 ? columns * head_size * 2 : 0)),
        work(missing + warps * ring_tiles(head_size, column_tiles) * 4),
        size(work + kWorkBytes),
        inbox_size(kInboxBarrier + columns * (head_size / piece_of(head_size)) * piece_bytes(head_size)) {}

  static constexpr int piece_bytes(int head_size) { return (piece_of(head_size) + 2) * 4; }
};

// A workspace begins with a counter of 8 bytes for each slot, and goes on with the slots (csrc/cuda/attention/schedule.cuh).
constexpr std::int64_t slot_counters_size(std::int64_t slots) { return (slots + 1) / 2 * 16; }

}  // namespace fp8kv::core
