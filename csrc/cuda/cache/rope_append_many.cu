// rope_quant_and_cache for many tokens, with RoPE, a norm or channels: threads with two vectors of several heads.
#include "cuda/cache/rope_append.cuh"

namespace fp8kv::cuda {
namespace {

constexpr unsigned kThreads = core::kManyHeadsThreads;
constexpr int kBlocks = 7;           // per multiprocessor: at most 72 registers
constexpr int kUnit = 2 * kVecSize;  // elements that a thread takes of a head

using Unit = cuda::Unit<2>;

// What a block reads for every head of Q, of K or of V.
struct Shared {
  float2 scales[core::kMaxSharedHeads];  // prepared: hi and lo
  float4 weights[kUnit / 4][32];         // of the norm: four of a unit, for all units
};

// Prepared parameters of the channels of K or of V, four at a time: hi, lo and offset, each [head][four of a unit][unit], so
// that neighboring threads read neighboring words.
extern __shared__ float4 channels[];

// Fills `channels`, and returns whether a scale asks for the IEEE division.
template <class In, class Out, Rope kRope>
__device__ __forceinline__ bool fill_channels(const ExtendedArgs& p, int which) {
  const KVViews& kv = p.kv[which - 1];
  const std::uint32_t fours = kUnit / 4 * p.units_per_head, count = p.segments[which].heads * fours;
  bool divides = false;
#pragma unroll 1
  for (std::uint32_t i = threadIdx.x; i < count; i += kThreads) {
    const std::uint32_t head = i / fours, four = i % fours / p.units_per_head;
    const Unit unit = unit_of<kRope, 2>(p, i % p.units_per_head);
    const std::uint32_t column = unit.begin + four / 2 * unit.second + four % 2 * 4;
    const float* scale = kv.scales.data + head * kv.scales.head;
    float scales[4], offsets[4] = {};
    if (kv.scales.dim != 0) {
      load_half(scale + column, scales);
    } else {
#pragma unroll
      for (float& to : scales) to = *scale;
    }
    if (kv.offsets.data) load_half(kv.offsets.data + head * kv.offsets.head + column, offsets);
    float hi[4], lo[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const auto prepared = device::QuantizeOp<Out>::prepare(scales[k]);
      divides |= prepared.divide;
      hi[k] = prepared.hi, lo[k] = prepared.lo;
    }
    channels[i] = {hi[0], hi[1], hi[2], hi[3]};
    channels[count + i] = {lo[0], lo[1], lo[2], lo[3]};
    channels[2 * count + i] = {offsets[0], offsets[1], offsets[2], offsets[3]};
  }
  return divides;
}

// A unit of a head by what `channels` has for it.
template <class Out, class In>
__device__ __forceinline__ void convert_channels(const ExtendedArgs& p, int which, std::uint32_t head, const Unit& unit,
                                                 const Vec<In> (&vecs)[2], Vec<Out> (&results)[2]) {
  const std::uint32_t fours = kUnit / 4 * p.units_per_head, count = p.segments[which].heads * fours;
  const float4* at = channels + head * fours + unit.index;
#pragma unroll
  for (int v = 0; v < 2; ++v) {
    float x[kVecSize];
    device::unpack(vecs[v], x);
#pragma unroll
    for (int i = 0; i < kVecSize; i += 4, at += p.units_per_head) {
      const float4 hi = at[0], lo = at[count], offset = at[2 * count];
      const auto apply = [](float x, float hi, float lo, float offset) {
        return device::QuantizeOp<Out>::apply({.hi = hi, .lo = lo}, __fsub_rn(x, offset));
      };
      x[i] = apply(x[i], hi.x, lo.x, offset.x);
      x[i + 1] = apply(x[i + 1], hi.y, lo.y, offset.y);
      x[i + 2] = apply(x[i + 2], hi.z, lo.z, offset.z);
      x[i + 3] = apply(x[i + 3], hi.w, lo.w, offset.w);
    }
    results[v] = device::pack<Out>(x);
  }
}

// Fills `shared`, and returns whether a scale asks for the IEEE division. A barrier.
template <class In, class Out, Rope kRope, bool kNorm, bool kChannels>
__device__ __forceinline__ bool fill(Shared& shared, const ExtendedArgs& p, int which) {
  const Segment& s = p.segments[which];
  bool divides = false;
  if constexpr (kChannels) {
    divides = fill_channels<In, Out, kRope>(p, which);
  } else if constexpr (core::kIsQuantized<Out>) {
#pragma unroll 1
    for (std::uint32_t head = threadIdx.x; head < s.heads; head += kThreads) {
      const std::uint32_t scale = load4(s.scales + s.heads_per_scale.div(head) * s.scale_stride);
      const auto prepared = device::QuantizeOp<Out>::prepare(__uint_as_float(scale));
      divides |= prepared.divide;
      shared.scales[head] = {prepared.hi, prepared.lo};
    }
  }
  if (kNorm && s.norm_weight != nullptr) {
#pragma unroll 1  // from the last thread on: as a rule other warps than those with scales
    for (std::uint32_t i = kThreads - 1 - threadIdx.x; i < kUnit / 4 * p.units_per_head; i += kThreads) {
      const std::uint32_t four = i % (kUnit / 4);
      const Unit unit = unit_of<kRope, 2>(p, i / (kUnit / 4));
      float values[4];
      load_half<In>(s.norm_weight, p.wide_weights[which], unit.begin + four / 2 * unit.second + four % 2 * 4, values);
      shared.weights[four][unit.index] = {values[0], values[1], values[2], values[3]};
    }
  }
  return __syncthreads_or(divides);
}

// Of the frequencies of a thread: fp32, or not yet expanded to it from In.
struct CosSin {
  std::uint32_t cos[kVecSize], sin[kVecSize];
};

// The loads are the same for both types: without branches, nothing waits for them before they are needed.
template <class In>
__device__ __forceinline__ void load_cos_sin(const ExtendedArgs& p, std::uint32_t first, std::uint32_t position, CosSin& to) {
  const std::uint32_t size = p.wide_cos_sin ? sizeof(float) : sizeof(In), second = p.wide_cos_sin ? 16 : 0;
  const char* cos = static_cast<const char*>(p.cos_sin) + (position * p.cos_sin_row + first) * size;
  const char* sin = cos + p.rotary_units * kVecSize * size;
  device::load16(to.cos, cos);
  device::load16(to.cos + 4, cos + second);
  device::load16(to.sin, sin);
  device::load16(to.sin + 4, sin + second);
}

template <class In>
__device__ __forceinline__ void expand(std::uint32_t (&words)[kVecSize]) {
  float values[kVecSize];
  device::unpack(Vec<In>{words[0], words[1], words[2], words[3]}, values);
#pragma unroll
  for (int i = 0; i < kVecSize; ++i) words[i] = __float_as_uint(values[i]);
}

// With three positions; expanded.
template <class In>
__device__ __forceinline__ void load_cos_sin(const ExtendedArgs& p, std::uint32_t first, const std::uint32_t (&positions)[3],
                                             CosSin& to) {
#pragma unroll
  for (int i = 0; i < kVecSize; ++i) {
    const int axis = p.all_positions.sections.axis_of(first + i);
    const std::uint32_t position = axis == 0 ? positions[0] : axis == 1 ? positions[1] : positions[2];
    const std::int64_t at = position * p.cos_sin_row + first + i;
    to.cos[i] = __float_as_uint(load_element<In>(p.cos_sin, p.wide_cos_sin, at));
    to.sin[i] = __float_as_uint(load_element<In>(p.cos_sin, p.wide_cos_sin, at + p.rotary_units * kVecSize));
  }
}

// Whole warps call it.
__device__ __forceinline__ void normalize(const ExtendedArgs& p, const Shared& shared, const Unit& unit,
                                          float (&x)[2][kVecSize]) {
  float sum = sum_of_squares(x);
  sum = unit.holds ? sum : 0.0f;
  const auto add = [&](std::uint32_t lanes) { sum = __fadd_rn(sum, __shfl_xor_sync(kAllLanes, sum, lanes)); };
  if (p.threads_per_head.divisor == 8) {  // heads of 128, without a loop
    add(4), add(2), add(1);
  } else {
#pragma unroll 1
    for (std::uint32_t lanes = p.threads_per_head.divisor / 2; lanes > 0; lanes /= 2) add(lanes);
  }
  const float factor = norm_factor(p, sum);
#pragma unroll
  for (int i = 0; i < kUnit; i += 4) {
    const float4 four = shared.weights[i / 4][unit.index];
    float* to = &x[i / kVecSize][i % kVecSize];
    to[0] = __fmul_rn(__fmul_rn(to[0], factor), four.x);
    to[1] = __fmul_rn(__fmul_rn(to[1], factor), four.y);
    to[2] = __fmul_rn(__fmul_rn(to[2], factor), four.z);
    to[3] = __fmul_rn(__fmul_rn(to[3], factor), four.w);
  }
}

// The heads of a block. kAhead: heads that a thread has loaded. kExtended: with three positions, a norm after RoPE, or one of Q
// or of K alone. kDivide: by the IEEE division, with `shared` filled.
template <class In, class Out, Rope kRope, bool kNorm, int kAhead, bool kExtended, bool kDivide>
__device__ __forceinline__ void append_heads(const ExtendedArgs& p, Shared& shared, int which);

// The same out of line and from the beginning, so that it costs the usual case no registers.
template <class In, class Out, Rope kRope, bool kNorm, int kAhead, bool kChannels = false, bool kDivide = false>
__device__ __noinline__ void append_apart(const ExtendedArgs& p, Shared& shared, int which) {
  append_heads<In, Out, kRope, kNorm, kAhead, true, kChannels, kDivide>(p, shared, which);
}

template <class In, class Out, Rope kRope, bool kNorm, int kAhead, bool kExtended, bool kChannels, bool kDivide>
__device__ __forceinline__ void append_heads(const ExtendedArgs& p, Shared& shared, int which) {
  const Segment& s = p.segments[which];
  const std::uint32_t thread = (blockIdx.x - p.first_blocks[which]) * kThreads + threadIdx.x;
  const auto [token, in_token] = s.threads_per_token.divmod(min(thread, s.threads - 1));  // the whole block goes on
  const auto [batch, index] = p.threads_per_head.divmod(in_token);
  const std::uint32_t first_head = batch * s.heads_per_thread;
  const Unit unit = unit_of<kRope, 2>(p, index);

  const LoadedIndex loaded_position(kRope != Rope::None || p.rotary_units > 0 ? p.positions : p.slots, token);
  const LoadedIndex loaded_slot(p.slots, token);  // of Q too, which does not ask for it
  const In* from = static_cast<const In*>(s.in) + token * s.in_token + first_head * s.in_head + (unit.holds ? unit.begin : 0);
  Vec<In> raw[kAhead][2] = {};
  const auto load = [&](bool condition, Vec<In>(&to)[2]) {
    load16_if(condition, to[0].words, from);
    load16_if(condition, to[1].words, from + unit.second);
    from += s.in_head;
  };
#pragma unroll
  for (int k = 0; k < kAhead; ++k) load(k < s.heads_per_thread, raw[k]);

  bool stores = thread < s.threads && unit.holds;
  CosSin turn;
  if constexpr (kRope != Rope::None) {
    std::uint32_t positions[3] = {loaded_position.low};
    stores &= loaded_position.within(p.positions);
    const bool three = kExtended && p.all_positions.sections.axes > 1;
    for (int axis = 1; three && axis < 3; ++axis) {
      const LoadedIndex position(p.all_positions.axes[axis], token);
      positions[axis] = position.low;
      stores &= position.within(p.all_positions.axes[axis]);
    }
    if (unit.rotates && stores) {
      if (three)
        load_cos_sin<In>(p, index * kVecSize, positions, turn);
      else
        load_cos_sin<In>(p, index * kVecSize, positions[0], turn);
    }
  }
  if constexpr (!kDivide) {
    const bool divides = fill<In, Out, kRope, kNorm, kChannels>(shared, p, which);
    if constexpr (core::kIsQuantized<Out>)
      if (divides) return append_apart<In, Out, kRope, kNorm, 1, kChannels, true>(p, shared, which);
  }
  if constexpr (kRope != Rope::None) {
    if (!p.wide_cos_sin && !(kExtended && p.all_positions.sections.axes > 1)) {
      expand<In>(turn.cos);
      expand<In>(turn.sin);
    }
  } else if (p.rotary_units > 0) {  // V, which is not stored either where a position is wrong
    stores &= loaded_position.within(p.positions);
    for (int axis = 1; kExtended && axis < p.all_positions.sections.axes; ++axis)
      stores &= LoadedIndex(p.all_positions.axes[axis], token).within(p.all_positions.axes[axis]);
  }

  std::int64_t place = token * s.out_offset;
  if (which > 0) {
    stores &= loaded_slot.within(p.slots);
    const auto [block, offset] = p.block_size.divmod(loaded_slot.low);
    place = block * s.out_block + offset * s.out_offset;
  }
  if (!kNorm && !stores) return;  // with a norm whole warps go on
  Out* to = static_cast<Out*>(s.out) + place + first_head * s.out_head + unit.begin;
  const float2* scale = shared.scales + first_head;
  const bool normalizes = kNorm && (!kExtended || s.norm_weight != nullptr), after = kExtended && p.norm_after_rope;

#pragma unroll 1
  for (std::uint32_t left = s.heads_per_thread;;) {
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      float x[2][kVecSize];
      Vec<In> vecs[2] = {raw[k][0], raw[k][1]};
      device::unpack(vecs[0], x[0]);
      device::unpack(vecs[1], x[1]);
      load(left > kAhead, raw[k]);
      if (kRope != Rope::None || normalizes) {
        if (normalizes && !after) normalize(p, shared, unit, x);
        if (unit.rotates) rotate_pairs<kRope>(turn.cos, turn.sin, x);
        if (normalizes && after) normalize(p, shared, unit, x);
        vecs[0] = device::pack_any_nan<In>(x[0]);
        vecs[1] = device::pack_any_nan<In>(x[1]);
        if constexpr (std::is_same_v<In, Out>) device::make_nan_canonical(vecs);
      }
      const auto head = static_cast<std::uint32_t>(scale - shared.scales);
      Vec<Out> results[2];
      if constexpr (std::is_same_v<In, Out>) {
        results[0] = vecs[0], results[1] = vecs[1];
      } else if constexpr (kChannels && !kDivide) {
        convert_channels(p, which, head, unit, vecs, results);
      } else if constexpr (kChannels) {
        using Op = device::QuantizeOp<Out>;
#pragma unroll
        for (int v = 0; v < 2; ++v)
          results[v] = device::convert_vec<Op, Out>(
              vecs[v], load_channels<Op, In, ChannelParameters::Any>(p.kv[which - 1], s.scales + head * s.scale_stride, head,
                                                                     {unit.begin + v * unit.second}));
      } else {
        using Op = device::QuantizeOp<Out>;
        typename Op::Prepared prepared{.hi = scale->x, .lo = scale->y};
        if constexpr (kDivide) {
          prepared = {.scale = s.scales[s.heads_per_scale.div(head) * s.scale_stride], .divide = true};
        }
        results[0] = device::convert_vec<Op, Out>(vecs[0], prepared);
        results[1] = device::convert_vec<Op, Out>(vecs[1], prepared);
      }
      if (stores) {
        device::store_aligned(to, results[0]);
        device::store_aligned(to + unit.second, results[1]);
      }
      if (--left == 0) return;
      to += s.out_head;
      ++scale;
    }
  }
}

template <class In, class Fp8, Rope kRope, bool kNorm, bool kChannels>
__global__ void __launch_bounds__(kThreads, kBlocks) rope_append_many(const __grid_constant__ ExtendedArgs p) {
  constexpr int kAhead = kNorm || kRope != Rope::None ? 2 : 1;
  __shared__ Shared shared;
  const int which = p.segment_of(blockIdx.x);
  const bool extended = p.all_positions.sections.axes > 1 ||
                        (which < 2 && kNorm && (p.norm_after_rope || p.segments[which].norm_weight == nullptr));
  device::wait_then_release();
  if constexpr (kChannels) {
    if (which == 1 && p.has_channels[0]) return append_apart<In, Fp8, kRope, kNorm, 1, true>(p, shared, which);
    if (which == 2 && p.has_channels[1]) return append_apart<In, Fp8, Rope::None, false, 1, true>(p, shared, which);
  }
  if (which == 0 && !p.quantizes_query)
    append_apart<In, In, kRope, kNorm, kAhead>(p, shared, which);
  else if (which == 2 && extended)
    append_apart<In, Fp8, Rope::None, false, kAhead>(p, shared, which);
  else if (which == 2)
    append_heads<In, Fp8, Rope::None, false, kAhead, false, false, false>(p, shared, which);
  else if (extended)
    append_apart<In, Fp8, kRope, kNorm, 1>(p, shared, which);
  else
    append_heads<In, Fp8, kRope, kNorm, kAhead, false, false, false>(p, shared, which);
}

}  // namespace

