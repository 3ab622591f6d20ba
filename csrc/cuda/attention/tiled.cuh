// Attention on the tensor cores for FP8 and INT8 caches: a warp takes tiles of 16 positions. K is the left operand of the first
// product and V, transposed, of the second, so that a query token and head costs one of 8 columns; bytes become fp16 in
// registers, which is exact.
//
// Every warp copies its tiles into a ring of its own in shared memory while it works on earlier ones. Warps that share tiles
// (column_warps) read each other's rings. At the end of an item the warps merge what they have.
#pragma once

#include <cooperative_groups.h>

#include "cuda/attention/finish.cuh"
#include "cuda/attention/inbox.cuh"
#include "cuda/attention/schedule.cuh"
#include "device/async_copy.cuh"
#include "device/mma.cuh"
#include "device/pdl.cuh"

namespace fp8kv::cuda::attention {

inline constexpr int kMaxWarps = 8;  // of a block

struct TiledArgs {
  AttentionLayout layout;
  AttentionPlan plan;
  CacheStrides keys, values;
  FastDiv tiles_per_block;  // of the cache
  Divisors divisors;
  void* workspace;
  float inverse_softcap;
};

// How a tile lies in shared memory, and what a lane reads of it: of K, kKeyBytes neighboring bytes of each of kKeyParts parts
// of rows g and g + 8; of V, kValueBytes neighboring bytes of rows 2t, 2t + 1, 2t + 8 and 2t + 9. Rows are padded, or their
// chunks of 16 bytes permuted, so that no two lanes of an access need the same bank.
template <int kHeadSize, bool kPerToken>
struct TileShape {
  static_assert(kHeadSize % 32 == 0);
  static constexpr int kSteps = kHeadSize / 16;  // of the inner dimension of K's product, and pairs of 8 elements of V
  static constexpr int kKeyBytes = kHeadSize % 64 == 0 ? 16 : 8;
  static constexpr int kKeyParts = kHeadSize / (4 * kKeyBytes);
  static constexpr int kKeyWords = kKeyBytes / 4;
  static constexpr int kValueBytes = kHeadSize / 8;
  static constexpr int kValueWords = kValueBytes / 4;
  static constexpr int kChunks = kHeadSize / 16;  // of a row
  static constexpr core::TileBytes kBytes{kHeadSize, kPerToken};
  static constexpr int kRowsPerCopy = kChunks == 4 ? 8 : kChunks <= 8 ? 4 : 2;  // that the lanes of a warp copy at once

  __device__ static int key_chunk(int row, int chunk) { return kChunks % 8 == 0 ? chunk ^ ((row & 1) * 4) : chunk; }
  __device__ static int value_chunk(int row, int chunk) {
    if constexpr (kChunks == 4) return chunk ^ ((row >> 1) & 2);
    if constexpr (kChunks == 16) return chunk ^ (((row >> 1) & 1) | (row & 4));
    return chunk ^ (row & 6);
  }
};

template <int kBytes>
__device__ __forceinline__ void load_shared(std::uint32_t* words, const std::byte* p) {
  if constexpr (kBytes == 16) {
    const uint4 loaded = *reinterpret_cast<const uint4*>(p);
    words[0] = loaded.x, words[1] = loaded.y, words[2] = loaded.z, words[3] = loaded.w;
  } else if constexpr (kBytes == 8) {
    const uint2 loaded = *reinterpret_cast<const uint2*>(p);
    words[0] = loaded.x, words[1] = loaded.y;
  } else {
    words[0] = *reinterpret_cast<const std::uint32_t*>(p);
  }
}

// --- The kernel ----------------------------------------------------------------

constexpr int blocks_per_multiprocessor(int head_size, int column_tiles) {
  return head_size <= 128 && column_tiles == 1 ? 2 : 1;
}

template <class Fp8, int kHeadSize, int kColumnTiles, bool kPerToken>
class TiledAttention {
  using Shape = TileShape<kHeadSize, kPerToken>;
  static constexpr int kSteps = Shape::kSteps;
  static constexpr int kWarpColumns = kColumnTiles * core::kColumnTile;
  static constexpr int kPiece = core::piece_of(kHeadSize);
  static constexpr int kPieces = kHeadSize / kPiece, kPerLane = kPiece / 32;
  static constexpr int kAtOnce = core::tiles_at_once(kHeadSize, kColumnTiles),
                       kRing = core::ring_tiles(kHeadSize, kColumnTiles);
  static constexpr bool kKeepsFactors = kColumnTiles * kHeadSize <= 256;  // in registers
  static constexpr int kQueryFours = (kHeadSize / 4 + 31) / 32;           // of a row that a lane loads

  struct QueryRow {
    std::uint32_t words[kQueryFours][4];  // four elements each, as they are in memory
    float factor;                         // with softcap of logits, else of logits in units of log2(e)
    float k_scale;                        // 1 unless there is one for all of its keys
  };

  // What a lane has of a piece.
  struct alignas(4 * kPerLane) Lane {
    float x[kPerLane];
  };

 public:
  __device__ TiledAttention(const TiledArgs& args, const core::AttentionMemory& memory, const Item& item, std::byte* shared)
      : args_(args),
        l_(args.layout),
        item_(item),
        shared_(shared),
        memory_(memory),
        warps_(static_cast<int>(blockDim.x / 32)),
        lane_(static_cast<int>(threadIdx.x % 32)),
        warp_(static_cast<int>(threadIdx.x / 32)),
        g_(lane_ / 4),
        t_(lane_ % 4),
        column_warp_(warp_ & (args.plan.column_warps - 1)),
        ring_address_(device::shared_address(tile_memory(warp_, 0))) {}

  // The item, by all threads of the block.
  __device__ void attend() {
    begin();
    const QueryRow row = load_query(warp_);  // before tiles, which fill all queues
    constexpr int kAhead = kRing - kAtOnce;
    int stage = 0;  // of the ring
#pragma unroll 1
    for (int i = 0; i < kAhead; ++i) start_copy(i, i);
    share_queries(row);
    const int column_warps = args_.plan.column_warps;
#pragma unroll 1
    for (int i = 0; i < iterations_; i += kAtOnce) {
      device::wait_for_copies<kAhead - kAtOnce>();
      sync_tile_warps();
#pragma unroll 1
      for (int n = 0; n < kAtOnce; ++n) start_copy(i + kAhead + n, (stage >= kAtOnce ? stage - kAtOnce : stage + kAhead) + n);
      const int tile = first_tile_ + i * warps_ - column_warp_;
#pragma unroll 1
      for (int w = 0; w < column_warps; ++w) {
        const int last = tile + w + (kAtOnce - 1) * warps_;
        if (last >= tiles_.begin && tile + w < tiles_.end) take_tiles(warp_ - column_warp_ + w, stage, tile + w);
      }
      stage = stage + kAtOnce >= kRing ? 0 : stage + kAtOnce;
    }
    device::wait_for_copies<0>();
    finish();
  }

