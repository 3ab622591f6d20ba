// The kernels of dynamic quantization, one for each AmaxPath, and their launcher. Instantiated for one input type a source
// file.
#pragma once

#include <cooperative_groups.h>

#include <algorithm>
#include <bit>
#include <utility>

#include "../device/amax.h"
#include "amax.h"
#include "dynamic_quantize.h"
#include "fp8kv/fp8.h"
#include "map.cuh"
#include "quantize.h"

namespace fp8kv::cuda {

namespace cg = cooperative_groups;

template <class Fp8, class In>
__device__ __forceinline__ void quantize_unit(const Unit<In>& raw, Fp8* out, const Cut& cut,
                                              const typename device::QuantizeOp<Fp8>::Prepared& scale) {
  device::store_range(out + cut.first, device::map_unit<device::QuantizeOp<Fp8>, Fp8>(raw, scale), cut.range);
}

// One run, as whoever quantizes it sees it.
template <class Fp8, class In, bool kAligned>
struct Run {
  const In* in;
  Fp8* out;
  std::int64_t size;

  __device__ __forceinline__ Cut cut(std::uint32_t unit) const {
    if constexpr (kAligned) return {std::int64_t{unit} * kUnit, {}};
    return cut_unit(out, unit, size);
  }
  __device__ __forceinline__ Unit<In> load(const Cut& cut) const {
    if constexpr (kAligned) return device::load_aligned(in + cut.first);
    if (cut.range.begin >= cut.range.end) return {};
    return device::load_any(in, cut.first, size, cut.range);
  }
};

// The threads of a group hold its run in registers. kUnits: units a thread; 0 reads the run a second time instead. kLanes: the
// threads are a part of a warp, a power of two, and not the block. `works`: false for lanes beyond the last group.
template <int kUnits, bool kLanes, class Fp8, class In, bool kAligned>
__device__ __forceinline__ void quantize_group(const Run<Fp8, In, kAligned>& run, float* scale_out, const float* upper_bound,
                                               bool works, std::uint32_t lane, std::uint32_t threads, std::uint32_t units) {
  using Op = device::QuantizeOp<Fp8>;
  if (!works) units = 0;
  constexpr int kHeld = kUnits > 0 ? kUnits : 1;
  Unit<In> held[kHeld];
  std::uint32_t bits = 0;
  if constexpr (kUnits > 0) {
#pragma unroll
    for (int k = 0; k < kUnits; ++k) {
      const std::uint32_t unit = lane + k * threads;
      held[k] = unit < units ? run.load(run.cut(unit)) : Unit<In>{};
    }
#pragma unroll
    for (int k = 0; k < kUnits; ++k) bits = max(bits, device::finite_max_bits(held[k]));
  } else {
#pragma unroll 4
    for (std::uint32_t unit = lane; unit < units; unit += threads)
      bits = max(bits, device::finite_max_bits(run.load(run.cut(unit))));
  }
  const float bound = device::bound_of(upper_bound);
  if constexpr (kLanes) {
    bits = device::lanes_max(bits, static_cast<int>(threads));
  } else {
    __shared__ std::uint32_t scratch[32];
    bits = device::block_max(bits, scratch);
  }

  const float scale = device::scale_of<Fp8>(device::magnitude<In>(bits), bound);
  const auto prepared = Op::prepare(scale);
  if (lane == 0 && works) *scale_out = scale;
  if constexpr (kUnits > 0) {
#pragma unroll
    for (int k = 0; k < kUnits; ++k) {
      const std::uint32_t unit = lane + k * threads;
      if (unit >= units) break;
      const Cut cut = run.cut(unit);
      if (cut.range.begin < cut.range.end) quantize_unit(held[k], run.out, cut, prepared);
    }
  } else {
#pragma unroll 4
    for (std::uint32_t unit = lane; unit < units; unit += threads) {
      const Cut cut = run.cut(unit);
      if (cut.range.begin < cut.range.end) quantize_unit(run.load(cut), run.out, cut, prepared);
    }
  }
}

// AmaxPath::Groups. A group has 2^lanes_log2 lanes of a warp, or the block.
template <class Fp8, class In, int kUnits, bool kLanes, bool kAligned>
__global__ void __launch_bounds__(1024)
    quantize_groups(const In* __restrict__ input, Fp8* __restrict__ result, float* __restrict__ scales,
                    const float* __restrict__ upper_bound, const __grid_constant__ Walk walk, int lanes_log2) {
  const std::uint32_t threads = kLanes ? 1u << lanes_log2 : blockDim.x;
  const std::uint32_t group = kLanes ? (blockIdx.x * blockDim.x + threadIdx.x) >> lanes_log2 : blockIdx.x;
  device::overlap_neighbors();
  const Offsets at = walk.at<-1>(min(group, walk.count - 1));  // whole warps take part in the maximum
  quantize_group<kUnits, kLanes>(Run<Fp8, In, kAligned>{input + at.in, result + at.out, walk.run}, scales + at.scale,
                                 upper_bound, group < walk.count, kLanes ? threadIdx.x & (threads - 1) : threadIdx.x, threads,
                                 walk.units_per_run.divisor);
}

// The same where aligned runs lie one after the other, as do their scales: few parameters, and nothing to compute before the
// loads.
template <class Fp8, class In, int kUnits, bool kLanes>
__global__ void __launch_bounds__(1024)
    quantize_groups_gapless(const In* __restrict__ input, Fp8* __restrict__ result, float* __restrict__ scales,
                            const float* __restrict__ upper_bound, std::uint32_t groups, std::uint32_t units, int lanes_log2) {
  const std::uint32_t threads = kLanes ? 1u << lanes_log2 : blockDim.x;
  const std::uint32_t group = kLanes ? (blockIdx.x * blockDim.x + threadIdx.x) >> lanes_log2 : blockIdx.x;
  const std::uint32_t lane = kLanes ? threadIdx.x & (threads - 1) : threadIdx.x;
  const std::int64_t first = std::int64_t{min(group, groups - 1)} * units * kUnit;
  device::overlap_neighbors();
  quantize_group<kUnits, kLanes>(Run<Fp8, In, true>{input + first, result + first, 0}, scales + group, upper_bound,
                                 !kLanes || group < groups, lane, threads, units);
}

// AmaxPath::Repeated: one run, one scale. Every block finds the maximum of all of it, which takes less time than asking other
// blocks, and quantizes its own kRepeatedShare units.
constexpr int kRepeatedThreads = 1024;
constexpr int kRepeatedShare = 512;

template <class Fp8, class In, int kUnits, bool kAligned>
__global__ void __launch_bounds__(kRepeatedThreads)
    quantize_repeated(const In* __restrict__ input, Fp8* __restrict__ result, float* __restrict__ scale_out,
                      const float* __restrict__ upper_bound, std::int64_t size, std::uint32_t units) {
  using Op = device::QuantizeOp<Fp8>;
  __shared__ std::uint32_t scratch[32];
  device::overlap_neighbors();
  const Run<Fp8, In, kAligned> run{input, result, size};
  const std::uint32_t own_unit = blockIdx.x * kRepeatedShare + threadIdx.x;
  const bool quantizes = threadIdx.x < kRepeatedShare && own_unit < units;
  const Cut cut = run.cut(own_unit);
  const Unit<In> own = quantizes ? run.load(cut) : Unit<In>{};
  Unit<In> held[kUnits];
#pragma unroll
  for (int k = 0; k < kUnits; ++k) {
    const std::uint32_t unit = threadIdx.x + k * kRepeatedThreads;
    held[k] = unit < units ? run.load(run.cut(unit)) : Unit<In>{};
  }
  const float bound = device::bound_of(upper_bound);
  std::uint32_t bits = 0;
#pragma unroll
  for (int k = 0; k < kUnits; ++k) bits = max(bits, device::finite_max_bits(held[k]));
  bits = device::block_max(bits, scratch);
  const float scale = device::scale_of<Fp8>(device::magnitude<In>(bits), bound);
  if (own_unit == 0) *scale_out = scale;
  if (quantizes && cut.range.begin < cut.range.end) quantize_unit(own, result, cut, Op::prepare(scale));
}

// AmaxPath::Cluster: one run, one scale, one thread block cluster. Every block sends its maximum to all others.
template <class Fp8, class In, int kUnits, bool kAligned>
__global__ void __launch_bounds__(1024)
    quantize_cluster(const In* __restrict__ input, Fp8* __restrict__ result, float* __restrict__ scale_out,
                     const float* __restrict__ upper_bound, std::int64_t size, std::uint32_t units) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  using Op = device::QuantizeOp<Fp8>;
  __shared__ std::uint32_t scratch[32];
  __shared__ std::uint32_t maxima[16];
  cg::cluster_group cluster = cg::this_cluster();
  auto started = cluster.barrier_arrive();
  const std::uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x;
  const std::uint32_t stride = gridDim.x * blockDim.x;
  const Run<Fp8, In, kAligned> run{input, result, size};
  const float bound = device::bound_of(upper_bound);

