#include "amax.h"

#include <algorithm>

#include "../device/amax.h"
#include "fp8kv/fp8.h"
#include "map.cuh"

namespace fp8kv::cuda {
namespace {

using core::ceil_div;

// What is written for a group's maximum.
struct AsAmax {
  __device__ float operator()(float amax) const { return amax; }
};

template <class Fp8>
struct AsScale {
  const float* upper_bound;
  __device__ float operator()(float amax) const { return device::scale_of<Fp8>(amax, device::bound_of(upper_bound)); }
};

// Raises target[offset] to the maximum of the block's threads, each with an offset and magnitude bits of its own; -1 for none.
// Called by all threads of the block. Atomic operations on one address follow one another, so equal offsets are put together.
template <class In, class Finish>
__device__ __forceinline__ void raise(float* target, std::int64_t offset, std::uint32_t bits, const Finish& finish) {
  __shared__ std::int64_t first;
  __shared__ std::uint32_t scratch[32];
  if (threadIdx.x == 0) first = offset;
  __syncthreads();
  bool writes;
  if (__syncthreads_and(offset == first || offset < 0)) {
    bits = device::block_max(bits, scratch);
    writes = threadIdx.x == 0;
  } else {
    const unsigned peers = __match_any_sync(0xffffffffu, offset);
    bits = __reduce_max_sync(peers, bits);
    writes = threadIdx.x % 32 == __ffs(peers) - 1;
  }
  if (writes && offset >= 0) device::atomic_max(target + offset, finish(device::magnitude<In>(bits)));
}

// One dimension whose indices a thread walks, in chunks that don't cross a block of its scale.
struct Strip {
  std::uint32_t size;
  std::uint32_t block;
  std::uint32_t chunk;
  device::FastDiv chunks_per_block;
  device::FastDiv items;  // threads (amax_columns: blocks) for one chunk
  std::int64_t in, scale;
  std::int64_t limit;  // elements from the begin of the strip; below that of its last row where the run itself is walked
};

constexpr int kStripThreads = 256;

// The largest bits a thread meets in its unit over a chunk of a strip: one maximum, or one a column.
template <class In, bool kColumns, bool kAligned>
struct StripMaxima {
  static constexpr int kCount = kColumns ? kUnit : 1;
  std::uint32_t bits[kCount] = {};
  int columns = 0;  // of the unit that exist

  __device__ __forceinline__ void walk_chunk(const In* in, const Strip& strip, std::int64_t run, std::uint32_t column,
                                             std::uint32_t begin, std::uint32_t end) {
    constexpr int kRows = 4;
    for (std::uint32_t row = begin; row < end; row += kRows) {
      Unit<In> raw[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const std::int64_t row_begin = (row + r) * strip.in;
        const std::int64_t size = min(run, strip.limit - row_begin);
        raw[r] = {};
        if (row + r >= end || column >= size) continue;
        const int left = size - column < kUnit ? static_cast<int>(size - column) : kUnit;
        columns = max(columns, left);
        if (kAligned && left == kUnit)
          raw[r] = device::load_aligned(in + row_begin + column);
        else
          raw[r] = device::load_any(in + row_begin, column, size, {0, left});
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if constexpr (kColumns) {
#pragma unroll
          for (int e = 0; e < kUnit; ++e) bits[e] = max(bits[e], device::finite_bits(raw[r], e));
        } else {
          bits[0] = max(bits[0], device::finite_max_bits(raw[r]));
        }
      }
    }
  }
};

// Chunk number `chunk` of a strip: the rows, and the scale of their block.
struct Chunk {
  std::uint32_t begin, end, block;