 private:
  __device__ static int log2_of(int power) { return __popc(power - 1); }

  // --- Tiles: into the ring --------------------------------

  __device__ std::byte* tile_memory(int warp, int stage) const { return shared_ + (warp * kRing + stage) * Shape::kBytes.size; }
  __device__ int* missing(int warp, int stage) const {
    return reinterpret_cast<int*>(shared_ + memory_.missing) + warp * kRing + stage;
  }

  __device__ void begin() {
    // Not as conditional expressions, for whose sake ptxas (13.0) spills registers.
    first_query_ = query_of(0);
    int last_query = query_of(max(item_.num_columns, 1) - 1);
    if (kColumnTiles == 1 && !l_.cu_query_lens.data) first_query_ = last_query = 0;
    one_query_ = first_query_ == last_query;
    // What any query of the item sees, and what all of them see.
    const Sequence sequence = item_.sequence;
    any_ = sequence.seen_by_any(l_, first_query_, last_query + 1);
    all_ = {sequence.seen_by(l_, last_query).begin, sequence.seen_by(l_, first_query_).end};
    // Whatever range of tiles a block has, a tile falls to the same warp.
    tiles_ = item_.tiles;
    const int first = tiles_.begin & ~(kAtOnce * warps_ - 1);
    iterations_ = tiles_.empty() ? 0 : (tiles_.end - first + warps_ - 1) >> log2_of(warps_);
    first_tile_ = first + warp_;

    const int row = lane_ / Shape::kChunks, chunk = lane_ % Shape::kChunks, kv_head = item_.kv_head;
    key_from_ = kv_head * args_.keys.head + row * args_.keys.offset + chunk * 16;
    value_from_ = kv_head * args_.values.head + row * args_.values.offset + chunk * 16;
    table_ = static_cast<const int*>(l_.block_table.data) + item_.index * l_.block_table_row;
    next_blocks_ = block_of_iteration(lane_);
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) softmax_[j][i] = {}, value_maximum_[j][i] = kNothing;
#pragma unroll
      for (int k = 0; k < kSteps; ++k) out_[j][k][0] = out_[j][k][1] = out_[j][k][2] = out_[j][k][3] = 0.0f;
    }
  }

  // The block of the cache of this warp's tile; -1 if there is none.
  __device__ int block_of_iteration(int iteration) const {
    const int tile = first_tile_ + iteration * warps_;
    if (tile < tiles_.begin || tile >= tiles_.end) return -1;
    const auto column = static_cast<int>(args_.tiles_per_block.div(static_cast<std::uint32_t>(tile)));
    const int block = __ldg(table_ + column * l_.block_table.stride);
    return static_cast<unsigned>(block) < static_cast<unsigned>(l_.num_blocks) ? block : -1;
  }

  // Starts the copy of this warp's tile of an iteration to the stage, of which positions that no query of the item sees become
  // zero.
  __device__ void start_copy(int iteration, int stage) {
    if ((iteration & 31) == 0) {
      blocks_ = next_blocks_;
      next_blocks_ = block_of_iteration(iteration + 32 + lane_);
    }
    const int tile = first_tile_ + iteration * warps_;
    // One that is taken together with others is filled with zeros where there is none.
    if (kAtOnce > 1 ? (iteration & ~(kAtOnce - 1)) < iterations_ : tile >= tiles_.begin && tile < tiles_.end) {
      const int block = __shfl_sync(kAllLanes, blocks_, iteration & 31);
      int within = 0;  // the block
      if (args_.tiles_per_block.divisor > 1)
        within = kTile * static_cast<int>(args_.tiles_per_block.divmod(static_cast<std::uint32_t>(tile)).remainder);
      const int first = any_.begin - tile * kTile, rows = block < 0 ? 0 : any_.end - any_.begin;
      const std::uint32_t to = ring_address_ + stage * Shape::kBytes.size;
      copy_rows<Shape::kBytes.key_pitch>(to, key_to(), l_.key_cache.data, key_from_, args_.keys, block, within, first, rows,
                                         [](int row) { return Shape::key_chunk(row, 0); });
      copy_rows<Shape::kBytes.value_pitch>(to, value_to(), l_.value_cache.data, value_from_, args_.values, block, within, first,
                                           rows, [](int row) { return Shape::value_chunk(row, 0); });
      if constexpr (kPerToken) copy_scales(to + Shape::kBytes.scales, block, within, first, rows);
      if (lane_ == 0) *missing(warp_, stage) = block < 0;
    }
    device::commit_copies();
  }

  // Where the first chunk that this lane copies comes to lie in a tile.
  __device__ std::uint32_t key_to() const {
    const int row = lane_ / Shape::kChunks, chunk = lane_ % Shape::kChunks;
    return row * Shape::kBytes.key_pitch + Shape::key_chunk(row, chunk) * 16;
  }
  __device__ std::uint32_t value_to() const {
    const int row = lane_ / Shape::kChunks, chunk = lane_ % Shape::kChunks;
    return Shape::kBytes.values + row * Shape::kBytes.value_pitch + Shape::value_chunk(row, chunk) * 16;
  }

  // `permutation`: what a row that the first lane copies adds to the chunks' permutation, which is linear in the bits of rows.
  template <int kPitch, class Permutation>
  __device__ void copy_rows(std::uint32_t tile, std::uint32_t to, const void* data, int from, const CacheStrides& strides,
                            int block, int within, int first, int rows, const Permutation& permutation) const {
    if (Shape::kChunks * Shape::kRowsPerCopy < 32 && lane_ >= Shape::kChunks * Shape::kRowsPerCopy) return;
    const std::byte* source = static_cast<const std::byte*>(data) + (from + within * strides.offset);
    source += max(block, 0) * std::int64_t{strides.block};
    const int row = lane_ / Shape::kChunks - first;
#pragma unroll
    for (int i = 0; i < kTile / Shape::kRowsPerCopy; ++i) {
      constexpr int kRows = Shape::kRowsPerCopy;
      const bool seen = static_cast<unsigned>(row + i * kRows) < static_cast<unsigned>(rows);
      device::copy16_async(tile + (to ^ (permutation(i * kRows) * 16)) + i * kRows * kPitch,
                           source + std::int64_t{strides.offset} * (i * kRows), seen ? 16 : 0);
    }
  }

  // Lanes 0 to 15 those of K, the others those of V.
  __device__ void copy_scales(std::uint32_t to, int block, int within, int first, int rows) const {
    const core::ChannelScales &k = l_.k_scale, &v = l_.v_scale;
    const bool of_keys = lane_ < kTile;
    const int row = lane_ % kTile;
    const bool seen = static_cast<unsigned>(row - first) < static_cast<unsigned>(rows) && (of_keys ? k.dim : v.dim) == 0;
    const float* from = of_keys ? k.data : v.data;
    if (seen)
      from += item_.kv_head * (of_keys ? k.head : v.head) + block * (of_keys ? k.block : v.block) +
              (std::int64_t{within} + row) * (of_keys ? k.offset : v.offset);
    device::copy4_async(to + lane_ * 4, from, seen ? 4 : 0);
  }

  __device__ void sync_tile_warps() const {
    if (args_.plan.column_warps == 1)
      __syncwarp();
    else
      device::sync_threads(1 + (warp_ >> log2_of(args_.plan.column_warps)), 32 * args_.plan.column_warps);
  }

  // --- Queries -----------------------------------------------

  __device__ int column_of(int column_tile, int i) const { return column_warp_ * kWarpColumns + column_tile * 8 + i; }

  // The query of a column of the item.
  __device__ int query_of(int column) const {
    return static_cast<int>(args_.divisors.group.div(static_cast<std::uint32_t>(item_.first_column + column)));
  }

  __device__ Column place_of(int column) const {
    const int query = l_.cu_query_lens.data ? query_of(column) : 0, group = static_cast<int>(args_.divisors.group.divisor);
    return {item_.sequence.first_row + query, item_.kv_head * group + item_.first_column + column - query * group};
  }

  // The queries as right operands of the first product, in shared memory: a lane reads those elements of column g whose K it
  // reads. A row is scaled by a power of two so that it fits fp16; factor_ takes it back.
  __device__ void share_queries(QueryRow row) {
    const int columns = args_.plan.columns;
#pragma unroll 1
    for (int i = warp_; i < columns; i += warps_) {
      if (i != warp_) row = load_query(i);
      share_query(i, row);
    }
    __syncthreads();
    if constexpr (kKeepsFactors) {
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) factor_[j][i] = scales()[column_of(j, 2 * t_ + i)].x;
    }
    if constexpr (kColumnTiles == 1) {
      const uint2* query = query_fragments(column_warp_, 0);
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        const uint2 halves = query[32 * k + lane_];
        query_[k][0] = halves.x, query_[k][1] = halves.y;
      }
      __syncthreads();  // before the ring takes their place
    }
  }

  __device__ float factor(int column_tile, int i) const {
    if constexpr (kKeepsFactors) return factor_[column_tile][i];
    return scales()[column_of(column_tile, 2 * t_ + i)].x;
  }
  __device__ float2* scales() const { return reinterpret_cast<float2*>(shared_ + memory_.scales); }

  // Of a column tile: operands of all lanes for each step. With one column tile per warp they go to registers, and the stage
  // of the ring that is copied to last holds them until then.
  __device__ uint2* query_fragments(int column_warp, int column_tile) const {
    if constexpr (kColumnTiles == 1) {
      return reinterpret_cast<uint2*>(tile_memory(column_warp, kRing - 1));
    } else {
      const int tile = column_warp * kColumnTiles + column_tile;
      return reinterpret_cast<uint2*>(shared_ + memory_.queries) + tile * kSteps * 32;
    }
  }

  // A row of queries by a warp: of a column of the block, zeros if the item doesn't have it.
  __device__ QueryRow load_query(int column) const {
    QueryRow row{};
    if (column >= item_.num_columns) return row;
    const Column place = place_of(column);
    const std::int64_t at = place.row * l_.query.token + place.head * l_.query.head;
#pragma unroll
    for (int n = 0; n < kQueryFours; ++n)
      if (lane_ + 32 * n < kHeadSize / 4) load_four(at + 4 * (lane_ + 32 * n), row.words[n]);
    row.factor = l_.softcap > 0.0f ? l_.softmax_scale : l_.softmax_scale * kLog2e;
    if (l_.q_scale) row.factor *= __ldg(l_.q_scale + place.head / static_cast<int>(l_.heads_per_q_scale) * l_.q_scale_stride);
    row.k_scale =
        l_.k_scale.dim == 0 && !l_.k_scale.per_token() ? __ldg(l_.k_scale.data + item_.kv_head * l_.k_scale.head) : 1.0f;
    return row;
  }

  // As operands for all lanes in shared memory.
  __device__ void share_query(int column, const QueryRow& row) const {
    const std::int64_t kv_head = item_.kv_head;
    float elements[kQueryFours][4], largest = 0.0f, product = 0.0f;
#pragma unroll
    for (int n = 0; n < kQueryFours; ++n) {
      float (&x)[4] = elements[n];
      const int first = 4 * (lane_ + 32 * n);
      if (first >= kHeadSize) continue;
      decode_four(row.words[n], x);
      if (l_.k_offset.data) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          product += x[i] * __ldg(l_.k_offset.data + kv_head * l_.k_offset.head + (first + i) * l_.k_offset.dim);
      }
      if (l_.k_scale.dim != 0) {
#pragma unroll
        for (int i = 0; i < 4; ++i) x[i] *= __ldg(l_.k_scale.data + kv_head * l_.k_scale.head + (first + i) * l_.k_scale.dim);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (is_finite(x[i])) largest = fmaxf(largest, fabsf(x[i]));
    }
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, lanes));
      product += __shfl_xor_sync(kAllLanes, product, lanes);
    }
    const int exponent = exponent_of(largest);
    const PowerOfTwo down(-exponent), up(exponent);
    uint2* fragments = query_fragments(column / kWarpColumns, column % kWarpColumns / 8) + 4 * (column % 8);
