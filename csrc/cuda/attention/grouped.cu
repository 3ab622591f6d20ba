// paged_attention on the tensor cores where K and V have two head sizes or dtypes, FP8 or INT8. A block has query heads of one
// row and KV head, its columns, and goes through the positions that they see, or a part of them, in tiles of 32. The bytes of a
// tile are copied to shared memory while the block works on earlier ones; they become fp16, which is exact, once for all of its
// warps. These divide the logits by columns and elements of K, the softmax by columns, and the result by elements of V.
#include "core/grouped_memory.h"
#include "cuda/attention/finish.cuh"
#include "cuda/attention/kernels.h"
#include "cuda/attention/rows.cuh"
#include "device/async_copy.cuh"
#include "device/mma.cuh"
#include "device/pdl.cuh"

namespace fp8kv::cuda::attention {
namespace {

using core::GroupedMemory;
using core::GroupedShape;
using device::Vec;

constexpr int kPositions = GroupedShape::kPositions;

struct GroupedArgs {
  AttentionLayout layout;  // its head_size is that of V, by which partial results are counted
  AttentionPlan plan;
  GroupedMemory memory;
  int head_size;  // of K
  bool values_in_keys;
  bool query_aligned;  // 8 elements are one access
  CacheStrides keys, values;
  FastDiv block_size;
  void* workspace;
};

// Matrices of 8 x 8 values of 16 bits, of whose rows a lane has the address of one: four, two, and four that are transposed.
__device__ __forceinline__ void load_matrices(std::uint32_t (&x)[4], std::uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void load_matrices(std::uint32_t (&x)[2], std::uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(x[0]), "=r"(x[1]) : "r"(address) : "memory");
}
__device__ __forceinline__ void load_transposed(std::uint32_t (&x)[4], std::uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address)
               : "memory");
}

template <int kCount>
__device__ __forceinline__ void load_shared_floats(const float* from, float (&x)[kCount]) {
  if constexpr (kCount == 4) {
    const float4 four = *reinterpret_cast<const float4*>(from);
    x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
  } else if constexpr (kCount == 2) {
    const float2 two = *reinterpret_cast<const float2*>(from);
    x[0] = two.x, x[1] = two.y;
  } else {
    x[0] = *from;
  }
}

template <class T>
__device__ __forceinline__ uint4 widened(std::uint32_t low, std::uint32_t high) {
  return {device::halves_of<T, false>(low), device::halves_of<T, true>(low), device::halves_of<T, false>(high),
          device::halves_of<T, true>(high)};
}

// kValueSize: what heads of V are padded to.
template <int kColumns, int kValueSize>
class GroupedAttention {
  static constexpr int kWarps = GroupedShape::warps(kColumns, kValueSize), kThreads = 32 * kWarps;
  static constexpr int kThreadsPerRow = kThreads / kPositions;  // of K and V, which copy 16 bytes of it at a time
  static constexpr int kColumnTiles = kColumns / 8;
  static constexpr int kKeyParts = GroupedShape::key_parts(kColumns, kValueSize);
  static constexpr int kWarpColumnTiles = kColumns == 8 ? 1 : 2;                  // whose logits a warp calculates
  static constexpr int kThreadsPerColumn = kThreads / kColumns;                   // in the softmax
  static constexpr int kPerThread = kPositions / kThreadsPerColumn;               // positions
  static constexpr int kKeyChunks = kValueSize == 128 ? 2 : 48 / kThreadsPerRow;  // of 16 bytes, of a thread
  static constexpr int kValueChunks = kValueSize / 16 / kThreadsPerRow;
  static constexpr int kWarpDims = kValueSize / kWarps, kDimTiles = kWarpDims / 16;
  static constexpr int kLoads = kValueSize == 128 ? 1 : 3;  // of 8 elements of a query by a lane at once

 public:
  __device__ GroupedAttention(const GroupedArgs& args, std::byte* shared)
      : args_(args),
        l_(args.layout),
        m_(args.memory),
        shared_(shared),
        thread_(static_cast<int>(threadIdx.x)),
        lane_(thread_ % 32),
        warp_(thread_ / 32) {}

