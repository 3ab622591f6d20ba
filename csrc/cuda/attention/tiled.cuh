// Attention on the tensor cores for FP8 caches: a warp takes tiles of 16 positions. K is the left operand of the first product
// and V, transposed, of the second, so that a query token and head costs one of 8 columns; FP8 becomes fp16 in registers, which
// is exact.
//
// Every warp copies its tiles into a ring of its own in shared memory while it works on earlier ones. Warps that share tiles
// (column_warps) read each other's rings. At the end of an item the warps merge what they have.
#pragma once

#include "cuda/attention/finish.cuh"
#include "device/async_copy.cuh"
#include "device/fastdiv.cuh"
#include "device/mma.cuh"
#include "device/pdl.cuh"

namespace fp8kv::cuda::attention {

using device::FastDiv;

inline constexpr int kMaxWarps = 8;        // of a block
inline constexpr float kMaxGrowth = 8.0f;  // of a maximum, in powers of two, before what was summed up is scaled anew

struct TiledArgs {
  AttentionLayout layout;
  AttentionPlan plan;
  FastDiv tiles_per_block;  // of the cache
  FastDiv group;            // query heads of a KV head
  void* workspace;
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
    if constexpr (kChunks == 4) return chunk ^ ((row >> 1) & 3);
    if constexpr (kChunks == 8) return chunk ^ (row & 6);
    if constexpr (kChunks == 16) return chunk ^ (((row >> 1) & 1) | (row & 4));
    return chunk;
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

 public:
  __device__ TiledAttention(const TiledArgs& args, std::byte* shared)
      : args_(args),
        l_(args.layout),
        shared_(shared),
        memory_(kHeadSize, kColumnTiles, kPerToken, static_cast<int>(blockDim.x / 32), args.plan.heads * args.plan.columns),
        warps_(static_cast<int>(blockDim.x / 32)),
        lane_(static_cast<int>(threadIdx.x % 32)),
        warp_(static_cast<int>(threadIdx.x / 32)),
        g_(lane_ / 4),
        t_(lane_ % 4),
        tile_warps_(warps_ / args.plan.heads),
        head_(warp_ / tile_warps_),
        place_(warp_ % tile_warps_),
        column_warp_(place_ % args.plan.column_warps) {}

  __device__ void attend(const Item& item) {
    begin(item);
    for (int i = 0; i < core::kRingTiles - 1; ++i) start_copy(item, i);
    load_queries(item);
    for (int i = 0; i < iterations_; ++i) {
      device::wait_for_copies<core::kRingTiles - 2>();
      sync_tile_warps();
      start_copy(item, i + core::kRingTiles - 1);
      for (int w = 0; w < args_.plan.column_warps; ++w) {
        const int place = place_ - column_warp_ + w;
        const int tile = first_tile_ + i * tile_warps_ + place;
        if (tile >= item.tiles.begin && tile < item.tiles.end)
          take_tile(item, ring(warp_ - column_warp_ + w) + i % core::kRingTiles * Shape::kBytes.size, tile);
      }
    }
    device::wait_for_copies<0>();
    finish(item);
  }

 private:
  // --- Tiles: into the ring --------------------------------

  __device__ std::byte* ring(int warp) const { return shared_ + warp * core::kRingTiles * Shape::kBytes.size; }