#pragma unroll
    for (int n = 0; n < kQueryFours; ++n) {
      const int four = lane_ + 32 * n;
      if (four >= kHeadSize / 4) continue;
      const int step = four / (4 * Shape::kKeyWords) * Shape::kKeyWords + four % Shape::kKeyWords;
      const int lane = four / Shape::kKeyWords % 4;
      const float (&x)[4] = elements[n];
      fragments[32 * step + lane] = {device::half2_of(down.times(x[0]), down.times(x[1])),
                                     device::half2_of(down.times(x[2]), down.times(x[3]))};
    }
    if (lane_ == 0) scales()[column] = {up.times(row.factor * row.k_scale), row.factor * product};
  }

  // Elements at to at + 3 of the query.
  __device__ void load_four(std::int64_t at, std::uint32_t (&words)[4]) const {
    const auto* bytes = static_cast<const std::byte*>(l_.query.data);
    if (l_.query_dtype == DType::Float32) {
      const uint4 four = __ldg(reinterpret_cast<const uint4*>(bytes + 4 * at));
      words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
    } else if (l_.query_dtype == DType::Float16 || l_.query_dtype == DType::BFloat16) {
      const uint2 two = __ldg(reinterpret_cast<const uint2*>(bytes + 2 * at));
      words[0] = two.x, words[1] = two.y;
    } else {
      words[0] = __ldg(reinterpret_cast<const std::uint32_t*>(bytes + at));
    }
  }

  // In fp32.
  __device__ void decode_four(const std::uint32_t (&words)[4], float (&x)[4]) const {
    if (l_.query_dtype == DType::Float32) {
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = __uint_as_float(words[i]);
      return;
    }
    const bool is_16_bits = l_.query_dtype == DType::Float16 || l_.query_dtype == DType::BFloat16;
    const std::uint32_t pairs[2] = {is_16_bits ? words[0] : device::halves_of<Fp8, false>(words[0]),
                                    is_16_bits ? words[1] : device::halves_of<Fp8, true>(words[0])};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (l_.query_dtype == DType::BFloat16) {
        x[2 * i] = __uint_as_float(pairs[i] << 16), x[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000u);
      } else {
        const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&pairs[i]));
        x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
      }
    }
  }

  // --- A tile -------------------------------------------------

  // The tile `index` of the sequence, which a warp has copied, and those that it takes together with it.
  __device__ void take_tiles(int warp, int stage, int index) {
    float logits[kAtOnce][kColumnTiles][4];
    float value_logits[kAtOnce][2] = {};  // log2 of the scales of V of rows g and g + 8
    std::uint32_t key[kAtOnce][2][Shape::kKeyParts][Shape::kKeyWords];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u)
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int c = 0; c < Shape::kKeyParts; ++c) {
          const int row = g_ + 8 * r, at = (c * 4 + t_) * Shape::kKeyBytes;
          load_shared<Shape::kKeyBytes>(key[u][r][c], tile_memory(warp, stage + u) + row * Shape::kBytes.key_pitch +
                                                          Shape::key_chunk(row, at / 16) * 16 + at % 16);
        }
    multiply_keys(key, logits);
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) scale_logits(tile_memory(warp, stage + u), logits[u], value_logits[u]);
    mask(warp, stage, index, logits);
    raise_maxima(logits, value_logits);
    std::uint32_t weights[kAtOnce][kColumnTiles][2];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) weigh(logits[u], value_logits[u], weights[u]);
    if (!one_query_ && has_edge(index) && !are_values_finite(warp, stage)) {
#pragma unroll 1
      for (int u = 0; u < kAtOnce; ++u) {
        std::uint32_t value[4][Shape::kValueWords], own[kColumnTiles][2];
        load_values(warp, stage + u, value);
#pragma unroll
        for (int j = 0; j < kColumnTiles; ++j)
#pragma unroll
          for (int r = 0; r < 2; ++r) own[j][r] = u == 0 ? weights[0][j][r] : weights[kAtOnce - 1][j][r];
        add_values_by_query(index + u * warps_, value, own);
      }
      return;
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      std::uint32_t value[4][Shape::kValueWords];
      load_values(warp, stage + u, value);
      add_values(value, weights[u], [](float (&sum)[4], const float (&product)[4], int) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[i] = product[i];
      });
    }
  }

  __device__ int value_row(int r) const { return 2 * t_ + (r & 1) + (r >> 1) * 8; }

  __device__ void load_values(int warp, int stage, std::uint32_t (&words)[4][Shape::kValueWords]) const {
    constexpr int kAccess = Shape::kValueBytes % 16 == 0 ? 16 : Shape::kValueBytes % 8 == 0 ? 8 : 4;
    const std::byte* values = tile_memory(warp, stage) + Shape::kBytes.values;
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
      for (int i = 0; i < Shape::kValueBytes; i += kAccess) {
        const int row = value_row(r), at = g_ * Shape::kValueBytes + i;
        load_shared<kAccess>(words[r] + i / 4,
                             values + row * Shape::kBytes.value_pitch + Shape::value_chunk(row, at / 16) * 16 + at % 16);
      }
  }

  // Of all tiles that are taken at once.
  __device__ bool are_values_finite(int warp, int stage) const {
    bool finite = true;
#pragma unroll 1
    for (int u = 0; u < kAtOnce; ++u) {
      std::uint32_t value[4][Shape::kValueWords];
      load_values(warp, stage + u, value);
#pragma unroll
      for (int r = 0; r < 4; ++r)
#pragma unroll
        for (int w = 0; w < Shape::kValueWords; ++w) finite &= !device::any_not_finite<Fp8>(value[r][w]);
    }
    return __all_sync(kAllLanes, finite);
  }

  // Elements 0 and 1 of `logits` are columns 2t and 2t + 1 of position g, 2 and 3 those of position g + 8.
  __device__ void multiply_keys(const std::uint32_t (&key)[kAtOnce][2][Shape::kKeyParts][Shape::kKeyWords],
                                float (&logits)[kAtOnce][kColumnTiles][4]) const {
    // Independent sums, so that a product need not wait for the one before.
    constexpr int kSums = kColumnTiles * kAtOnce <= 2 ? 2 : 1;
    float sums[kAtOnce][kColumnTiles][kSums][4] = {};
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      std::uint32_t a[kAtOnce][4];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const std::uint32_t upper = key[u][0][k / Shape::kKeyWords][k % Shape::kKeyWords],
                            lower = key[u][1][k / Shape::kKeyWords][k % Shape::kKeyWords];
        a[u][0] = device::halves_of<Fp8, false>(upper), a[u][1] = device::halves_of<Fp8, false>(lower);
        a[u][2] = device::halves_of<Fp8, true>(upper), a[u][3] = device::halves_of<Fp8, true>(lower);
      }
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
        uint2 query;
        if constexpr (kColumnTiles == 1)
          query = {query_[k][0], query_[k][1]};
        else
          query = query_fragments(column_warp_, j)[32 * k + lane_];
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u)
          device::multiply_add(sums[u][j][k % kSums], a[u][0], a[u][1], a[u][2], a[u][3], query.x, query.y);
      }
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u)
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          logits[u][j][i] = kSums == 2 ? sums[u][j][0][i] + sums[u][j][kSums - 1][i] : sums[u][j][0][i];
  }

  __device__ void scale_logits(const std::byte* tile, float (&logits)[kColumnTiles][4], float (&value_logits)[2]) const {
    float key_scales[2] = {1.0f, 1.0f};
    if constexpr (kPerToken) {
      const float* scales = reinterpret_cast<const float*>(tile + Shape::kBytes.scales);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (l_.k_scale.per_token()) key_scales[r] = scales[g_ + 8 * r];
        if (l_.v_scale.per_token()) value_logits[r] = device::log2_approximation(scales[kTile + g_ + 8 * r]);
      }
    }
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) logits[j][i] *= kPerToken ? factor(j, i % 2) * key_scales[i / 2] : factor(j, i % 2);
    if (l_.softcap > 0.0f) {
      const float capped = l_.softcap * kLog2e;
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float base = l_.k_offset.data ? scales()[column_of(j, 2 * t_ + i % 2)].y : 0.0f;
          logits[j][i] = capped * tanh_of((logits[j][i] + base) * args_.inverse_softcap);
        }
    }
  }

  // Within 2e-7.
  __device__ static float tanh_of(float x) {
    const float large = 1.0f - __fdividef(2.0f, device::exp2_approximation(2.0f * kLog2e * x) + 1.0f);
    const float square = x * x;
    const float small = x + x * square * (-1.0f / 3 + square * (2.0f / 15 - square * (17.0f / 315)));
    return fabsf(x) < 0.2f ? small : large;
  }

  // Whether some positions of the tiles are not seen by all queries.
  __device__ bool has_edge(int tile) const {
    return tile * kTile < all_.begin || (tile + (kAtOnce - 1) * warps_ + 1) * kTile > all_.end;
  }

  // Logits of positions that are not seen become -infinity.
  __device__ void mask(int warp, int stage, int index, float (&logits)[kAtOnce][kColumnTiles][4]) const {
    bool all_seen = !has_edge(index);
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) all_seen &= *missing(warp, stage + u) == 0;
    if (all_seen) return;
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        Positions seen = any_;
        if (!one_query_) seen = item_.sequence.seen_by(l_, query_of(column_of(j, 2 * t_ + i)));
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) {
          const bool is_missing = *missing(warp, stage + u) != 0;
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const int position = (index + u * warps_) * kTile + g_ + 8 * r;
            if (is_missing || position < seen.begin || position >= seen.end) logits[u][j][2 * r + i] = -INFINITY;
          }
        }
      }
  }

  // --- Softmax ------------------------------------------------

  // Maxima grow only where a logit is far above them, which is decided for each column by itself.
  __device__ void raise_maxima(const float (&logits)[kAtOnce][kColumnTiles][4], const float (&value_logits)[kAtOnce][2]) {
    float largest[kColumnTiles][2], largest_value[kColumnTiles][2];
    bool grows = false;
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float (&x)[2] = largest[j];
        x[i] = fmaxf(logits[0][j][i], logits[0][j][2 + i]);
#pragma unroll
        for (int u = 1; u < kAtOnce; ++u) x[i] = fmaxf(x[i], fmaxf(logits[u][j][i], logits[u][j][2 + i]));
        grows |= x[i] > softmax_[j][i].maximum + kMaxGrowth;
        if constexpr (kPerToken) {
          float (&y)[2] = largest_value[j];
          y[i] = fmaxf(logits[0][j][i] + value_logits[0][0], logits[0][j][2 + i] + value_logits[0][1]);
#pragma unroll
          for (int u = 1; u < kAtOnce; ++u)
            y[i] = fmaxf(y[i], fmaxf(logits[u][j][i] + value_logits[u][0], logits[u][j][2 + i] + value_logits[u][1]));
          grows |= y[i] > value_maximum_[j][i] + kMaxGrowth;
        }
      }
    if (!__any_sync(kAllLanes, grows)) return;
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
      float rescale[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float kept = raise(softmax_[j][i].maximum, largest[j][i]);
        softmax_[j][i].sum *= kept;
        rescale[i] = kept;
        if constexpr (kPerToken) rescale[i] = raise(value_maximum_[j][i], largest_value[j][i]);
      }
