// reshape_and_cache_flash_dynamic: as reshape_and_cache_flash, with one scale per token and head, found and stored on the way.
// With offsets, everything is about the differences, as fp32.
#include <bit>
#include <utility>

#include "cuda/cache/cache.cuh"
#include "device/reduce.cuh"

namespace fp8kv::cuda {
namespace {

struct AppendDynamicArgs {
  KVViews kv[2];
  TokenIndices slots;
  std::uint32_t count;  // heads of all tokens, or pairs of them
  std::uint32_t head_size;
  std::uint32_t vecs_per_head;
  std::uint32_t threads_log2;  // threads of a head
  FastDiv num_heads;           // of a token, or pairs
  FastDiv block_size;
};

// A vector less its offsets.
template <class In>
__device__ __forceinline__ Vec<float> difference(const Vec<In>& raw, const OffsetView& view, std::uint32_t head,
                                                 Columns columns) {
  float values[kVecSize], offsets[kVecSize];
  device::unpack(raw, values);
  load_offsets<In>(view, head, columns, offsets);
#pragma unroll
  for (int i = 0; i < kVecSize; ++i) values[i] = __fsub_rn(values[i], offsets[i]);
  return device::pack<float>(values);
}

// A head stays in the registers of its threads, up to a warp, between the maximum and the division. kOffsets: aligned.
template <class Fp8, class In, int kVecs, bool kAligned, bool kOffsets = false>
__global__ void __launch_bounds__(256) append_dynamic_vectorized(const __grid_constant__ AppendDynamicArgs p) {
  using Op = device::QuantizeOp<Fp8>;
  const KVViews& kv = p.kv[blockIdx.y];
  const std::uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x;
  const std::uint32_t threads = 1u << p.threads_log2, lane = thread & (threads - 1);
  const std::uint32_t index = thread >> p.threads_log2;
  const auto [token, head] = p.num_heads.divmod(min(index, p.count - 1));  // whole warps take part in the maximum
  device::wait_then_release();
  const std::int64_t slot = p.slots[token];
  const In* from = row<const In>(kv.rows, token, head);
  const auto to = [&, head = head] {
    const auto [block, offset] = p.block_size.divmod(static_cast<std::uint32_t>(slot));
    return std::pair(row<Fp8>(kv.cache, block, offset, head), kv.scales.data + at(kv.scales, block, offset, head));
  };

  Vec<In> raw[kVecs];
  Slice slices[kVecs];
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    const std::uint32_t vec = lane + i * threads;
    raw[i] = Vec<In>{};
    if constexpr (kAligned) {  // does not wait for the slot
      if (vec < p.vecs_per_head) raw[i] = device::load_aligned(from + vec * kVecSize);
    } else {
      slices[i] = slice_of(to().first, vec, p.head_size);
      if (slices[i].range.begin < slices[i].range.end)
        raw[i] = device::load_any(from, slices[i].first, p.head_size, slices[i].range);
    }
  }
  const auto quantize = [&]<class Held>(const Vec<Held>(&held)[kVecs]) {
    std::uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < kVecs; ++i) bits = max(bits, device::max_bits(held[i]));
    bits = device::lanes_max(bits, static_cast<int>(threads));
    if (__any_sync(0xffffffffu, bits >= device::kInfinityBits<Held>)) {
      bits = 0;
#pragma unroll
      for (int i = 0; i < kVecs; ++i) bits = max(bits, device::finite_max_bits(held[i]));
      bits = device::lanes_max(bits, static_cast<int>(threads));
    }
    const float scale = device::fast_dynamic_scale<Fp8>(device::magnitude<Held>(bits));
    const auto prepared = Op::prepare(scale);
    if (index >= p.count || !p.slots.contains(slot)) return;
    const auto [result, stored_scale] = to();
    if (lane == 0) *stored_scale = scale;
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      [[maybe_unused]] const std::uint32_t vec = lane + i * threads;
      if constexpr (kAligned) {
        if (vec < p.vecs_per_head)
          device::store_aligned(result + vec * kVecSize, device::convert_vec<Op, Fp8>(held[i], prepared));
      } else if (slices[i].range.begin < slices[i].range.end) {
        device::store_range(result + slices[i].first, device::convert_vec<Op, Fp8>(held[i], prepared), slices[i].range);
      }
    }
  };
  if constexpr (kOffsets) {
    Vec<float> differences[kVecs] = {};
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      const std::uint32_t vec = lane + i * threads;
      if (vec < p.vecs_per_head) differences[i] = difference(raw[i], kv.offsets, head, {vec * kVecSize});
    }
    quantize(differences);
  } else {
    quantize(raw);
  }
}

