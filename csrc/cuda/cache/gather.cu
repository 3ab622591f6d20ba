// gather_and_dequant_cache: rows of any sequences out of the blocks they lie in.
#include "cuda/cache/cache.cuh"

namespace fp8kv::cuda {
namespace {

// Sequences, and where their positions lie. Whatever the index tensors hold, nothing outside of them or of the cache is read.
// Tokens, positions and blocks count in 32 bits, as the index tensors do; a negative one says that there is none.
struct Sequences {
  const int* cu_seq_lens;
  std::int64_t cu_seq_lens_stride;
  const int* starts;  // nullptr: all 0
  std::int64_t starts_stride;
  const int* table;
  std::int64_t table_row;
  std::int64_t table_stride;
  std::uint32_t max_blocks;
  std::uint32_t num_blocks;
  std::uint32_t count;

  static Sequences of(const CacheGather& p) {
    const auto data = [](const TensorView& view) { return static_cast<const int*>(view.data); };
    const auto count = [](std::int64_t n) { return static_cast<std::uint32_t>(std::min<std::int64_t>(n, INT32_MAX)); };
    return {.cu_seq_lens = data(p.cu_seq_lens),
            .cu_seq_lens_stride = p.cu_seq_lens.strides[0],
            .starts = p.seq_starts ? data(*p.seq_starts) : nullptr,
            .starts_stride = p.seq_starts ? p.seq_starts->strides[0] : 0,
            .table = data(p.block_table),
            .table_row = p.block_table.strides[0],
            .table_stride = p.block_table.strides[1],
            .max_blocks = count(p.block_table.sizes[1]),
            .num_blocks = count(p.key_cache.sizes[0]),
            .count = count(p.block_table.sizes[0])};
  }

  __device__ __forceinline__ int sum(std::uint32_t i) const { return __ldg(cu_seq_lens + i * cu_seq_lens_stride); }

  // The first sequence from `first` on that ends after the token, most often `first` itself; `count` if there is none.
  __device__ __forceinline__ std::uint32_t find(int token, std::uint32_t first) const {
    if (first < count && sum(first + 1) > token) return first;
    std::uint32_t end = count;
    while (first < end) {
      const std::uint32_t middle = first + (end - first) / 2;
      if (sum(middle + 1) > token)
        end = middle;
      else
        first = middle + 1;
    }
    return first;
  }

  // The same from 0 on, by a whole warp with one token: in each round every lane looks at one of 32 parts.
  __device__ __forceinline__ std::uint32_t find_together(int token) const {
    constexpr std::uint32_t kWarp = 32;
    std::uint32_t first = 0, end = count;
    while (first < end) {
      const std::uint32_t part = (end - first + kWarp - 1) / kWarp;
      const std::uint32_t last = first + (threadIdx.x % kWarp + 1) * part - 1;
      const unsigned after = __ballot_sync(0xffffffffu, last >= end || sum(last + 1) > token);
      if (after == 0) return end;
      first += (__ffs(after) - 1) * part;
      end = min(end, first + part - 1);
    }
    return first;
  }

  __device__ __forceinline__ int position(int token, std::uint32_t sequence) const {
    if (sequence >= count) return -1;
    const int start = starts ? __ldg(starts + sequence * starts_stride) : 0;
    const int within = static_cast<int>(static_cast<unsigned>(token) - static_cast<unsigned>(sum(sequence)));
    return (start | within) < 0 ? -1 : static_cast<int>(static_cast<unsigned>(start) + static_cast<unsigned>(within));
  }

  // The block of number `index` of a sequence.
  __device__ __forceinline__ int block(std::uint32_t sequence, std::uint32_t index) const {
    if (index >= max_blocks) return -1;
    const int block = __ldg(table + sequence * table_row + index * table_stride);
    return static_cast<std::uint32_t>(block) < num_blocks ? block : -1;
  }

