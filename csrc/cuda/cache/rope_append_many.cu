// rope_quant_and_cache for many tokens: threads with two vectors of several heads.
#include "cuda/cache/rope_append.cuh"

namespace fp8kv::cuda {
namespace {

constexpr unsigned kThreads = core::kManyHeadsThreads;
constexpr int kBlocks = 7;           // per multiprocessor: at most 72 registers
constexpr int kUnit = 2 * kVecSize;  // elements that a thread takes of a head

// A load under a condition; else the words stay. As one instruction, for which the compiler makes no copies of them.
__device__ __forceinline__ void load16_if(bool condition, std::uint32_t* words, const void* p) {
  asm volatile(
      "{\n"
      ".reg .pred condition;\n"
      "setp.ne.u32 condition, %5, 0;\n"
      "@condition ld.global.v4.b32 {%0, %1, %2, %3}, [%4];\n"
      "}"
      : "+r"(words[0]), "+r"(words[1]), "+r"(words[2]), "+r"(words[3])
      : "l"(p), "r"(static_cast<std::uint32_t>(condition))
      : "memory");
}
__device__ __forceinline__ std::uint32_t load4(const void* p) {
  std::uint32_t word;
  asm volatile("ld.global.b32 %0, [%1];" : "=r"(word) : "l"(p) : "memory");
  return word;
}

// An index on its way, of either type without a branch: what first asks for its value waits for it.
struct LoadedIndex {
  std::uint32_t low, high;
  bool wide;