template <class In, class Fp8>
void launch_many_heads(const ExtendedArgs& args, unsigned blocks, const RopeLayout& layout, cudaStream_t stream) {
  const core::CacheLayout& cache = layout.cache;
  const bool channels = cache.has_channels();
  const auto bytes = static_cast<int>(3 * sizeof(float) * cache.num_heads * cache.head_size);
  const LaunchShape shape{
      .grid = blocks, .threads = kThreads, .shared_memory = channels ? bytes : 0, .dependent = launches_dependent(blocks)};
  visit_transforms(layout, [&]<Rope kRope, bool kNorm>() {
    auto kernel = rope_append_many<In, Fp8, kRope, kNorm, true>;
    if constexpr (kRope != Rope::None || kNorm)  // else heads share nothing but what they have per channel
      if (!channels) kernel = rope_append_many<In, Fp8, kRope, kNorm, false>;
    launch(kernel, shape, stream, args);
  });
}

#define FP8KV_LAUNCH(In, Fp8) \
  template void launch_many_heads<In, Fp8>(const ExtendedArgs&, unsigned, const RopeLayout&, cudaStream_t);
FP8KV_LAUNCH(BFloat16, E4M3)
FP8KV_LAUNCH(BFloat16, E5M2)
FP8KV_LAUNCH(BFloat16, Int8)
FP8KV_LAUNCH(Half, E4M3)
FP8KV_LAUNCH(Half, E5M2)
FP8KV_LAUNCH(Half, Int8)
#undef FP8KV_LAUNCH

}  // namespace fp8kv::cuda