  Unit<In> held[kUnits];
#pragma unroll
  for (int k = 0; k < kUnits; ++k) {
    const std::uint32_t unit = thread + k * stride;
    held[k] = unit < units ? run.load(run.cut(unit)) : Unit<In>{};
  }
  std::uint32_t bits = 0;
#pragma unroll
  for (int k = 0; k < kUnits; ++k) bits = max(bits, device::finite_max_bits(held[k]));
  bits = device::block_max(bits, scratch);
  cluster.barrier_wait(std::move(started));  // the shared memory of all blocks is there
  if (threadIdx.x < gridDim.x) *cluster.map_shared_rank(&maxima[blockIdx.x], threadIdx.x) = bits;
  cluster.sync();
  const unsigned lane = threadIdx.x % 32;
  bits = __reduce_max_sync(0xffffffffu, lane < gridDim.x ? maxima[lane] : 0u);

  const float scale = device::scale_of<Fp8>(device::magnitude<In>(bits), bound);
  if (thread == 0) *scale_out = scale;
  const auto prepared = Op::prepare(scale);
#pragma unroll
  for (int k = 0; k < kUnits; ++k) {
    const std::uint32_t unit = thread + k * stride;
    if (unit >= units) break;
    const Cut cut = run.cut(unit);
    if (cut.range.begin < cut.range.end) quantize_unit(held[k], result, cut, prepared);
  }
#endif
}