  // Where a token lies in the cache; -1: nowhere. `sequence` must not be behind its own, which it becomes.
  struct Place {
    int block;
    std::uint32_t offset;
  };
  __device__ __forceinline__ Place locate(int token, std::uint32_t& sequence, const FastDiv& block_size) const {
    sequence = find(token, sequence);
    const int at = position(token, sequence);
    if (at < 0) return {-1, 0};
    const auto [index, offset] = block_size.divmod(static_cast<std::uint32_t>(at));
    return {block(sequence, index), offset};
  }
};

// From one vector of a thread to the next, in elements.
struct Steps {
  std::int64_t rows, cache, scales;
};

struct GatherArgs {
  KVViews kv[2];
  int sides;
  Sequences sequences;
  std::uint32_t first_token;
  std::uint32_t num_tokens;
  std::uint32_t head_size;
  FastDiv vecs_per_token;  // threads of a token
  FastDiv vecs_per_head;
  FastDiv block_size;
  Steps steps[2];  // with several vectors a thread
};

// A vector of quantized values with one scale. Only a NaN or an infinity gives NaN, so that the look for it is at the input.
template <class Out, class In>
__device__ __forceinline__ Vec<Out> dequantized(const Vec<In>& raw, float scale) {
  bool any_nan = !is_finite(scale);
  if constexpr (!std::is_same_v<In, Int8>) {
    constexpr std::uint32_t kToSign = std::is_same_v<In, E4M3> ? 0x01010101u : 0x04040404u;  // from NaN, from infinity on
    const std::uint32_t a = (raw.words[0] & 0x7f7f7f7fu) + kToSign, b = (raw.words[1] & 0x7f7f7f7fu) + kToSign;
    any_nan |= ((a | b) & 0x80808080u) != 0;
  }
  if (any_nan) return device::convert_vec<device::DequantizeOp, Out>(raw, device::DequantizeOp::prepare(scale));
  float values[kVecSize];
  device::unpack(raw, values);
#pragma unroll
  for (int i = 0; i < kVecSize; ++i) values[i] = __fmul_rn(values[i], scale);
  if constexpr (sizeof(Out) == 2) {
    return device::pack_any_nan<Out>(values);
  } else {
    Vec<Out> vec;
#pragma unroll
    for (int i = 0; i < kVecSize; ++i) vec.words[i] = __float_as_uint(values[i]);
    return vec;
  }
}

// Where all is aligned: kVecs vectors of each side per thread, at the same place in heads that are far apart, which share what
// is found of the token. A warp searches for the sequence of its first token; lanes that are further along, each for itself.
template <class Op, class In, class Out, int kVecs>
__global__ void __launch_bounds__(256, 4) gather_heads(const __grid_constant__ GatherArgs p) {
  const std::uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x;
  const std::uint32_t warp_token = p.first_token + p.vecs_per_token.div(thread & ~31u);
  const auto [token_in_chunk, vec_in_token] = p.vecs_per_token.divmod(thread);
  const std::uint32_t token = p.first_token + token_in_chunk;
  device::wait_then_release();
  std::uint32_t sequence = p.sequences.find_together(static_cast<int>(warp_token));
  if (token_in_chunk >= p.num_tokens) return;
  const auto [block, offset] = p.sequences.locate(static_cast<int>(token), sequence, p.block_size);
  if (block < 0) return;
  const auto [head, vec] = p.vecs_per_head.divmod(vec_in_token);
  Vec<In> raw[2][kVecs];
  float scales[2][kVecs];
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    if (s >= p.sides) break;
    const KVViews& kv = p.kv[s];
    const In* from = row<const In>(kv.cache, static_cast<std::uint32_t>(block), offset, head) + vec * kVecSize;
    const float* scale = kv.scales.data + at(kv.scales, static_cast<std::uint32_t>(block), offset, head);
#pragma unroll
    for (int v = 0; v < kVecs; ++v) {
      raw[s][v] = device::load_aligned(from + v * p.steps[s].cache);
      scales[s][v] = __ldg(scale + v * p.steps[s].scales);
    }
  }
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    if (s >= p.sides) break;
    Out* to = row<Out>(p.kv[s].rows, token, head) + vec * kVecSize;
#pragma unroll
    for (int v = 0; v < kVecs; ++v) {
      Out* place = to + v * p.steps[s].rows;
      if constexpr (core::kIsQuantized<In>)
        device::store_aligned(place, dequantized<Out>(raw[s][v], scales[s][v]));
      else
        device::store_aligned(place, device::convert_vec<Op, Out>(raw[s][v], Op::prepare(scales[s][v])));
    }
  }
}