#pragma unroll
      for (int k = 0; k < kSteps; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) out_[j][k][i] *= rescale[i % 2];
    }
  }

  // Raises the maximum of a column if need be; what was summed up before is multiplied with the result.
  __device__ static float raise(float& maximum, float largest) {
#pragma unroll
    for (int lanes = 4; lanes < 32; lanes *= 2) largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, lanes));
    if (!(largest > maximum + kMaxGrowth)) return 1.0f;
    const float kept = device::exp2_approximation(maximum - largest);
    maximum = largest;
    return kept;
  }

  // The exponentials, and as right operands of the second product: pairs of positions of column g.
  __device__ void weigh(const float (&logits)[kColumnTiles][4], const float (&value_logits)[2],
                        std::uint32_t (&weights)[kColumnTiles][2]) {
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
      float x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = device::exp2_approximation(logits[j][i] - softmax_[j][i % 2].maximum);
#pragma unroll
      for (int i = 0; i < 2; ++i) softmax_[j][i].sum += x[i] + x[2 + i];
      if constexpr (kPerToken) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          x[i] = device::exp2_approximation(logits[j][i] + value_logits[i / 2] - value_maximum_[j][i % 2]);
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) weights[j][r] = device::transpose8x8(device::half2_of(x[2 * r], x[2 * r + 1]));
    }
  }

  // --- Values -------------------------------------------------

  // out_ with the products of the values, merged by `merge(sum, product, column tile)`; the product begins with the sum.
  template <class Merge>
  __device__ void add_values(const std::uint32_t (&value)[4][Shape::kValueWords],
                             const std::uint32_t (&weights)[kColumnTiles][2], const Merge& merge) {
#pragma unroll
    for (int w = 0; w < Shape::kValueWords; ++w)
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        // Bytes of two positions side by side: elements 4w + 2 * pair and the next one.
        const std::uint32_t upper = __byte_perm(value[0][w], value[1][w], pair ? 0x7362 : 0x5140);
        const std::uint32_t lower = __byte_perm(value[2][w], value[3][w], pair ? 0x7362 : 0x5140);
        const std::uint32_t a0 = device::halves_of<Fp8, false>(upper), a1 = device::halves_of<Fp8, true>(upper),
                            a2 = device::halves_of<Fp8, false>(lower), a3 = device::halves_of<Fp8, true>(lower);
#pragma unroll
        for (int j = 0; j < kColumnTiles; ++j) {
          float (&sum)[4] = out_[j][2 * w + pair];
          float product[4] = {sum[0], sum[1], sum[2], sum[3]};
          device::multiply_add(product, a0, a1, a2, a3, weights[j][0], weights[j][1]);
          merge(sum, product, j);
        }
      }
  }

  // Where a value is infinite or NaN, 0 times it is not 0: what one query does not see must not come near it.
  __device__ void add_values_by_query(int tile, const std::uint32_t (&value)[4][Shape::kValueWords],
                                      const std::uint32_t (&weights)[kColumnTiles][2]) {
    const int last = query_of(item_.num_columns - 1);
#pragma unroll 1
    for (int query = first_query_; query <= last; ++query) {
      const Positions seen = item_.sequence.seen_by(l_, query);
      std::uint32_t visible[4][Shape::kValueWords];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int position = tile * kTile + value_row(r);
#pragma unroll
        for (int w = 0; w < Shape::kValueWords; ++w)
          visible[r][w] = position >= seen.begin && position < seen.end ? value[r][w] : 0u;
      }
      add_values(visible, weights, [&](float (&sum)[4], const float (&product)[4], int j) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (query_of(column_of(j, 2 * t_ + i % 2)) == query) sum[i] = product[i];
      });
    }
  }

  // --- The end of an item -------------------------------------

  __device__ Softmax* warp_softmax(int warp) const {
    return reinterpret_cast<Softmax*>(shared_ + memory_.softmax) + warp * kWarpColumns;
  }
  __device__ float* warp_sums(int warp, int column) const {
    return reinterpret_cast<float*>(shared_ + (warp * kWarpColumns + column) * memory_.sums_pitch);
  }

  // A warp takes a piece of a column at a time: of all warps, and then of all blocks.
  __device__ void finish() {
    const float value_scale = Finish::value_scale_of(l_, item_.kv_head);  // on its way meanwhile
    __syncthreads();                                                      // the rings are free
    write_warp();
    __syncthreads();
    const bool in_cluster = kColumnTiles <= core::AttentionClusters::kMaxColumnTiles && item_.slot == Item::kInCluster;
    if (in_cluster) prepare_cluster();
    const Slots slots(l_, args_.plan, args_.workspace);
    const int step = args_.plan.column_warps, parts = warps_ >> log2_of(step);
#pragma unroll 1
    for (int i = warp_; i < item_.num_columns * kPieces; i += warps_) {
      const int column = i / kPieces, dim = i % kPieces * kPiece + lane_ * kPerLane;
      const int first_warp = column / kWarpColumns, in_warp = column % kWarpColumns;
      Softmax total;
      Lane sums{};
      merge_parts<kMaxWarps>(
          parts, total, sums, [&](int part) { return warp_softmax(first_warp + part * step)[in_warp]; },
          [&](int part) { return *reinterpret_cast<const Lane*>(warp_sums(first_warp + part * step, in_warp) + dim); });
      if (item_.slot == Item::kWhole) {
        end(column, dim, total, sums, value_scale);
      } else if (in_cluster) {
        send_piece(i, total, sums);
      } else {
        *reinterpret_cast<Lane*>(slots.sums(item_.slot, column) + dim) = sums;
        float* softmax = slots.softmax(item_.slot, column);
        if (dim == 0) softmax[0] = total.maximum, softmax[1] = total.sum, softmax[2] = base_of(column);
      }
    }
    if (in_cluster) merge_cluster(value_scale);
    if (item_.slot >= 0 && args_.plan.merges == 0) merge_slots(slots, value_scale);
    __syncthreads();  // before rings, scales and queries of the next item
  }

  // What k_offset adds to the logits of a column.
  __device__ float base_of(int column) const { return l_.softcap > 0.0f ? 0.0f : scales()[column].y; }

  // Adds parts to what is known of a column. `load_softmax(part)` is a maximum and a sum, `load_sums(part)` this lane's
  // elements. Lanes don't wait for each other, and loads of several parts are on their way at once.
  template <int kAtOnce, class LoadSoftmax, class LoadSums>
  __device__ static void merge_parts(int parts, Softmax& total, Lane& sums, const LoadSoftmax& load_softmax,
                                     const LoadSums& load_sums) {
#pragma unroll 1
    for (int first = 0; first < parts; first += kAtOnce) {
      Softmax softmax[kAtOnce];
      Lane loaded[kAtOnce] = {};
#pragma unroll
      for (int p = 0; p < kAtOnce; ++p)
        if (first + p < parts) softmax[p] = load_softmax(first + p), loaded[p] = load_sums(first + p);
      float maximum = total.maximum;
#pragma unroll
      for (int p = 0; p < kAtOnce; ++p) maximum = fmaxf(maximum, softmax[p].maximum);
      float kept = device::exp2_approximation(total.maximum - maximum);
      total = {maximum, total.sum * kept};
#pragma unroll
      for (int n = 0; n < kPerLane; ++n) sums.x[n] *= kept;
#pragma unroll
      for (int p = 0; p < kAtOnce; ++p) {
        kept = device::exp2_approximation(softmax[p].maximum - maximum);
        total.sum += softmax[p].sum * kept;
#pragma unroll
        for (int n = 0; n < kPerLane; ++n) sums.x[n] += loaded[p].x[n] * kept;
      }
    }
  }

  // Elements dim and following of the result of a column.
  __device__ void end(int column, int dim, const Softmax& total, const Lane& sums, float value_scale) const {
    const Finish end(l_, place_of(column), item_.kv_head, total, base_of(column), value_scale);
    end.store(dim, sums.x);
    if (dim == 0) end.store_lse();
  }

  // Blocks of a cluster take turns at pieces. Each sends what it has of a piece to the block that merges it.
  __device__ Inbox inbox() const { return Inbox(shared_ + memory_.size); }
  __device__ float* received(int piece, int from) const {
    return inbox().at(((piece >> log2_of(args_.plan.cluster)) * args_.plan.cluster + from) *
                      core::AttentionMemory::piece_bytes(kHeadSize));
  }

  __device__ void prepare_cluster() const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (merges_in_cluster_ > 0) cooperative_groups::this_cluster().sync();  // all have read what they received
