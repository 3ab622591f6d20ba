// gather_and_dequant_cache: rows of any sequences out of the blocks they lie in.
#include <limits>

#include "cuda/cache/cache.cuh"

namespace fp8kv::cuda {
namespace {

// p, `index` strides further on; they count bytes.
template <class T, class Stride>
__device__ __forceinline__ T* step(T* p, std::uint32_t index, Stride stride) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return reinterpret_cast<T*>(reinterpret_cast<Byte*>(p) + index * static_cast<std::uint64_t>(stride));
}

// A sequence: its tokens from `begin` up to `end`, and the position of the first.
struct Span {
  std::uint32_t index;
  int begin;
  int end;
  int start;
};
inline constexpr Span kBeforeAll{.index = 0, .begin = 0, .end = INT32_MIN, .start = 0};

// Where a token lies in the cache. The block may be any number: Sequences::num_blocks is the limit of those that are there.
struct Place {
  std::uint32_t block = 0xffffffffu;
  std::uint32_t offset = 0;
};

// Sequences, and where their positions lie. Whatever the index tensors hold, nothing outside of them or of the cache is read.
// Tokens, positions and blocks count in 32 bits, as the index tensors do; a negative one says that there is none. Strides count
// bytes: in 32 bits where they fit, as they nearly always do.
template <class Stride>
struct Sequences {
  const int* cu_seq_lens;
  const int* starts;  // nullptr: all 0
  const int* table;
  Stride cu_seq_lens_stride;
  Stride starts_stride;
  Stride table_row;
  Stride table_stride;
  std::uint32_t count;  // not 0
  std::uint32_t max_blocks;
  std::uint32_t num_blocks;

  static Sequences of(const CacheGather& p) {
    const auto data = [](const TensorView& view) { return static_cast<const int*>(view.data); };
    const auto bytes = [](const TensorView& view, int dim) { return static_cast<Stride>(view.strides[dim] * sizeof(int)); };
    const auto count = [](std::int64_t n) { return static_cast<std::uint32_t>(std::min<std::int64_t>(n, INT32_MAX)); };
    return {.cu_seq_lens = data(p.cu_seq_lens),
            .starts = p.seq_starts ? data(*p.seq_starts) : nullptr,
            .table = data(p.block_table),
            .cu_seq_lens_stride = bytes(p.cu_seq_lens, 0),
            .starts_stride = p.seq_starts ? bytes(*p.seq_starts, 0) : 0,
            .table_row = bytes(p.block_table, 0),
            .table_stride = bytes(p.block_table, 1),
            .count = count(p.block_table.sizes[0]),
            .max_blocks = count(p.block_table.sizes[1]),
            .num_blocks = count(p.key_cache.sizes[0])};
  }

  // Whether all strides fit.
  static bool fit(const CacheGather& p) {
    constexpr std::int64_t kLimit = std::numeric_limits<Stride>::max() / std::int64_t{sizeof(int)};
    return p.cu_seq_lens.strides[0] <= kLimit && (!p.seq_starts || p.seq_starts->strides[0] <= kLimit) &&
           p.block_table.strides[0] <= kLimit && p.block_table.strides[1] <= kLimit;
  }

  // Index tensors are read without __ldg, whose loads ptxas moves before the wait for the previous kernel.
  __device__ __forceinline__ int sum(std::uint32_t i) const { return *step(cu_seq_lens, i, cu_seq_lens_stride); }

  // Behind the last sequence, the last one.
  __device__ __forceinline__ Span span(std::uint32_t index) const {
    index = min(index, count - 1);
    const int* sums = step(cu_seq_lens, index, cu_seq_lens_stride);
    return {.index = index,
            .begin = *sums,
            .end = *step(sums, 1, cu_seq_lens_stride),
            .start = starts ? *step(starts, index, starts_stride) : 0};
  }

  // The position of a token of a sequence; negative: there is none.
  __device__ __forceinline__ int position(std::uint32_t token, const Span& sequence) const {
    constexpr std::uint32_t kSign = 0x80000000u;
    const auto start = static_cast<std::uint32_t>(sequence.start), within = token - static_cast<std::uint32_t>(sequence.begin);
    return static_cast<int>((start + within) | ((start | within) & kSign));
  }

