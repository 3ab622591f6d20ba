// rope_quant_and_cache: norm, RoPE and quantization of Q and K, quantization of V, and the append, in one launch.
#include <algorithm>

#include "cuda/cache/rope_append.cuh"

namespace fp8kv::cuda {
namespace {

using core::CacheLayout;
using core::RopeAppendPlan;
using core::View1D;

template <bool kExtended>
using ArgsOf = std::conditional_t<kExtended, ExtendedArgs, RopeAppendArgs>;

// Elements on their way, of a table or of weights: fp32, or In, which is expanded at the first use. Without branches, nothing
// waits for them before.
template <class In, int kCount>
struct LoadedFloats {
  std::uint32_t words[kCount] = {}, narrow[kCount / 2] = {};

  LoadedFloats() = default;
  // That are `value` where nothing is loaded, and `wide`.
  __device__ __forceinline__ explicit LoadedFloats(float value) {
#pragma unroll
    for (std::uint32_t& word : words) word = __float_as_uint(value);
  }

  // From an address aligned to half a vector.
  __device__ __forceinline__ void load(bool condition, const void* data, bool wide, std::int64_t first) {
    const char* at = static_cast<const char*>(data) + first * (wide ? sizeof(float) : sizeof(In));
#pragma unroll
    for (int i = 0; i < kCount; i += kHalf) {
      load16_if(condition && wide, words + i, at + i * sizeof(float));
      load8_if(condition && !wide, narrow + i / 2, at + i * sizeof(In));
    }
  }
  __device__ __forceinline__ void expand(bool wide) {
#pragma unroll
    for (int i = 0; i < kCount; i += kHalf) {
      float values[kVecSize];
      device::unpack(Vec<In>{narrow[i / 2], narrow[i / 2 + 1]}, values);
#pragma unroll
      for (int k = 0; k < kHalf; ++k) words[i + k] = wide ? words[i + k] : __float_as_uint(values[k]);
    }
  }
};

// By the IEEE division, which few scales need: out of line.
template <class Fp8, class In>
__device__ __noinline__ Vec<Fp8> divide(const Vec<In> vec, float scale) {
  using Op = device::QuantizeOp<Fp8>;
  return device::convert_vec<Op, Fp8>(vec, typename Op::Prepared{.scale = scale, .divide = true});
}

// The parts of a unit: apart, or next to each other.
template <Rope kRope, int kVecs, class T>
__device__ __forceinline__ void store(T* to, std::uint32_t second, const Vec<T> (&vecs)[kVecs]) {
  if constexpr (kVecs == 2) {
    device::store_aligned(to, vecs[0]);
    device::store_aligned(to + second, vecs[1]);
  } else if constexpr (kRope == Rope::Neox) {
    using Bits = std::conditional_t<core::kIsQuantized<T>, std::uint32_t, uint2>;
    const auto* halves = reinterpret_cast<const Bits*>(vecs[0].words);
    *reinterpret_cast<Bits*>(to) = halves[0];
    *reinterpret_cast<Bits*>(to + second) = halves[1];
  } else {
    device::store_aligned(to, vecs[0]);
  }
}

// A unit of Q, of K or of V (kWhich). All that does not depend on a position is loaded before one is waited for, all in one
// block of code: behind a branch, the compiler would wait before it loads.
template <class In, class Fp8, Rope kRope, bool kNorm, int kVecs, bool kExtended, int kWhich>
__device__ __forceinline__ void append_unit(const ArgsOf<kExtended>& p, std::uint32_t row, std::uint32_t block) {
  using Op = device::QuantizeOp<Fp8>;
  constexpr int kPart = Unit<kVecs>::kPart;
  constexpr bool kQuery = kWhich == 0, kTurns = kWhich < 2 && kRope != Rope::None, kNormalizes = kWhich < 2 && kNorm;
  constexpr Rope kTurn = kTurns ? kRope : Rope::None;
  const Segment& s = p.segments[kWhich];
  const std::uint32_t token = min(row, p.tokens - 1);
  const LoadedIndex position(kRope == Rope::None ? p.slots : p.positions, token);
  const LoadedIndex slot(p.slots, token);  // of Q too, which does not ask for it

  const auto [head, index] = p.threads_per_head.divmod((block - p.first_blocks[kWhich]) * blockDim.x + threadIdx.x);
  Unit<kVecs> unit = unit_of<kTurn, kVecs>(p, index);
  unit.holds &= head < s.heads && row == token;
  const In* from = static_cast<const In*>(s.in) + token * s.in_token + head * s.in_head + unit.begin;
  Vec<In> raw[kVecs] = {};
  if constexpr (kVecs == 2) {
    load16_if(unit.holds, raw[0].words, from);
    load16_if(unit.holds, raw[1].words, from + unit.second);
  } else if constexpr (kTurn == Rope::Neox) {
    load8_if(unit.holds, raw[0].words, from);
    load8_if(unit.holds, raw[0].words + 2, from + unit.second);
  } else {
    load16_if(unit.holds, raw[0].words, from);
  }
  std::uint32_t scale_bits = 0x3f800000u;  // 1, which does not divide, for threads without elements
  load4_if(unit.holds, scale_bits, s.scales + (kQuery ? s.heads_per_scale.div(head) : head) * s.scale_stride);
  const bool normalizes = kNormalizes && s.norm_weight != nullptr;
  LoadedFloats<In, kPart> weights[2] = {LoadedFloats<In, kPart>(1.0f), LoadedFloats<In, kPart>(1.0f)};
  if constexpr (kNormalizes) {
    weights[0].load(normalizes && unit.holds, s.norm_weight, p.wide_weights[kWhich], unit.begin);
    weights[1].load(normalizes && unit.holds, s.norm_weight, p.wide_weights[kWhich], unit.begin + unit.second);
  }
  __syncwarp();  // which no load is moved across
  if (row != token) return;

  if constexpr (kNormalizes) {
    weights[0].expand(p.wide_weights[kWhich]);
    weights[1].expand(p.wide_weights[kWhich]);
  }
  bool in_table = kRope == Rope::None || position.within(p.positions), one_position = true;
  if constexpr (kExtended) {
    one_position = p.all_positions.sections.axes == 1;
    for (int axis = 1; axis < p.all_positions.sections.axes; ++axis)
      in_table &= LoadedIndex(p.all_positions.axes[axis], token).within(p.all_positions.axes[axis]);
  }
  LoadedFloats<In, kPart> cos, sin;
  if constexpr (kTurns) {
    const std::int64_t at = position.low * p.cos_sin_row + index * kPart, sines = p.rotary_units * kPart;
    cos.load(unit.rotates && in_table && one_position, p.cos_sin, p.wide_cos_sin, at);
    sin.load(unit.rotates && in_table && one_position, p.cos_sin, p.wide_cos_sin, at + sines);
    if constexpr (kExtended) {
      if (!one_position && unit.rotates && in_table) {
#pragma unroll
        for (int i = 0; i < kPart; ++i) {
          const std::uint32_t frequency = index * kPart + i;
          const std::int64_t at = p.all_positions.of_frequency(token, frequency) * p.cos_sin_row + frequency;
          cos.words[i] = __float_as_uint(load_element<In>(p.cos_sin, p.wide_cos_sin, at));
          sin.words[i] = __float_as_uint(load_element<In>(p.cos_sin, p.wide_cos_sin, at + sines));
        }
      }
    }
  }
  if constexpr (kTurns && kNormalizes) __syncwarp();
  if (!in_table) return;

  const float scale = __uint_as_float(scale_bits);
  const auto prepared = Op::prepare(scale);
  std::int64_t place = token * s.out_offset;
  bool stores = unit.holds;
  if constexpr (!kQuery) {
    stores &= slot.within(p.slots);
    const auto [block, offset] = p.block_size.divmod(slot.low);
    place = block * s.out_block + offset * s.out_offset;
  }
  place += head * s.out_head + unit.begin;

  if constexpr (kTurns || kNormalizes) {
    float x[2][kPart];
    float values[kVecs][kVecSize];
#pragma unroll
    for (int v = 0; v < kVecs; ++v) device::unpack(raw[v], values[v]);
#pragma unroll
    for (int i = 0; i < 2 * kPart; ++i) x[i / kPart][i % kPart] = values[i / kVecSize][i % kVecSize];
    const auto normalize = [&] {
      float sum = sum_of_squares(x);
#pragma unroll
      for (std::uint32_t lanes = 16; lanes > 0; lanes /= 2) {
        const float other = __shfl_xor_sync(kAllLanes, sum, lanes);
        sum = lanes < p.threads_per_head.divisor ? __fadd_rn(sum, other) : sum;
      }
      const float factor = normalizes ? norm_factor(p, sum) : 1.0f;
#pragma unroll
      for (int part = 0; part < 2; ++part) {
#pragma unroll
        for (int i = 0; i < kPart; ++i)
          x[part][i] = __fmul_rn(__fmul_rn(x[part][i], factor), __uint_as_float(weights[part].words[i]));
      }
    };
    bool after = false;
    if constexpr (kExtended) after = p.norm_after_rope;
    if (kNormalizes && !after) normalize();
    if constexpr (kTurns) {
      cos.expand(p.wide_cos_sin || !one_position);
      sin.expand(p.wide_cos_sin || !one_position);
      if (unit.rotates) rotate_pairs<kRope>(cos.words, sin.words, x);
    }
    if (kNormalizes && after) normalize();
#pragma unroll
    for (int i = 0; i < 2 * kPart; ++i) values[i / kVecSize][i % kVecSize] = x[i / kPart][i % kPart];
#pragma unroll
    for (int v = 0; v < kVecs; ++v) {
      raw[v] = device::pack_any_nan<In>(values[v]);
      if (kQuery && !p.quantizes_query) device::make_nan_canonical(raw[v]);
    }
  }

  if constexpr (kQuery) {
    if (!p.quantizes_query) {
      if (stores) store<kTurn>(static_cast<In*>(s.out) + place, unit.second, raw);
      return;
    }
  }
  Vec<Fp8> results[kVecs];
  if constexpr (kExtended && !kQuery) {
    if (p.has_channels[kWhich - 1]) {
      if (!stores) return;
      const float* scales = s.scales + head * s.scale_stride;
#pragma unroll
      for (int v = 0; v < kVecs; ++v) {
        const Columns columns = kVecs == 1 ? Columns{unit.begin, unit.second} : Columns{unit.begin + v * unit.second};
        results[v] = device::convert_vec<Op, Fp8>(
            raw[v], load_channels<Op, In, ChannelParameters::Any>(p.kv[kWhich - 1], scales, head, columns));
      }
      return store<kTurn>(static_cast<Fp8*>(s.out) + place, unit.second, results);
    }
  }
#pragma unroll
  for (int v = 0; v < kVecs; ++v)
    results[v] = device::convert_vec<Op, Fp8>(raw[v], typename Op::Prepared{.hi = prepared.hi, .lo = prepared.lo});
  if (prepared.divide) [[unlikely]] {
#pragma unroll
    for (int v = 0; v < kVecs; ++v) results[v] = divide<Fp8>(raw[v], scale);
  }
  if (stores) store<kTurn>(static_cast<Fp8*>(s.out) + place, unit.second, results);
}

constexpr int kMaxThreads = 256;  // per block

// One or two vectors of a head per thread. Blocks have threads of Q, of K or of V in x, and tokens in y. kExtended: with three
// positions, a norm after RoPE, or scales or offsets per channel.
template <class In, class Fp8, Rope kRope, bool kNorm, int kVecs, bool kExtended>
__global__ void __launch_bounds__(kMaxThreads) rope_append_vectorized(const __grid_constant__ ArgsOf<kExtended> p) {
  const std::uint32_t token = blockIdx.x * blockDim.y + threadIdx.y, block = blockIdx.y;
  device::wait_then_release();
  if (block >= p.first_blocks[2])
    append_unit<In, Fp8, kRope, kNorm, kVecs, kExtended, 2>(p, token, block);
  else if (block >= p.first_blocks[1])
    append_unit<In, Fp8, kRope, kNorm, kVecs, kExtended, 1>(p, token, block);
  else
    append_unit<In, Fp8, kRope, kNorm, kVecs, kExtended, 0>(p, token, block);
}

struct ScalarRopeAppendArgs {
  RopeLayout layout;
  TokenIndices slots;
  Positions positions;
  std::int64_t heads;  // of Q, K and V together
};

// At an offset counted in elements.
template <class In>
__device__ __forceinline__ float load(const View1D& v, std::int64_t offset) {
  return load_element<In>(v.data, v.dtype == DType::Float32, offset);
}

// Norm and RoPE of a head, element by element; a warp calls it.
template <class In>
struct ScalarTransform {
  const RopeLayout& layout;
  const In* head;
  std::int64_t dim;  // from one element of the head to the next
  View1D weight;
  const Positions& positions;
  std::int64_t token;
  float factor = 1.0f;

