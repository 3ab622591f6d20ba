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
  const auto scale = Op::prepare(kv.scales.data[head * kv.scales.head]);
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

// Where all is aligned, strides count bytes and have 32 bits, so that a place takes one multiplication for each index.
struct AlignedKV {
  const char* rows;
  char* cache;
  const char* scales;
  const char* offsets;
  std::uint32_t row_token, row_head;
  std::uint32_t cache_block, cache_offset, cache_head;
  std::uint32_t scale_head, offset_head;
  bool scales_of_channels;

  AlignedKV(const KVViews& kv, DType row, DType cache)
      : rows(static_cast<const char*>(kv.rows.data)),
        cache(static_cast<char*>(kv.cache.data)),
        scales(reinterpret_cast<const char*>(kv.scales.data)),
        offsets(reinterpret_cast<const char*>(kv.offsets.data)),
        row_token(bytes(kv.rows.token, row)),
        row_head(bytes(kv.rows.head, row)),
        cache_block(bytes(kv.cache.block, cache)),
        cache_offset(bytes(kv.cache.offset, cache)),
        cache_head(bytes(kv.cache.head, cache)),
        scale_head(bytes(kv.scales.head, DType::Float32)),
        offset_head(bytes(kv.offsets.head, DType::Float32)),
        scales_of_channels(kv.scales.dim != 0) {}

 private:
  static std::uint32_t bytes(std::int64_t stride, DType dtype) { return static_cast<std::uint32_t>(stride * size_of(dtype)); }
};

// TokenIndices with a stride in bytes: one address for both types.
struct AlignedSlots {
  const char* data;
  std::int64_t stride;
  std::int64_t limit;
  bool wide;

  explicit AlignedSlots(const TokenIndices& slots)
      : data(static_cast<const char*>(slots.data)),
        stride(slots.stride * (slots.wide ? 8 : 4)),
        limit(slots.limit),
        wide(slots.wide) {}

  __device__ __forceinline__ std::int64_t operator[](std::uint32_t token) const {
    const char* at = data + token * stride;
    return wide ? *reinterpret_cast<const long long*>(at) : *reinterpret_cast<const int*>(at);
  }
  __device__ __forceinline__ bool contains(std::int64_t slot) const {
    return static_cast<std::uint64_t>(slot) < static_cast<std::uint64_t>(limit);
  }
};

struct AlignedAppendArgs {
  AlignedKV kv[2];
  AlignedSlots slots;
  FastDiv vecs_per_token;
  FastDiv vecs_per_head;
  FastDiv block_size;
  std::uint32_t count;  // threads with work
  std::uint32_t last_token;
};

__device__ __forceinline__ std::uint64_t product(std::uint32_t index, std::uint32_t stride) {
  return std::uint64_t{index} * stride;
}

// A word of which a scale is too close to where it can't be split if it is below kTooClose. Not all of those have to be divided
// by: of INT8, what is 1 or 3 above a multiple of 2^17 is among them.
template <class Fp8>
struct SplitDistance {
  static constexpr std::uint32_t kTooClose = 4u << 12;
  static constexpr __host__ __device__ std::uint32_t of(std::uint32_t scale) { return (scale << 12) + kTooClose; }
};
template <>
struct SplitDistance<Int8> {
  static constexpr std::uint32_t kTooClose = 3u << 15;
  static constexpr __host__ __device__ std::uint32_t of(std::uint32_t scale) {
    const std::uint32_t place = scale << 15;
    return (static_cast<std::int32_t>(place) < 0 ? 0u - place : place) - 1u;
  }
};

template <class Fp8>
constexpr bool distances_are_right() {
  for (int i = -64; i <= 64; ++i) {
    const auto bits = static_cast<std::uint32_t>(0x3f800000 + i);
    const bool close = SplitDistance<Fp8>::of(bits) < SplitDistance<Fp8>::kTooClose;
    if (core::splits_wrong<Fp8>(bits) ? !close : close && (i == 0 || i < -4 || i > 4)) return false;
  }
  return true;
}

// Whether one of 8 scales may have to be divided by: fewer instructions than to ask each (QuantizeOp::prepare).
template <class Fp8>
__device__ __forceinline__ bool may_divide(const float (&scales)[kVecSize]) {
  static_assert(distances_are_right<Fp8>());
  constexpr std::uint32_t kLowest = 0x00800000u, kHighest = 0x6f800000u;  // 2^-126, 2^96
  std::uint32_t largest = 0, closest = 0xffffffffu;
#pragma unroll
  for (int i = 0; i < kVecSize; ++i) {
    const std::uint32_t bits = __float_as_uint(scales[i]);
    largest = max(largest, bits - kLowest);
    closest = min(closest, SplitDistance<Fp8>::of(bits));
  }
  return largest > kHighest - kLowest || closest < SplitDistance<Fp8>::kTooClose;
}