  // The block of number `index` of a sequence.
  __device__ __forceinline__ std::uint32_t block(std::uint32_t sequence, std::uint32_t index) const {
    if (index >= max_blocks) return Place{}.block;
    return static_cast<std::uint32_t>(*step(step(table, sequence, table_row), index, table_stride));
  }
  __device__ __forceinline__ Place place(std::uint32_t token, const Span& sequence, const FastDiv& block_size) const {
    const int at = position(token, sequence);
    if (at < 0) return {};
    const auto [index, offset] = block_size.divmod(static_cast<std::uint32_t>(at));
    return {block(sequence.index, index), offset};
  }
};

// Finds the sequences of a warp's tokens, which ascend with the lanes. All lanes call it together. Each knows one of 32
// sequences, so that there is nothing left to load once one of these is found.
template <class Stride>
class SequenceFinder {
 public:
  explicit __device__ __forceinline__ SequenceFinder(const Sequences<Stride>& sequences)
      : sequences_(sequences), known_(sequences.span(lane())) {}

  // The sequence that ends first after the lane's token; behind all tokens if there is none.
  __device__ __forceinline__ Span find(std::uint32_t token, bool wanted) {
    Span sequence = kBeforeAll;
    advance(token, wanted, sequence, kAll);
    return sequence;
  }

  // The same where one is known that is not behind it. A template, for the compiler not to warn of where it is not called.
  template <bool = true>
  __device__ __forceinline__ void advance(std::uint32_t token, bool wanted, Span& sequence) {
    advance(token, wanted, sequence, __ballot_sync(kAll, wanted && static_cast<int>(token) >= sequence.end));
  }

 private:
  static constexpr std::uint32_t kWarp = 32;
  static constexpr unsigned kAll = 0xffffffffu;
  static __device__ __forceinline__ std::uint32_t lane() { return threadIdx.x % kWarp; }

  // For the lanes of `left`. Nearly always they all have tokens of one sequence.
  __device__ __forceinline__ void advance(std::uint32_t token, bool wanted, Span& sequence, unsigned left) {
    while (left != 0) {
      const Span next = first_after(static_cast<int>(__shfl_sync(kAll, token, __ffs(left) - 1)));
      if (static_cast<int>(token) >= sequence.end) sequence = next;
      left = __ballot_sync(kAll, wanted && static_cast<int>(token) >= sequence.end);
    }
  }

  // The sequence that ends first after a token that is the same in all lanes.
  __device__ __forceinline__ Span first_after(int token) {
    std::uint32_t first = 0;
    if (sequences_.count > kWarp) {
      std::uint32_t last = sequences_.count;
      while (last - first > kWarp) {  // in each round, a lane looks at one of 32 parts
        const std::uint32_t part = (last - first + kWarp - 1) / kWarp, end = first + (lane() + 1) * part;
        const unsigned after = __ballot_sync(kAll, end >= last || sequences_.sum(end) > token);
        first += (__ffs(after) - 1) * part;
        last = min(last, first + part);
      }
      known_ = sequences_.span(first + lane());
    }
    const unsigned after = __ballot_sync(kAll, known_.end > token);
    const int found = __ffs(after) - 1;
    Span span{.index = first + static_cast<std::uint32_t>(found),
              .begin = __shfl_sync(kAll, known_.begin, found),
              .end = __shfl_sync(kAll, known_.end, found),
              .start = sequences_.starts ? __shfl_sync(kAll, known_.start, found) : 0};
    if (after == 0) span.begin = span.end = INT32_MAX;  // none
    return span;
  }