  __device__ void attend() {
    const auto parts = static_cast<unsigned>(max(args_.plan.parts, std::int64_t{1}));
    const auto group = static_cast<unsigned>(l_.heads_per_kv_head());
    const unsigned column_blocks = (group + kColumns - 1) / kColumns, item = blockIdx.x / parts;
    part_ = static_cast<int>(blockIdx.x - item * parts);
    const unsigned of_heads = item / column_blocks, kv_heads = static_cast<unsigned>(l_.num_kv_heads);
    first_column_ = static_cast<int>(item - of_heads * column_blocks) * kColumns;
    num_columns_ = min(kColumns, static_cast<int>(group) - first_column_);
    row_ = static_cast<int>(of_heads / kv_heads);
    kv_head_ = static_cast<int>(of_heads - static_cast<unsigned>(row_) * kv_heads);
    const Slots slots(l_, args_.plan, args_.workspace);
    const std::int64_t s = sequence_of(l_, row_);
    if (s < 0) {
      if (args_.plan.slots > 0 && part_ == 0 && thread_ == 0) slots.store_no_item(blockIdx.x);
      return;
    }
    const Sequence sequence = Sequence::load(l_, s);
    seen_ = sequence.seen_by(l_, row_ - sequence.first_row);
    table_ = static_cast<const int*>(l_.block_table.data) + s * l_.block_table_row;
    int tile = seen_.begin / kPositions, end = seen_.empty() ? tile : (seen_.end - 1) / kPositions + 1;
    const int share = (end - tile) / static_cast<int>(parts), longer = (end - tile) - share * static_cast<int>(parts);
    tile += share * part_ + min(part_, longer);
    end = tile + share + (part_ < longer);

    const auto rows_of = [&](const core::PagedView& view, const CacheStrides& strides) {
      return static_cast<const std::byte*>(view.data) + kv_head_ * strides.head + 16 * first_chunk();
    };
    keys_ = rows_of(l_.key_cache, args_.keys), values_ = rows_of(l_.value_cache, args_.values);
    table_entry_ = entry_of(tile);
    for (int i = 0; i < m_.stages; ++i) start_copy(tile + i, end, i);
    for (int c = warp_; c < kColumns; c += kWarps) load_query(c);
#pragma unroll
    for (int d = 0; d < kDimTiles; ++d)
#pragma unroll
      for (int c = 0; c < kColumnTiles; ++c)
#pragma unroll
        for (int i = 0; i < 4; ++i) out_[d][c][i] = 0.0f;
    int stage = 0;
#pragma unroll 1
    for (; tile < end; ++tile) {
      wait_for_tile();
      __syncthreads();  // what all warps did with the last tile; queries
      widen_tile(stage);
      start_copy(tile + m_.stages, end, stage);
      stage = stage + 1 == m_.stages ? 0 : stage + 1;
      __syncthreads();
      multiply_keys();
      __syncthreads();
      const bool grew = weigh(tile);
      add_values(__syncthreads_or(grew));
    }
    device::wait_for_copies<0>();
    __syncthreads();
    finish(slots);
  }

 private:
  // --- Tiles: bytes, then fp16 --------------------------------

  __device__ int row() const { return thread_ / kThreadsPerRow; }          // that this thread copies and widens
  __device__ int first_chunk() const { return thread_ % kThreadsPerRow; }  // of 16 bytes; and every kThreadsPerRow-th after it

  // For each position of a tile: the scale of K, that of V, whether it is seen.
  __device__ float* position_data(int tile) const {
    return reinterpret_cast<float*>(shared_ + m_.positions) + tile % (GroupedMemory::kMostStages + 1) * 3 * kPositions;
  }

