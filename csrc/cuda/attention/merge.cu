// The end of items that several blocks of the tiled or the grouped kernel have parts of, where these are too many or too large
// for the last of the blocks.
#include "cuda/attention/finish.cuh"
#include "cuda/attention/kernels.h"
#include "device/pdl.cuh"

namespace fp8kv::cuda::attention {
namespace {

constexpr int kWarps = 8;  // of a block

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

  __device__ void add(const Softmax& other, const float4& other_sums) {
    const float maximum = fmaxf(softmax.maximum, other.maximum);
    const float kept = device::exp2_approximation(softmax.maximum - maximum);
    const float added = device::exp2_approximation(other.maximum - maximum);
    softmax = {maximum, softmax.sum * kept + other.sum * added};
    sums = {sums.x * kept + other_sums.x * added, sums.y * kept + other_sums.y * added, sums.z * kept + other_sums.z * added,
            sums.w * kept + other_sums.w * added};
  }
};

// Item blockIdx.x. A row of threads is a warp; blockDim.y of them share the parts of a column, and blockDim.z such groups have
// a column each.
__global__ void __launch_bounds__(32 * kWarps) merge_parts(const __grid_constant__ MergeArgs args) {
  __shared__ Part scratch[kWarps][32];
  const AttentionLayout& l = args.layout;
  const AttentionPlan& plan = args.plan;
  const Slots slots(l, plan, args.workspace);
  device::wait_then_release();
  const auto first = static_cast<int>(plan.parts == 0 ? 2 * blockIdx.x + 1 : blockIdx.x * plan.parts);
  const Slots::Header header = slots.header(first);
  if (header.parts == 0) return;
  const int column = static_cast<int>(blockIdx.y * blockDim.z + threadIdx.z), sharers = static_cast<int>(blockDim.y);
  const bool exists = column < header.num_columns;
  const int warp = static_cast<int>(threadIdx.z * blockDim.y + threadIdx.y), lane = static_cast<int>(threadIdx.x);
  for (int four = lane; four < (l.head_size + 127) / 128 * 32; four += 32) {
    const bool active = exists && 4 * four < l.head_size;
    Part part;
    float base = 0.0f;
    if (active) {
#pragma unroll 4
      for (int i = static_cast<int>(threadIdx.y); i < header.parts; i += sharers) {
        const int slot = slots.slot_of(first, i);
        const float4 softmax = __ldcg(reinterpret_cast<const float4*>(slots.softmax(slot, column)));
        base = softmax.z;
        part.add({softmax.x, softmax.y}, __ldcg(reinterpret_cast<const float4*>(slots.sums(slot, column)) + four));
      }
    }
    if (sharers > 1) {
      __syncthreads();
      scratch[warp][lane] = part;
      __syncthreads();
      if (threadIdx.y > 0) continue;
      for (int i = 1; i < sharers; ++i) part.add(scratch[warp + i][lane].softmax, scratch[warp + i][lane].sums);
    }
    if (!active) continue;
    const auto [query, in_group] = args.group.divmod(static_cast<std::uint32_t>(header.first_column + column));
    const Finish end(l,
                     {header.first_row + static_cast<int>(query),
                      header.kv_head * static_cast<int>(args.group.divisor) + static_cast<int>(in_group)},
                     header.kv_head, part.softmax, base);
    end.store(4 * four, part.sums.x);
    end.store(4 * four + 1, part.sums.y);
    end.store(4 * four + 2, part.sums.z);
    end.store(4 * four + 3, part.sums.w);
    if (four == 0) end.store_lse();
  }
}

}  // namespace

void launch_merge(const AttentionLayout& layout, const AttentionPlan& plan, void* workspace, cudaStream_t stream) {
  MergeArgs args{layout, plan, FastDiv(layout.heads_per_kv_head()), workspace};
  args.layout.head_size = layout.v_head_size;  // what slots have of each column
  const auto sharers = static_cast<unsigned>(plan.merge_sharers), columns = kWarps / sharers;
  const dim3 grid(static_cast<unsigned>(plan.merges), (plan.columns + columns - 1) / columns);
  const LaunchShape shape{.grid = grid, .threads = dim3(32, sharers, columns), .dependent = can_depend(grid.x * grid.y)};
  launch(merge_parts, shape, stream, args);
  check_launch("paged_attention");
}

}  // namespace fp8kv::cuda::attention