  __device__ void begin(const Item& item) {
    const std::int64_t kv_head = item.first_head + head_;
    first_query_ = query_of(item, 0);
    const int last_query = query_of(item, item.num_columns - 1);
    one_query_ = first_query_ == last_query;
    // What any query of the item sees, and what all of them see.
    any_ = item.sequence.seen_by_any(l_, first_query_, last_query + 1);
    const Positions first = item.sequence.seen_by(l_, first_query_), last = item.sequence.seen_by(l_, last_query);
    all_ = {last.begin, first.end};
    // Whatever range of tiles a block has, a tile falls to the same warp.
    first_tile_ = item.tiles.begin / tile_warps_ * tile_warps_;
    iterations_ = (item.tiles.end - first_tile_ + tile_warps_ - 1) / tile_warps_;
    if (item.tiles.end <= item.tiles.begin) iterations_ = 0;

    const int chunk = lane_ % Shape::kChunks;
    copy_row_ = lane_ / Shape::kChunks;
    keys_ = static_cast<const std::byte*>(l_.key_cache.data) + kv_head * l_.key_cache.head + chunk * 16;
    values_ = static_cast<const std::byte*>(l_.value_cache.data) + kv_head * l_.value_cache.head + chunk * 16;
    table_ = static_cast<const int*>(l_.block_table.data) + item.index * l_.block_table_row;
    next_blocks_ = block_of_iteration(item, lane_);
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) softmax_[j][i] = {}, value_maximum_[j][i] = kNothing;
#pragma unroll
      for (int k = 0; k < kSteps; ++k) out_[j][k][0] = out_[j][k][1] = out_[j][k][2] = out_[j][k][3] = 0.0f;
    }
  }

  // The block of the cache of this warp's tile; -1 if there is none.
  __device__ int block_of_iteration(const Item& item, int iteration) const {
    const int tile = first_tile_ + iteration * tile_warps_ + place_;
    if (tile < item.tiles.begin || tile >= item.tiles.end) return -1;
    const std::uint32_t column = args_.tiles_per_block.div(static_cast<std::uint32_t>(tile));
    const int block = __ldg(table_ + column * l_.block_table.stride);
    return block >= 0 && block < l_.num_blocks ? block : -1;
  }

  // Starts the copy of this warp's tile of an iteration, of which positions that no query of the item sees become zero.
  __device__ void start_copy(const Item& item, int iteration) {
    if (iteration % 32 == 0) {
      blocks_ = next_blocks_;
      next_blocks_ = block_of_iteration(item, iteration + 32 + lane_);
    }
    const int tile = first_tile_ + iteration * tile_warps_ + place_;
    if (tile >= item.tiles.begin && tile < item.tiles.end) {
      const int block = __shfl_sync(kAllLanes, blocks_, iteration % 32);
      const std::uint32_t within = args_.tiles_per_block.divmod(static_cast<std::uint32_t>(tile)).remainder;
      const int first = any_.begin - tile * kTile, last = block < 0 ? first : any_.end - tile * kTile;
      std::byte* to = ring(warp_) + iteration % core::kRingTiles * Shape::kBytes.size;
      copy_rows<Shape::kBytes.key_pitch>(to, keys_, l_.key_cache, block, within, first, last,
                                         [](int row, int chunk) { return Shape::key_chunk(row, chunk); });
      copy_rows<Shape::kBytes.value_pitch>(to + Shape::kBytes.values, values_, l_.value_cache, block, within, first, last,
                                           [](int row, int chunk) { return Shape::value_chunk(row, chunk); });
      if constexpr (kPerToken) copy_scales(item, to + Shape::kBytes.scales, block, within, first, last);
      if (lane_ == 0) *reinterpret_cast<int*>(to + Shape::kBytes.missing) = block < 0;
    }
    device::commit_copies();
  }

  template <int kPitch, class Place>
  __device__ void copy_rows(std::byte* to, const std::byte* from, const core::PagedView& view, int block, std::uint32_t within,
                            int first, int last, const Place& place) const {
    if (lane_ >= Shape::kChunks * Shape::kRowsPerCopy) return;
    const std::byte* tile = from + max(block, 0) * view.block + within * kTile * view.offset;
    const int chunk = lane_ % Shape::kChunks;
#pragma unroll
    for (int i = 0; i < kTile / Shape::kRowsPerCopy; ++i) {
      const int row = i * Shape::kRowsPerCopy + copy_row_;
      device::copy16_async(to + row * kPitch + place(row, chunk) * 16, tile + row * view.offset,
                           row >= first && row < last ? 16 : 0);
    }
  }

  // Lanes 0 to 15 those of K, the others those of V.
  __device__ void copy_scales(const Item& item, std::byte* to, int block, std::uint32_t within, int first, int last) const {
    const core::ChannelScales& scale = lane_ < kTile ? l_.k_scale : l_.v_scale;
    const int row = lane_ % kTile;
    const bool seen = row >= first && row < last && scale.dim == 0;
    const float* from = scale.data + (item.first_head + head_) * scale.head;
    if (seen) from += block * scale.block + (std::int64_t{within} * kTile + row) * scale.offset;
    device::copy4_async(to + lane_ * 4, from, seen ? 4 : 0);
  }

  __device__ void sync_tile_warps() const {
    if (args_.plan.column_warps == 1)
      __syncwarp();
    else
      device::sync_threads(1 + warp_ / args_.plan.column_warps, 32 * args_.plan.column_warps);
  }

  // --- Queries -----------------------------------------------

  __device__ int column_of(int column_tile, int i) const { return column_warp_ * kWarpColumns + column_tile * 8 + i; }

  // The query of a column of the item.
  __device__ int query_of(const Item& item, int column) const {
    return static_cast<int>(args_.group.div(static_cast<std::uint32_t>(item.first_column + column)));
  }

  __device__ Column place_of(const Item& item, int head, int column) const {
    const auto [query, in_group] = args_.group.divmod(static_cast<std::uint32_t>(item.first_column + column));
    return {item.sequence.first_row + static_cast<int>(query),
            static_cast<int>((item.first_head + head) * args_.group.divisor + in_group)};
  }

  // The queries as right operands of the first product: a lane has those elements of column g whose K it reads. A row is scaled
  // by a power of two so that it fits fp16; factor_ takes it back. With more than one column tile per warp they stay in shared
  // memory, written by the first warps of each KV head.
  __device__ void load_queries(const Item& item) {
    const bool writes = place_ < args_.plan.column_warps;
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
      float factor = 0.0f, base = 0.0f;
      if (kColumnTiles == 1 || writes) {
        std::uint32_t halves[kSteps][2];
        load_query(item, column_of(j, g_), halves, factor, base);
        if constexpr (kColumnTiles == 1) {
#pragma unroll
          for (int k = 0; k < kSteps; ++k) query_[k][0] = halves[k][0], query_[k][1] = halves[k][1];
        } else {
#pragma unroll
          for (int k = 0; k < kSteps; ++k) *shared_query(j, k) = {halves[k][0], halves[k][1]};
        }
        if (writes && t_ == 0) scales()[column_in_block(head_, column_of(j, g_))] = {factor, base};
      }
      if constexpr (kColumnTiles == 1)
        factor_[j][0] = __shfl_sync(kAllLanes, factor, 8 * t_), factor_[j][1] = __shfl_sync(kAllLanes, factor, 8 * t_ + 4),
        base_[j][0] = __shfl_sync(kAllLanes, base, 8 * t_), base_[j][1] = __shfl_sync(kAllLanes, base, 8 * t_ + 4);
    }
    if constexpr (kColumnTiles > 1) {
      __syncthreads();
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float2 scale = scales()[column_in_block(head_, column_of(j, 2 * t_ + i))];
          factor_[j][i] = scale.x, base_[j][i] = scale.y;
        }
    }
  }

  __device__ float2* scales() const { return reinterpret_cast<float2*>(shared_ + memory_.scales); }
  __device__ int column_in_block(int head, int column) const { return head * args_.plan.columns + column; }

  __device__ uint2* shared_query(int column_tile, int step) const {
    auto* queries = reinterpret_cast<uint2*>(shared_ + memory_.queries);
    const int first = (head_ * args_.plan.column_warps + column_warp_) * kColumnTiles + column_tile;
    return queries + (first * kSteps + step) * 32 + lane_;
  }

  __device__ void load_query(const Item& item, int column, std::uint32_t (&halves)[kSteps][2], float& factor,
                             float& base) const {
    constexpr int kElements = Shape::kKeyBytes;  // neighboring ones of a lane
    const std::int64_t kv_head = item.first_head + head_;
    float x[Shape::kKeyParts][kElements] = {}, q_scale = 1.0f;
    if (column < item.num_columns) {
      const Column place = place_of(item, head_, column);
      const std::int64_t at = place.row * l_.query.token + place.head * l_.query.head;
#pragma unroll
      for (int c = 0; c < Shape::kKeyParts; ++c) load_elements(at + (c * 4 + t_) * kElements, x[c]);
      if (l_.q_scale) q_scale = __ldg(l_.q_scale + place.head / l_.heads_per_q_scale * l_.q_scale_stride);
    }
    float largest = 0.0f, product = 0.0f;
#pragma unroll
    for (int c = 0; c < Shape::kKeyParts; ++c)
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        const std::int64_t dim = (c * 4 + t_) * kElements + i;
        if (l_.k_offset.data) product += x[c][i] * __ldg(l_.k_offset.data + kv_head * l_.k_offset.head + dim * l_.k_offset.dim);
        if (l_.k_scale.dim != 0) x[c][i] *= __ldg(l_.k_scale.data + kv_head * l_.k_scale.head + dim * l_.k_scale.dim);
        if (is_finite(x[c][i])) largest = fmaxf(largest, fabsf(x[c][i]));
      }