  const Sequences<Stride>& sequences_;
  Span known_;
};

struct GatherArgs {
  Sequences<std::uint32_t> sequences;
  std::uint32_t first_token;
  std::uint32_t num_tokens;
  FastDiv vecs_per_token;  // threads of a token
  FastDiv vecs_per_head;
  FastDiv block_size;
  std::uint32_t head_size;
  int sides;
  KVViews kv[2];
};

// Parameters of gather_heads, in as few bytes as possible: a launch of few tokens takes 5% longer with all strides in 64 bits.
// Strides count bytes. K and V share those of caches and rows.
struct HeadsArgs {
  struct Side {  // K or V
    const void* cache;
    const float* scales;
    void* rows;
    std::uint32_t scale_block, scale_offset, scale_head;
    std::int64_t scale_step;  // from one vector of a thread to the next
  };

  Sequences<std::uint32_t> sequences;
  std::uint32_t first_token;
  std::uint32_t num_tokens;
  FastDiv vecs_per_token;  // threads of a token
  FastDiv vecs_per_head;
  FastDiv block_size;
  std::uint32_t cache_block, cache_offset, cache_head;
  std::uint32_t row_token, row_head;
  std::int64_t cache_step, row_step;
  int sides;
  Side side[2];
};

// Where a token lies, in the lanes that want to know it; nowhere in the others. All lanes of a warp call it together.
template <class Args>
__device__ __forceinline__ Place find_place(const Args& p, std::uint32_t token, bool wanted) {
  const auto& sequences = p.sequences;
  if (sequences.count == 1) {
    // One sequence nearly always begins at 0: so its block is asked for together with its length, not after it.
    if (!wanted) return {};
    const Span only = sequences.span(0);
    const auto [index, offset] = p.block_size.divmod(token);
    const std::uint32_t block = sequences.block(0, index);
    const bool within = static_cast<int>(token) < only.end, from_0 = (only.begin | only.start) == 0;
    if (within & from_0) return {block, offset};
    return within ? sequences.place(token, only, p.block_size) : Place{};
  }
  const Span sequence = SequenceFinder(sequences).find(token, wanted);
  return wanted ? sequences.place(token, sequence, p.block_size) : Place{};
}

// Vectors of quantized values with one scale each. Only a NaN or an infinity gives NaN, so that the look for it is at the
// input.
template <class Out, class In, int kCount>
__device__ __forceinline__ void dequantize(const Vec<In> (&raw)[kCount], const float (&scales)[kCount],
                                           Vec<Out> (&to)[kCount]) {
  bool any_nan = false;
  std::uint32_t signs = 0;
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    any_nan |= !is_finite(scales[k]);
    if constexpr (!std::is_same_v<In, Int8>) {
      constexpr std::uint32_t kToSign = std::is_same_v<In, E4M3> ? 0x01010101u : 0x04040404u;  // from NaN, from infinity on
      signs |= ((raw[k].words[0] & 0x7f7f7f7fu) + kToSign) | ((raw[k].words[1] & 0x7f7f7f7fu) + kToSign);
    }
  }
  any_nan |= (signs & 0x80808080u) != 0;
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    float values[kVecSize];
    device::unpack(raw[k], values);
#pragma unroll
    for (int i = 0; i < kVecSize; ++i) values[i] = __fmul_rn(values[i], scales[k]);
    if constexpr (sizeof(Out) == 2) {
      to[k] = device::pack_any_nan<Out>(values);
    } else {
#pragma unroll
      for (int i = 0; i < kVecSize; ++i) to[k].words[i] = __float_as_uint(values[i]);
    }
  }
  if (!any_nan) return;
#pragma unroll
  for (int k = 0; k < kCount; ++k)
    to[k] = device::convert_vec<device::DequantizeOp, Out>(raw[k], device::DequantizeOp::prepare(scales[k]));
}

// The same with the parameters of channels. Many of them could give NaN, so that the look is at the result.
template <class Out, class In>
__device__ __forceinline__ Vec<Out> dequantized(const Vec<In>& raw, const device::Channels<device::DequantizeOp>& channels) {
  float values[kVecSize];
  device::unpack(raw, values);
#pragma unroll
  for (int i = 0; i < kVecSize; ++i) values[i] = __fadd_rn(__fmul_rn(values[i], channels.scales[i].scale), channels.offsets[i]);
  if constexpr (sizeof(Out) == 2) {
    Vec<Out> vec[1] = {device::pack_any_nan<Out>(values)};
    device::make_nan_canonical(vec);
    return vec[0];
  } else {
    return device::pack<Out>(values);
  }
}