// AmaxPath::Whole: one run, one scale, all multiprocessors. Between the two passes a thread keeps its first units in registers
// and the next `slots` in shared memory; the rest is read again, last first, while the L2 cache still has it. The scale itself
// collects the maximum: dynamic_scale never decreases, so the largest scale of the blocks is the scale of all.
constexpr int kWholeThreads = 512;
constexpr int kWholeBlocks = 2;  // a multiprocessor
template <class In>
constexpr int kWholeUnits = 16 / sizeof(In);

template <class Fp8, class In, bool kAligned>
__global__ void __launch_bounds__(kWholeThreads, kWholeBlocks)
    quantize_whole(const In* __restrict__ input, Fp8* __restrict__ result, float* __restrict__ scale_out,
                   const float* __restrict__ upper_bound, std::int64_t size, std::uint32_t units, int slots) {
  using Op = device::QuantizeOp<Fp8>;
  constexpr int kHeld = kWholeUnits<In>;
  extern __shared__ __align__(16) char shared[];
  __shared__ std::uint32_t scratch[32];
  Unit<In>* kept = reinterpret_cast<Unit<In>*>(shared) + threadIdx.x;  // slot k at kept[k * kWholeThreads]
  const cg::grid_group grid = cg::this_grid();
  const std::uint32_t thread = blockIdx.x * kWholeThreads + threadIdx.x;
  const std::uint32_t stride = gridDim.x * kWholeThreads;
  const std::uint32_t first_kept = thread + kHeld * stride;
  const std::uint32_t first_rest = first_kept + slots * stride;
  const Run<Fp8, In, kAligned> run{input, result, size};

  if (thread == 0) *scale_out = 0.0f;
  auto zeroed = grid.barrier_arrive();
  Unit<In> held[kHeld];
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    const std::uint32_t unit = thread + k * stride;
    held[k] = unit < units ? run.load(run.cut(unit)) : Unit<In>{};
  }
  std::uint32_t bits = 0;
  int slot = 0;
#pragma unroll 4
  for (std::uint32_t unit = first_kept; unit < min(units, first_rest); unit += stride, ++slot) {
    const Unit<In> raw = run.load(run.cut(unit));
    kept[slot * kWholeThreads] = raw;
    bits = max(bits, device::finite_max_bits(raw));
  }
#pragma unroll 8
  for (std::uint32_t unit = first_rest; unit < units; unit += stride)
    bits = max(bits, device::finite_max_bits(run.load(run.cut(unit))));