// One vector of each side per thread, at any alignment.
template <class Op, class In, class Out>
__global__ void __launch_bounds__(256) gather_unaligned(const __grid_constant__ GatherArgs p) {
  const std::uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x;
  const std::uint32_t warp_token = p.first_token + p.vecs_per_token.div(thread & ~31u);
  const auto [token_in_chunk, vec_in_token] = p.vecs_per_token.divmod(thread);
  const std::uint32_t token = p.first_token + token_in_chunk;
  device::wait_then_release();
  std::uint32_t sequence = p.sequences.find_together(static_cast<int>(warp_token));
  if (token_in_chunk >= p.num_tokens) return;
  const auto [entry, offset] = p.sequences.locate(static_cast<int>(token), sequence, p.block_size);
  if (entry < 0) return;
  const auto block = static_cast<std::uint32_t>(entry);
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
  const std::uint32_t warp_token = p.first_token + p.vecs_per_token.div(thread & ~31u) * kTokens;
  const auto [batch, vec_in_token] = p.vecs_per_token.divmod(thread);
  const auto [head, vec] = p.vecs_per_head.divmod(vec_in_token);
  const std::uint32_t column = vec * kVecSize, first = batch * kTokens;
  device::wait_then_release();
  std::uint32_t sequence = p.sequences.find_together(static_cast<int>(warp_token));
  int blocks[kTokens];
  std::uint32_t offsets[kTokens];
  Vec<In> raw[2][kTokens];
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    blocks[t] = -1;
    if (first + t >= p.num_tokens) continue;
    const auto [block, offset] = p.sequences.locate(static_cast<int>(p.first_token + first + t), sequence, p.block_size);
    blocks[t] = block, offsets[t] = offset;
    if (block < 0) continue;
#pragma unroll
    for (int s = 0; s < 2; ++s)
      if (s < p.sides)
        raw[s][t] =
            device::load_aligned(row<const In>(p.kv[s].cache, static_cast<std::uint32_t>(block), offset, head) + column);
  }
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    if (s >= p.sides) break;
    const KVViews& kv = p.kv[s];
    const float* scale = kv.scales.data + head * kv.scales.head;
    auto channels = load_channels<Op, In, kChannels>(kv, scale, head, {column});
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      if (blocks[t] < 0) continue;
      if (kChannels == ChannelParameters::Any && kv.scales.per_token()) {
        const auto prepared = Op::prepare(__ldg(scale + at(kv.scales, static_cast<std::uint32_t>(blocks[t]), offsets[t], 0u)));
#pragma unroll
        for (int i = 0; i < kVecSize; ++i) channels.scales[i] = prepared;
      }
      Out* to = row<Out>(kv.rows, p.first_token + first + t, head) + column;
      device::store_aligned(to, device::convert_vec<Op, Out>(raw[s][t], channels));
    }
  }
}

struct ScalarGatherArgs {
  KVViews kv[2];
  int sides;
  Sequences sequences;
  std::int64_t count;
  std::int64_t num_heads;
  std::int64_t head_size;
  std::int64_t block_size;
};

// Anything: one element of each side per thread.
template <class Op, class In, class Out, bool kChannels>
__global__ void __launch_bounds__(256) gather_scalar(const __grid_constant__ ScalarGatherArgs p) {
  const std::int64_t element = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (element >= p.count) return;
  device::wait_then_release();
  const std::int64_t dim = element % p.head_size;
  const std::int64_t head = element / p.head_size % p.num_heads;
  const std::int64_t token = element / p.head_size / p.num_heads;
  const std::uint32_t sequence = p.sequences.find(static_cast<int>(token), 0);
  const std::int64_t position = p.sequences.position(static_cast<int>(token), sequence);
  if (position < 0) return;
  const std::int64_t offset = position % p.block_size;
  const std::int64_t block = p.sequences.block(sequence, static_cast<std::uint32_t>(position / p.block_size));
  if (block < 0) return;
  for (int s = 0; s < p.sides; ++s) {
    const KVViews& kv = p.kv[s];
    const float* scale = kv.scales.data + at(kv.scales, block, offset, head);
    const In raw = row<const In>(kv.cache, block, offset, head)[dim * kv.cache.dim];
    row<Out>(kv.rows, token, head)[dim * kv.rows.dim] = convert_at<Op, Out, kChannels>(raw, kv, scale, head, dim);
  }
}