  __device__ __forceinline__ Chunk(const Strip& strip, std::uint32_t chunk) {
    block = strip.chunks_per_block.divide(chunk);
    begin = block * strip.block + chunk * strip.chunk;
    end = min(min(begin + strip.chunk, (block + 1) * strip.block), strip.size);
  }
};

// Runs of stride 1 with one scale each: a thread takes one unit of a run and walks a chunk of its neighbours along another
// dimension, so that it meets one scale and writes once.
template <class In, bool kAligned, class Finish>
__global__ void __launch_bounds__(kStripThreads)
    amax_runs(const In* __restrict__ input, float* __restrict__ target, const __grid_constant__ Walk walk,
              const __grid_constant__ Strip strip, const Finish finish) {
  std::uint32_t item = blockIdx.x * kStripThreads + threadIdx.x;
  std::int64_t offset = -1;
  StripMaxima<In, false, kAligned> maxima;
  if (item < walk.count) {
    const Chunk chunk(strip, strip.items.divide(item));
    const Offsets at = walk.at<-1>(walk.units_per_run.divide(item));
    maxima.walk_chunk(input + at.in, strip, walk.run, item * kUnit, chunk.begin, chunk.end);
    if (maxima.columns > 0) offset = at.scale + chunk.block * strip.scale;
  }
  raise<In>(target, offset, maxima.bits[0], finish);
}

// Runs of stride 1 whose scale changes inside: the lanes of a warp take neighbouring units, the warps of a block neighbouring
// chunks; what the warps found for a column is put together where their chunks share their scales.
template <class In, bool kAligned, class Finish>
__global__ void __launch_bounds__(kStripThreads)
    amax_columns(const In* __restrict__ input, float* __restrict__ target, const __grid_constant__ Walk walk,
                 const __grid_constant__ Strip strip, const __grid_constant__ RunScales run_scales, std::uint32_t chunks,
                 const Finish finish) {
  constexpr std::uint32_t kWarps = kStripThreads / 32;
  __shared__ std::uint32_t found[kWarps][kUnit][32];
  const std::uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  // Blocks are numbered by groups of 32 units (walk.units_per_run counts these), outer index (strip.items), and chunks.
  std::uint32_t outer = blockIdx.x;
  const std::uint32_t first_chunk = strip.items.divide(outer) * kWarps;
  const Offsets at = walk.at<-1>(walk.units_per_run.divide(outer));
  const std::uint32_t unit = outer * 32 + lane;
  StripMaxima<In, true, kAligned> maxima;
  std::int64_t offset = at.scale;
  if (first_chunk + warp < chunks) {
    const Chunk chunk(strip, first_chunk + warp);
    maxima.walk_chunk(input + at.in, strip, walk.run, unit * kUnit, chunk.begin, chunk.end);
    offset += chunk.block * strip.scale;
  }
  const auto write = [&](int e, std::uint32_t bits) {
    device::atomic_max(target + offset + run_scales.offset(unit * kUnit + e), finish(device::magnitude<In>(bits)));
  };
  if (strip.scale != 0) {
#pragma unroll
    for (int e = 0; e < kUnit; ++e)
      if (e < maxima.columns) write(e, maxima.bits[e]);
    return;
  }
#pragma unroll
  for (int e = 0; e < kUnit; ++e) found[warp][e][lane] = maxima.bits[e];
  __syncthreads();
  static_assert(kWarps == kUnit, "each warp puts one element of the units together");
  if (unit * kUnit + warp >= walk.run) return;
  std::uint32_t bits = 0;
#pragma unroll
  for (std::uint32_t w = 0; w < kWarps; ++w) bits = max(bits, found[w][warp][lane]);
  write(static_cast<int>(warp), bits);
}

// Anything: one element at a time, at a stride of the whole grid.
template <class In, class Finish>
__global__ void __launch_bounds__(256)
    amax_elements(const In* __restrict__ input, float* __restrict__ target, const __grid_constant__ Walk walk,
                  const __grid_constant__ FlatRows flat, const Finish finish) {
  std::int64_t offset = -1;
  std::uint32_t bits = 0;
  const std::uint32_t stride = gridDim.x * blockDim.x;
  for (std::uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < walk.count; i += stride) {
    const Offsets at = walk.at<-1>(i);
    const std::int64_t here = at.scale + flat.offset(i);
    if (here != offset) {
      if (offset >= 0) device::atomic_max(target + offset, finish(device::magnitude<In>(bits)));
      offset = here;
      bits = 0;
    }
    Unit<In> one{};
    one.words[0] = __builtin_bit_cast(typename device::BitsOf<In>::type, input[at.in]);
    bits = max(bits, device::finite_bits(one, 0));
  }
  raise<In>(target, offset, bits, finish);
}

// How many indices along a dimension share a scale.
std::int64_t shared_extent(const Layout::Dim& dim) { return dim.scale == 0 ? dim.size : dim.block; }

// Where a Layout is walked: in a dimension outside the run, or in the run itself, cut into rows of kRowOfRun elements.
struct StripPlan {
  static constexpr std::int64_t kRowOfRun = 2048;
  Layout outer;  // the dimensions that are left, with the run
  Strip strip;
  std::int64_t outer_count;  // items of the outer dimensions
  std::int64_t units;        // a run
  std::int64_t chunks;
};

StripPlan plan_strips(const Layout& layout) {
  const Layout::Dim& run = layout.run();
  int walked = layout.ndim - 1;
  std::int64_t best = run.scale == 0 ? ceil_div(run.size, StripPlan::kRowOfRun) : 0;
  for (int d = 0; d + 1 < layout.ndim; ++d)
    if (shared_extent(layout.dims[d]) > best) best = shared_extent(layout.dims[walked = d]);

  StripPlan plan{layout, {}, 1, 0, 0};
  Layout::Dim dim = layout.dims[walked];
  std::int64_t limit = INT64_MAX;
  if (walked == layout.ndim - 1 && best > 0) {
    limit = run.size;
    dim = {best, StripPlan::kRowOfRun, 0, 0, 1};
    plan.outer.dims[walked].size = std::min(run.size, StripPlan::kRowOfRun);
  } else if (walked == layout.ndim - 1) {
    dim = {1, 0, 0, 0, 1};
  } else {
    std::copy(layout.dims + walked + 1, layout.dims + layout.ndim, plan.outer.dims + walked);
    --plan.outer.ndim;
  }
  for (int d = 0; d + 1 < plan.outer.ndim; ++d) plan.outer_count *= plan.outer.dims[d].size;
  plan.units = ceil_div(plan.outer.run().size, kUnit);
  const std::int64_t block = shared_extent(dim);
  // Enough threads to fill the device; fewer where every thread, or nearly so, writes a maximum for each of its columns.
  const std::int64_t wanted_threads = std::int64_t{multiprocessors()} * (run.scale == 0 ? 1024 : 256);
  const std::int64_t threads_a_row = plan.outer_count * plan.units;
  const std::int64_t chunk = std::clamp<std::int64_t>(ceil_div(dim.size * threads_a_row, wanted_threads * 4) * 4, 4, 64);
  const std::int64_t chunks_per_block = ceil_div(block, chunk);
  plan.chunks = chunks_per_block * ceil_div(dim.size, block);
  plan.strip = {static_cast<std::uint32_t>(dim.size),
                static_cast<std::uint32_t>(block),
                static_cast<std::uint32_t>(chunk),
                device::FastDiv(chunks_per_block),
                device::FastDiv(threads_a_row),
                dim.in,
                dim.scale,
                limit};
  return plan;
}

bool strips_aligned(const Layout& layout, const void* input, std::int64_t bytes) {
  for (int d = 0; d + 1 < layout.ndim; ++d)
    if (layout.dims[d].in % kUnit != 0) return false;
  return reinterpret_cast<std::uintptr_t>(input) % std::min<std::int64_t>(16, kUnit * bytes) == 0;
}

template <class In, class Finish>
void launch_amax(const core::Piece& piece, const In* input, float* target, Finish finish, cudaStream_t stream) {
  const Layout& layout = piece.layout;
  const Layout::Dim& run = layout.run();
  input += piece.in;
  target += piece.scale;
  if (layout.flat_rows || run.in != 1 || (run.size < kUnit && layout.ndim == 1)) {
    const std::int64_t blocks = std::min<std::int64_t>(ceil_div(layout.numel, 256), std::int64_t{multiprocessors()} * 8);
    const Walk walk = Walk::over(layout, layout.ndim, 1, layout.numel);
    amax_elements<<<static_cast<unsigned>(blocks), 256, 0, stream>>>(input, target, walk, FlatRows::of(piece), finish);
    return;
  }
  StripPlan plan = plan_strips(layout);
  const bool aligned = strips_aligned(layout, input, sizeof(In));
  const int outer_dims = plan.outer.ndim - 1;
  if (run.scale == 0) {
    const std::int64_t items = plan.outer_count * plan.units * plan.chunks;
    const Walk walk = Walk::over(plan.outer, outer_dims, plan.units, items);
    const auto kernel = aligned ? amax_runs<In, true, Finish> : amax_runs<In, false, Finish>;
    kernel<<<static_cast<unsigned>(ceil_div(items, kStripThreads)), kStripThreads, 0, stream>>>(input, target, walk, plan.strip,
                                                                                                finish);
    return;
  }
  const std::int64_t unit_groups = ceil_div(plan.units, 32);
  const Walk walk = Walk::over(plan.outer, outer_dims, unit_groups, 0);
  plan.strip.items = device::FastDiv(plan.outer_count * unit_groups);
  const RunScales run_scales{run.scale, 0, device::FastDiv(run.block), false};
  const auto kernel = aligned ? amax_columns<In, true, Finish> : amax_columns<In, false, Finish>;
  const std::int64_t blocks = plan.outer_count * unit_groups * ceil_div(plan.chunks, kStripThreads / 32);
  kernel<<<static_cast<unsigned>(blocks), kStripThreads, 0, stream>>>(input, target, walk, plan.strip, run_scales,
                                                                      static_cast<std::uint32_t>(plan.chunks), finish);
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
      core::for_each_even_part(layout, [&](const core::Piece& part) {
        core::for_each_piece(part, kMaxPiece / 8, [&](const core::Piece& piece) {
          launch_amax(piece, static_cast<const In*>(input.data), target, finish, stream);
          check_launch(op);
        });
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
  const std::int64_t blocks = std::min<std::int64_t>(ceil_div(layout.num_groups, 256), std::int64_t{multiprocessors()} * 8);
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