#endif
  }

  __device__ void send_piece(int piece, const Softmax& softmax, const Lane& sums) const {
    const int to = piece & (args_.plan.cluster - 1);
    const float* at = received(piece, rank_in_cluster());
    if constexpr (kPerLane == 2)
      inbox().send(at + 2 * lane_, to, sums.x[0], sums.x[1]);
    else
      inbox().send(at + lane_, to, sums.x[0]);
    if (lane_ == 0) inbox().send(at + kPiece, to, softmax.maximum, softmax.sum);
  }

  __device__ void merge_cluster(float value_scale) {
    const int blocks = args_.plan.cluster, rank = rank_in_cluster(), pieces = item_.num_columns * kPieces;
    const int own = max(pieces - rank + blocks - 1, 0) >> log2_of(blocks);
    inbox().receive(own * blocks * core::AttentionMemory::piece_bytes(kHeadSize), merges_in_cluster_++);
#pragma unroll 1
    for (int i = warp_ * blocks + rank; i < pieces; i += warps_ * blocks) {
      Softmax total;
      Lane sums{};
      merge_parts<1 << core::AttentionClusters::kMaxLog2Blocks>(
          blocks, total, sums, [&](int part) { return *reinterpret_cast<const Softmax*>(received(i, part) + kPiece); },
          [&](int part) { return *reinterpret_cast<const Lane*>(received(i, part) + lane_ * kPerLane); });
      end(i / kPieces, i % kPieces * kPiece + lane_ * kPerLane, total, sums, value_scale);
    }
  }

  // Plans with clusters have blocks of one dimension.
  __device__ int rank_in_cluster() const { return static_cast<int>(blockIdx.x) & (args_.plan.cluster - 1); }

  // The last block to write its part of the item merges all of them.
  __device__ void merge_slots(const Slots& slots, float value_scale) {
    constexpr int kLaterParts = 15;  // at once: of 16 parts, as one sequence of 8 KV heads has them
    __syncthreads();
    const bool last = threadIdx.x == 0 && slots.arrives_last(item_.first_slot, item_.parts);
    if (!__syncthreads_or(last)) return;
    const int first_slot = item_.first_slot, later_parts = item_.parts - 1;
#pragma unroll 1
    for (int i = warp_; i < item_.num_columns * kPieces; i += warps_) {
      const int column = i / kPieces, dim = i % kPieces * kPiece + lane_ * kPerLane;
      const float *softmax = slots.softmax(first_slot, column), *of_lane = slots.sums(first_slot, column) + dim;
      Softmax total = load_softmax(softmax);
      Lane sums = load_lane(of_lane);
      softmax = slots.next(softmax), of_lane = slots.next(of_lane);
      merge_parts<kLaterParts>(
          later_parts, total, sums, [&](int part) { return load_softmax(slots.later(softmax, part)); },
          [&](int part) { return load_lane(slots.later(of_lane, part)); });
      end(column, dim, total, sums, value_scale);
    }
  }

  // What another block has written.
  __device__ static Softmax load_softmax(const float* p) {
    const float2 loaded = __ldcg(reinterpret_cast<const float2*>(p));
    return {loaded.x, loaded.y};
  }
  __device__ static Lane load_lane(const float* p) {
    if constexpr (kPerLane == 2) {
      const float2 loaded = __ldcg(reinterpret_cast<const float2*>(p));
      return {loaded.x, loaded.y};
    } else {
      return {__ldcg(p)};
    }
  }

  __device__ void write_warp() {
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        Softmax& softmax = softmax_[j][i];
#pragma unroll
        for (int lanes = 4; lanes < 32; lanes *= 2) softmax.sum += __shfl_xor_sync(kAllLanes, softmax.sum, lanes);
        // Sums of V have a maximum of their own with a scale for each token.
        const float rescale =
            kPerToken && !softmax.saw_nothing() ? device::exp2_approximation(value_maximum_[j][i] - softmax.maximum) : 1.0f;
        const int column = 8 * j + 2 * t_ + i;
        if (g_ == 0) warp_softmax(warp_)[column] = softmax;
        // The elements of V that this lane has begin at g * kValueBytes.
        float* sums = warp_sums(warp_, column) + g_ * Shape::kValueBytes;
#pragma unroll
        for (int k = 0; k < kSteps; k += 2)
          *reinterpret_cast<float4*>(sums + 2 * k) = {out_[j][k][i] * rescale, out_[j][k][2 + i] * rescale,
                                                      out_[j][k + 1][i] * rescale, out_[j][k + 1][2 + i] * rescale};
      }
  }

  const TiledArgs& args_;
  const AttentionLayout& l_;
  const Item& item_;  // in shared memory
  std::byte* shared_;
  core::AttentionMemory memory_;
  int warps_, lane_, warp_, g_, t_;
  int column_warp_;
  int merges_in_cluster_ = 0;   // until now
  std::uint32_t ring_address_;  // of this warp

  // Of an item.
  int first_query_;
  bool one_query_;
  Positions any_, all_, tiles_;
  int first_tile_, iterations_;  // of this warp
  int key_from_, value_from_;    // the first bytes that this lane copies, in block 0 of the cache
  const int* table_;
  int blocks_, next_blocks_;  // of iterations, one per lane
  std::uint32_t query_[kColumnTiles == 1 ? kSteps : 1][2];
  float factor_[kKeepsFactors ? kColumnTiles : 1][2];  // of columns 2t and 2t + 1
  Softmax softmax_[kColumnTiles][2];
  float value_maximum_[kColumnTiles][2];  // with a scale for each token: of logits plus log2 of V's scale
  float out_[kColumnTiles][kSteps][4];
};