// As device::pack. Of INT8, the second conversion of a word takes in what the first one packed.
template <class Out>
__device__ __forceinline__ Vec<Out> pack(const float (&values)[kVecSize]) {
  if constexpr (std::is_same_v<Out, Int8>) {
    Vec<Out> vec;
#pragma unroll
    for (int i = 0; i < kVecSize; i += 4) {
      std::uint32_t high;
      asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, 0;"
          : "=r"(high)
          : "r"(device::int8_of(values[i + 3])), "r"(device::int8_of(values[i + 2])));
      asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, %3;"
          : "=r"(vec.words[i / 4])
          : "r"(device::int8_of(values[i + 1])), "r"(device::int8_of(values[i])), "r"(high));
    }
    return vec;
  } else {
    return device::pack<Out>(values);
  }
}

// What the columns of a thread have: scales each and offsets, or one scale.
template <class Op, class In, class Out, ChannelParameters kChannels>
struct Parameters {
  typename Op::Prepared scales[kVecSize];
  float offsets[kVecSize];
  bool divides;

  __device__ __forceinline__ Parameters(const AlignedKV& kv, std::uint32_t head, std::uint32_t vec) {
    const auto columns = [vec](const char* of_head) {
      return reinterpret_cast<const float*>(of_head + product(vec, kVecSize * sizeof(float)));
    };
    const char* of_head = kv.scales + product(head, kv.scale_head);
    float values[kVecSize];
    if (kChannels == ChannelParameters::Any && !kv.scales_of_channels) {
      const float one = *reinterpret_cast<const float*>(of_head);
#pragma unroll
      for (int i = 0; i < kVecSize; ++i) values[i] = one;
    } else {
      load_columns(columns(of_head), {0}, values);
    }
    if (kChannels == ChannelParameters::Any) {
      if (kv.offsets) {
        load_columns(columns(kv.offsets + product(head, kv.offset_head)), {0}, offsets);
      } else {
#pragma unroll
        for (int i = 0; i < kVecSize; ++i) offsets[i] = 0.0f;
      }
    }
    divides = may_divide<Out>(values);
#pragma unroll
    for (int i = 0; i < kVecSize; ++i) scales[i] = Op::prepare(values[i]);
  }

  // Divisions pass for products from here on.
  __device__ __forceinline__ void multiply() {
#pragma unroll
    for (int i = 0; i < kVecSize; ++i) scales[i].divide = false;
  }

  __device__ __forceinline__ Vec<Out> operator()(const Vec<In>& raw) const {
    float values[kVecSize];
    device::unpack(raw, values);
    if constexpr (kChannels == ChannelParameters::Any) {
#pragma unroll
      for (int i = 0; i < kVecSize; ++i) values[i] = __fsub_rn(values[i], offsets[i]);
    }
    device::apply<Op>(scales, values);
    return pack<Out>(values);
  }
};

template <class Op, class In, class Out>
struct Parameters<Op, In, Out, ChannelParameters::None> {
  typename Op::Prepared scale;
  bool divides;

  __device__ __forceinline__ Parameters(const AlignedKV& kv, std::uint32_t head, std::uint32_t) {
    scale = Op::prepare(*reinterpret_cast<const float*>(kv.scales + product(head, kv.scale_head)));
    divides = scale.divide;
  }
  __device__ __forceinline__ void multiply() {
    if constexpr (kQuantizes<Op>) scale.divide = false;
  }
  __device__ __forceinline__ Vec<Out> operator()(const Vec<In>& raw) const { return device::convert_vec<Op, Out>(raw, scale); }
};

// The bounds that give a thread registers for all its loads; without, the compiler puts loads off. With offsets, two more
// blocks of 16-bit values to FP8 are 5% faster; fp32 would not fit.
template <class In, class Out, int kTokens, ChannelParameters kChannels>
struct Bounds {
  static constexpr bool kOfHeads = kChannels == ChannelParameters::None;
  static constexpr bool kMore = kChannels == ChannelParameters::Any && sizeof(In) == 2 && !std::is_same_v<Out, Int8>;
  static constexpr int kThreads = kOfHeads ? 256 : kTokens == 1 ? 128 : 64;
  static constexpr int kBlocks = kOfHeads ? 6 : kTokens == 1 ? 5 : kMore ? 12 : 10;
};