template <class Op, class In, class Out>
void launch_gather(const char* op, const CacheLayout& layout, const Sequences& sequences, const CachePlan& plan,
                   cudaStream_t stream) {
  const auto blocks = [&](std::int64_t threads) { return static_cast<unsigned>(core::ceil_div(threads, plan.threads)); };
  if (plan.path == KernelPath::Scalar) {
    const ScalarGatherArgs params{.kv = {layout.k, layout.v},
                                  .sides = layout.sides,
                                  .sequences = sequences,
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
  // The vectors of a thread are in heads that are far apart, or in parts of a head where their number is odd.
  const std::int64_t threads_per_token = layout.num_heads * plan.vecs_per_head / plan.vecs_per_thread;
  const bool by_heads = layout.num_heads % plan.vecs_per_thread == 0;
  const std::int64_t heads = layout.num_heads / plan.vecs_per_thread;
  const std::int64_t vecs = by_heads ? plan.vecs_per_head : plan.vecs_per_head / plan.vecs_per_thread;
  const auto steps = [&](const KVViews& kv) {
    if (by_heads) return Steps{heads * kv.rows.head, heads * kv.cache.head, heads * kv.scales.head};
    return Steps{vecs * kVecSize, vecs * kVecSize, 0};
  };
  GatherArgs params{.kv = {layout.k, layout.v},
                    .sides = layout.sides,
                    .sequences = sequences,
                    .first_token = 0,
                    .num_tokens = 0,
                    .head_size = static_cast<std::uint32_t>(layout.head_size),
                    .vecs_per_token = FastDiv(threads_per_token),
                    .vecs_per_head = FastDiv(vecs),
                    .block_size = FastDiv(layout.block_size),
                    .steps = {steps(layout.k), steps(layout.v)}};
  auto kernel = !plan.aligned               ? gather_unaligned<Op, In, Out>
                : plan.vecs_per_thread == 1 ? gather_heads<Op, In, Out, 1>
                                            : gather_heads<Op, In, Out, 2>;
  if constexpr (core::kIsQuantized<In>)
    if (plan.path == KernelPath::PerColumn)
      kernel = plan.tokens_per_thread == 1    ? gather_tokens<Op, In, Out, 1, ChannelParameters::Any>
               : layout.only_channel_scales() ? gather_tokens<Op, In, Out, 2, ChannelParameters::Scales>
                                              : gather_tokens<Op, In, Out, 2, ChannelParameters::Any>;
  for (; params.first_token < layout.num_tokens; params.first_token += params.num_tokens) {
    params.num_tokens = static_cast<std::uint32_t>(std::min(plan.tokens, layout.num_tokens - params.first_token));
    const std::int64_t batches = core::ceil_div(params.num_tokens, plan.tokens_per_thread);
    launch_dependent(kernel, blocks(batches * threads_per_token), plan.threads, stream, params);
    check_launch(op);
  }
}

}  // namespace

void run(const CacheGather& problem, Stream stream) {
  constexpr const char* op = "gather_and_dequant_cache";
  const CacheLayouts layouts = core::lower(problem);
  core::check_on_device({op, "key_cache", problem.key_cache}, current_device());
  if (layouts.empty()) return;
  if (debugging(stream)) debug_check_sequences(problem, layouts.front(), stream);
  if (layouts.front().num_slots() == 0) return;
  const Sequences sequences = Sequences::of(problem);
  for (CacheLayout layout : layouts) {
    if (layout.empty()) continue;
    layout.num_tokens = std::min<std::int64_t>(layout.num_tokens, INT32_MAX);  // no sequence reaches beyond
    const CachePlan plan = core::plan_gather(layout);
    core::visit_real(layout.row_dtype, [&]<class Out>(core::Type<Out>) {
      if (core::is_quantized(layout.cache_dtype))
        core::visit_quantized(layout.cache_dtype, [&]<class In>(core::Type<In>) {
          launch_gather<device::DequantizeOp, In, Out>(op, layout, sequences, plan, stream);
        });
      else
        core::visit_real(layout.cache_dtype, [&]<class In>(core::Type<In>) {
          launch_gather<device::CopyOp, In, Out>(op, layout, sequences, plan, stream);
        });
    });
  }
}

}  // namespace fp8kv::cuda