  // Where the block of a position of this thread stands, and its offset there; no block where the position is not seen. Read a
  // tile early.
  struct Entry {
    int block, offset;
  };
  __device__ Entry entry_of(int tile) const {
    const int position = tile * kPositions + row();
    if (position < seen_.begin || position >= seen_.end) return {-1, 0};
    const auto [index, offset] = args_.block_size.divmod(static_cast<unsigned>(position));
    return {__ldg(table_ + index * l_.block_table.stride), static_cast<int>(offset)};
  }

  // Positions that are not seen become zero.
  __device__ void start_copy(int tile, int end, int stage) {
    if (tile < end) {
      const auto [entry, offset] = table_entry_;
      const bool seen = static_cast<unsigned>(entry) < static_cast<unsigned>(l_.num_blocks);
      const int block = seen ? entry : 0;
      const std::uint32_t to = device::shared_address(shared_ + m_.bytes + stage * m_.stage) + 16 * first_chunk();
      const auto from = [&](const std::byte* rows, const CacheStrides& strides) {
        return rows + (std::int64_t{block} * strides.block + (seen ? offset * strides.offset : 0));
      };
      copy_row<kKeyChunks>(from(keys_, args_.keys), to + row() * args_.head_size, args_.head_size, seen);
      if (!args_.values_in_keys) {
        const auto head_size = static_cast<int>(l_.v_head_size);
        copy_row<kValueChunks>(from(values_, args_.values), to + kPositions * args_.head_size + row() * head_size, head_size,
                               seen);
      }
      if (first_chunk() == 0) {
        float* data = position_data(tile) + row();
        const auto copy_scale = [&](const core::ChannelScales& scale, float* to) {
          if (!scale.per_token()) return;
          const float* from = scale.data;
          if (seen) from += block * scale.block + offset * scale.offset + kv_head_ * scale.head;
          device::copy4_async(device::shared_address(to), from, seen ? 4 : 0);
        };
        copy_scale(l_.k_scale, data);
        copy_scale(l_.v_scale, data + kPositions);
        data[2 * kPositions] = seen ? 1.0f : 0.0f;
      }
      table_entry_ = entry_of(tile + 1);
    }
    device::commit_copies();
  }

  // From this thread's first chunk on.
  template <int kChunks>
  __device__ void copy_row(const std::byte* from, std::uint32_t to, int head_size, bool seen) const {
    for_each_chunk<kChunks>(head_size, [&](int at) { device::copy16_async(to + at, from + at, seen ? 16 : 0); });
  }

  // Calls f with the distance of each chunk of this thread from its first one; most rows have no more than kChunks of them.
  template <int kChunks, class F>
  __device__ void for_each_chunk(int head_size, const F& f) const {
    constexpr int kStep = 16 * kThreadsPerRow;
    const int end = head_size - 16 * first_chunk();
#pragma unroll
    for (int n = 0; n < kChunks; ++n)
      if (n * kStep < end) f(n * kStep);
#pragma unroll 1
    for (int at = kChunks * kStep; at < end; at += kStep) f(at);
  }

  __device__ void wait_for_tile() const {
    if (m_.stages == 3)
      device::wait_for_copies<2>();
    else if (m_.stages == 2)
      device::wait_for_copies<1>();
    else
      device::wait_for_copies<0>();
  }

  // What this thread copied.
  __device__ void widen_tile(int stage) const {
    const std::byte* bytes = shared_ + m_.bytes + stage * m_.stage;
    widen_row<kKeyChunks>(l_.cache_dtype, bytes, m_.keys, m_.key_pitch, args_.head_size);
    if (!args_.values_in_keys)
      widen_row<kValueChunks>(l_.v_cache_dtype, bytes + kPositions * args_.head_size, m_.values, m_.value_pitch,
                              static_cast<int>(l_.v_head_size));
  }

  template <int kChunks>
  __device__ void widen_row(DType dtype, const std::byte* bytes, int halves, int pitch, int head_size) const {
    const std::byte* from = bytes + row() * head_size + 16 * first_chunk();
    std::byte* to = shared_ + halves + row() * pitch + 32 * first_chunk();
    if (dtype == DType::E4M3)
      widen_chunks<E4M3, kChunks>(from, to, head_size);
    else if (dtype == DType::E5M2)
      widen_chunks<E5M2, kChunks>(from, to, head_size);
    else
      widen_chunks<Int8, kChunks>(from, to, head_size);
  }