struct Work {
  Cursor cursor;
  Item item;
};

// What the compiler knows of the arguments of a call: less code, which takes a short kernel most of its time, and fewer
// registers. Usual: 16-bit queries and results, and nothing rare; with a column tile, one query per sequence. Plain: a usual
// call without sinks and softcap, which cost it 1% and up to 5% of a short one. Channels: a plain call whose channels may have
// scales and offsets, as INT8 caches have.
enum class Known { Nothing, Usual, Plain, Channels };

template <int kColumnTiles, bool kPerToken, Known kKnown>
struct KnownCall {
  static_assert(kKnown != Known::Nothing);

  static bool is(const AttentionLayout& l, const AttentionPlan& plan) {
    if (kColumnTiles == 1 && l.cu_query_lens.data) return false;
    if (kKnown != Known::Usual && (l.sinks.data || l.softcap > 0.0f)) return false;
    if (kKnown != Known::Channels && (l.k_offset.data || l.v_offset.data)) return false;
    const bool known_sinks = !l.sinks.data || l.sinks.dtype == DType::Float32 || l.sinks.dtype == DType::BFloat16;
    return known_sinks && !l.seq_starts.data && !l.lse.data && !l.q_scale && l.sliding_window == 0 &&
           l.query_dtype == DType::BFloat16 && l.out_dtype == DType::BFloat16 && l.out.dim == 1 && l.block_table.stride == 1 &&
           l.seq_lens.stride == 1 && are_known(l.k_scale, l.v_scale) && plan.column_tiles == kColumnTiles &&
           plan.column_warps == 1;
  }