  __device__ void find_factor(unsigned lane) {
    if (!weight.data) return;
    float sum = 0.0f;
    for (std::int64_t d = lane; d < layout.cache.head_size; d += 32) {
      const float x = layout.norm_after_rope ? rotated(d) : element(d);
      sum = __fmaf_rn(x, x, sum);
    }
    for (int lanes = 16; lanes > 0; lanes /= 2) sum = __fadd_rn(sum, __shfl_xor_sync(kAllLanes, sum, lanes));
    factor = rsqrtf(__fmaf_rn(sum, 1.0f / static_cast<float>(layout.cache.head_size), layout.norm_eps));
  }

  __device__ float element(std::int64_t d) const { return decode(head[d * dim]); }

  __device__ float normalized(float x, std::int64_t d) const {
    return weight.data ? __fmul_rn(__fmul_rn(x, factor), load<In>(weight, d * weight.stride)) : x;
  }

  // Element d as RoPE finds it.
  __device__ float before_rope(std::int64_t d) const { return layout.norm_after_rope ? element(d) : normalized(element(d), d); }

  __device__ float rotated(std::int64_t d) const {
    if (d >= layout.rotary_dim) return before_rope(d);
    const std::int64_t half = layout.rotary_dim / 2, pair = layout.is_neox ? d % half : d / 2;
    const bool is_second = layout.is_neox ? d >= half : d % 2 != 0;
    float a = before_rope(layout.is_neox ? pair : 2 * pair), b = before_rope(layout.is_neox ? pair + half : 2 * pair + 1);
    const View1D& table = layout.cos_sin;
    const std::int64_t row = positions.of_frequency(token, pair) * layout.cos_sin_row;
    rotate(a, b, load<In>(table, row + pair * table.stride), load<In>(table, row + (half + pair) * table.stride));
    return is_second ? b : a;
  }

