// The end of items that several blocks of the tiled kernel have parts of.
#include "cuda/attention/finish.cuh"
#include "cuda/attention/kernels.h"
#include "cuda/attention/schedule.cuh"
#include "device/pdl.cuh"

namespace fp8kv::cuda::attention {
namespace {

constexpr int kThreads = 512;

struct MergeArgs {
  AttentionLayout layout;
  AttentionPlan plan;
  void* workspace;
};

// Parts of a sum, with the maximum that each was computed with.
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

// The slots that the parts of an item are in: `first`, then `next` and others with a distance of `step`.
struct PartSlots {
  int first, next, step, count;

  __device__ std::int64_t at(int i) const { return i == 0 ? first : next + std::int64_t{i - 1} * step; }
};

// Four elements of a column per thread; if there are more threads, they share the slots.
__device__ void merge(const MergeArgs& args, const Item& item, const PartSlots& parts, Part* scratch) {
  const AttentionLayout& l = args.layout;
  const AttentionPlan& plan = args.plan;
  const Slots slots(l, plan, args.workspace);
  const int fours = static_cast<int>(l.head_size / 4), elements = plan.heads * item.num_columns * fours;
  const int sharers = max(1, min(kThreads / elements, parts.count));
  const int thread = static_cast<int>(threadIdx.x);
  for (int first = 0; first < elements; first += kThreads / sharers) {
    const int sharer = thread / (kThreads / sharers), element = first + thread % (kThreads / sharers);
    const bool active = sharer < sharers && element < elements;
    const int head = element / fours / item.num_columns, column = element / fours % item.num_columns, four = element % fours;
    const int in_slot = head * plan.columns + column;
    Part part;
    float base = 0.0f;
    if (active) {
#pragma unroll 4
      for (int i = sharer; i < parts.count; i += sharers) {
        const float4 softmax = __ldcg(slots.softmax(parts.at(i), in_slot));
        base = softmax.z;
        part.add({softmax.x, softmax.y}, __ldcg(slots.sums(parts.at(i), in_slot) + four));
      }
    }
    __syncthreads();
    if (sharer > 0) scratch[thread] = part;
    __syncthreads();
    if (!active || sharer > 0) continue;
    for (int i = 1; i < sharers; ++i) {
      const Part& other = scratch[i * (kThreads / sharers) + thread];
      part.add(other.softmax, other.sums);
    }
    const int at = item.first_column + column, group = static_cast<int>(l.heads_per_kv_head());
    const Finish end(l, {item.sequence.first_row + at / group, (item.first_head + head) * group + at % group}, part.softmax,
                     base);
    end.store(4 * four, part.sums, plan.out_vectors);
    if (four == 0) end.store_lse();
  }
}

__global__ void __launch_bounds__(kThreads) merge_parts(const __grid_constant__ MergeArgs args) {
  extern __shared__ __align__(16) std::byte shared_memory[];
  const AttentionPlan& plan = args.plan;
  Schedule schedule(args.layout, plan);  // while the kernel before, which has waited for all that came before it, still runs
  device::wait_then_release();
  const unsigned total = schedule.total();
  if (total == 0) return;
  const Share share(plan, total);
  // parts == 0: a block merges the item that the block of the same number ends with and has begun.
  const auto parts = static_cast<unsigned>(plan.parts);
  const unsigned count = parts == 0 ? share.blocks - 1 : min(total, static_cast<unsigned>(plan.slots)) / parts;
  for (unsigned i = blockIdx.x; i < count; i += gridDim.x) {
    const unsigned unit = parts == 0 ? share.begin(i + 1) - 1 : i * parts;
    schedule.seek(unit);
    const unsigned units = schedule.units_per_item(), number = (unit - schedule.first_unit()) / units;
    const unsigned first = schedule.first_unit() + number * units;
    PartSlots slots{static_cast<int>(unit), static_cast<int>(unit) + 1, 1, static_cast<int>(parts)};
    if (parts == 0) {
      if (first < share.begin(i) || first + units == unit + 1) continue;
      const unsigned last_block = share.block_of(first + units - 1);
      slots = {slot_of_share(i, true), slot_of_share(i + 1, false), 2, static_cast<int>(last_block - i + 1)};
    }
    merge(args, item_of(args.layout, plan, schedule, number), slots, reinterpret_cast<Part*>(shared_memory));
  }
}

}  // namespace

void launch_merge(const AttentionLayout& layout, const AttentionPlan& plan, void* workspace, cudaStream_t stream) {
  const MergeArgs args{layout, plan, workspace};
  const LaunchShape shape{.grid = static_cast<unsigned>(plan.merge_blocks),
                          .threads = kThreads,
                          .shared_memory = kThreads * sizeof(Part),
                          .dependent = device_limits().has_dependent_launch};
  launch(merge_parts, shape, stream, args);
  check_launch("paged_attention");
}

}  // namespace fp8kv::cuda::attention