#pragma unroll
    for (int lanes = 1; lanes < 4; lanes *= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, lanes));
      product += __shfl_xor_sync(kAllLanes, product, lanes);
    }
    const int exponent = exponent_of(largest);
    const PowerOfTwo down(-exponent), up(exponent);
#pragma unroll
    for (int c = 0; c < Shape::kKeyParts; ++c)
#pragma unroll
      for (int w = 0; w < Shape::kKeyWords; ++w)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float* pair = &x[c][4 * w + 2 * i];
          halves[c * Shape::kKeyWords + w][i] = device::half2_of(down.times(pair[0]), down.times(pair[1]));
        }
    // With softcap the logits themselves, else those in units of log2(e).
    const float unit = q_scale * (l_.softcap > 0.0f ? l_.softmax_scale : l_.softmax_scale * kLog2e);
    const bool one_scale = l_.k_scale.dim == 0 && !l_.k_scale.per_token();
    factor = up.times(unit * (one_scale ? __ldg(l_.k_scale.data + kv_head * l_.k_scale.head) : 1.0f));
    base = unit * product;
  }

  // Elements at to at + kElements of the query in fp32.
  template <int kElements>
  __device__ void load_elements(std::int64_t at, float (&x)[kElements]) const {
    switch (l_.query_dtype) {
      case DType::Float32: return load_vectors<float>(at, x);
      case DType::Float16: return load_vectors<Half>(at, x);
      case DType::BFloat16: return load_vectors<BFloat16>(at, x);
      default: return load_vectors<Fp8>(at, x);
    }
  }

  template <class In, int kElements>
  __device__ void load_vectors(std::int64_t at, float (&x)[kElements]) const {
#pragma unroll
    for (int i = 0; i < kElements; i += core::kVecSize) {
      float values[core::kVecSize];
      device::unpack(device::load_aligned(static_cast<const In*>(l_.query.data) + at + i), values);
#pragma unroll
      for (int k = 0; k < core::kVecSize; ++k) x[i + k] = values[k];
    }
  }

  // --- A tile -------------------------------------------------

  __device__ void take_tile(const Item& item, const std::byte* tile, int index) {
    std::uint32_t key[2][Shape::kKeyParts][Shape::kKeyWords], value[4][Shape::kValueWords];
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int c = 0; c < Shape::kKeyParts; ++c) {
        const int row = g_ + 8 * r, at = (c * 4 + t_) * Shape::kKeyBytes;
        load_shared<Shape::kKeyBytes>(key[r][c],
                                      tile + row * Shape::kBytes.key_pitch + Shape::key_chunk(row, at / 16) * 16 + at % 16);
      }