#pragma unroll
  for (int k = 0; k < kHeld; ++k) bits = max(bits, device::finite_max_bits(held[k]));
  bits = device::block_max(bits, scratch);
  grid.barrier_wait(std::move(zeroed));
  if (threadIdx.x == 0)
    device::atomic_max(scale_out, device::scale_of<Fp8>(device::magnitude<In>(bits), device::bound_of(upper_bound)));
  grid.sync();  // the scale is final

  const auto prepared = Op::prepare(__ldcg(scale_out));
  const auto finish = [&](std::uint32_t unit, const Unit<In>& raw, const Cut& cut) {
    if (cut.range.begin < cut.range.end) quantize_unit(raw, result, cut, prepared);
  };
  if (units > first_rest) {
    const std::uint32_t last = first_rest + (units - 1 - first_rest) / stride * stride;
#pragma unroll 4
    for (std::uint32_t unit = last; unit >= first_rest; unit -= stride) {
      const Cut cut = run.cut(unit);
      finish(unit, run.load(cut), cut);
    }
  }
  slot = 0;
#pragma unroll 2
  for (std::uint32_t unit = first_kept; unit < min(units, first_rest); unit += stride, ++slot)
    finish(unit, kept[slot * kWholeThreads], run.cut(unit));
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    const std::uint32_t unit = thread + k * stride;
    if (unit < units) finish(unit, held[k], run.cut(unit));
  }
}

template <class Fp8, class In>
struct DynamicLauncher {
  const DynamicQuantize& problem;
  const Layout& layout;
  cudaStream_t stream;
  const In* input = static_cast<const In*>(problem.input.data);
  Fp8* result = static_cast<Fp8*>(problem.result.data);
  float* scale = static_cast<float*>(problem.scale.data);
  const float* upper_bound = problem.scale_ub ? static_cast<const float*>(problem.scale_ub->data) : nullptr;

  DynamicPlan plan(const core::Piece& piece) const {
    const DeviceLimits& limits = device_limits();
    return plan_dynamic(piece.layout, shifted(problem.input, piece.in), shifted(problem.result, piece.out),
                        limits.multiprocessors, limits.max_cluster);
  }

  // One launch, for a piece whose runs are its groups.
  void operator()(const char* op, const core::Piece& piece) const {
    const DynamicPlan planned = plan(piece);
    switch (planned.units_per_thread) {
      case 1: launch<1>(piece, planned); break;
      case 2: launch<2>(piece, planned); break;
      case 4: launch<4>(piece, planned); break;
      case 8: launch<8>(piece, planned); break;
      default: launch<0>(piece, planned); break;
    }
    check_launch(op);
  }

  void two_passes(const char* op) const {
    fill_groups(op, layout, scale, min_scale(DTypeOf<Fp8>::value), stream);
    if (layout.numel == 0) return;
    raise_to_amax(op, layout, problem.input, scale, DTypeOf<Fp8>::value, upper_bound, stream);
    quantize_with(op, layout, problem.input, problem.result, problem.scale, stream);
  }

 private:
  template <int kUnits>
  void launch(const core::Piece& piece, const DynamicPlan& plan) const {
    if (plan.path == AmaxPath::Whole) return launch_whole(piece, plan);
    if constexpr (kUnits > 0) {
      if (plan.path == AmaxPath::Cluster) return launch_cluster<kUnits>(piece, plan);
      if (plan.path == AmaxPath::Repeated) return launch_repeated<kUnits>(piece, plan);
    }
    if (plan.lanes_per_group > 0)
      launch_groups<1, true>(piece, plan);
    else
      launch_groups<kUnits, false>(piece, plan);
  }

  template <int kUnits, bool kLanes>
  void launch_groups(const core::Piece& piece, const DynamicPlan& plan) const {
    const Layout& part = piece.layout;
    const std::int64_t groups = part.numel / part.run().size;
    const int lanes_log2 = std::countr_zero(static_cast<unsigned>(plan.lanes_per_group));
    const auto start = [&](auto kernel, const auto&... params) {
      launch_dependent(kernel, static_cast<unsigned>(plan.blocks), plan.threads, stream, input + piece.in, result + piece.out,
                       scale + piece.scale, upper_bound, params..., lanes_log2);
    };
    if constexpr (kUnits == 1 || kUnits == 2)
      if (plan.gapless)
        return start(quantize_groups_gapless<Fp8, In, kUnits, kLanes>, static_cast<std::uint32_t>(groups),
                     static_cast<std::uint32_t>(plan.units_per_run));
    const Walk walk = Walk::over(part, part.ndim - 1, plan.units_per_run, groups);
    start(plan.aligned ? quantize_groups<Fp8, In, kUnits, kLanes, true> : quantize_groups<Fp8, In, kUnits, kLanes, false>,
          walk);
  }