  __device__ In operator()(std::int64_t d) const {
    const float x = rotated(d);
    return from_float<In>(layout.norm_after_rope ? normalized(x, d) : x);
  }
};

// An element of query_out of a real type.
template <class In, class... Real>
__device__ __forceinline__ void store_real(core::TypeList<Real...>, void* data, DType dtype, std::int64_t at, In x) {
  const auto put = [&]<class T>(T* to) { to[at] = device::convert_element<device::CopyOp, T>(x, {}); };
  ((DTypeOf<Real>::value == dtype ? put(static_cast<Real*>(data)) : void()), ...);
}

// An element of query_out, which may be of any type.
template <class Op, class Out, class In>
__device__ __forceinline__ void store_query(const HeadsView& out, DType dtype, std::int64_t token, std::int64_t head,
                                            std::int64_t d, In x, const typename Op::Prepared& scale) {
  const std::int64_t at = token * out.token + head * out.head + d * out.dim;
  if constexpr (core::kIsQuantized<Out>) {
    if (dtype == DTypeOf<Out>::value) {
      static_cast<Out*>(out.data)[at] = device::convert_element<Op, Out>(x, scale);
      return;
    }
  }
  store_real(core::RealTypes{}, out.data, dtype, at, x);
}

// Anything: one warp per head.
template <class Op, class In, class Out, bool kChannels>
__global__ void __launch_bounds__(256) rope_append_scalar(const __grid_constant__ ScalarRopeAppendArgs p) {
  const RopeLayout& l = p.layout;
  const std::int64_t warp = (std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / 32, token = warp / p.heads;
  if (token >= l.cache.num_tokens) return;
  device::wait_then_release();
  const unsigned lane = threadIdx.x % 32;
  const std::int64_t index = warp % p.heads;
  const bool is_query = index < l.num_heads;
  const int which = is_query ? 0 : static_cast<int>(1 + (index - l.num_heads) / l.cache.num_heads);  // Q, K or V
  const std::int64_t head = is_query ? index : (index - l.num_heads) % l.cache.num_heads;
  const std::int64_t slot = is_query ? 0 : p.slots[token];
  if (!is_query && !p.slots.contains(slot)) return;
  if (l.rotary_dim > 0 && !p.positions.in_table(token, p.positions.axes[0][token])) return;

  const KVViews& kv = which < 2 ? l.cache.k : l.cache.v;
  const HeadsView& in = is_query ? l.query : kv.rows;
  const In* from = row<const In>(in, token, head);
  const float* scales =
      is_query ? l.q_scale + head / l.heads_per_scale * l.q_scale_stride : kv.scales.data + head * kv.scales.head;
  const auto scale = Op::prepare(*scales);
  ScalarTransform<In> transform{l, from, in.dim, which < 2 ? l.norm_weights[which] : View1D{}, p.positions, token};
  transform.find_factor(lane);
  const bool transforms = which < 2 && (l.rotary_dim > 0 || transform.weight.data);
  Out* to = is_query ? nullptr : row<Out>(kv.cache, slot / l.cache.block_size, slot % l.cache.block_size, head);
  for (std::int64_t d = lane; d < l.cache.head_size; d += 32) {
    const In x = transforms ? transform(d) : from[d * in.dim];
    if (is_query) {
      store_query<Op, Out>(l.query_out, l.query_out_dtype, token, head, d, x, scale);
    } else if constexpr (kChannels) {
      to[d * kv.cache.dim] = convert_at<Op, Out, true>(x, kv, scales, head, d);
    } else {
      to[d * kv.cache.dim] = device::convert_element<Op, Out>(x, scale);
    }
  }
}

// The parameters of a launch, and its blocks: of a token, or of all where threads share several heads.
struct Launch {
  RopeAppendArgs args;
  std::uint32_t blocks = 0;
};

bool shares_heads(const RopeAppendPlan& plan) { return plan.query_heads_per_thread > 1 || plan.kv_heads_per_thread > 1; }

Launch launch_of(const RopeLayout& l, const TokenIndices& slots, const TokenIndices& positions, const RopeAppendPlan& plan) {
  const CacheLayout& cache = l.cache;
  const int unit = plan.vecs_per_thread * kVecSize;
  std::uint32_t blocks = 0;
  const auto segment = [&](const HeadsView& in, std::int64_t heads, int heads_per_thread, const float* scales,
                           std::int64_t scale_stride) {
    const std::int64_t per_token = core::ceil_div(heads, heads_per_thread) * plan.threads_per_head,
                       threads = per_token * cache.num_tokens;
    Segment s{.in = in.data,
              .in_token = in.token,
              .in_head = in.head,
              .scales = scales,
              .scale_stride = scale_stride,
              .heads = static_cast<std::uint32_t>(heads),
              .threads_per_token = FastDiv(std::max<std::int64_t>(1, per_token)),
              .heads_per_thread = static_cast<std::uint32_t>(heads_per_thread),
              .threads = static_cast<std::uint32_t>(threads)};
    blocks += static_cast<std::uint32_t>(core::ceil_div(shares_heads(plan) ? threads : per_token, plan.threads));
    return s;
  };
  RopeAppendArgs args{.positions = positions,
                      .slots = slots,
                      .tokens = static_cast<std::uint32_t>(cache.num_tokens),
                      .threads_per_head = FastDiv(plan.threads_per_head),
                      .units_per_head = static_cast<std::uint32_t>(cache.head_size / unit),
                      .rotary_units = static_cast<std::uint32_t>(l.rotary_dim / unit),
                      .wide_cos_sin = l.cos_sin.dtype == DType::Float32,
                      .quantizes_query = core::is_quantized(l.query_out_dtype),
                      .norm_eps = l.norm_eps,
                      .per_element = 1.0f / static_cast<float>(cache.head_size),
                      .block_size = FastDiv(std::max<std::int64_t>(1, cache.block_size)),
                      .cos_sin = l.cos_sin.data,
                      .cos_sin_row = l.cos_sin_row};
  Segment& query = args.segments[0] = segment(l.query, l.num_heads, plan.query_heads_per_thread, l.q_scale, l.q_scale_stride);
  query.out = l.query_out.data;
  query.out_offset = l.query_out.token;
  query.out_head = l.query_out.head;
  query.heads_per_scale = FastDiv(l.heads_per_scale);
  const std::int64_t kv_heads = cache.num_slots() > 0 ? cache.num_heads : 0;
  for (int i = 0; i < 2; ++i) {
    const KVViews& from = i == 0 ? cache.k : cache.v;
    args.first_blocks[1 + i] = blocks;
    Segment& s = args.segments[1 + i] =
        segment(from.rows, kv_heads, plan.kv_heads_per_thread, from.scales.data, from.scales.head);
    s.out = from.cache.data;
    s.out_block = from.cache.block;
    s.out_offset = from.cache.offset;
    s.out_head = from.cache.head;
    args.segments[i].norm_weight = l.norm_weights[i].data;
    args.wide_weights[i] = l.norm_weights[i].dtype == DType::Float32;
  }
  return {args, blocks};
}

template <class In, class Fp8>
void launch_vectorized(const RopeLayout& l, const TokenIndices& slots, const Positions& positions, const RopeAppendPlan& plan,
                       cudaStream_t stream) {
  const auto [args, blocks] = launch_of(l, slots, positions.axes[0], plan);
  if (blocks == 0) return;  // no query heads, and no slots
  const ExtendedArgs extended{
      args, positions, l.norm_after_rope, {l.cache.k.has_channels(), l.cache.v.has_channels()}, {l.cache.k, l.cache.v}};
  if (shares_heads(plan)) return launch_many_heads<In, Fp8>(extended, blocks, l, stream);
  // Several tokens per block, but not so many that few blocks are left.
  const std::int64_t tokens = std::clamp<std::int64_t>(l.cache.num_tokens / 4, 1, kMaxThreads / plan.threads);
  const dim3 grid(static_cast<unsigned>(core::ceil_div(l.cache.num_tokens, tokens)), blocks);
  const LaunchShape shape{.grid = grid,
                          .threads = dim3(plan.threads, static_cast<unsigned>(tokens)),
                          .dependent = launches_dependent(grid.x * grid.y)};
  visit_transforms(l, [&]<Rope kRope, bool kNorm>() {
    if (l.extended()) return launch(rope_append_vectorized<In, Fp8, kRope, kNorm, 1, true>, shape, stream, extended);
    auto kernel = rope_append_vectorized<In, Fp8, kRope, kNorm, 1, false>;
    if constexpr (kRope == Rope::None && !kNorm)
      if (plan.vecs_per_thread == 2) kernel = rope_append_vectorized<In, Fp8, kRope, kNorm, 2, false>;
    launch(kernel, shape, stream, args);
  });
}

template <class Op, class In, class Out>
void launch_rope_append(const RopeLayout& layout, const TokenIndices& slots, const Positions& positions,
                        const RopeAppendPlan& plan, cudaStream_t stream) {
  if constexpr (sizeof(In) == 2 && core::kIsQuantized<Out>)
    if (plan.path == KernelPath::Vectorized) return launch_vectorized<In, Out>(layout, slots, positions, plan, stream);
  const std::int64_t heads = layout.num_heads + 2 * layout.cache.num_heads;
  const auto blocks = static_cast<unsigned>(core::ceil_div(32 * heads * layout.cache.num_tokens, plan.threads));
  auto kernel = rope_append_scalar<Op, In, Out, false>;
  if constexpr (core::kIsQuantized<Out>)
    if (layout.cache.has_channels()) kernel = rope_append_scalar<Op, In, Out, true>;
  launch_dependent(kernel, blocks, plan.threads, stream, ScalarRopeAppendArgs{layout, slots, positions, heads});
}

}  // namespace

void run(const RopeAppend& problem, Stream stream) {
  constexpr const char* op = "rope_quant_and_cache";
  const RopeLayout layout = core::lower(problem);
  const CacheLayout& cache = layout.cache;
  core::check_on_device({op, "query", problem.query}, current_device());
  if (layout.empty()) return;
  if (debugging(stream)) {
    debug_check_slots(op, problem.slot_mapping, cache, stream);
    if (problem.positions) debug_check_positions(op, *problem.positions, layout, stream);
  }
  const RopeAppendPlan plan = core::plan_rope_append(layout);
  visit_append(cache.row_dtype, cache.cache_dtype, [&]<class Op, class In, class Out>() {
    RopeLayout part = layout;
    Positions positions = Positions::of(problem, layout);
    for_each_token_chunk(cache, plan.tokens, problem.slot_mapping, [&](const CacheLayout& chunk, const TokenIndices& slots) {
      part.cache = chunk;
      launch_rope_append<Op, In, Out>(part, slots, positions, plan, stream);
      check_launch(op);
      part.query = after(part.query, chunk.num_tokens, cache.row_dtype);
      part.query_out = after(part.query_out, chunk.num_tokens, layout.query_out_dtype);
      positions = positions.after(chunk.num_tokens);
    });
  });
}

}  // namespace fp8kv::cuda