  // Four of eight neighboring threads take the second half of a chunk first, so that no two store to the same bank.
  template <class T, int kChunks>
  __device__ void widen_chunks(const std::byte* from, std::byte* to, int head_size) const {
    const int first = thread_ & 4 ? 8 : 0, second = 8 - first;
    for_each_chunk<kChunks>(head_size, [&](int at) {
      const uint2 a = *reinterpret_cast<const uint2*>(from + at + first),
                  b = *reinterpret_cast<const uint2*>(from + at + second);
      *reinterpret_cast<uint4*>(to + 2 * (at + first)) = widened<T>(a.x, a.y);
      *reinterpret_cast<uint4*>(to + 2 * (at + second)) = widened<T>(b.x, b.y);
    });
  }

  // --- Queries ------------------------------------------------

  __device__ float* column_data() const { return reinterpret_cast<float*>(shared_ + m_.columns); }
  __device__ float& factor(int column) const {
    return column_data()[column];
  }  // of logits, without softcap in units of log2(e)
  __device__ float& base(int column) const { return column_data()[kColumns + column]; }  // likewise, added to them
  __device__ float2* softmax() const { return reinterpret_cast<float2*>(column_data() + 2 * kColumns); }
  __device__ float& rescale(int column) const { return column_data()[2 * kColumns + column]; }  // before there is a softmax()

  __device__ Column place_of(int column) const {
    return {row_, kv_head_ * static_cast<int>(l_.heads_per_kv_head()) + first_column_ + column};
  }

  // By a warp: the row of a column in fp16, times the scales of K's channels and a power of two, so that it fits.
  __device__ void load_query(int column) const {
    std::byte* to = shared_ + column * m_.key_pitch;
    constexpr int kAtOnce = 32 * kLoads * device::kVecSize;
    if (column >= num_columns_) {
      for (int d = 8 * lane_; d < args_.head_size; d += 8 * 32) *reinterpret_cast<uint4*>(to + 2 * d) = {};
      if (lane_ == 0) factor(column) = base(column) = 0.0f;
      return;
    }
    const Column place = place_of(column);
    const std::int64_t row = place.row * l_.query.token + place.head * l_.query.head;
    float x[kLoads][device::kVecSize], largest = 0.0f, product = 0.0f;
    for (int first = 0; first < args_.head_size; first += kAtOnce) product += load_scaled(row, first, x, largest);
    largest = max_of_warp(largest);
    product = sum_of_warp(product);
    const PowerOfTwo down(-exponent_of(largest)), up(exponent_of(largest));
    for (int first = 0; first < args_.head_size; first += kAtOnce) {
      if (args_.head_size > kAtOnce) load_scaled(row, first, x, largest);
#pragma unroll
      for (int n = 0; n < kLoads; ++n) {
        const int d = first + 8 * (lane_ + 32 * n);
        if (d >= args_.head_size) continue;
        std::uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) words[i] = device::half2_of(down.times(x[n][2 * i]), down.times(x[n][2 * i + 1]));
        *reinterpret_cast<uint4*>(to + 2 * d) = {words[0], words[1], words[2], words[3]};
      }
    }
    if (lane_ != 0) return;
    float by = l_.softcap > 0.0f ? l_.softmax_scale : l_.softmax_scale * kLog2e;
    if (l_.q_scale) by *= __ldg(l_.q_scale + place.head / l_.heads_per_q_scale * l_.q_scale_stride);
    const bool per_head = l_.k_scale.dim == 0 && !l_.k_scale.per_token();
    factor(column) = up.times(per_head ? by * __ldg(l_.k_scale.data + kv_head_ * l_.k_scale.head) : by);
    base(column) = by * product;
  }

  // Elements of this lane from `first` on, times the scales of K's channels, and the largest of them. Returns their product
  // with the offsets of K.
  __device__ float load_scaled(std::int64_t row, int first, float (&x)[kLoads][device::kVecSize], float& largest) const {
    if (!args_.query_aligned) {
#pragma unroll
      for (int n = 0; n < kLoads; ++n)
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int d = first + 8 * (lane_ + 32 * n) + i;
          x[n][i] = d < args_.head_size ? load_element(l_.query.data, l_.query_dtype, row + d * l_.query.dim) : 0.0f;
        }
    } else {
      switch (l_.query_dtype) {
        case DType::Float32: load_aligned<float>(row, first, x); break;
        case DType::Float16: load_aligned<Half>(row, first, x); break;
        case DType::BFloat16: load_aligned<BFloat16>(row, first, x); break;
        case DType::E4M3: load_aligned<E4M3>(row, first, x); break;
        default: load_aligned<E5M2>(row, first, x);
      }
    }
    float product = 0.0f;
