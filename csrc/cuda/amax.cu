#include "amax.h"

#include <numeric>

#include "../device/amax.h"
#include "fp8kv/fp8.h"
#include "map.cuh"

namespace fp8kv::cuda {
namespace {

// What is written for a group's maximum.
struct AsAmax {
  __device__ float operator()(float amax) const { return amax; }
};

template <class Fp8>
struct AsScale {
  const float* upper_bound;
  __device__ float operator()(float amax) const {
    return dynamic_scale<Fp8>(amax, upper_bound ? __ldg(upper_bound) : __int_as_float(0x7f800000));
  }
};

// A maximum that belongs to one address, written when the thread moves on to another or ends.
template <class In, class Finish>
struct Pending {
  float* target;
  Finish finish;
  std::int64_t offset = -1;
  std::uint32_t bits = 0;

  __device__ __forceinline__ void add(std::int64_t at, std::uint32_t value) {
    if (at != offset) {
      flush();
      offset = at;
      bits = 0;
    }
    bits = max(bits, value);
  }

  __device__ __forceinline__ void flush() {
    if (offset >= 0) device::atomic_max(target + offset, finish(device::magnitude<In>(bits)));
  }

  // At the end, by all lanes of the warp: lanes that hold the same address write once.
  __device__ __forceinline__ void flush_warp() {
    const unsigned peers = __match_any_sync(0xffffffffu, offset);
    bits = __reduce_max_sync(peers, bits);
    if (offset >= 0 && threadIdx.x % 32 == __ffs(peers) - 1)
      device::atomic_max(target + offset, finish(device::magnitude<In>(bits)));
  }
};

// Runs of stride 1 with one scale each: units at a stride of the whole grid.
template <class In, class Finish>
__global__ void __launch_bounds__(256) amax_runs(const In* __restrict__ input, float* __restrict__ target,
                                                 const __grid_constant__ Walk walk, const Finish finish) {
  Pending<In, Finish> pending{target, finish};
  const std::uint32_t stride = gridDim.x * blockDim.x;
  for (std::uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < walk.count; i += stride) {
    std::uint32_t unit = i;
    const Offsets at = walk.at<-1>(walk.units_per_run.divide(unit));
    const In* in = input + at.in;
    const Cut cut = cut_unit(in, unit, walk.run);
    if (cut.range.begin >= cut.range.end) continue;
    pending.add(at.scale, device::finite_max_bits(device::load_any(in, cut.first, walk.run, cut.range)));
  }
  pending.flush_warp();
}

// Runs of stride 1 whose scale changes inside: a thread keeps a maximum a column of its unit while it stays on these columns.
template <class In, class Finish>
__global__ void __launch_bounds__(256)
    amax_columns(const In* __restrict__ input, float* __restrict__ target, const __grid_constant__ Walk walk,
                 const __grid_constant__ RunScales run_scales, const Finish finish) {
  std::int64_t held_scale = 0, held_first = 0;
  Range held_range{0, 0};
  std::uint32_t held[kUnit] = {};
  const auto flush = [&] {
#pragma unroll
    for (int e = 0; e < kUnit; ++e) {
      if (e < held_range.begin || e >= held_range.end) continue;
      device::atomic_max(target + held_scale + run_scales.offset(static_cast<std::uint32_t>(held_first + e)),
                         finish(device::magnitude<In>(held[e])));
      held[e] = 0;
    }
  };
  const std::uint32_t stride = gridDim.x * blockDim.x;
  for (std::uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < walk.count; i += stride) {
    std::uint32_t unit = i;
    const Offsets at = walk.at<-1>(walk.units_per_run.divide(unit));
    const In* in = input + at.in;
    const Cut cut = cut_unit(in, unit, walk.run);
    if (cut.range.begin >= cut.range.end) continue;
    const Unit<In> raw = device::load_any(in, cut.first, walk.run, cut.range);
    if (at.scale != held_scale || cut.first != held_first) {
      flush();
      held_scale = at.scale;
      held_first = cut.first;
      held_range = cut.range;
    }
#pragma unroll
    for (int e = 0; e < kUnit; ++e) held[e] = max(held[e], device::finite_bits(raw, e));
  }
  flush();
}

template <class In, class Finish>
__global__ void __launch_bounds__(256)
    amax_elements(const In* __restrict__ input, float* __restrict__ target, const __grid_constant__ Walk walk,
                  const __grid_constant__ FlatRows flat, const Finish finish) {
  Pending<In, Finish> pending{target, finish};
  const std::uint32_t stride = gridDim.x * blockDim.x;
  for (std::uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < walk.count; i += stride) {
    const Offsets at = walk.at<-1>(i);
    Unit<In> one{};
    one.words[0] = __builtin_bit_cast(typename device::BitsOf<In>::type, input[at.in]);
    pending.add(at.scale + flat.offset(i), device::finite_bits(one, 0));
  }
  pending.flush_warp();
}

// Blocks for `work` items with a stride that is a multiple of `row_units`, the items after which scales repeat at best, so that
// threads stay on their group as long as possible.
unsigned grid_for(std::int64_t work, std::int64_t row_units) {
  constexpr int kThreads = 256, kBlocksPerMultiprocessor = 8;
  const std::int64_t wanted = std::int64_t{multiprocessors()} * kBlocksPerMultiprocessor * kThreads;
  std::int64_t threads = std::min(work, wanted);
  const std::int64_t step = std::lcm(row_units, std::int64_t{kThreads});
  if (step < work && step <= 4 * wanted) threads = std::max(step, threads / step * step);
  return static_cast<unsigned>((threads + kThreads - 1) / kThreads);
}

template <class In, class Finish>
void launch_amax(const core::Piece& piece, const In* input, float* target, Finish finish, cudaStream_t stream) {
  const Layout& layout = piece.layout;
  const Layout::Dim& run = layout.run();
  input += piece.in;
  target += piece.scale;
  const std::int64_t outer_rows = layout.ndim > 1 ? layout.dims[0].size : 1;
  if (layout.flat_rows || run.in != 1 || run.size < kUnit) {
    const Walk walk = Walk::over(layout, layout.ndim, 1, layout.numel);
    amax_elements<<<grid_for(walk.count, layout.numel / outer_rows), 256, 0, stream>>>(input, target, walk, FlatRows::of(piece),
                                                                                     finish);
    return;
  }
  const std::int64_t units = (run.size + kUnit - 1 + kUnit - 1) / kUnit;
  const Walk walk = Walk::over(layout, layout.ndim - 1, units, layout.numel / run.size * units);
  const unsigned blocks = grid_for(walk.count, walk.count / outer_rows);
  if (run.scale == 0) {
    amax_runs<<<blocks, 256, 0, stream>>>(input, target, walk, finish);
  } else {
    const RunScales scales{run.scale, 0, device::FastDiv(run.block)};
    amax_columns<<<blocks, 256, 0, stream>>>(input, target, walk, scales, finish);
  }
}

struct Groups {
  int ndim;
  std::int64_t sizes[kMaxDims];
  std::int64_t strides[kMaxDims];
};

__global__ void __launch_bounds__(256)
    fill_kernel(float* __restrict__ target, const __grid_constant__ Groups groups, std::int64_t count, float value) {
  const std::int64_t step = std::int64_t{gridDim.x} * blockDim.x;
  for (std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += step) {
    std::int64_t rest = i, offset = 0;
    for (int d = groups.ndim - 1; d >= 0; --d) {
      offset += rest % groups.sizes[d] * groups.strides[d];
      rest /= groups.sizes[d];
    }
    target[offset] = value;
  }
}

}  // namespace

void raise_to_amax(const char* op, const Layout& layout, const TensorView& input, float* target, DType fp8,
                   const float* upper_bound, cudaStream_t stream) {
  const auto launch = [&](auto finish) {
    core::visit_real(input.dtype, [&]<class In>(core::Type<In>) {
      core::for_each_piece({layout}, kMaxPiece / 2, [&](const core::Piece& piece) {
        launch_amax(piece, static_cast<const In*>(input.data), target, finish, stream);
        check_launch(op);
      });
    });
  };
  if (fp8 == DType::E4M3) return launch(AsScale<E4M3>{upper_bound});
  if (fp8 == DType::E5M2) return launch(AsScale<E5M2>{upper_bound});
  launch(AsAmax{});
}

void fill_groups(const char* op, const Layout& layout, float* target, float value, cudaStream_t stream) {
  if (layout.num_groups == 0) return;
  Groups groups{layout.scale_ndim, {}, {}};
  std::copy(layout.scale_sizes, layout.scale_sizes + layout.scale_ndim, groups.sizes);
  std::copy(layout.scale_strides, layout.scale_strides + layout.scale_ndim, groups.strides);
  const std::int64_t blocks = std::min<std::int64_t>((layout.num_groups + 255) / 256, std::int64_t{multiprocessors()} * 8);
  fill_kernel<<<static_cast<unsigned>(blocks), 256, 0, stream>>>(target, groups, layout.num_groups, value);
  check_launch(op);
}

void run(const GroupAmax& problem, void* stream) {
  constexpr const char* op = "group_amax";
  const Layout layout = validate(problem);
  check_cuda_device({op, "input", problem.input});
  if (layout.numel == 0) return;
  raise_to_amax(op, layout, problem.input, static_cast<float*>(problem.amax.data), DType::Other, nullptr,
                static_cast<cudaStream_t>(stream));
}

}  // namespace fp8kv::cuda
