// The operator group_amax, and maxima for dynamic quantization in two passes. Rows that are groups, such as tokens, find theirs
// in dynamic.cuh; the heads of a token in cuda/cache/append_dynamic.cu.
#include "cuda/quantize/group_amax.h"

#include <algorithm>

#include "core/dispatch.h"
#include "cuda/quantize/elementwise.cuh"
#include "device/reduce.cuh"

namespace fp8kv::cuda {
namespace {

// The result for a group's maximum.
struct AsAmax {
  __device__ float operator()(float amax) const { return amax; }
};

template <class Fp8>
struct AsScale {
  const float* upper_bound;
  __device__ float operator()(float amax) const { return device::fast_dynamic_scale<Fp8>(amax, device::bound_of(upper_bound)); }
};

// Raises target[offset] to the maximum of the block's threads, each with an offset and magnitude bits of its own; -1 for none.
// Called by all threads of the block. Atomic operations on one address follow one another, so equal offsets are merged first.
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

// The dimension that is reduced (AmaxPlan::reduced), in spans that don't cross a block of its scales.
struct ReducedDim {
  std::uint32_t size;
  std::uint32_t block;
  std::uint32_t span;
  device::FastDiv spans_per_block;
  device::FastDiv items_per_span;  // threads; blocks where scales change along a row
  std::int64_t in, scale;
  std::int64_t limit;  // elements from the first index on; less than size * in where the row itself is reduced
};

constexpr int kAmaxThreads = 256;

// The indices of a span, and the scale block that they lie in.
struct Span {
  std::uint32_t begin, end, block;

  __device__ __forceinline__ Span(const ReducedDim& dim, std::uint32_t index) {
    const auto [quotient, in_block] = dim.spans_per_block.divmod(index);
    block = quotient;
    begin = block * dim.block + in_block * dim.span;
    end = min(min(begin + dim.span, (block + 1) * dim.block), dim.size);
  }
};

// The largest bits a thread meets in its vector over a span: one maximum, or one per column.
template <class In, bool kPerColumn, bool kAligned>
struct Maxima {
  static constexpr int kCount = kPerColumn ? kVecSize : 1;
  std::uint32_t bits[kCount] = {};
  int columns = 0;  // of the vector that exist