// Of 16 neighboring elements.
template <class T>
struct Neighbors {
  Vec<T> halves[2];

  __device__ __forceinline__ static Neighbors load(const T* from) {
    return {device::load_aligned(from), device::load_aligned(from + kVecSize)};
  }
};

// The largest magnitude bits of 16-bit values, without those that are not finite if `only_finite`.
template <class In>
__device__ __forceinline__ std::uint32_t max_bits(const Neighbors<In>& x, bool only_finite) {
  if (only_finite) return max(device::finite_max_bits(x.halves[0]), device::finite_max_bits(x.halves[1]));
  std::uint32_t m = 0;
#pragma unroll
  for (const Vec<In>& half : x.halves) {
#pragma unroll
    for (int i = 0; i < Vec<In>::kWords; ++i) m = __vmaxu2(m, half.words[i] & 0x7fff7fffu);
  }
  return max(m & 0xffffu, m >> 16);
}

// Where all is aligned to 16 bytes: kLanes threads hold two neighboring heads of 128 elements, whose maxima are the halves of
// one word.
template <class Fp8, class In>
__global__ void __launch_bounds__(128, 8) append_dynamic_pairs(const __grid_constant__ AppendDynamicArgs p) {
  constexpr int kLanes = 8;
  using Op = device::QuantizeOp<Fp8>;
  const KVViews& kv = p.kv[blockIdx.y];
  const std::uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x, lane = thread % kLanes, index = thread / kLanes;
  const auto [token, pair] = p.num_heads.divmod(min(index, p.count - 1));  // whole warps take part in the maximum
  const std::uint32_t head = 2 * pair, column = lane * 2 * kVecSize;
  device::wait_then_release();
  const std::int64_t slot = p.slots[token];
  const In* from = row<const In>(kv.rows, token, head) + column;
  Neighbors<In> raw[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) raw[h] = Neighbors<In>::load(from + h * kv.rows.head);

  const auto largest = [&](bool only_finite) {
    std::uint32_t bits = max_bits(raw[0], only_finite) | max_bits(raw[1], only_finite) << 16;
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) bits = __vmaxu2(bits, __shfl_xor_sync(0xffffffffu, bits, step));
    return bits;
  };
  std::uint32_t bits = largest(false);
  constexpr std::uint32_t kInfinity = device::kInfinityBits<In>;
  if (__any_sync(0xffffffffu, (bits & 0xffffu) >= kInfinity || bits >> 16 >= kInfinity)) bits = largest(true);
  if (index >= p.count || !p.slots.contains(slot)) return;

  const auto [block, offset] = p.block_size.divmod(static_cast<std::uint32_t>(slot));
  Fp8* to = row<Fp8>(kv.cache, block, offset, head) + column;
  float* stored_scale = kv.scales.data + at(kv.scales, block, offset, head);
  float scales[2];
#pragma unroll
  for (int h = 0; h < 2; ++h)
    scales[h] = device::fast_dynamic_scale<Fp8>(device::magnitude<In>(h == 0 ? bits & 0xffffu : bits >> 16));
  if (lane < 2) stored_scale[lane * kv.scales.head] = lane == 0 ? scales[0] : scales[1];  // of neighboring heads at once
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const auto prepared = Op::prepare(scales[h]);
    std::uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Vec<Fp8> half = device::convert_vec<Op, Fp8>(raw[h].halves[i], prepared);
      words[2 * i] = half.words[0], words[2 * i + 1] = half.words[1];
    }
    *reinterpret_cast<uint4*>(to + h * kv.cache.head) = {words[0], words[1], words[2], words[3]};
  }
}