  template <int kUnits>
  void launch_repeated(const core::Piece& piece, const DynamicPlan& plan) const {
    const auto kernel = plan.aligned ? quantize_repeated<Fp8, In, kUnits, true> : quantize_repeated<Fp8, In, kUnits, false>;
    launch_dependent(kernel, static_cast<unsigned>(plan.blocks), plan.threads, stream, input + piece.in, result + piece.out,
                     scale + piece.scale, upper_bound, piece.layout.run().size, static_cast<std::uint32_t>(plan.units_per_run));
  }

  template <int kUnits>
  void launch_cluster(const core::Piece& piece, const DynamicPlan& plan) const {
    const auto kernel = plan.aligned ? quantize_cluster<Fp8, In, kUnits, true> : quantize_cluster<Fp8, In, kUnits, false>;
    if (plan.blocks > 8) cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    cudaLaunchAttribute cluster_size{};
    cluster_size.id = cudaLaunchAttributeClusterDimension;
    cluster_size.val.clusterDim = {static_cast<unsigned>(plan.blocks), 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = static_cast<unsigned>(plan.blocks);
    config.blockDim = plan.threads;
    config.stream = stream;
    config.attrs = &cluster_size;
    config.numAttrs = 1;
    cudaLaunchKernelEx(&config, kernel, input + piece.in, result + piece.out, scale + piece.scale, upper_bound,
                       piece.layout.run().size, static_cast<std::uint32_t>(plan.units_per_run));
  }

  void launch_whole(const core::Piece& piece, const DynamicPlan& plan) const {
    const auto kernel = plan.aligned ? quantize_whole<Fp8, In, true> : quantize_whole<Fp8, In, false>;
    const std::int64_t needed = core::ceil_div(plan.units_per_run, kWholeThreads);
    const auto blocks = static_cast<unsigned>(std::min<std::int64_t>(needed, kWholeBlocks * multiprocessors()));
    // Shared memory for what registers can't hold; 2 KiB a block stay for static and reserved memory.
    constexpr int kSlotBytes = kWholeThreads * sizeof(Unit<In>);
    const std::int64_t beyond_registers = core::ceil_div(needed, blocks) - kWholeUnits<In>;
    const int most = (device_limits().shared_memory / kWholeBlocks - 2048) / kSlotBytes;
    int slots = static_cast<int>(std::clamp<std::int64_t>(beyond_registers, 0, most));
    if (slots > 0) cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, slots * kSlotBytes);

    const In* in = input + piece.in;
    Fp8* out = result + piece.out;
    float* scale_out = scale + piece.scale;
    const float* bound = upper_bound;
    std::int64_t size = piece.layout.run().size;
    auto units = static_cast<std::uint32_t>(plan.units_per_run);
    void* arguments[] = {&in, &out, &scale_out, &bound, &size, &units, &slots};
    cudaLaunchCooperativeKernel(reinterpret_cast<void*>(kernel), blocks, kWholeThreads, arguments, slots * kSlotBytes, stream);
  }
};

template <class In>
void launch_dynamic(const DynamicQuantize& problem, const Layout& layout, cudaStream_t stream) {
  constexpr const char* op = "dynamic_scaled_fp8_quant";
  core::visit_fp8(problem.result.dtype, [&]<class Fp8>(core::Type<Fp8>) {
    const DynamicLauncher<Fp8, In> launcher{problem, layout, stream};
    if (layout.numel == 0) return launcher.two_passes(op);
    bool one_pass = true;
    core::for_each_even_part(layout,
                             [&](const core::Piece& part) { one_pass &= launcher.plan(part).path != AmaxPath::TwoPasses; });
    if (!one_pass) return launcher.two_passes(op);
    core::for_each_even_part(layout, [&](const core::Piece& part) {
      core::for_each_piece(part, kMaxPiece, [&](const core::Piece& piece) { launcher(op, piece); });
    });
  });
}

}  // namespace fp8kv::cuda
