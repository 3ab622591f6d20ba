// rope_quant_and_cache: norm, RoPE and quantization of Q and K, quantization of V, and the append, in one launch.
#include <algorithm>

#include "cuda/cache/rope_append.cuh"

namespace fp8kv::cuda {
namespace {

using core::CacheLayout;
using core::RopeAppendPlan;
using core::View1D;

template <class In>
__device__ __forceinline__ float load_element(const void* data, bool wide, std::int64_t offset) {
  return wide ? __ldg(static_cast<const float*>(data) + offset) : decode(static_cast<const In*>(data)[offset]);
}

// With scales or offsets per channel. All that few calls have is in kernels of its own.
struct ExtendedArgs : ManyHeadsArgs {
  KVViews kv[2];

  __device__ __forceinline__ bool in_table(std::uint32_t token, std::int64_t position) const {
    return all_positions.in_table(token, position);
  }
};

// Cosines and sines of the frequencies first to first + 3 of a token, whose first position is known.
template <class In>
__device__ __forceinline__ void load_cos_sin(const RopeAppendArgs& p, std::uint32_t, std::int64_t position, std::uint32_t first,
                                             float (&cos)[kHalf], float (&sin)[kHalf]) {
  const std::int64_t at = position * p.cos_sin_row + first;
  load_half<In>(p.cos_sin, p.wide_cos_sin, at, cos);
  load_half<In>(p.cos_sin, p.wide_cos_sin, at + p.rotary_units * kHalf, sin);
}

template <class In>
__device__ __forceinline__ void load_cos_sin(const ExtendedArgs& p, std::uint32_t token, std::int64_t position,
                                             std::uint32_t first, float (&cos)[kHalf], float (&sin)[kHalf]) {
  if (p.all_positions.sections.axes == 1)
    return load_cos_sin<In>(static_cast<const RopeAppendArgs&>(p), token, position, first, cos, sin);
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const std::int64_t at = p.all_positions.of_frequency(token, first + i) * p.cos_sin_row + first + i;
    cos[i] = load_element<In>(p.cos_sin, p.wide_cos_sin, at);
    sin[i] = load_element<In>(p.cos_sin, p.wide_cos_sin, at + p.rotary_units * kHalf);
  }
}

// The elements of a thread: two halves of a vector, `second` elements apart.
template <class T>
__device__ __forceinline__ void store_halves(T* p, std::uint32_t second, const Vec<T>& vec) {
  using Bits = std::conditional_t<core::kIsQuantized<T>, std::uint32_t, uint2>;
  const auto* halves = reinterpret_cast<const Bits*>(vec.words);
  *reinterpret_cast<Bits*>(p) = halves[0];
  *reinterpret_cast<Bits*>(p + second) = halves[1];
}

template <Rope kRope, class T>
__device__ __forceinline__ void store(T* p, std::uint32_t second, const Vec<T>& vec) {
  if constexpr (kRope == Rope::Neox)
    store_halves(p, second, vec);
  else
    device::store_aligned(p, vec);
}

// A thread takes one vector of kHeads neighboring heads, so that it reads cosines, sines and weights once.
template <class In, class Fp8, Rope kRope, bool kNorm, int kHeads, bool kExtended = false>
__global__ void __launch_bounds__(256)
    rope_append_vectorized(const __grid_constant__ std::conditional_t<kExtended, ExtendedArgs, RopeAppendArgs> p) {
  using Op = device::QuantizeOp<Fp8>;
  const int which = p.segment_of(blockIdx.x);
  const Segment& s = p.segments[which];
  const bool is_query = which == 0, transforms = which < 2 && (kRope != Rope::None || kNorm);
  std::uint32_t thread = (blockIdx.x - s.first_block) * blockDim.x + threadIdx.x;
  const bool works = thread < s.threads;
  if constexpr (kNorm)
    thread = min(thread, s.threads - 1);  // whole warps take part in the sum
  else if (!works)
    return;
  const auto [token, thread_in_token] = s.threads_per_token.divmod(thread);
  const auto [head_batch, vec] = p.threads_per_head.divmod(thread_in_token);
  const std::uint32_t first_head = head_batch * kHeads;

  device::wait_then_release();
  const std::int64_t position = kRope == Rope::None ? 0 : p.positions[token];
  const std::int64_t slot = is_query ? 0 : p.slots[token];
  const bool rotates = kRope != Rope::None && transforms && vec < p.rotary_units;
  const bool apart = kRope == Rope::Neox && rotates;
  const std::uint32_t begin = apart ? vec * kHalf : vec * kVecSize, second = apart ? p.rotary_units * kHalf : kHalf;
  const bool holds = !kNorm || vec < p.units_per_head;
  const In* from = static_cast<const In*>(s.in) + token * s.in_token + first_head * s.in_head + begin;
  Vec<In> raw[kHeads];
  float scale_values[kHeads];
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    raw[h] = Vec<In>{};
    scale_values[h] = 1.0f;
    if (first_head + h >= s.heads) continue;
    scale_values[h] = __ldg(s.scales + s.heads_per_scale.div(first_head + h) * s.scale_stride);
    if (!holds) continue;
    if constexpr (kRope == Rope::Neox) {
      device::load8(raw[h].words, from + h * s.in_head);
      device::load8(raw[h].words + 2, from + h * s.in_head + second);
    } else {
      raw[h] = device::load_aligned(from + h * s.in_head);
    }
  }
  const bool in_table = kRope == Rope::None || p.in_table(token, position);