// Anything: one warp per head, which is read twice.
template <class Fp8, class In, bool kOffsets>
__global__ void __launch_bounds__(256) append_dynamic_scalar(const __grid_constant__ ScalarAppendArgs p) {
  using Op = device::QuantizeOp<Fp8>;
  constexpr int kWarp = 32;
  const KVViews& kv = p.kv[blockIdx.y];
  const std::int64_t index = (std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / kWarp;
  if (index >= p.count) return;
  device::wait_then_release();
  const std::int64_t head = index % p.num_heads, token = index / p.num_heads, slot = p.slots[token];
  if (!p.slots.contains(slot)) return;
  const std::int64_t block = slot / p.block_size, offset = slot % p.block_size;
  const unsigned lane = threadIdx.x % kWarp;
  const In* from = row<const In>(kv.rows, token, head);
  Fp8* to = row<Fp8>(kv.cache, block, offset, head);

  const auto value = [&](std::int64_t i) {
    const In raw = from[i * kv.rows.dim];
    if constexpr (kOffsets)
      return __fsub_rn(decode(raw), offset_of<In>(kv.offsets, head, i));
    else
      return raw;
  };
  std::uint32_t bits = 0;  // of fp32
  for (std::int64_t i = lane; i < p.head_size; i += kWarp) {
    const float x = decode(value(i));
    if (is_finite(x)) bits = max(bits, __float_as_uint(x) & 0x7fffffffu);
  }
  const float scale = device::fast_dynamic_scale<Fp8>(__uint_as_float(__reduce_max_sync(0xffffffffu, bits)));
  const auto prepared = Op::prepare(scale);
  if (lane == 0) kv.scales.data[at(kv.scales, block, offset, head)] = scale;
  for (std::int64_t i = lane; i < p.head_size; i += kWarp)
    to[i * kv.cache.dim] = device::convert_element<Op, Fp8>(value(i), prepared);
}

template <class Fp8, class In>
void launch_append_dynamic(const CacheLayout& layout, const TokenIndices& slots, const CachePlan& plan, cudaStream_t stream) {
  const std::int64_t heads = layout.num_tokens * layout.num_heads / plan.heads_per_thread;
  const dim3 grid = grid_of(heads * plan.threads_per_head, plan, layout);
  if (plan.path == KernelPath::Scalar) {
    const auto kernel = layout.has_channels() ? append_dynamic_scalar<Fp8, In, true> : append_dynamic_scalar<Fp8, In, false>;
    launch_dependent(kernel, grid, plan.threads, stream, ScalarAppendArgs(layout, slots, heads));
    return;
  }
  const AppendDynamicArgs params{
      .kv = {layout.k, layout.v},
      .slots = slots,
      .count = static_cast<std::uint32_t>(heads),
      .head_size = static_cast<std::uint32_t>(layout.head_size),
      .vecs_per_head = static_cast<std::uint32_t>(plan.vecs_per_head),
      .threads_log2 = static_cast<std::uint32_t>(std::countr_zero(static_cast<unsigned>(plan.threads_per_head))),
      .num_heads = FastDiv(layout.num_heads / plan.heads_per_thread),
      .block_size = FastDiv(layout.block_size)};
  const auto choose = [&]<int kVecs>() {
    if (plan.path == KernelPath::PerColumn) return append_dynamic_vectorized<Fp8, In, kVecs, true, true>;
    return plan.aligned ? append_dynamic_vectorized<Fp8, In, kVecs, true> : append_dynamic_vectorized<Fp8, In, kVecs, false>;
  };
  auto kernel = plan.vecs_per_thread == 4 ? choose.template operator()<4>() : choose.template operator()<2>();
  if constexpr (sizeof(In) == 2)
    if (plan.heads_per_thread == 2) kernel = append_dynamic_pairs<Fp8, In>;
  launch_dependent(kernel, grid, plan.threads, stream, params);
}

}  // namespace

void run(const CacheAppendDynamic& problem, Stream stream) {
  constexpr const char* op = "reshape_and_cache_flash_dynamic";
  const CacheLayouts layouts = core::lower(problem);
  core::check_on_device({op, "key", problem.key}, current_device());
  if (layouts.empty()) return;
  if (debugging(stream)) debug_check_slots(op, problem.slot_mapping, layouts.front(), stream);
  if (layouts.front().num_slots() == 0) return;
  for (const CacheLayout& layout : layouts) {
    if (layout.empty()) continue;
    const CachePlan plan = core::plan_append_dynamic(layout);
    core::visit_real(layout.row_dtype, [&]<class In>(core::Type<In>) {
      core::visit_quantized(layout.cache_dtype, [&]<class Out>(core::Type<Out>) {
        for_each_token_chunk(layout, plan.tokens, problem.slot_mapping,
                             [&](const CacheLayout& chunk, const TokenIndices& slots) {
                               launch_append_dynamic<Out, In>(chunk, slots, plan, stream);
                               check_launch(op);
                             });
      });
    });
  }
}

}  // namespace fp8kv::cuda