// Where all is aligned: kVecs vectors of each side per thread, at the same place in heads that are far apart, which share what
// is found of the token.
template <class Op, class In, class Out, int kVecs>
__global__ void __launch_bounds__(256, kVecs == 4 ? 5 : 8) gather_heads(const __grid_constant__ HeadsArgs p) {
  const std::uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x;
  const auto [token_in_chunk, vec_in_token] = p.vecs_per_token.divmod(thread);
  const auto [head, vec] = p.vecs_per_head.divmod(vec_in_token);
  const std::uint32_t token = p.first_token + token_in_chunk;
  const bool wanted = token_in_chunk < p.num_tokens;
  device::wait_then_release();
  const auto [block, offset] = find_place(p, token, wanted);
  if (block >= p.sequences.num_blocks) return;
  const std::uint64_t in_cache = std::uint64_t{block} * p.cache_block + std::uint64_t{offset} * p.cache_offset +
                                 std::uint64_t{head} * p.cache_head + vec * Vec<In>::kBytes;
  const std::uint64_t in_rows = std::uint64_t{token} * p.row_token + std::uint64_t{head} * p.row_head + vec * Vec<Out>::kBytes;
  Vec<In> raw[2][kVecs];
  float scales[2][kVecs];
#pragma unroll
  for (int s = 1; s >= 0; --s) {  // V first: behind its branch, the compiler would wait for K before it loads V
    if (s >= 1 && p.sides == 1) continue;
    const HeadsArgs::Side& side = p.side[s];
    const char* from = static_cast<const char*>(side.cache) + in_cache;
    const float* scale =
        step(step(step(side.scales, head, side.scale_head), offset, side.scale_offset), block, side.scale_block);
#pragma unroll
    for (int v = 0; v < kVecs; ++v) {
      raw[s][v] = device::load_aligned(reinterpret_cast<const In*>(step(from, v, p.cache_step)));
      scales[s][v] = __ldg(step(scale, v, side.scale_step));
    }
  }
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    if (s >= 1 && p.sides == 1) break;
    Vec<Out> rows[kVecs];
    if constexpr (core::kIsQuantized<In>) {
      dequantize(raw[s], scales[s], rows);
    } else {
#pragma unroll
      for (int v = 0; v < kVecs; ++v) rows[v] = device::convert_vec<Op, Out>(raw[s][v], Op::prepare(scales[s][v]));
    }
    char* to = static_cast<char*>(p.side[s].rows) + in_rows;
#pragma unroll
    for (int v = 0; v < kVecs; ++v) device::store_aligned(reinterpret_cast<Out*>(step(to, v, p.row_step)), rows[v]);
  }
}

// One vector of each side per thread, at any alignment.
template <class Op, class In, class Out>
__global__ void __launch_bounds__(256) gather_unaligned(const __grid_constant__ GatherArgs p) {
  const std::uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x;
  const auto [token_in_chunk, vec_in_token] = p.vecs_per_token.divmod(thread);
  const std::uint32_t token = p.first_token + token_in_chunk;
  const bool wanted = token_in_chunk < p.num_tokens;
  device::wait_then_release();
  const auto [block, offset] = find_place(p, token, wanted);
  if (block >= p.sequences.num_blocks) return;
  const auto [head, vec] = p.vecs_per_head.divmod(vec_in_token);
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    if (s >= p.sides) break;
    const KVViews& kv = p.kv[s];
    Out* to = row<Out>(kv.rows, token, head);
    const Slice slice = slice_of(to, vec, p.head_size);
    if (slice.range.begin >= slice.range.end) continue;
    const auto scale = Op::prepare(__ldg(kv.scales.data + at(kv.scales, block, offset, head)));
    const Vec<In> raw = device::load_any(row<const In>(kv.cache, block, offset, head), slice.first, p.head_size, slice.range);
    device::store_range(to + slice.first, device::convert_vec<Op, Out>(raw, scale), slice.range);
  }
}

