// reshape_and_cache_flash: key and value into the slots of their tokens, with given scales.
#include "cache.cuh"

namespace fp8kv::cuda {
namespace {

struct AppendRuns {
  CacheSide sides[2];
  Slots slots;
  std::uint32_t count;  // threads with work
  std::uint32_t head_size;
  FastDiv units_per_token;
  FastDiv units_per_head;
  FastDiv block_size;
};

// One unit a thread.
template <class Op, class In, class Out, bool kAligned>
__global__ void __launch_bounds__(256) append_runs(const __grid_constant__ AppendRuns p) {
  const CacheSide& side = p.sides[blockIdx.y];
  std::uint32_t unit = blockIdx.x * blockDim.x + threadIdx.x;
  if (unit >= p.count) return;
  device::overlap_neighbors();
  const std::uint32_t token = p.units_per_token.divide(unit);
  const std::int64_t slot = p.slots[token];
  const std::uint32_t head = p.units_per_head.divide(unit);
  const In* from = row<const In>(side.heads, token, head);
  const auto scale = Op::prepare(__ldg(side.scales.data + head * side.scales.head));
  Unit<Out> out;
  if constexpr (kAligned)  // neither the loads nor the arithmetic wait for the slot
    out = device::map_unit<Op, Out>(device::load_aligned(from + unit * kUnit), scale);
  if (!p.slots.contains(slot)) return;
  auto offset = static_cast<std::uint32_t>(slot);
  const std::uint32_t block = p.block_size.divide(offset);
  Out* to = row<Out>(side.cache, block, offset, head);
  if constexpr (kAligned) {
    device::store_aligned(to + unit * kUnit, out);
  } else {
    const Cut cut = cut_unit(to, unit, p.head_size);
    if (cut.range.begin >= cut.range.end) return;
    const Unit<In> raw = device::load_any(from, cut.first, p.head_size, cut.range);
    device::store_range(to + cut.first, device::map_unit<Op, Out>(raw, scale), cut.range);
  }
}

// Anything: one element a thread.
template <class Op, class In, class Out>
__global__ void __launch_bounds__(256) append_elements(const __grid_constant__ AppendElements p) {
  const CacheSide& side = p.sides[blockIdx.y];
  const std::int64_t element = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (element >= p.count) return;
  device::overlap_neighbors();
  const std::int64_t dim = element % p.head_size;
  const std::int64_t head = element / p.head_size % p.num_heads;
  const std::int64_t token = element / p.head_size / p.num_heads;
  const std::int64_t slot = p.slots[token];
  if (!p.slots.contains(slot)) return;
  const auto scale = Op::prepare(__ldg(side.scales.data + head * side.scales.head));
  const In raw = row<const In>(side.heads, token, head)[dim * side.heads.dim];
  Out* to = row<Out>(side.cache, slot / p.block_size, slot % p.block_size, head);
  to[dim * side.cache.dim] = device::map_element<Op, Out>(raw, scale);
}

template <class Op, class In, class Out>
void launch(const CacheLayout& layout, const Slots& slots, const CachePlan& plan, cudaStream_t stream) {
  if (plan.path == MapPath::Elements) {
    const AppendElements params(layout, slots, layout.num_tokens * layout.num_heads * layout.head_size);
    launch_dependent(append_elements<Op, In, Out>, grid_of(params.count, plan), plan.threads, stream, params);
    return;
  }
  const std::int64_t units_per_token = layout.num_heads * plan.units_per_head;
  const AppendRuns params{.sides = {layout.key, layout.value},
                          .slots = slots,
                          .count = static_cast<std::uint32_t>(layout.num_tokens * units_per_token),
                          .head_size = static_cast<std::uint32_t>(layout.head_size),
                          .units_per_token = FastDiv(units_per_token),
                          .units_per_head = FastDiv(plan.units_per_head),
                          .block_size = FastDiv(layout.block_size)};
  const auto kernel = plan.aligned ? append_runs<Op, In, Out, true> : append_runs<Op, In, Out, false>;
  launch_dependent(kernel, grid_of(params.count, plan), plan.threads, stream, params);
}

template <class Op, class In, class Out>
void launch_pieces(const char* op, const CacheLayout& layout, const TensorView& slot_mapping, cudaStream_t stream) {
  const CachePlan plan = plan_append(layout);
  for_each_piece(layout, plan.tokens, slot_mapping, [&](const CacheLayout& piece, const Slots& slots) {
    launch<Op, In, Out>(piece, slots, plan, stream);
    check_launch(op);
  });
}

}  // namespace

void run(const CacheAppend& problem, void* stream_handle) {
  constexpr const char* op = "reshape_and_cache_flash";
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  const CacheLayout layout = validate(problem);
  check_cuda_device({op, "key", problem.key});
  if (!anything_to_append(op, problem.slot_mapping, layout, stream)) return;
  core::visit_real(layout.real, [&]<class In>(core::Type<In>) {
    if (is_fp8(layout.element)) {
      core::visit_fp8(layout.element, [&]<class Out>(core::Type<Out>) {
        launch_pieces<device::QuantizeOp<Out>, In, Out>(op, layout, problem.slot_mapping, stream);
      });
    } else {
      core::visit_real(layout.element, [&]<class Out>(core::Type<Out>) {
        launch_pieces<device::CopyOp, In, Out>(op, layout, problem.slot_mapping, stream);
      });
    }
  });
}

}  // namespace fp8kv::cuda
