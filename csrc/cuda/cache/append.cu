// reshape_and_cache_flash: key and value into the slots of their tokens, with given scales.
#include "cuda/cache/cache.cuh"

namespace fp8kv::cuda {
namespace {

struct AppendArgs {
  KVViews kv[2];
  TokenIndices slots;
  std::uint32_t count;  // threads with work
  std::uint32_t head_size;
  FastDiv vecs_per_token;
  FastDiv vecs_per_head;
  FastDiv block_size;
  std::uint32_t num_tokens;
};

// One vector per thread, at any alignment.
template <class Op, class In, class Out>
__global__ void __launch_bounds__(256) append_unaligned(const __grid_constant__ AppendArgs p) {
  const KVViews& kv = p.kv[blockIdx.y];
  const std::uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x;
  if (thread >= p.count) return;
  device::wait_then_release();
  const auto [token, vec_in_token] = p.vecs_per_token.divmod(thread);
  const std::int64_t slot = p.slots[token];
  const auto [head, vec] = p.vecs_per_head.divmod(vec_in_token);
  const auto scale = Op::prepare(__ldg(kv.scales.data + head * kv.scales.head));
  if (!p.slots.contains(slot)) return;
  const auto [block, offset] = p.block_size.divmod(static_cast<std::uint32_t>(slot));
  Out* to = row<Out>(kv.cache, block, offset, head);
  const Slice slice = slice_of(to, vec, p.head_size);
  if (slice.range.begin >= slice.range.end) return;
  const Vec<In> raw = device::load_any(row<const In>(kv.rows, token, head), slice.first, p.head_size, slice.range);
  device::store_range(to + slice.first, device::convert_vec<Op, Out>(raw, scale), slice.range);
}

template <class Op>
inline constexpr bool kQuantizes = !std::is_same_v<Op, device::CopyOp>;

// Whether the division of a prepared scale, or of one of several, is not a product; afterwards it passes for one.
template <class Prepared>
__device__ __forceinline__ bool take_division(Prepared& scale) {
  const bool divides = scale.divide;
  scale.divide = false;
  return divides;
}

template <class Op>
__device__ __forceinline__ bool take_division(device::Channels<Op>& channels) {
  bool divides = false;
#pragma unroll
  for (int i = 0; i < kVecSize; ++i) divides |= take_division(channels.scales[i]);
  return divides;
}

// Where all is aligned: a thread takes the vectors of kTokens tokens at one place in their heads, which share addresses and
// what is prepared of scales and offsets. With these bounds it has registers for that; without, the compiler puts loads off.
template <class Op, class In, class Out, int kTokens, ChannelParameters kChannels>
__global__ void __launch_bounds__(kChannels == ChannelParameters::None ? 256 : 128,
                                  kChannels == ChannelParameters::None ? 6 : 5)
    append_tokens(const __grid_constant__ AppendArgs p) {
  const KVViews& kv = p.kv[blockIdx.y];
  const std::uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x;
  if (thread >= p.count) return;
  device::wait_then_release();
  const auto [batch, vec_in_token] = p.vecs_per_token.divmod(thread);
  const auto [head, vec] = p.vecs_per_head.divmod(vec_in_token);
  const std::uint32_t first = batch * kTokens, column = vec * kVecSize;
  const In* from = row<const In>(kv.rows, 0u, head) + column;
  Out* to = row<Out>(kv.cache, 0u, 0u, head) + column;
  const auto token = [&](int t) { return min(first + t, p.num_tokens - 1); };  // the last one may be stored more than once
  std::int64_t slots[kTokens];
  Vec<In> raw[kTokens];
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    slots[t] = p.slots[token(t)];
    raw[t] = device::load_aligned(from + token(t) * kv.rows.token);
  }
  const float* scale = kv.scales.data + head * kv.scales.head;
  const auto prepare = [&, head = head] {
    if constexpr (kChannels == ChannelParameters::None)
      return Op::prepare(__ldg(scale));
    else
      return load_channels<Op, In, kChannels>(kv, scale, head, {column});
  };
  const auto store = [&](bool stores, std::int64_t slot, const Vec<In>& x, const auto& parameters) {
    const Vec<Out> result = device::convert_vec<Op, Out>(x, parameters);
    const auto [block, offset] = p.block_size.divmod(static_cast<std::uint32_t>(slot));
    if (stores && p.slots.contains(slot)) device::store_aligned(to + block * kv.cache.block + offset * kv.cache.offset, result);
  };
  auto parameters = prepare();
  bool divides = false;
  if constexpr (kQuantizes<Op>) divides = take_division(parameters);
#pragma unroll
  for (int t = 0; t < kTokens; ++t) store(!divides, slots[t], raw[t], parameters);
  if (!divides) return;
  // Seldom, and behind the rest: before it, the loads would wait for the scales. All is loaded again, so that nothing is kept.
  const auto divisors = prepare();
#pragma unroll 1
  for (int t = 0; t < kTokens; ++t)
    store(true, p.slots[token(t)], device::load_aligned(from + token(t) * kv.rows.token), divisors);
}

// Anything: one element per thread.
template <class Op, class In, class Out, bool kChannels>
__global__ void __launch_bounds__(256) append_scalar(const __grid_constant__ ScalarAppendArgs p) {
  const KVViews& kv = p.kv[blockIdx.y];
  const std::int64_t element = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (element >= p.count) return;
  device::wait_then_release();
  const std::int64_t dim = element % p.head_size;
  const std::int64_t head = element / p.head_size % p.num_heads;
  const std::int64_t token = element / p.head_size / p.num_heads;
  const std::int64_t slot = p.slots[token];
  if (!p.slots.contains(slot)) return;
  const float* scale = kv.scales.data + head * kv.scales.head;
  const In raw = row<const In>(kv.rows, token, head)[dim * kv.rows.dim];
  Out* to = row<Out>(kv.cache, slot / p.block_size, slot % p.block_size, head);
  to[dim * kv.cache.dim] = convert_at<Op, Out, kChannels>(raw, kv, scale, head, dim);
}

template <class Op, class In, class Out>
void launch_append(const CacheLayout& layout, const TokenIndices& slots, const CachePlan& plan, cudaStream_t stream) {
  if (plan.path == KernelPath::Scalar) {
    const ScalarAppendArgs params(layout, slots, layout.num_tokens * layout.num_heads * layout.head_size);
    auto kernel = append_scalar<Op, In, Out, false>;
    if constexpr (kQuantizes<Op>)
      if (layout.has_channels()) kernel = append_scalar<Op, In, Out, true>;
    launch_dependent(kernel, grid_of(params.count, plan, layout), plan.threads, stream, params);
    return;
  }
  const std::int64_t vecs_per_token = layout.num_heads * plan.vecs_per_head;
  const std::int64_t batches = core::ceil_div(layout.num_tokens, plan.tokens_per_thread);
  const AppendArgs params{.kv = {layout.k, layout.v},
                          .slots = slots,
                          .count = static_cast<std::uint32_t>(batches * vecs_per_token),
                          .head_size = static_cast<std::uint32_t>(layout.head_size),
                          .vecs_per_token = FastDiv(vecs_per_token),
                          .vecs_per_head = FastDiv(plan.vecs_per_head),
                          .block_size = FastDiv(layout.block_size),
                          .num_tokens = static_cast<std::uint32_t>(layout.num_tokens)};
  auto kernel = !plan.aligned                 ? append_unaligned<Op, In, Out>
                : plan.tokens_per_thread == 1 ? append_tokens<Op, In, Out, 1, ChannelParameters::None>
                                              : append_tokens<Op, In, Out, 2, ChannelParameters::None>;
  if constexpr (kQuantizes<Op>) {
    // Of INT8 the kernel for scales alone is slower: the compiler puts its loads off until the scales are there.
    const bool only_scales = layout.only_channel_scales() && !std::is_same_v<Out, Int8>;
    if (plan.path == KernelPath::PerColumn)
      kernel = plan.tokens_per_thread == 1 ? append_tokens<Op, In, Out, 1, ChannelParameters::Any>
               : only_scales               ? append_tokens<Op, In, Out, 4, ChannelParameters::Scales>
                                           : append_tokens<Op, In, Out, 4, ChannelParameters::Any>;
  }
  launch_dependent(kernel, grid_of(params.count, plan, layout), plan.threads, stream, params);
}

}  // namespace

void run(const CacheAppend& problem, Stream stream) {
  constexpr const char* op = "reshape_and_cache_flash";
  const CacheLayouts layouts = core::lower(problem);
  core::check_on_device({op, "key", problem.key}, current_device());
  if (layouts.empty()) return;
  if (debugging(stream)) debug_check_slots(op, problem.slot_mapping, layouts.front(), stream);
  if (layouts.front().num_slots() == 0) return;
  for (const CacheLayout& layout : layouts) {
    if (layout.empty()) continue;
    const CachePlan plan = core::plan_append(layout);
    const auto launch = [&]<class Op, class In, class Out>() {
      for_each_token_chunk(layout, plan.tokens, problem.slot_mapping, [&](const CacheLayout& chunk, const TokenIndices& slots) {
        launch_append<Op, In, Out>(chunk, slots, plan, stream);
        check_launch(op);
      });
    };
    if (core::is_quantized(layout.row_dtype))
      launch.template operator()<device::CopyOp, E4M3, E4M3>();  // bytes, whatever the format
    else
      visit_append(layout.row_dtype, layout.cache_dtype, launch);
  }
}

}  // namespace fp8kv::cuda