// Where channels have parameters, and all is aligned: a thread owns 8 of them and takes the vectors of kTokens tokens. Scales
// per token and head are those of each token.
template <class Op, class In, class Out, int kTokens, ChannelParameters kChannels>
__global__ void __launch_bounds__(128, 6) gather_tokens(const __grid_constant__ GatherArgs p) {
  const std::uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x;
  const auto [batch, vec_in_token] = p.vecs_per_token.divmod(thread);
  const auto [head, vec] = p.vecs_per_head.divmod(vec_in_token);
  const std::uint32_t column = vec * kVecSize, first = batch * kTokens;
  device::wait_then_release();
  SequenceFinder finder(p.sequences);
  Span sequence = kBeforeAll;
  Place places[kTokens];
  Vec<In> raw[2][kTokens] = {};
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    const std::uint32_t token = p.first_token + first + t;
    const bool wanted = first + t < p.num_tokens;
    // Most tokens lie behind the one before, in the same block.
    const Place before = places[t > 0 ? t - 1 : 0];
    const bool follows = wanted && static_cast<int>(token) < sequence.end && before.block < p.sequences.num_blocks &&
                         before.offset + 1 < p.block_size.divisor;
    if (t > 0 && __all_sync(0xffffffffu, follows)) {
      places[t] = {before.block, before.offset + 1};
    } else {
      finder.advance(token, wanted, sequence);
      if (wanted) places[t] = p.sequences.place(token, sequence, p.block_size);
    }
    const auto [block, offset] = places[t];
    if (block >= p.sequences.num_blocks) continue;
#pragma unroll
    for (int s = 0; s < 2; ++s)
      if (s < p.sides) raw[s][t] = device::load_aligned(row<const In>(p.kv[s].cache, block, offset, head) + column);
  }
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    if (s >= p.sides) break;
    const KVViews& kv = p.kv[s];
    const float* scale = kv.scales.data + head * kv.scales.head;
    auto channels = load_channels<Op, In, kChannels>(kv, scale, head, {column});
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      const auto [block, offset] = places[t];
      if (block >= p.sequences.num_blocks) continue;
      if (kChannels == ChannelParameters::Any && kv.scales.per_token()) {
        const auto prepared = Op::prepare(__ldg(scale + at(kv.scales, block, offset, 0u)));
#pragma unroll
        for (int i = 0; i < kVecSize; ++i) channels.scales[i] = prepared;
      }
      device::store_aligned(row<Out>(kv.rows, p.first_token + first + t, head) + column, dequantized<Out>(raw[s][t], channels));
    }
  }
}

struct ScalarGatherArgs {
  KVViews kv[2];
  int sides;
  Sequences<std::int64_t> sequences;
  std::int64_t count;
  std::int64_t num_heads;
  std::int64_t head_size;
  std::int64_t block_size;
};

// Anything: one element of each side per thread.
template <class Op, class In, class Out, bool kChannels>
__global__ void __launch_bounds__(256) gather_scalar(const __grid_constant__ ScalarGatherArgs p) {
  const std::int64_t element = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const bool wanted = element < p.count;
  const std::int64_t dim = element % p.head_size;
  const std::int64_t head = element / p.head_size % p.num_heads;
  const std::int64_t token = element / p.head_size / p.num_heads;
  device::wait_then_release();
  const Span sequence = SequenceFinder(p.sequences).find(static_cast<std::uint32_t>(token), wanted);
  if (!wanted) return;
  const std::int64_t position = p.sequences.position(static_cast<std::uint32_t>(token), sequence);
  if (position < 0) return;
  const std::int64_t offset = position % p.block_size;
  const std::int64_t block = p.sequences.block(sequence.index, static_cast<std::uint32_t>(position / p.block_size));
  if (block >= p.sequences.num_blocks) return;
  for (int s = 0; s < p.sides; ++s) {
    const KVViews& kv = p.kv[s];
    const float* scale = kv.scales.data + at(kv.scales, block, offset, head);
    const In raw = row<const In>(kv.cache, block, offset, head)[dim * kv.cache.dim];
    row<Out>(kv.rows, token, head)[dim * kv.rows.dim] = convert_at<Op, Out, kChannels>(raw, kv, scale, head, dim);
  }
}