#pragma unroll
    for (int n = 0; n < kLoads; ++n) {
      const int d = first + 8 * (lane_ + 32 * n);
      if (d >= args_.head_size) continue;
      if (l_.k_offset.data) {
#pragma unroll
        for (int i = 0; i < 8; ++i)
          product += x[n][i] * __ldg(l_.k_offset.data + kv_head_ * l_.k_offset.head + (d + i) * l_.k_offset.dim);
      }
      if (l_.k_scale.dim != 0) {
#pragma unroll
        for (int i = 0; i < 8; ++i) x[n][i] *= __ldg(l_.k_scale.data + kv_head_ * l_.k_scale.head + (d + i) * l_.k_scale.dim);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (is_finite(x[n][i])) largest = fmaxf(largest, fabsf(x[n][i]));
    }
    return product;
  }

  template <class T>
  __device__ void load_aligned(std::int64_t row, int first, float (&x)[kLoads][device::kVecSize]) const {
    const T* from = static_cast<const T*>(l_.query.data) + row + first;
    Vec<T> vecs[kLoads] = {};
#pragma unroll
    for (int n = 0; n < kLoads; ++n)
      if (const int d = 8 * (lane_ + 32 * n); first + d < args_.head_size) vecs[n] = device::load_aligned(from + d);
#pragma unroll
    for (int n = 0; n < kLoads; ++n) device::unpack(vecs[n], x[n]);
  }

  // --- Logits -------------------------------------------------

  __device__ float* logits(int part, int column) const {
    return reinterpret_cast<float*>(shared_ + m_.logits) + (part * kColumns + column) * GroupedMemory::kLogitPitch;
  }

  // A warp multiplies all positions, some columns, and a part of the elements.
  __device__ void multiply_keys() const {
    const int part = warp_ % kKeyParts, first = warp_ / kKeyParts * 16;  // column
    float sums[2][kWarpColumnTiles][4] = {};
    const std::uint32_t key = device::shared_address(shared_ + m_.keys) + lane_ % 16 * m_.key_pitch + lane_ / 16 * 16;
    const int column = first + lane_ % 8 + (kWarpColumnTiles == 2 ? lane_ / 16 * 8 : 0);
    const std::uint32_t query = device::shared_address(shared_) + column * m_.key_pitch + lane_ / 8 % 2 * 16;
    const int steps = args_.head_size / 16;
#pragma unroll 3
    for (int step = part; step < steps; step += kKeyParts) {
      std::uint32_t keys[2][4];
      load_matrices(keys[0], key + 32 * step);
      load_matrices(keys[1], key + 16 * m_.key_pitch + 32 * step);
      std::uint32_t queries[2 * kWarpColumnTiles];
      load_matrices(queries, query + 32 * step);
#pragma unroll
      for (int p = 0; p < 2; ++p)
#pragma unroll
        for (int n = 0; n < kWarpColumnTiles; ++n)
          device::multiply_add(sums[p][n], keys[p][0], keys[p][1], keys[p][2], keys[p][3], queries[2 * n], queries[2 * n + 1]);
    }
#pragma unroll
    for (int p = 0; p < 2; ++p)
#pragma unroll
      for (int n = 0; n < kWarpColumnTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          logits(part, first + 8 * n + 2 * (lane_ % 4) + i % 2)[16 * p + lane_ / 4 + i / 2 * 8] = sums[p][n][i];
  }

  // --- Softmax ------------------------------------------------

  __device__ int own_column() const { return thread_ / kThreadsPerColumn; }

  // The maximum over the threads of a column.
  __device__ static float max_of_column(float x) {
#pragma unroll
    for (int lanes = 1; lanes < kThreadsPerColumn; lanes *= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, lanes));
    return x;
  }

  // Raises the maximum of a column where a logit is far above it; what was summed up before is multiplied with the result.
  __device__ static float raise_for(float& maximum, const float (&x)[kPerThread]) {
    float largest = x[0];
#pragma unroll
    for (int i = 1; i < kPerThread; ++i) largest = fmaxf(largest, x[i]);
    if (!__any_sync(kAllLanes, largest > maximum + kMaxGrowth)) return 1.0f;
    largest = max_of_column(largest);
    if (!(largest > maximum + kMaxGrowth)) return 1.0f;
    const float kept = device::exp2_approximation(maximum - largest);
    maximum = largest;
    return kept;
  }

  // The logits of this thread from what warps have of them.
  __device__ void add_parts(int column, int first, float (&x)[kPerThread]) const {
    constexpr int kAccess = kPerThread % 4 == 0 ? 4 : kPerThread;  // elements
#pragma unroll
    for (int part = 0; part < kKeyParts; ++part)
#pragma unroll
      for (int i = 0; i < kPerThread; i += kAccess) {
        float loaded[kAccess];
        load_shared_floats(logits(part, column) + first + i, loaded);
#pragma unroll
        for (int k = 0; k < kAccess; ++k) x[i + k] = part == 0 ? loaded[k] : x[i + k] + loaded[k];
      }
  }

  // From the logits of a tile to the weights of its values. Returns whether sums of the column have to be scaled.
  __device__ bool weigh(int tile) {
    const int column = own_column(), first = thread_ % kThreadsPerColumn * kPerThread;
    const float by = factor(column), added = base(column);
    const float *scales = position_data(tile) + first, *value_scales = scales + kPositions, *seen = scales + 2 * kPositions;
    float x[kPerThread];  // logits
    add_parts(column, first, x);
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      x[i] *= by;
      if (l_.k_scale.per_token()) x[i] *= scales[i];
      if (l_.softcap > 0.0f) x[i] = l_.softcap * tanhf((x[i] + added) / l_.softcap) * kLog2e;
      if (seen[i] == 0.0f) x[i] = -INFINITY;
    }
    float kept_values = raise_for(maximum_, x);
    sum_ *= kept_values;
    float weights[kPerThread];
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      weights[i] = device::exp2_approximation(x[i] - maximum_);
      sum_ += weights[i];
    }
    if (l_.v_scale.per_token()) {
#pragma unroll
      for (int i = 0; i < kPerThread; ++i)
        if (seen[i] != 0.0f) x[i] += device::log2_approximation(value_scales[i]);
      kept_values = raise_for(value_maximum_, x);
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) weights[i] = device::exp2_approximation(x[i] - value_maximum_);
    }
    auto* to = reinterpret_cast<__half*>(shared_ + m_.weights) + column * GroupedMemory::kWeightPitch + first;
    if constexpr (kPerThread == 1) {
      *to = __float2half_rn(weights[0]);
    } else {
#pragma unroll
      for (int i = 0; i < kPerThread; i += 2)
        *reinterpret_cast<std::uint32_t*>(to + i) = device::half2_of(weights[i], weights[i + 1]);
    }
    if (thread_ % kThreadsPerColumn == 0) rescale(column) = kept_values;
    return kept_values != 1.0f;
  }

  // --- Values -------------------------------------------------

  __device__ void add_values(bool rescales) {
    if (rescales) {
#pragma unroll
      for (int c = 0; c < kColumnTiles; ++c) {
        const float by[2] = {rescale(8 * c + 2 * (lane_ % 4)), rescale(8 * c + 2 * (lane_ % 4) + 1)};
#pragma unroll
        for (int d = 0; d < kDimTiles; ++d)
#pragma unroll
          for (int i = 0; i < 4; ++i) out_[d][c][i] *= by[i % 2];
      }
    }
    std::uint32_t weights[kColumnTiles][4];
    const std::uint32_t weight =
        device::shared_address(shared_ + m_.weights) + 2 * (lane_ % 8 * GroupedMemory::kWeightPitch + lane_ / 8 * 8);
#pragma unroll
    for (int c = 0; c < kColumnTiles; ++c) load_matrices(weights[c], weight + 2 * 8 * c * GroupedMemory::kWeightPitch);
    const std::uint32_t value = device::shared_address(shared_ + m_.values) + (lane_ % 8 + lane_ / 16 * 8) * m_.value_pitch +
                                2 * (warp_ * kWarpDims + lane_ / 8 % 2 * 8);
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int d = 0; d < kDimTiles; ++d) {
        std::uint32_t a[4];
        load_transposed(a, value + 16 * half * m_.value_pitch + 32 * d);
#pragma unroll
        for (int c = 0; c < kColumnTiles; ++c)
          device::multiply_add(out_[d][c], a[0], a[1], a[2], a[3], weights[c][2 * half], weights[c][2 * half + 1]);
      }
  }

  // --- The end ------------------------------------------------

  __device__ void finish(const Slots& slots) {
    // Sums of V have a maximum of their own with a scale for each token.
    float sum = sum_;
#pragma unroll
    for (int lanes = 1; lanes < kThreadsPerColumn; lanes *= 2) sum += __shfl_xor_sync(kAllLanes, sum, lanes);
    const float to_maximum =
        l_.v_scale.per_token() && sum != 0.0f ? device::exp2_approximation(value_maximum_ - maximum_) : 1.0f;
    const float of_base = l_.softcap > 0.0f ? 0.0f : base(own_column());
    __syncthreads();  // factors give way
    if (thread_ % kThreadsPerColumn == 0) {
      factor(own_column()) = to_maximum;
      base(own_column()) = of_base;
      softmax()[own_column()] = {maximum_, sum};
    }
    __syncthreads();
    if (args_.plan.slots > 0 && part_ == 0 && thread_ == 0)
      slots.store(blockIdx.x, {.parts = static_cast<int>(args_.plan.parts),
                               .first_row = row_,
                               .first_column = first_column_,
                               .num_columns = num_columns_,
                               .kv_head = kv_head_});
    // By way of shared memory, 8 columns at a time, so that neighboring lanes store neighboring elements.
    constexpr int kPitch = kValueSize + 4, kWarpsPerColumn = kWarps / 8;
    auto* staged = reinterpret_cast<float*>(shared_);
#pragma unroll
    for (int c = 0; c < kColumnTiles; ++c) {
#pragma unroll
      for (int d = 0; d < kDimTiles; ++d)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          staged[(2 * (lane_ % 4) + i % 2) * kPitch + warp_ * kWarpDims + 16 * d + lane_ / 4 + i / 2 * 8] = out_[d][c][i];
      __syncthreads();
      const int column = 8 * c + warp_ / kWarpsPerColumn;
      if (column < num_columns_)
        store_column(slots, column, staged + warp_ / kWarpsPerColumn * kPitch, warp_ % kWarpsPerColumn, kWarpsPerColumn);
      __syncthreads();
    }
  }

  // By `warps` warps, each of which has 32 neighboring elements at a time.
  __device__ void store_column(const Slots& slots, int column, const float* sums, int warp, int warps) const {
    const float2 total = softmax()[column];
    const float by = factor(column);
    const int first = 32 * warp + lane_, v_head_size = static_cast<int>(l_.v_head_size);
    if (args_.plan.slots > 0) {
      float* to = slots.sums(blockIdx.x, column);
      for (int dim = first; dim < v_head_size; dim += 32 * warps) to[dim] = sums[dim] * by;
      float* of_column = slots.softmax(blockIdx.x, column);
      if (first == 0) of_column[0] = total.x, of_column[1] = total.y, of_column[2] = base(column);
      return;
    }
    const Finish end(l_, place_of(column), kv_head_, {total.x, total.y}, base(column));
    for (int dim = first; dim < v_head_size; dim += 32 * warps) end.store(dim, sums[dim] * by);
    if (first == 0) end.store_lse();
  }

  const GroupedArgs& args_;
  const AttentionLayout& l_;
  const GroupedMemory& m_;
  std::byte* shared_;
  int thread_, lane_, warp_;
  int row_, kv_head_, first_column_, num_columns_, part_;
  Positions seen_;
  const int* table_;
  const std::byte *keys_, *values_;  // what this thread copies, of the first position of block 0
  Entry table_entry_;                // of the tile that is copied next
  // Of own_column(), but for the sum the same in all of its threads.
  float maximum_ = kNothing, value_maximum_ = kNothing, sum_ = 0.0f;
  float out_[kDimTiles][kColumnTiles][4];  // elements g and g + 8 of columns 2t and 2t + 1
};