#pragma unroll
    for (int r = 0; r < 4; ++r) load_values(tile + Shape::kBytes.values, value_row(r), value[r]);

    float logits[kColumnTiles][4];
    multiply_keys(key, logits);
    float value_logits[2] = {0.0f, 0.0f};  // log2 of the scales of V of rows g and g + 8
    scale_logits(tile, logits, value_logits);
    mask(item, index, *reinterpret_cast<const int*>(tile + Shape::kBytes.missing) != 0, logits);
    raise_maxima(logits, value_logits);
    std::uint32_t weights[kColumnTiles][2];
    weigh(logits, value_logits, weights);
    if (!one_query_ && is_edge(index)) {
      bool not_finite = false;
#pragma unroll
      for (int r = 0; r < 4; ++r)
#pragma unroll
        for (int w = 0; w < Shape::kValueWords; ++w) not_finite |= device::any_not_finite<Fp8>(value[r][w]);
      if (__any_sync(kAllLanes, not_finite)) return add_values_by_query(item, index, value, weights);
    }
    add_values(value, weights, [](float (&sum)[4], const float (&product)[4], int) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] = product[i];
    });
  }

  __device__ int value_row(int r) const { return 2 * t_ + (r & 1) + (r >> 1) * 8; }

  __device__ void load_values(const std::byte* values, int row, std::uint32_t (&words)[Shape::kValueWords]) const {
    constexpr int kAccess = Shape::kValueBytes % 16 == 0 ? 16 : Shape::kValueBytes % 8 == 0 ? 8 : 4;
#pragma unroll
    for (int i = 0; i < Shape::kValueBytes; i += kAccess) {
      const int at = g_ * Shape::kValueBytes + i;
      load_shared<kAccess>(words + i / 4,
                           values + row * Shape::kBytes.value_pitch + Shape::value_chunk(row, at / 16) * 16 + at % 16);
    }
  }

  // Elements 0 and 1 of `logits` are columns 2t and 2t + 1 of position g, 2 and 3 those of position g + 8.
  __device__ void multiply_keys(const std::uint32_t (&key)[2][Shape::kKeyParts][Shape::kKeyWords],
                                float (&logits)[kColumnTiles][4]) const {
    constexpr int kSums = kColumnTiles == 1 ? 2 : 1;  // independent ones, so that a product need not wait for the one before
    float sums[kColumnTiles][kSums][4] = {};
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const std::uint32_t upper = key[0][k / Shape::kKeyWords][k % Shape::kKeyWords],
                          lower = key[1][k / Shape::kKeyWords][k % Shape::kKeyWords];
      const std::uint32_t a0 = device::halves_of<Fp8, false>(upper), a1 = device::halves_of<Fp8, false>(lower),
                          a2 = device::halves_of<Fp8, true>(upper), a3 = device::halves_of<Fp8, true>(lower);
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
        if constexpr (kColumnTiles == 1) {
          device::multiply_add(sums[j][k % kSums], a0, a1, a2, a3, query_[k][0], query_[k][1]);
        } else {
          const uint2 query = *shared_query(j, k);
          device::multiply_add(sums[j][0], a0, a1, a2, a3, query.x, query.y);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) logits[j][i] = kSums == 2 ? sums[j][0][i] + sums[j][kSums - 1][i] : sums[j][0][i];
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
      for (int i = 0; i < 4; ++i) logits[j][i] *= kPerToken ? factor_[j][i % 2] * key_scales[i / 2] : factor_[j][i % 2];
    if (l_.softcap > 0.0f) {
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) logits[j][i] = l_.softcap * tanhf((logits[j][i] + base_[j][i % 2]) / l_.softcap) * kLog2e;
    }
  }

  // Whether some positions of the tile are not seen by all queries.
  __device__ bool is_edge(int tile) const { return tile * kTile < all_.begin || (tile + 1) * kTile > all_.end; }

  // Logits of positions that are not seen become -infinity.
  __device__ void mask(const Item& item, int tile, bool missing, float (&logits)[kColumnTiles][4]) const {
    if (!is_edge(tile) && !missing) return;
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        Positions seen = any_;
        if (!one_query_) seen = item.sequence.seen_by(l_, query_of(item, column_of(j, 2 * t_ + i)));
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int position = tile * kTile + g_ + 8 * r;
          if (missing || position < seen.begin || position >= seen.end) logits[j][2 * r + i] = -INFINITY;
        }
      }
  }

  // --- Softmax ------------------------------------------------

  // Maxima grow only where a logit is far above them, which is decided for each column by itself.
  __device__ void raise_maxima(const float (&logits)[kColumnTiles][4], const float (&value_logits)[2]) {
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
      float largest[2], largest_value[2];
      bool grows = false;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        largest[i] = fmaxf(logits[j][i], logits[j][2 + i]);
        grows |= largest[i] > softmax_[j][i].maximum + kMaxGrowth;
        if constexpr (kPerToken) {
          largest_value[i] = fmaxf(logits[j][i] + value_logits[0], logits[j][2 + i] + value_logits[1]);
          grows |= largest_value[i] > value_maximum_[j][i] + kMaxGrowth;
        }
      }
      if (!__any_sync(kAllLanes, grows)) continue;
      float rescale[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float kept = raise(softmax_[j][i].maximum, largest[i]);
        softmax_[j][i].sum *= kept;
        rescale[i] = kept;
        if constexpr (kPerToken) rescale[i] = raise(value_maximum_[j][i], largest_value[i]);
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
  __device__ void add_values_by_query(const Item& item, int tile, const std::uint32_t (&value)[4][Shape::kValueWords],
                                      const std::uint32_t (&weights)[kColumnTiles][2]) {
    const int last = query_of(item, item.num_columns - 1);
#pragma unroll 1
    for (int query = first_query_; query <= last; ++query) {
      const Positions seen = item.sequence.seen_by(l_, query);
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
          if (query_of(item, column_of(j, 2 * t_ + i % 2)) == query) sum[i] = product[i];
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

  __device__ void finish(const Item& item) {
    __syncthreads();  // the rings are free
    write_warp();
    __syncthreads();
    constexpr int kFours = kHeadSize / 4;
    const int columns = args_.plan.heads * item.num_columns;
    for (int i = static_cast<int>(threadIdx.x); i < columns * kFours; i += static_cast<int>(blockDim.x)) {
      const int head = i / kFours / item.num_columns, column = i / kFours % item.num_columns, four = i % kFours;
      const int column_warp = column / kWarpColumns, in_warp = column % kWarpColumns;
      const int first_warp = head * tile_warps_ + column_warp, step = args_.plan.column_warps;
      Softmax total;
      for (int w = first_warp; w < (head + 1) * tile_warps_; w += step)
        total.maximum = fmaxf(total.maximum, warp_softmax(w)[in_warp].maximum);
      float4 sums = {};
      for (int w = first_warp; w < (head + 1) * tile_warps_; w += step) {
        const Softmax part = warp_softmax(w)[in_warp];
        const float kept = device::exp2_approximation(part.maximum - total.maximum);
        const float4 part_sums = *reinterpret_cast<const float4*>(warp_sums(w, in_warp) + 4 * four);
        total.sum += part.sum * kept;
        sums.x += part_sums.x * kept, sums.y += part_sums.y * kept, sums.z += part_sums.z * kept, sums.w += part_sums.w * kept;
      }
      const float base = l_.softcap > 0.0f ? 0.0f : scales()[column_in_block(head, column)].y;
      if (item.slot < 0) {
        const Finish end(l_, place_of(item, head, column), total, base);
        end.store(4 * four, sums, args_.plan.out_vectors);
        if (four == 0) end.store_lse();
      } else {
        const Slots slots(l_, args_.plan, args_.workspace);
        slots.sums(item.slot, column_in_block(head, column))[four] = sums;
        if (four == 0) *slots.softmax(item.slot, column_in_block(head, column)) = {total.maximum, total.sum, base, 0.0f};
      }
    }
    __syncthreads();  // before rings, scales and queries of the next item
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
  std::byte* shared_;
  core::AttentionMemory memory_;
  int warps_, lane_, warp_, g_, t_;
  int tile_warps_;  // that share the tiles of a KV head
  int head_;        // KV head of the block
  int place_;       // of this warp among these
  int column_warp_;

  // Of an item.
  int first_query_;
  bool one_query_;
  Positions any_, all_;
  int first_tile_, iterations_;
  const std::byte *keys_, *values_;
  const int* table_;
  int copy_row_;
  int blocks_, next_blocks_;  // of iterations, one per lane
  std::uint32_t query_[kColumnTiles == 1 ? kSteps : 1][2];
  float factor_[kColumnTiles][2], base_[kColumnTiles][2];  // of columns 2t and 2t + 1
  Softmax softmax_[kColumnTiles][2];
  float value_maximum_[kColumnTiles][2];  // with a scale for each token: of logits plus log2 of V's scale
  float out_[kColumnTiles][kSteps][4];
};

// The items of this block, one after the other.
template <class F>
__device__ __forceinline__ void for_each_item(const TiledArgs& args, const F& attend) {
  const AttentionPlan& plan = args.plan;
  const AttentionLayout& l = args.layout;
  const auto parts = static_cast<unsigned>(plan.parts);
  const unsigned block = blockIdx.x;
  Schedule schedule(l, plan);
  if (schedule.total() == 0) return;
  const Share share(plan, schedule.total());
  if (parts == 0 && block >= share.blocks) return;
  unsigned unit = parts == 0 ? share.begin(block) : block;
  const unsigned end = parts == 0 ? share.begin(block + 1) : schedule.total();
  if (unit >= end) return;
  schedule.seek(unit);
  while (true) {
    const Sequence& sequence = schedule.sequence();
    const unsigned units = schedule.units_per_item(), in_sequence = unit - schedule.first_unit();
    const unsigned number = in_sequence / units, from = in_sequence - number * units;
    Item item = item_of(l, plan, schedule, number);
    // Units are those of all tiles of the sequence, of which the queries of an item may see only some.
    const Positions all = sequence.seen_by_any(l, 0, sequence.num_queries).tiles();
    const unsigned tiles = max(all.end - all.begin, 0);
    unsigned first = 0, last = tiles, next;
    bool has_tiles = true;
    if (parts == 0) {
      const unsigned to = min(units, from + (end - unit));
      if (from > 0 || to < units) item.slot = slot_of_share(block, from == 0), first = from, last = to;
      next = unit + (to - from);
    } else {
      // Without a slot the first part has everything.
      if (parts > 1 && unit - from + parts <= plan.slots) {
        item.slot = static_cast<int>(unit);
        first = static_cast<unsigned>(std::uint64_t{tiles} * from / parts);
        last = static_cast<unsigned>(std::uint64_t{tiles} * (from + 1) / parts);
      } else {
        has_tiles = from == 0;
      }
      next = unit + gridDim.x < unit ? end : unit + gridDim.x;
    }
    if (has_tiles) {
      const int last_query = (item.first_column + item.num_columns - 1) / static_cast<int>(args.group.divisor);
      const int first_query = item.first_column / static_cast<int>(args.group.divisor);
      const Positions seen = sequence.seen_by_any(l, first_query, last_query + 1).tiles();
      item.tiles = {max(all.begin + static_cast<int>(first), seen.begin), min(all.begin + static_cast<int>(last), seen.end)};
      attend(item);
    }
    unit = next;
    if (unit >= end) return;
    schedule.advance(unit);
  }
}

template <class Fp8, int kHeadSize, int kColumnTiles, bool kPerToken>
__global__ void __launch_bounds__(32 * kMaxWarps, blocks_per_multiprocessor(kHeadSize, kColumnTiles))
    attention_tiled(const __grid_constant__ TiledArgs args) {
  extern __shared__ __align__(16) std::byte shared_memory[];
  device::wait_then_release();
  TiledAttention<Fp8, kHeadSize, kColumnTiles, kPerToken> attention(args, shared_memory);
  for_each_item(args, [&](const Item& item) { attention.attend(item); });
}

}  // namespace fp8kv::cuda::attention