// Whether K and V have the same strides, but for those of their scales.
bool alike(const CacheLayout& layout) {
  const auto same = [](std::int64_t k, std::int64_t v, std::int64_t size) { return k == v || size <= 1; };
  const auto& [k, v] = std::pair<const KVViews&, const KVViews&>(layout.k, layout.v);
  return same(k.rows.token, v.rows.token, layout.num_tokens) && same(k.rows.head, v.rows.head, layout.num_heads) &&
         same(k.cache.block, v.cache.block, layout.num_blocks) && same(k.cache.offset, v.cache.offset, layout.block_size) &&
         same(k.cache.head, v.cache.head, layout.num_heads);
}

template <class In, class Out>
HeadsArgs heads_args(const CacheLayout& layout, const CachePlan& plan, const CacheGather& problem) {
  // The vectors of a thread are in heads that are far apart, or in parts of a head where their number is odd.
  const bool by_heads = layout.num_heads % plan.vecs_per_thread == 0;
  const std::int64_t heads = by_heads ? layout.num_heads / plan.vecs_per_thread : 0;
  const std::int64_t vecs = by_heads ? plan.vecs_per_head : plan.vecs_per_head / plan.vecs_per_thread;
  const std::int64_t in_head = by_heads ? 0 : vecs * kVecSize;
  constexpr std::int64_t kIn = sizeof(In), kOut = sizeof(Out), kScale = sizeof(float);
  // 0 for a dimension of one element, which may have any stride.
  const auto bytes = [](std::int64_t stride, std::int64_t size, std::int64_t element) {
    return static_cast<std::uint32_t>(size > 1 ? stride * element : 0);
  };
  const auto side = [&](const KVViews& kv) {
    return HeadsArgs::Side{.cache = kv.cache.data,
                           .scales = kv.scales.data,
                           .rows = kv.rows.data,
                           .scale_block = bytes(kv.scales.block, layout.num_blocks, kScale),
                           .scale_offset = bytes(kv.scales.offset, layout.block_size, kScale),
                           .scale_head = bytes(kv.scales.head, layout.num_heads, kScale),
                           .scale_step = heads * kv.scales.head * kScale};
  };
  const core::PagedView& cache = layout.k.cache;
  const core::HeadsView& rows = layout.k.rows;
  return {.sequences = Sequences<std::uint32_t>::of(problem),
          .vecs_per_token = FastDiv(layout.num_heads * plan.vecs_per_head / plan.vecs_per_thread),
          .vecs_per_head = FastDiv(vecs),
          .block_size = FastDiv(layout.block_size),
          .cache_block = bytes(cache.block, layout.num_blocks, kIn),
          .cache_offset = bytes(cache.offset, layout.block_size, kIn),
          .cache_head = bytes(cache.head, layout.num_heads, kIn),
          .row_token = bytes(rows.token, layout.num_tokens, kOut),
          .row_head = bytes(rows.head, layout.num_heads, kOut),
          .cache_step = (heads * cache.head + in_head) * kIn,
          .row_step = (heads * rows.head + in_head) * kOut,
          .sides = layout.sides,
          .side = {side(layout.k), side(layout.v)}};
}