template <int kColumns, int kValueSize>
__global__ void __launch_bounds__(32 * GroupedShape::warps(kColumns, kValueSize),
                                  GroupedShape::blocks_at_once(kColumns, kValueSize))
    attention_grouped(const __grid_constant__ GroupedArgs args) {
  extern __shared__ __align__(128) std::byte shared_memory[];
  device::wait_then_release();
  GroupedAttention<kColumns, kValueSize>(args, shared_memory).attend();
}

template <int kColumns, int kValueSize>
void launch_kernel(const GroupedArgs& args, cudaStream_t stream) {
  const auto kernel = attention_grouped<kColumns, kValueSize>;
  static PerDevice<bool> allowed;
  allowed.get([&] {
    check_query(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     device_limits().shared_memory - core::kReservedMemory));
    return true;
  });
  const auto blocks = static_cast<unsigned>(args.plan.blocks);
  const LaunchShape shape{.grid = blocks,
                          .threads = 32 * args.plan.warps,
                          .shared_memory = args.plan.shared_memory,
                          .dependent = launches_dependent(blocks)};
  launch(kernel, shape, stream, args);
  check_launch("paged_attention");
}

}  // namespace

void launch_grouped(const AttentionLayout& layout, const AttentionPlan& plan, void* workspace, cudaStream_t stream) {
  GroupedArgs args{.layout = layout,
                   .plan = plan,
                   .memory = core::grouped_memory(layout, plan.columns, device_limits().shared_memory),
                   .head_size = static_cast<int>(layout.head_size),
                   .values_in_keys = core::values_in_keys(layout),
                   .query_aligned = core::query_vecs_aligned(layout),
                   .keys = CacheStrides(layout.key_cache),
                   .values = CacheStrides(layout.value_cache),
                   .block_size = FastDiv(std::max<std::int64_t>(1, layout.block_size)),
                   .workspace = workspace};
  args.layout.head_size = layout.v_head_size;
  const auto launch = [&]<int kColumns>(std::integral_constant<int, kColumns>) {
    if (GroupedShape::value_size(layout.v_head_size) == 128) return launch_kernel<kColumns, 128>(args, stream);
    launch_kernel<kColumns, 512>(args, stream);
  };
  switch (plan.columns) {
    case 8: return launch(std::integral_constant<int, 8>{});
    case 16: return launch(std::integral_constant<int, 16>{});
    case 32: return launch(std::integral_constant<int, 32>{});
    default: return launch(std::integral_constant<int, 64>{});
  }
}

}  // namespace fp8kv::cuda::attention