  if (transforms) {
    float cos[kHalf], sin[kHalf], weights[2][kHalf];
    if (rotates && in_table) load_cos_sin<In>(p, token, position, vec * kHalf, cos, sin);
    const bool normalizes = kNorm && s.norm_weight != nullptr;
    if (normalizes && holds) {
      load_half<In>(s.norm_weight, p.wide_weights[which], begin, weights[0]);
      load_half<In>(s.norm_weight, p.wide_weights[which], begin + second, weights[1]);
    }
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      float x[kVecSize];
      device::unpack(raw[h], x);
      const auto normalize = [&] {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < kVecSize; ++i) sum = __fmaf_rn(x[i], x[i], sum);
        for (std::uint32_t lanes = p.threads_per_head.divisor / 2; lanes > 0; lanes /= 2)
          sum = __fadd_rn(sum, __shfl_xor_sync(kAllLanes, sum, lanes));
        const float factor = rsqrtf(__fmaf_rn(sum, p.per_element, p.norm_eps));
#pragma unroll
        for (int i = 0; i < kVecSize; ++i) x[i] = __fmul_rn(__fmul_rn(x[i], factor), weights[i / kHalf][i % kHalf]);
      };
      if (normalizes && !p.norm_after_rope) normalize();
      if (rotates) {
#pragma unroll
        for (int i = 0; i < kHalf; ++i) {
          if constexpr (kRope == Rope::Neox)
            rotate(x[i], x[i + kHalf], cos[i], sin[i]);
          else
            rotate(x[2 * i], x[2 * i + 1], cos[i], sin[i]);
        }
      }
      if (normalizes && p.norm_after_rope) normalize();
      raw[h] = device::pack_any_nan<In>(x);
      if (is_query && !p.quantizes_query) device::make_nan_canonical(raw[h]);
    }
  }

  if (!works || !holds || !in_table) return;
  std::int64_t place = token * s.out_offset;
  if (!is_query) {
    if (!p.slots.contains(slot)) return;
    const auto [block, offset] = p.block_size.divmod(static_cast<std::uint32_t>(slot));
    place = block * s.out_block + offset * s.out_offset;
  }
  place += first_head * s.out_head + begin;
  if constexpr (kExtended) {
    static_assert(kHeads == 1);
    if (!is_query && p.kv[which - 1].has_channels()) {
      const KVViews& kv = p.kv[which - 1];
      const auto channels = load_channels<Op, In, ChannelParameters::Any>(kv, s.scales + first_head * s.scale_stride,
                                                                          first_head, {begin, second});
      return store<kRope>(static_cast<Fp8*>(s.out) + place, second, device::convert_vec<Op, Fp8>(raw[0], channels));
    }
  }
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    if (first_head + h >= s.heads) break;
    if (is_query && !p.quantizes_query)
      store<kRope>(static_cast<In*>(s.out) + place + h * s.out_head, second, raw[h]);
    else
      store<kRope>(static_cast<Fp8*>(s.out) + place + h * s.out_head, second,
                   device::convert_vec<Op, Fp8>(raw[h], Op::prepare(scale_values[h])));
  }
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
  const auto scale = Op::prepare(__ldg(scales));
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

// The parameters of a launch, and its blocks.
struct Launch {
  RopeAppendArgs args;
  std::uint32_t blocks = 0;
};

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
              .threads_per_token = FastDiv(std::max<std::int64_t>(1, per_token)),
              .heads = static_cast<std::uint32_t>(heads),
              .heads_per_thread = static_cast<std::uint32_t>(heads_per_thread),
              .threads = static_cast<std::uint32_t>(threads),
              .first_block = blocks};
    blocks += static_cast<std::uint32_t>(core::ceil_div(threads, plan.threads));
    return s;
  };
  RopeAppendArgs args{.slots = slots,
                      .positions = positions,
                      .cos_sin = l.cos_sin.data,
                      .cos_sin_row = l.cos_sin_row,
                      .block_size = FastDiv(std::max<std::int64_t>(1, cache.block_size)),
                      .threads_per_head = FastDiv(plan.threads_per_head),
                      .units_per_head = static_cast<std::uint32_t>(cache.head_size / unit),
                      .rotary_units = static_cast<std::uint32_t>(l.rotary_dim / unit),
                      .norm_eps = l.norm_eps,
                      .per_element = 1.0f / static_cast<float>(cache.head_size),
                      .wide_cos_sin = l.cos_sin.dtype == DType::Float32,
                      .quantizes_query = core::is_quantized(l.query_out_dtype)};
  Segment& query = args.segments[0] = segment(l.query, l.num_heads, plan.query_heads_per_thread, l.q_scale, l.q_scale_stride);
  query.out = l.query_out.data;
  query.out_offset = l.query_out.token;
  query.out_head = l.query_out.head;
  query.heads_per_scale = FastDiv(l.heads_per_scale);
  const std::int64_t kv_heads = cache.num_slots() > 0 ? cache.num_heads : 0;
  for (int i = 0; i < 2; ++i) {
    const KVViews& from = i == 0 ? cache.k : cache.v;
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
  const ExtendedArgs extended{{args, positions, l.norm_after_rope}, {l.cache.k, l.cache.v}};
  if (plan.vecs_per_thread == 2) return launch_many_heads<In, Fp8>(extended, blocks, l, stream);
  const auto launch = [&]<Rope kRope, bool kNorm>() {
    if (l.extended())
      return launch_dependent(rope_append_vectorized<In, Fp8, kRope, kNorm, 1, true>, blocks, plan.threads, stream, extended);
    auto kernel = rope_append_vectorized<In, Fp8, kRope, kNorm, 1>;
    if constexpr (kRope != Rope::None || kNorm)  // else two heads have nothing to share
      if (plan.query_heads_per_thread == 2) kernel = rope_append_vectorized<In, Fp8, kRope, kNorm, 2>;
    launch_dependent(kernel, blocks, plan.threads, stream, args);
  };
  visit_transforms(l, launch);
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
