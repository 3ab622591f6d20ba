// reshape_and_cache_flash_dynamic: as reshape_and_cache_flash, with a scale for each token and head, found and stored on the
// way.
#include <bit>
#include <utility>

#include "../device/amax.h"
#include "cache.cuh"

namespace fp8kv::cuda {
namespace {

struct DynamicRuns {
  CacheSide sides[2];
  Slots slots;
  std::uint32_t count;  // heads of all tokens
  std::uint32_t head_size;
  std::uint32_t units_per_head;
  std::uint32_t threads_log2;  // threads of a head
  FastDiv num_heads;
  FastDiv block_size;
};

// A head stays in the registers of its threads, up to a warp, between the maximum and the division.
template <class Fp8, class In, int kUnits, bool kAligned>
__global__ void __launch_bounds__(256) append_dynamic_runs(const __grid_constant__ DynamicRuns p) {
  using Op = device::QuantizeOp<Fp8>;
  const CacheSide& side = p.sides[blockIdx.y];
  const std::uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x;
  const std::uint32_t threads = 1u << p.threads_log2, lane = thread & (threads - 1);
  const std::uint32_t index = thread >> p.threads_log2;
  std::uint32_t head = min(index, p.count - 1);  // whole warps take part in the maximum
  const std::uint32_t token = p.num_heads.divide(head);
  device::overlap_neighbors();
  const std::int64_t slot = p.slots[token];
  const In* from = row<const In>(side.heads, token, head);
  const auto to = [&] {
    auto offset = static_cast<std::uint32_t>(slot);
    const std::uint32_t block = p.block_size.divide(offset);
    return std::pair(row<Fp8>(side.cache, block, offset, head), side.scales.data + at(side.scales, block, offset, head));
  };

  Unit<In> raw[kUnits];
  Cut cuts[kUnits];
#pragma unroll
  for (int i = 0; i < kUnits; ++i) {
    const std::uint32_t unit = lane + i * threads;
    raw[i] = Unit<In>{};
    if constexpr (kAligned) {  // does not wait for the slot
      if (unit < p.units_per_head) raw[i] = device::load_aligned(from + unit * kUnit);
    } else {
      cuts[i] = cut_unit(to().first, unit, p.head_size);
      if (cuts[i].range.begin < cuts[i].range.end) raw[i] = device::load_any(from, cuts[i].first, p.head_size, cuts[i].range);
    }
  }
  std::uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < kUnits; ++i) bits = max(bits, device::max_bits(raw[i]));
  bits = device::lanes_max(bits, static_cast<int>(threads));
  if (__any_sync(0xffffffffu, bits >= device::kInfinityBits<In>)) {
    bits = 0;
#pragma unroll
    for (int i = 0; i < kUnits; ++i) bits = max(bits, device::finite_max_bits(raw[i]));
    bits = device::lanes_max(bits, static_cast<int>(threads));
  }
  const float scale = device::scale_of<Fp8>(device::magnitude<In>(bits));
  const auto prepared = Op::prepare(scale);
  if (index >= p.count || !p.slots.contains(slot)) return;
  const auto [result, stored_scale] = to();
  if (lane == 0) *stored_scale = scale;
#pragma unroll
  for (int i = 0; i < kUnits; ++i) {
    const std::uint32_t unit = lane + i * threads;
    if constexpr (kAligned) {
      if (unit < p.units_per_head) device::store_aligned(result + unit * kUnit, device::map_unit<Op, Fp8>(raw[i], prepared));
    } else if (cuts[i].range.begin < cuts[i].range.end) {
      device::store_range(result + cuts[i].first, device::map_unit<Op, Fp8>(raw[i], prepared), cuts[i].range);
    }
  }
}

// Anything: a warp a head, which is read twice.
template <class Fp8, class In>
__global__ void __launch_bounds__(256) append_dynamic_elements(const __grid_constant__ AppendElements p) {
  using Op = device::QuantizeOp<Fp8>;
  constexpr int kWarp = 32;
  const CacheSide& side = p.sides[blockIdx.y];
  const std::int64_t index = (std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / kWarp;
  if (index >= p.count) return;
  device::overlap_neighbors();
  const std::int64_t head = index % p.num_heads, token = index / p.num_heads, slot = p.slots[token];
  if (!p.slots.contains(slot)) return;
  const std::int64_t block = slot / p.block_size, offset = slot % p.block_size;
  const unsigned lane = threadIdx.x % kWarp;
  const In* from = row<const In>(side.heads, token, head);
  Fp8* to = row<Fp8>(side.cache, block, offset, head);

  std::uint32_t bits = 0;  // of fp32
  for (std::int64_t i = lane; i < p.head_size; i += kWarp) {
    const float x = decode(from[i * side.heads.dim]);
    if (is_finite(x)) bits = max(bits, __float_as_uint(x) & 0x7fffffffu);
  }
  const float scale = device::scale_of<Fp8>(__uint_as_float(__reduce_max_sync(0xffffffffu, bits)));
  const auto prepared = Op::prepare(scale);
  if (lane == 0) side.scales.data[at(side.scales, block, offset, head)] = scale;
  for (std::int64_t i = lane; i < p.head_size; i += kWarp)
    to[i * side.cache.dim] = device::map_element<Op, Fp8>(from[i * side.heads.dim], prepared);
}

template <class Fp8, class In>
void launch(const CacheLayout& layout, const Slots& slots, const CachePlan& plan, cudaStream_t stream) {
  const std::int64_t heads = layout.num_tokens * layout.num_heads;
  const dim3 grid = grid_of(heads * plan.threads_per_head, plan);
  if (plan.path == MapPath::Elements) {
    launch_dependent(append_dynamic_elements<Fp8, In>, grid, plan.threads, stream, AppendElements(layout, slots, heads));
    return;
  }
  const DynamicRuns params{
      .sides = {layout.key, layout.value},
      .slots = slots,
      .count = static_cast<std::uint32_t>(heads),
      .head_size = static_cast<std::uint32_t>(layout.head_size),
      .units_per_head = static_cast<std::uint32_t>(plan.units_per_head),
      .threads_log2 = static_cast<std::uint32_t>(std::countr_zero(static_cast<unsigned>(plan.threads_per_head))),
      .num_heads = FastDiv(layout.num_heads),
      .block_size = FastDiv(layout.block_size)};
  auto kernel = plan.aligned ? append_dynamic_runs<Fp8, In, 2, true> : append_dynamic_runs<Fp8, In, 2, false>;
  if (plan.units_per_thread == 4)
    kernel = plan.aligned ? append_dynamic_runs<Fp8, In, 4, true> : append_dynamic_runs<Fp8, In, 4, false>;
  launch_dependent(kernel, grid, plan.threads, stream, params);
}

}  // namespace

void run(const CacheAppendDynamic& problem, void* stream_handle) {
  constexpr const char* op = "reshape_and_cache_flash_dynamic";
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  const CacheLayout layout = validate(problem);
  check_cuda_device({op, "key", problem.key});
  if (!anything_to_append(op, problem.slot_mapping, layout, stream)) return;
  const CachePlan plan = plan_append_dynamic(layout);
  core::visit_real(layout.real, [&]<class In>(core::Type<In>) {
    core::visit_fp8(layout.element, [&]<class Fp8>(core::Type<Fp8>) {
      for_each_piece(layout, plan.tokens, problem.slot_mapping, [&](const CacheLayout& piece, const Slots& slots) {
        launch<Fp8, In>(piece, slots, plan, stream);
        check_launch(op);
      });
    });
  });
}

}  // namespace fp8kv::cuda
