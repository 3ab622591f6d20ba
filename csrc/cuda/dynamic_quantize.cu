#include <cooperative_groups.h>

#include "../device/amax.h"
#include "amax.h"
#include "fp8kv/fp8.h"
#include "map.cuh"
#include "quantize.h"

namespace fp8kv::cuda {
namespace {

namespace cg = cooperative_groups;

__device__ __forceinline__ float bound_of(const float* upper_bound) {
  return upper_bound ? __ldg(upper_bound) : __int_as_float(0x7f800000);
}

template <class Fp8, class In>
__device__ __forceinline__ void quantize_unit(const Unit<In>& raw, Fp8* out, const Cut& cut,
                                              const typename device::QuantizeOp<Fp8>::Prepared& scale) {
  float values[kUnit];
  device::unpack(raw, values);
  device::apply<device::QuantizeOp<Fp8>>(scale, values);
  device::store_range(out + cut.first, device::pack<Fp8>(values), cut.range);
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

// AmaxPath::Groups: `threads_per_group` threads (all of the block, or a power of two up to 32) hold one run in registers.
// kUnits: units a thread; 0 reads the run a second time instead.
template <class Fp8, class In, int kUnits, bool kAligned>
__global__ void __launch_bounds__(1024)
    quantize_groups(const In* __restrict__ input, Fp8* __restrict__ result, float* __restrict__ scales,
                    const float* __restrict__ upper_bound, const __grid_constant__ Walk walk, int threads_per_group) {
  using Op = device::QuantizeOp<Fp8>;
  __shared__ std::uint32_t scratch[32];
  const std::uint32_t lane = threadIdx.x % threads_per_group;
  const std::uint32_t group = blockIdx.x * (blockDim.x / threads_per_group) + threadIdx.x / threads_per_group;
  const std::uint32_t units = group < walk.count ? walk.units_per_run.divisor : 0;
  const Offsets at = walk.at<-1>(min(group, walk.count - 1));
  const Run<Fp8, In, kAligned> run{input + at.in, result + at.out, walk.run};
  const float bound = bound_of(upper_bound);

  constexpr int kHeld = kUnits > 0 ? kUnits : 1;
  Unit<In> held[kHeld];
  std::uint32_t bits = 0;
  if constexpr (kUnits > 0) {
#pragma unroll
    for (int k = 0; k < kUnits; ++k) {
      const std::uint32_t unit = lane + k * threads_per_group;
      held[k] = unit < units ? run.load(run.cut(unit)) : Unit<In>{};
    }
#pragma unroll
    for (int k = 0; k < kUnits; ++k) bits = max(bits, device::finite_max_bits(held[k]));
  } else {
#pragma unroll 4
    for (std::uint32_t unit = lane; unit < units; unit += threads_per_group)
      bits = max(bits, device::finite_max_bits(run.load(run.cut(unit))));
  }
  bits = threads_per_group > 32 ? device::block_max(bits, scratch) : device::lanes_max(bits, threads_per_group);

  const float scale = dynamic_scale<Fp8>(device::magnitude<In>(bits), bound);
  const auto prepared = Op::prepare(scale);
  if (lane == 0 && group < walk.count) scales[at.scale] = scale;
  if constexpr (kUnits > 0) {
#pragma unroll
    for (int k = 0; k < kUnits; ++k) {
      const std::uint32_t unit = lane + k * threads_per_group;
      if (unit >= units) break;
      const Cut cut = run.cut(unit);
      if (cut.range.begin < cut.range.end) quantize_unit(held[k], run.out, cut, prepared);
    }
  } else {
#pragma unroll 4
    for (std::uint32_t unit = lane; unit < units; unit += threads_per_group) {
      const Cut cut = run.cut(unit);
      if (cut.range.begin < cut.range.end) quantize_unit(run.load(cut), run.out, cut, prepared);
    }
  }
}

// AmaxPath::Whole: one run, one scale, all multiprocessors. A thread keeps its first units in registers between the two passes;
// the rest is read again, last first, while the L2 cache still has it. The scale itself collects the maximum: dynamic_scale
// never decreases, so the largest scale of the blocks is the scale of all.
constexpr int kWholeThreads = 512;
template <class In>
constexpr int kWholeUnits = 16 / sizeof(In);

template <class Fp8, class In, bool kAligned>
__global__ void __launch_bounds__(kWholeThreads, 2)
    quantize_whole(const In* __restrict__ input, Fp8* __restrict__ result, float* __restrict__ scale_out,
                   const float* __restrict__ upper_bound, std::int64_t size, std::uint32_t units) {
  using Op = device::QuantizeOp<Fp8>;
  constexpr int kHeld = kWholeUnits<In>;
  __shared__ std::uint32_t scratch[32];
  const cg::grid_group grid = cg::this_grid();
  const std::uint32_t thread = blockIdx.x * kWholeThreads + threadIdx.x;
  const std::uint32_t stride = gridDim.x * kWholeThreads;
  const Run<Fp8, In, kAligned> run{input, result, size};

  if (thread == 0) *scale_out = 0.0f;
  Unit<In> held[kHeld];
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    const std::uint32_t unit = thread + k * stride;
    held[k] = unit < units ? run.load(run.cut(unit)) : Unit<In>{};
  }
  grid.sync();  // the scale is 0 for everybody
  std::uint32_t bits = 0;
#pragma unroll 8
  for (std::uint32_t unit = thread + kHeld * stride; unit < units; unit += stride)
    bits = max(bits, device::finite_max_bits(run.load(run.cut(unit))));
#pragma unroll
  for (int k = 0; k < kHeld; ++k) bits = max(bits, device::finite_max_bits(held[k]));
  bits = device::block_max(bits, scratch);
  if (threadIdx.x == 0)
    device::atomic_max(scale_out, dynamic_scale<Fp8>(device::magnitude<In>(bits), bound_of(upper_bound)));
  grid.sync();  // the scale is final

  const auto prepared = Op::prepare(__ldcg(scale_out));
  if (units > thread) {
    const std::uint32_t last = thread + (units - 1 - thread) / stride * stride;
#pragma unroll 4
    for (std::uint32_t unit = last; unit >= thread + kHeld * stride; unit -= stride) {
      const Cut cut = run.cut(unit);
      if (cut.range.begin < cut.range.end) quantize_unit(run.load(cut), result, cut, prepared);
    }
  }
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    const std::uint32_t unit = thread + k * stride;
    if (unit >= units) break;
    const Cut cut = run.cut(unit);
    if (cut.range.begin < cut.range.end) quantize_unit(held[k], result, cut, prepared);
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

  void groups(const char* op) const {
    core::for_each_piece({layout}, kMaxPiece, [&](const core::Piece& piece) {
      const DynamicPlan plan = plan_dynamic(piece.layout, shifted(problem.input, piece.in), shifted(problem.result, piece.out),
                                            multiprocessors());
      switch (plan.units_per_thread) {
        case 1: launch_groups<1>(piece, plan); break;
        case 2: launch_groups<2>(piece, plan); break;
        case 4: launch_groups<4>(piece, plan); break;
        case 8: launch_groups<8>(piece, plan); break;
        default: launch_groups<0>(piece, plan); break;
      }
      check_launch(op);
    });
  }

  void whole(const char* op, const DynamicPlan& plan) const {
    auto kernel = plan.aligned ? quantize_whole<Fp8, In, true> : quantize_whole<Fp8, In, false>;
    std::int64_t size = layout.run().size;
    auto units = static_cast<std::uint32_t>(plan.units_per_run);
    const std::int64_t needed = (plan.units_per_run + kWholeThreads - 1) / kWholeThreads;
    const auto blocks = static_cast<unsigned>(std::min<std::int64_t>(needed, 2 * multiprocessors()));
    void* arguments[] = {const_cast<In**>(&input), const_cast<Fp8**>(&result), const_cast<float**>(&scale),
                         const_cast<float**>(&upper_bound), &size, &units};
    cudaLaunchCooperativeKernel(reinterpret_cast<void*>(kernel), blocks, kWholeThreads, arguments, 0, stream);
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
  void launch_groups(const core::Piece& piece, const DynamicPlan& plan) const {
    const Layout& part = piece.layout;
    const Walk walk = Walk::over(part, part.ndim - 1, plan.units_per_run, part.numel / part.run().size);
    auto kernel = plan.aligned ? quantize_groups<Fp8, In, kUnits, true> : quantize_groups<Fp8, In, kUnits, false>;
    kernel<<<static_cast<unsigned>(plan.blocks), plan.threads, 0, stream>>>(
        input + piece.in, result + piece.out, scale + piece.scale, upper_bound, walk, plan.threads_per_group);
  }
};

}  // namespace

void run(const DynamicQuantize& problem, void* stream) {
  constexpr const char* op = "dynamic_scaled_fp8_quant";
  const Layout layout = validate(problem);
  check_cuda_device({op, "input", problem.input});
  core::visit_real(problem.input.dtype, [&]<class In>(core::Type<In>) {
    core::visit_fp8(problem.result.dtype, [&]<class Fp8>(core::Type<Fp8>) {
      const DynamicLauncher<Fp8, In> launcher{problem, layout, static_cast<cudaStream_t>(stream)};
      if (layout.numel == 0) return launcher.two_passes(op);
      const DynamicPlan plan = plan_dynamic(layout, problem.input, problem.result, multiprocessors());
      switch (plan.path) {
        case AmaxPath::Groups: return launcher.groups(op);
        case AmaxPath::Whole: return launcher.whole(op, plan);
        case AmaxPath::TwoPasses: return launcher.two_passes(op);
      }
    });
  });
}

}  // namespace fp8kv::cuda
