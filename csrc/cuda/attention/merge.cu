// The end of items that several blocks of the tiled or the grouped kernel have parts of, where these are too many or too large
// for the last of the blocks.
#include <algorithm>

#include "cuda/attention/finish.cuh"
#include "cuda/attention/kernels.h"
#include "device/pdl.cuh"

namespace fp8kv::cuda::attention {
namespace {

constexpr int kWarps = 8;      // of a block, or as many as share a column
constexpr int kMaxWarps = 16;  // that do so
constexpr int kPiece = 128;    // elements of a column that a warp has at a time

struct MergeArgs {
  AttentionLayout layout;
  AttentionPlan plan;
  FastDiv group;
  void* workspace;
};

// Parts of sums, with the maximum that each was computed with.
struct Part {
  Softmax softmax;
  float4 sums = {};

  // Adds so many parts; several are on their way at once.
  template <class Load>
  __device__ void add(int count, const Load& load) {
    constexpr int kAtOnce = 10;
#pragma unroll 1
    for (int first = 0; first < count; first += kAtOnce) {
      Part parts[kAtOnce];
#pragma unroll
      for (int p = 0; p < kAtOnce; ++p)
        if (first + p < count) parts[p] = load(first + p);
      float maximum = softmax.maximum;
#pragma unroll
      for (int p = 0; p < kAtOnce; ++p) maximum = fmaxf(maximum, parts[p].softmax.maximum);
      const float kept = device::exp2_approximation(softmax.maximum - maximum);
      softmax = {maximum, softmax.sum * kept};
      sums = {sums.x * kept, sums.y * kept, sums.z * kept, sums.w * kept};
#pragma unroll
      for (int p = 0; p < kAtOnce; ++p) {
        const float added = device::exp2_approximation(parts[p].softmax.maximum - maximum);
        const float4& other = parts[p].sums;
        softmax.sum += parts[p].softmax.sum * added;
        sums = {sums.x + other.x * added, sums.y + other.y * added, sums.z + other.z * added, sums.w + other.w * added};
      }
    }
  }
};

// Some pieces of the columns of item blockIdx.x. A row of threads is a warp; blockDim.y of them share the parts of a column,
// and blockDim.z such groups have a column each.
__global__ void __launch_bounds__(32 * kMaxWarps) merge_parts(const __grid_constant__ MergeArgs args) {
  __shared__ Part scratch[kMaxWarps][32];
  const AttentionLayout& l = args.layout;
  const AttentionPlan& plan = args.plan;
  const Slots slots(l, plan, args.workspace);
  device::wait_then_release();
  const auto first = static_cast<int>(plan.parts == 0 ? 2 * blockIdx.x + 1 : blockIdx.x * plan.parts);
  const Slots::Header header = slots.header(first);
  if (header.parts == 0) return;
  const int column = static_cast<int>(blockIdx.y * blockDim.z + threadIdx.z), sharers = static_cast<int>(blockDim.y);
  const int sharer = static_cast<int>(threadIdx.y), warp = static_cast<int>(threadIdx.z) * sharers + sharer;
  const int lane = static_cast<int>(threadIdx.x), step = static_cast<int>(gridDim.z) * kPiece;
  for (int piece = static_cast<int>(blockIdx.z) * kPiece; piece < l.head_size; piece += step) {
    const int dim = piece + 4 * lane;
    const bool active = column < header.num_columns && dim < l.head_size;
    Part part;
    float base = 0.0f;
    if (active) {
      base = __ldcg(slots.softmax(first, column) + 2);
      part.add((header.parts - sharer + sharers - 1) / sharers, [&](int i) {
        const int slot = slots.slot_of(first, sharer + i * sharers);
        const float2 softmax = __ldcg(reinterpret_cast<const float2*>(slots.softmax(slot, column)));
        return Part{{softmax.x, softmax.y}, __ldcg(reinterpret_cast<const float4*>(slots.sums(slot, column) + dim))};
      });
    }
    if (sharers > 1) {
      __syncthreads();
      scratch[warp][lane] = part;
      __syncthreads();
    }
    if (!active || sharer > 0) continue;
    part.add(sharers - 1, [&](int i) { return scratch[warp + 1 + i][lane]; });
    const auto [query, in_group] = args.group.divmod(static_cast<std::uint32_t>(header.first_column + column));
    const Finish end(l,
                     {header.first_row + static_cast<int>(query),
                      header.kv_head * static_cast<int>(args.group.divisor) + static_cast<int>(in_group)},
                     header.kv_head, part.softmax, base);
    const float sums[4] = {part.sums.x, part.sums.y, part.sums.z, part.sums.w};
    end.store(dim, sums);
    if (dim == 0) end.store_lse();
  }
}

}  // namespace

void launch_merge(const AttentionLayout& layout, const AttentionPlan& plan, void* workspace, cudaStream_t stream) {
  MergeArgs args{layout, plan, FastDiv(layout.heads_per_kv_head()), workspace};
  args.layout.head_size = layout.v_head_size;  // what slots have of each column
  const auto sharers = static_cast<unsigned>(plan.merge_sharers), columns = std::max(kWarps / sharers, 1u);
  dim3 grid(static_cast<unsigned>(plan.merges), (plan.columns + columns - 1) / columns);
  const auto pieces = static_cast<unsigned>((layout.v_head_size + kPiece - 1) / kPiece);
  if (can_depend(grid.x * grid.y * pieces)) grid.z = pieces;
  const LaunchShape shape{
      .grid = grid, .threads = dim3(32, sharers, columns), .dependent = can_depend(grid.x * grid.y * grid.z)};
  launch(merge_parts, shape, stream, args);
  check_launch("paged_attention");
}

}  // namespace fp8kv::cuda::attention