  __device__ __forceinline__ LoadedIndex(const TokenIndices& indices, std::uint32_t token) : wide(indices.wide) {
    const char* at = static_cast<const char*>(indices.data) + token * indices.stride * (wide ? 8 : 4);
    low = load4(at);
    high = load4(at + (wide ? 4 : 0));
  }
  __device__ __forceinline__ std::int64_t value() const {
    const std::uint32_t sign = static_cast<std::int32_t>(low) < 0 ? 0xffffffffu : 0u;
    return static_cast<std::int64_t>(std::uint64_t{wide ? high : sign} << 32 | low);
  }
};

// One element as fp32.
template <class In>
__device__ __forceinline__ float load_one(const void* data, bool wide, std::int64_t offset) {
  return wide ? static_cast<const float*>(data)[offset] : decode(static_cast<const In*>(data)[offset]);
}

// What a thread takes of a head: two vectors, `second` elements apart. With RoPE of neox they turn with each other.
struct Unit {
  std::uint32_t index;
  std::uint32_t begin, second;
  bool holds;  // elements; a norm has threads that do not
  bool rotates;
};

template <Rope kRope>
__device__ __forceinline__ Unit unit_of(const ManyHeadsArgs& p, std::uint32_t index) {
  const bool rotates = kRope != Rope::None && index < p.rotary_units;
  const bool apart = kRope == Rope::Neox && rotates;
  return {index, index * (apart ? kVecSize : kUnit), apart ? p.rotary_units * kVecSize : kVecSize, index < p.units_per_head,
          rotates};
}

// What a block reads for every head of Q, of K or of V.
struct Shared {
  float2 scales[core::kMaxSharedHeads];  // prepared: hi and lo
  float4 weights[kUnit / 4][32];         // of the norm: four of a unit, for all units
};

// Fills `shared`, and says whether a scale asks for the IEEE division. A barrier.
template <class In, class Out, Rope kRope, bool kNorm>
__device__ __forceinline__ bool fill(Shared& shared, const ManyHeadsArgs& p, int which) {
  const Segment& s = p.segments[which];
  bool divides = false;
  if constexpr (core::kIsQuantized<Out>) {
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
      const Unit unit = unit_of<kRope>(p, i / (kUnit / 4));
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
__device__ __forceinline__ void load_cos_sin(const ManyHeadsArgs& p, std::uint32_t first, std::int64_t position, CosSin& to) {
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
__device__ __forceinline__ void load_cos_sin(const ManyHeadsArgs& p, std::uint32_t first, const std::int64_t (&positions)[3],
                                             CosSin& to) {
#pragma unroll
  for (int i = 0; i < kVecSize; ++i) {
    const int axis = p.all_positions.sections.axis_of(first + i);
    const std::int64_t position = axis == 0 ? positions[0] : axis == 1 ? positions[1] : positions[2];
    const std::int64_t at = position * p.cos_sin_row + first + i;
    to.cos[i] = __float_as_uint(load_one<In>(p.cos_sin, p.wide_cos_sin, at));
    to.sin[i] = __float_as_uint(load_one<In>(p.cos_sin, p.wide_cos_sin, at + p.rotary_units * kVecSize));
  }
}

// Whole warps call it.
__device__ __forceinline__ void normalize(const ManyHeadsArgs& p, const Shared& shared, const Unit& unit,
                                          float (&x)[2][kVecSize]) {
  float sums[2] = {};
#pragma unroll
  for (int i = 0; i < kVecSize; ++i) {
    sums[0] = __fmaf_rn(x[0][i], x[0][i], sums[0]);
    sums[1] = __fmaf_rn(x[1][i], x[1][i], sums[1]);
  }
  float sum = unit.holds ? __fadd_rn(sums[0], sums[1]) : 0.0f;
  const auto add = [&](std::uint32_t lanes) { sum = __fadd_rn(sum, __shfl_xor_sync(kAllLanes, sum, lanes)); };
  if (p.threads_per_head.divisor == 8) {  // heads of 128, without a loop
    add(4), add(2), add(1);
  } else {
#pragma unroll 1
    for (std::uint32_t lanes = p.threads_per_head.divisor / 2; lanes > 0; lanes /= 2) add(lanes);
  }
  const float factor = rsqrtf(__fmaf_rn(sum, p.per_element, p.norm_eps));
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

template <Rope kRope>
__device__ __forceinline__ void rotate_pairs(const CosSin& turn, float (&x)[2][kVecSize]) {
#pragma unroll
  for (int i = 0; i < kVecSize; ++i) {
    const float cos = __uint_as_float(turn.cos[i]), sin = __uint_as_float(turn.sin[i]);
    if constexpr (kRope == Rope::Neox)
      rotate(x[0][i], x[1][i], cos, sin);
    else
      rotate(x[i / 4][i % 4 * 2], x[i / 4][i % 4 * 2 + 1], cos, sin);
  }
}

// The heads of a block. kAhead: heads that a thread has loaded. kExtended: with three positions, a norm after RoPE, or one of Q
// or of K alone. kDivide: by the IEEE division, with `shared` filled.
template <class In, class Out, Rope kRope, bool kNorm, int kAhead, bool kExtended, bool kDivide>
__device__ __forceinline__ void append_heads(const ManyHeadsArgs& p, Shared& shared, int which);

// The same out of line and from the beginning, so that it costs the usual case no registers.
template <class In, class Out, Rope kRope, bool kNorm, int kAhead, bool kDivide>
__device__ __noinline__ void append_apart(const ManyHeadsArgs& p, Shared& shared, int which) {
  append_heads<In, Out, kRope, kNorm, kAhead, true, kDivide>(p, shared, which);
}

template <class In, class Out, Rope kRope, bool kNorm, int kAhead, bool kExtended, bool kDivide>
__device__ __forceinline__ void append_heads(const ManyHeadsArgs& p, Shared& shared, int which) {
  const Segment& s = p.segments[which];
  const std::uint32_t thread = (blockIdx.x - s.first_block) * kThreads + threadIdx.x;
  const auto [token, in_token] = s.threads_per_token.divmod(min(thread, s.threads - 1));  // the whole block goes on
  const auto [batch, index] = p.threads_per_head.divmod(in_token);
  const std::uint32_t first_head = batch * s.heads_per_thread;
  const Unit unit = unit_of<kRope>(p, index);

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
    std::int64_t positions[3] = {loaded_position.value()};
    stores &= p.positions.contains(positions[0]);
    const bool three = kExtended && p.all_positions.sections.axes > 1;
    for (int axis = 1; three && axis < 3; ++axis) {
      positions[axis] = LoadedIndex(p.all_positions.axes[axis], token).value();
      stores &= p.all_positions.axes[axis].contains(positions[axis]);
    }
    if (unit.rotates && stores) {
      if (three)
        load_cos_sin<In>(p, index * kVecSize, positions, turn);
      else
        load_cos_sin<In>(p, index * kVecSize, positions[0], turn);
    }
  }
  if constexpr (!kDivide) {
    const bool divides = fill<In, Out, kRope, kNorm>(shared, p, which);
    if constexpr (core::kIsQuantized<Out>)
      if (divides) return append_apart<In, Out, kRope, kNorm, 1, true>(p, shared, which);
  }
  if constexpr (kRope != Rope::None) {
    if (!p.wide_cos_sin && !(kExtended && p.all_positions.sections.axes > 1)) {
      expand<In>(turn.cos);
      expand<In>(turn.sin);
    }
  } else if (p.rotary_units > 0) {  // V, which is not stored either where a position is wrong
    stores &= p.positions.contains(loaded_position.value());
    for (int axis = 1; kExtended && axis < p.all_positions.sections.axes; ++axis)
      stores &= p.all_positions.axes[axis].contains(LoadedIndex(p.all_positions.axes[axis], token).value());
  }

  std::int64_t place = token * s.out_offset;
  if (which > 0) {
    stores &= p.slots.contains(loaded_slot.value());
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
        if (unit.rotates) rotate_pairs<kRope>(turn, x);
        if (normalizes && after) normalize(p, shared, unit, x);
        vecs[0] = device::pack_any_nan<In>(x[0]);
        vecs[1] = device::pack_any_nan<In>(x[1]);
        if constexpr (std::is_same_v<In, Out>) device::make_nan_canonical(vecs);
      }
      Vec<Out> results[2];
      if constexpr (std::is_same_v<In, Out>) {
        results[0] = vecs[0], results[1] = vecs[1];
      } else {
        using Op = device::QuantizeOp<Out>;
        typename Op::Prepared prepared{.hi = scale->x, .lo = scale->y};
        if constexpr (kDivide) {
          const auto head = static_cast<std::uint32_t>(scale - shared.scales);
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

template <class In, class Fp8, Rope kRope, bool kNorm>
__global__ void __launch_bounds__(kThreads, kBlocks) rope_append_many(const __grid_constant__ ManyHeadsArgs p) {
  constexpr int kAhead = kNorm || kRope != Rope::None ? 2 : 1;
  __shared__ Shared shared;
  const int which = p.segment_of(blockIdx.x);
  const bool extended = p.all_positions.sections.axes > 1 ||
                        (which < 2 && kNorm && (p.norm_after_rope || p.segments[which].norm_weight == nullptr));
  device::wait_then_release();
  if (which == 0 && !p.quantizes_query)
    append_apart<In, In, kRope, kNorm, kAhead, false>(p, shared, which);
  else if (which == 2 && extended)
    append_apart<In, Fp8, Rope::None, false, kAhead, false>(p, shared, which);
  else if (which == 2)
    append_heads<In, Fp8, Rope::None, false, kAhead, false, false>(p, shared, which);
  else if (extended)
    append_apart<In, Fp8, kRope, kNorm, 1, false>(p, shared, which);
  else
    append_heads<In, Fp8, kRope, kNorm, kAhead, false, false>(p, shared, which);
}

}  // namespace

template <class In, class Fp8>
void launch_many_heads(const ManyHeadsArgs& args, unsigned blocks, const RopeLayout& layout, cudaStream_t stream) {
  visit_transforms(layout, [&]<Rope kRope, bool kNorm>() {
    launch_dependent(rope_append_many<In, Fp8, kRope, kNorm>, blocks, kThreads, stream, args);
  });
}

#define FP8KV_LAUNCH(In, Fp8) \
  template void launch_many_heads<In, Fp8>(const ManyHeadsArgs&, unsigned, const RopeLayout&, cudaStream_t);
FP8KV_LAUNCH(BFloat16, E4M3)
FP8KV_LAUNCH(BFloat16, E5M2)
FP8KV_LAUNCH(BFloat16, Int8)
FP8KV_LAUNCH(Half, E4M3)
FP8KV_LAUNCH(Half, E5M2)
FP8KV_LAUNCH(Half, Int8)
#undef FP8KV_LAUNCH

}  // namespace fp8kv::cuda