template <class Op, class In, class Out>
void launch_gather(const char* op, const CacheLayout& layout, const CacheGather& problem, const CachePlan& plan,
                   cudaStream_t stream) {
  const auto blocks = [&](std::int64_t threads) { return static_cast<unsigned>(core::ceil_div(threads, plan.threads)); };
  if (plan.path == KernelPath::Scalar) {
    const ScalarGatherArgs params{.kv = {layout.k, layout.v},
                                  .sides = layout.sides,
                                  .sequences = Sequences<std::int64_t>::of(problem),
                                  .count = layout.num_tokens * layout.num_heads * layout.head_size,
                                  .num_heads = layout.num_heads,
                                  .head_size = layout.head_size,
                                  .block_size = layout.block_size};
    auto kernel = gather_scalar<Op, In, Out, false>;
    if constexpr (core::kIsQuantized<In>)
      if (layout.has_channels()) kernel = gather_scalar<Op, In, Out, true>;
    launch_dependent(kernel, blocks(params.count), plan.threads, stream, params);
    return check_launch(op);
  }
  const std::int64_t threads_per_token = layout.num_heads * plan.vecs_per_head / plan.vecs_per_thread;
  const auto in_chunks = [&](auto kernel, auto params) {
    for (std::int64_t first = 0; first < layout.num_tokens; first += params.num_tokens) {
      params.first_token = static_cast<std::uint32_t>(first);
      params.num_tokens = static_cast<std::uint32_t>(std::min(plan.tokens, layout.num_tokens - first));
      const std::int64_t batches = core::ceil_div(params.num_tokens, plan.tokens_per_thread);
      launch_dependent(kernel, blocks(batches * threads_per_token), plan.threads, stream, params);
      check_launch(op);
    }
  };
  if (plan.path == KernelPath::Vectorized && plan.aligned) {
    const auto kernel = plan.vecs_per_thread == 1   ? gather_heads<Op, In, Out, 1>
                        : plan.vecs_per_thread == 2 ? gather_heads<Op, In, Out, 2>
                                                    : gather_heads<Op, In, Out, 4>;
    if (layout.sides == 1 || alike(layout)) return in_chunks(kernel, heads_args<In, Out>(layout, plan, problem));
    CacheLayout side = layout;
    side.sides = 1;
    for (const KVViews* kv : {&layout.k, &layout.v}) {
      side.k = *kv;
      in_chunks(kernel, heads_args<In, Out>(side, plan, problem));
    }
    return;
  }
  auto kernel = gather_unaligned<Op, In, Out>;
  if constexpr (core::kIsQuantized<In>)
    if (plan.path == KernelPath::PerColumn)
      kernel = plan.tokens_per_thread == 1    ? gather_tokens<Op, In, Out, 1, ChannelParameters::Any>
               : layout.only_channel_scales() ? gather_tokens<Op, In, Out, 2, ChannelParameters::Scales>
                                              : gather_tokens<Op, In, Out, 2, ChannelParameters::Any>;
  in_chunks(kernel, GatherArgs{.sequences = Sequences<std::uint32_t>::of(problem),
                               .vecs_per_token = FastDiv(threads_per_token),
                               .vecs_per_head = FastDiv(plan.vecs_per_head),
                               .block_size = FastDiv(layout.block_size),
                               .head_size = static_cast<std::uint32_t>(layout.head_size),
                               .sides = layout.sides,
                               .kv = {layout.k, layout.v}});
}

}  // namespace

void run(const CacheGather& problem, Stream stream) {
  constexpr const char* op = "gather_and_dequant_cache";
  const CacheLayouts layouts = core::lower(problem);
  core::check_on_device({op, "key_cache", problem.key_cache}, current_device());
  if (layouts.empty()) return;
  if (debugging(stream)) debug_check_sequences(problem, layouts.front(), stream);
  if (layouts.front().num_slots() == 0 || problem.block_table.sizes[0] == 0) return;
  for (CacheLayout layout : layouts) {
    if (layout.empty()) continue;
    layout.num_tokens = std::min<std::int64_t>(layout.num_tokens, INT32_MAX);  // no sequence reaches beyond
    CachePlan plan = core::plan_gather(layout);
    if (!Sequences<std::uint32_t>::fit(problem)) plan = {.tokens = layout.num_tokens};  // elements, counted in 64 bits
    core::visit_real(layout.row_dtype, [&]<class Out>(core::Type<Out>) {
      if (core::is_quantized(layout.cache_dtype))
        core::visit_quantized(layout.cache_dtype, [&]<class In>(core::Type<In>) {
          launch_gather<device::DequantizeOp, In, Out>(op, layout, problem, plan, stream);
        });
      else
        core::visit_real(layout.cache_dtype, [&]<class In>(core::Type<In>) {
          launch_gather<device::CopyOp, In, Out>(op, layout, problem, plan, stream);
        });
    });
  }
}

}  // namespace fp8kv::cuda