  __device__ static TiledArgs of(TiledArgs args) {
    AttentionLayout& l = args.layout;
    if constexpr (kColumnTiles == 1) l.cu_query_lens = {};
    if constexpr (kKnown != Known::Usual) l.sinks = {}, l.softcap = 0.0f;
    if constexpr (kKnown != Known::Channels) l.k_offset = l.v_offset = {};
    l.sinks.dtype = l.sinks.dtype == DType::Float32 ? DType::Float32 : DType::BFloat16;
    l.seq_starts = {}, l.lse = {};
    l.q_scale = nullptr, l.sliding_window = 0;
    l.query_dtype = l.out_dtype = DType::BFloat16;
    l.out.dim = l.block_table.stride = l.seq_lens.stride = 1;
    if constexpr (kPerToken) {
      __builtin_assume(l.k_scale.offset != 0);
      l.k_scale.dim = 0;
      l.v_scale = {l.v_scale.data, l.k_scale.block, l.k_scale.offset, l.k_scale.head, 0};
    } else {
      constexpr bool kDims = kKnown == Known::Channels;
      l.k_scale = {l.k_scale.data, 0, 0, l.k_scale.head, kDims ? l.k_scale.dim : 0};
      l.v_scale = {l.v_scale.data, 0, 0, l.v_scale.head, kDims ? l.v_scale.dim : 0};
    }
    args.plan.column_tiles = kColumnTiles, args.plan.column_warps = 1, args.plan.columns = kColumnTiles * core::kColumnTile;
    return args;
  }