// A thread takes the vectors of kTokens tokens at one place in their heads, which share addresses and what is prepared of
// scales and offsets.
template <class Op, class In, class Out, int kTokens, ChannelParameters kChannels>
__global__ void __launch_bounds__(Bounds<In, Out, kTokens, kChannels>::kThreads, Bounds<In, Out, kTokens, kChannels>::kBlocks)
    append_tokens(const __grid_constant__ AlignedAppendArgs p) {
  const AlignedKV& kv = p.kv[blockIdx.y];
  const std::uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x;
  if (thread >= p.count) return;
  device::wait_then_release();
  const auto [batch, vec_in_token] = p.vecs_per_token.divmod(thread);
  const auto [head, vec] = p.vecs_per_head.divmod(vec_in_token);
  const std::uint32_t first = batch * kTokens;
  const char* from = kv.rows + product(head, kv.row_head) + product(vec, kVecSize * sizeof(In));
  char* to = kv.cache + product(head, kv.cache_head) + product(vec, kVecSize * sizeof(Out));
  const auto token = [&](int t) { return min(first + t, p.last_token); };  // which may be stored more than once
  const auto load = [&](int t) {
    return device::load_aligned(reinterpret_cast<const In*>(from + product(token(t), kv.row_token)));
  };
  std::int64_t slots[kTokens];
  Vec<In> raw[kTokens];
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    raw[t] = load(t);
    slots[t] = p.slots[token(t)];
  }
  Parameters<Op, In, Out, kChannels> parameters(kv, head, vec);
  const auto store = [&](bool stores, std::int64_t slot, const Vec<In>& x, const auto& convert) {
    const Vec<Out> result = convert(x);
    const auto [block, offset] = p.block_size.divmod(static_cast<std::uint32_t>(slot));
    if (stores && p.slots.contains(slot))
      device::store_aligned(reinterpret_cast<Out*>(to + product(block, kv.cache_block) + product(offset, kv.cache_offset)),
                            result);
  };
  const bool divides = parameters.divides;
  parameters.multiply();
#pragma unroll
  for (int t = 0; t < kTokens; ++t) store(!divides, slots[t], raw[t], parameters);
  if (!divides) return;
  // Seldom, and behind the rest: before it, the loads would wait for the scales. All is loaded again, so that nothing is kept.
  const Parameters<Op, In, Out, kChannels> divisors(kv, head, vec);
#pragma unroll 1
  for (int t = 0; t < kTokens; ++t) store(true, p.slots[token(t)], load(t), divisors);
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
  const auto count = static_cast<std::uint32_t>(batches * vecs_per_token);
  const dim3 grid = grid_of(count, plan, layout);
  if (!plan.aligned) {
    const AppendArgs params{.kv = {layout.k, layout.v},
                            .slots = slots,
                            .count = count,
                            .head_size = static_cast<std::uint32_t>(layout.head_size),
                            .vecs_per_token = FastDiv(vecs_per_token),
                            .vecs_per_head = FastDiv(plan.vecs_per_head),
                            .block_size = FastDiv(layout.block_size)};
    launch_dependent(append_unaligned<Op, In, Out>, grid, plan.threads, stream, params);
    return;
  }
  const auto aligned = [&](const KVViews& kv) { return AlignedKV(kv, layout.row_dtype, layout.cache_dtype); };
  const AlignedAppendArgs params{.kv = {aligned(layout.k), aligned(layout.v)},
                                 .slots = AlignedSlots(slots),
                                 .vecs_per_token = FastDiv(vecs_per_token),
                                 .vecs_per_head = FastDiv(plan.vecs_per_head),
                                 .block_size = FastDiv(layout.block_size),
                                 .count = count,
                                 .last_token = static_cast<std::uint32_t>(layout.num_tokens - 1)};
  auto kernel = plan.tokens_per_thread == 1 ? append_tokens<Op, In, Out, 1, ChannelParameters::None>
                                            : append_tokens<Op, In, Out, 2, ChannelParameters::None>;
  if constexpr (kQuantizes<Op>) {
    if (plan.path == KernelPath::PerColumn)
      kernel = plan.tokens_per_thread == 1    ? append_tokens<Op, In, Out, 1, ChannelParameters::Any>
               : layout.only_channel_scales() ? append_tokens<Op, In, Out, 4, ChannelParameters::Scales>
                                              : append_tokens<Op, In, Out, 4, ChannelParameters::Any>;
  }
  launch_dependent(kernel, grid, plan.threads, stream, params);
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