  __device__ __forceinline__ void reduce(const In* in, const ReducedDim& dim, std::int64_t row_size, std::uint32_t column,
                                         const Span& span) {
    constexpr int kRows = 4;
    for (std::uint32_t row = span.begin; row < span.end; row += kRows) {
      Vec<In> raw[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const std::int64_t row_begin = (row + r) * dim.in;
        const std::int64_t size = min(row_size, dim.limit - row_begin);
        raw[r] = {};
        if (row + r >= span.end || column >= size) continue;
        const int left = size - column < kVecSize ? static_cast<int>(size - column) : kVecSize;
        columns = max(columns, left);
        if (kAligned && left == kVecSize)
          raw[r] = device::load_aligned(in + row_begin + column);
        else
          raw[r] = device::load_any(in + row_begin, column, size, {0, left});
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if constexpr (kPerColumn) {
#pragma unroll
          for (int e = 0; e < kVecSize; ++e) bits[e] = max(bits[e], device::finite_bits(raw[r], e));
        } else {
          bits[0] = max(bits[0], device::finite_max_bits(raw[r]));
        }
      }
    }
  }
};

// Rows of stride 1 with one scale each: a thread takes one vector of a row and reduces over a span of its neighbors along
// another dimension, so that it meets one scale and writes once.
template <class In, bool kAligned, class Finish>
__global__ void __launch_bounds__(kAmaxThreads)
    group_amax_vectorized(const In* __restrict__ input, float* __restrict__ target, const __grid_constant__ IndexMap map,
                          const __grid_constant__ ReducedDim dim, const Finish finish) {
  const std::uint32_t thread = blockIdx.x * kAmaxThreads + threadIdx.x;
  std::int64_t offset = -1;
  Maxima<In, false, kAligned> maxima;
  if (thread < map.count) {
    const auto [index, item] = dim.items_per_span.divmod(thread);
    const Span span(dim, index);
    const auto [row, vec] = map.vecs_per_row.divmod(item);
    const Offsets at = map.at<-1>(row);
    maxima.reduce(input + at.in, dim, map.row_size, vec * kVecSize, span);
    if (maxima.columns > 0) offset = at.scale + span.block * dim.scale;
  }
  raise<In>(target, offset, maxima.bits[0], finish);
}

// Rows of stride 1 whose scale changes along them: the lanes of a warp take neighboring vectors, the warps of a block
// neighboring spans; what the warps found for a column is merged where their spans share their scales.
template <class In, bool kAligned, class Finish>
__global__ void __launch_bounds__(kAmaxThreads)
    group_amax_per_column(const In* __restrict__ input, float* __restrict__ target, const __grid_constant__ IndexMap map,
                          const __grid_constant__ ReducedDim dim, const __grid_constant__ PerColumnScales columns,
                          std::uint32_t num_spans, const Finish finish) {
  constexpr std::uint32_t kWarps = kAmaxThreads / 32;
  __shared__ std::uint32_t found[kWarps][kVecSize][32];
  const std::uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  // Blocks are numbered by groups of 32 vectors (map.vecs_per_row counts these), outer row, and spans (dim.items_per_span).
  const auto [span_group, item] = dim.items_per_span.divmod(blockIdx.x);
  const auto [row, warp_in_row] = map.vecs_per_row.divmod(item);
  const std::uint32_t index = span_group * kWarps + warp;
  const Offsets at = map.at<-1>(row);
  const std::uint32_t vec = warp_in_row * 32 + lane;
  Maxima<In, true, kAligned> maxima;
  std::int64_t offset = at.scale;
  if (index < num_spans) {
    const Span span(dim, index);
    maxima.reduce(input + at.in, dim, map.row_size, vec * kVecSize, span);
    offset += span.block * dim.scale;
  }
  const auto write = [&](int e, std::uint32_t bits) {
    device::atomic_max(target + offset + columns.offset(vec * kVecSize + e), finish(device::magnitude<In>(bits)));
  };
  if (dim.scale != 0) {
#pragma unroll
    for (int e = 0; e < kVecSize; ++e)
      if (e < maxima.columns) write(e, maxima.bits[e]);
    return;
  }
#pragma unroll
  for (int e = 0; e < kVecSize; ++e) found[warp][e][lane] = maxima.bits[e];
  __syncthreads();
  static_assert(kWarps == kVecSize, "each warp merges one element of the vectors");
  if (vec * kVecSize + warp >= map.row_size) return;
  std::uint32_t bits = 0;
#pragma unroll
  for (std::uint32_t w = 0; w < kWarps; ++w) bits = max(bits, found[w][warp][lane]);
  write(static_cast<int>(warp), bits);
}

// Anything: one element at a time, at a stride of the whole grid.
template <class In, class Finish>
__global__ void __launch_bounds__(256)
    group_amax_scalar(const In* __restrict__ input, float* __restrict__ target, const __grid_constant__ IndexMap map,
                      const __grid_constant__ FlatRows flat, const Finish finish) {
  std::int64_t offset = -1;
  std::uint32_t bits = 0;
  const std::uint32_t stride = gridDim.x * blockDim.x;
  for (std::uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < map.count; i += stride) {
    const Offsets at = map.at<-1>(i);
    const std::int64_t here = at.scale + flat.offset(i);
    if (here != offset) {
      if (offset >= 0) device::atomic_max(target + offset, finish(device::magnitude<In>(bits)));
      offset = here;
      bits = 0;
    }
    Vec<In> one{};
    one.words[0] = __builtin_bit_cast(typename device::BitsOf<In>::type, input[at.in]);
    bits = max(bits, device::finite_bits(one, 0));
  }
  raise<In>(target, offset, bits, finish);
}

template <class In, class Finish>
void launch_amax(const core::AmaxPlan& plan, const core::Chunk& chunk, const In* input, float* target, Finish finish,
                 cudaStream_t stream) {
  input += chunk.in;
  target += chunk.scale;
  const auto blocks = static_cast<unsigned>(plan.blocks);
  if (plan.path == core::KernelPath::Scalar) {
    const IndexMap map = IndexMap::over(chunk.layout, chunk.layout.ndim, 1, plan.work);
    group_amax_scalar<<<blocks, plan.threads, 0, stream>>>(input, target, map, FlatRows::of(chunk), finish);
    return;
  }
  const bool vectorized = plan.path == core::KernelPath::Vectorized;
  const std::int64_t items_per_row = vectorized ? plan.vecs_per_row : plan.warps_per_row();
  const IndexMap map = IndexMap::over(plan.outer, plan.outer.ndim - 1, items_per_row, plan.work);
  const ReducedDim dim{.size = static_cast<std::uint32_t>(plan.reduced.size),
                       .block = static_cast<std::uint32_t>(plan.reduced.block),
                       .span = static_cast<std::uint32_t>(plan.span),
                       .spans_per_block = device::FastDiv(plan.spans_per_block()),
                       .items_per_span = device::FastDiv(plan.outer_rows * items_per_row),
                       .in = plan.reduced.in,
                       .scale = plan.reduced.scale,
                       .limit = plan.limit};
  if (vectorized) {
    const auto kernel = plan.aligned ? group_amax_vectorized<In, true, Finish> : group_amax_vectorized<In, false, Finish>;
    kernel<<<blocks, plan.threads, 0, stream>>>(input, target, map, dim, finish);
    return;
  }
  const Layout::Dim& inner = chunk.layout.inner();
  const PerColumnScales columns{.stride = inner.scale, .block = device::FastDiv(inner.block), .vectors = false};
  const auto kernel = plan.aligned ? group_amax_per_column<In, true, Finish> : group_amax_per_column<In, false, Finish>;
  kernel<<<blocks, plan.threads, 0, stream>>>(input, target, map, dim, columns, static_cast<std::uint32_t>(plan.num_spans),
                                              finish);
}

// Where the groups' scales lie.
struct GroupOffsets {
  int ndim;
  std::int64_t sizes[kMaxDims];
  std::int64_t strides[kMaxDims];
};

__global__ void __launch_bounds__(256)
    fill_scales(float* __restrict__ target, const __grid_constant__ GroupOffsets groups, std::int64_t count, float value) {
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
  const int multiprocessors = device_limits().multiprocessors;
  const auto launch = [&](auto finish) {
    core::visit_real(input.dtype, [&]<class In>(core::Type<In>) {
      core::for_each_uniform_part(layout, [&](const core::Chunk& part) {
        core::for_each_chunk(part, core::kMaxChunk / 8, [&](const core::Chunk& chunk) {
          const core::AmaxPlan plan = core::plan_amax(chunk, input, multiprocessors);
          launch_amax(plan, chunk, static_cast<const In*>(input.data), target, finish, stream);
          check_launch(op);
        });
      });
    });
  };
  if (!core::is_quantized(fp8)) return launch(AsAmax{});
  core::visit_quantized(fp8, [&]<class Fp8>(core::Type<Fp8>) { launch(AsScale<Fp8>{upper_bound}); });
}

void fill_groups(const char* op, const Layout& layout, float* target, float value, cudaStream_t stream) {
  if (layout.num_groups == 0) return;
  GroupOffsets groups{layout.scale_ndim, {}, {}};
  std::copy(layout.scale_sizes, layout.scale_sizes + layout.scale_ndim, groups.sizes);
  std::copy(layout.scale_strides, layout.scale_strides + layout.scale_ndim, groups.strides);
  const std::int64_t blocks = core::grid_stride_blocks(layout.num_groups, device_limits().multiprocessors);
  fill_scales<<<static_cast<unsigned>(blocks), 256, 0, stream>>>(target, groups, layout.num_groups, value);
  check_launch(op);
}

void run(const GroupAmax& problem, Stream stream) {
  constexpr const char* op = "group_amax";
  const Layout layout = core::lower(problem);
  core::check_on_device({op, "input", problem.input}, current_device());
  if (layout.numel == 0) return;
  raise_to_amax(op, layout, problem.input, static_cast<float*>(problem.amax.data), DType::Other, nullptr, stream);
}

}  // namespace fp8kv::cuda