 private:
  static bool are_known(const core::ChannelScales& k, const core::ChannelScales& v) {
    if (!k.data || !v.data || (kKnown != Known::Channels && (k.dim != 0 || v.dim != 0))) return false;
    if (!kPerToken) return !k.per_token() && !v.per_token();
    return k.offset != 0 && k.block == v.block && k.offset == v.offset && k.head == v.head;
  }
};

// The blocks bring the table of one sequence into the L2 cache, while they find out what they have of it.
__device__ __forceinline__ void prefetch_table(const TiledArgs& args) {
  constexpr unsigned kEntries = 8;  // of a sector
  const AttentionLayout& l = args.layout;
  const unsigned entry = kEntries * ((threadIdx.x - 32) * gridDim.x + blockIdx.x);
  const unsigned entries = min(static_cast<unsigned>(l.max_blocks), args.tiles_per_block.div(l.max_seq_len / kTile) + 1);
  if (entry < entries)
    asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const int*>(l.block_table.data) + entry * l.block_table.stride));
}

template <class Fp8, int kHeadSize, int kColumnTiles, bool kPerToken>
__device__ __forceinline__ void attend_all(const TiledArgs& args, std::byte* shared) {
  const core::AttentionMemory memory(kHeadSize, kColumnTiles, kPerToken, static_cast<int>(blockDim.x / 32), args.plan.columns);
  static_assert(sizeof(Work) <= core::AttentionMemory::kWorkBytes);
  Work& work = *reinterpret_cast<Work*>(shared + memory.work);
  const Inbox inbox(shared + memory.size);
  if (args.plan.cluster > 1) inbox.open();
  device::wait_then_release();
  const bool schedules = threadIdx.x < 32;
  const Schedule schedule(args.layout, args.plan, args.divisors, args.workspace);
  bool found = false;  // the first item
  if (schedules)
    found = schedule.begin(work.cursor, work.item);
  else if (args.layout.num_seqs == 1)
    prefetch_table(args);
  if (args.plan.cluster > 1) inbox.wait_for_all_open();
  TiledAttention<Fp8, kHeadSize, kColumnTiles, kPerToken> attention(args, memory, work.item, shared);
  while (true) {
    if (schedules && !found) schedule.next(work.cursor, work.item);
    found = false;
    __syncthreads();
    if (work.item.nothing) return;
    attention.attend();
    if (args.layout.num_seqs == 1 && args.plan.parts > 0) return;  // that was the only one
  }
}

template <class Fp8, int kHeadSize, int kColumnTiles, bool kPerToken, Known kKnown>
__global__ void __launch_bounds__(32 * kMaxWarps, blocks_per_multiprocessor(kHeadSize, kColumnTiles))
    attention_tiled(const __grid_constant__ TiledArgs args) {
  extern __shared__ __align__(128) std::byte shared_memory[];
  if constexpr (kKnown == Known::Nothing)
    attend_all<Fp8, kHeadSize, kColumnTiles, kPerToken>(args, shared_memory);
  else
    attend_all<Fp8, kHeadSize, kColumnTiles, kPerToken>(KnownCall<kColumnTiles, kPerToken, kKnown>::of(args), shared_memory);
}

}  // namespace fp8kv::cuda::attention
