// launch_tiled of one head size: the instantiations of the kernel in tiled.cuh.
#pragma once

#include "core/dispatch.h"
#include "cuda/attention/kernels.h"
#include "cuda/attention/tiled.cuh"

namespace fp8kv::cuda::attention {

// What the driver must allow of a kernel, to the most that any plan asks for: it can't fall below what another thread is about
// to launch with.
template <class Kernel>
void allow(Kernel kernel) {
  const DeviceLimits& limits = device_limits();
  check_query(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limits.shared_memory - core::kReservedMemory));
  if (limits.has_clusters) check_query(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
}

template <int kHeadSize, int kColumnTiles>
void count_clusters(core::AttentionClusters& clusters) {
  const auto kernel = attention_tiled<E4M3, kHeadSize, kColumnTiles, true, Known::Nothing>;
  const core::AttentionMemory memory(kHeadSize, kColumnTiles, true, kMaxWarps, kColumnTiles * core::kColumnTile);
  const int shared_memory = memory.size + memory.inbox_size;
  if (shared_memory > device_limits().shared_memory - core::kReservedMemory) return;
  allow(kernel);
  for (int log2 = 1; log2 <= core::AttentionClusters::kMaxLog2Blocks; ++log2) {
    cudaLaunchAttribute size{};
    size.id = cudaLaunchAttributeClusterDimension;
    size.val.clusterDim = {1u << log2, 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = 1u << log2;
    config.blockDim = 32 * kMaxWarps;
    config.dynamicSmemBytes = shared_memory;
    config.attrs = &size;
    config.numAttrs = 1;
    int& active = clusters.active[kColumnTiles - 1][log2];
    if (cudaOccupancyMaxActiveClusters(&active, kernel, &config) != cudaSuccess) active = 0;
  }
  cudaGetLastError();  // sizes that the device doesn't have
}

template <int kHeadSize>
const core::AttentionClusters& clusters() {
  static PerDevice<core::AttentionClusters> counts;
  return counts.get([] {
    core::AttentionClusters found;
    if (device_limits().has_clusters) count_clusters<kHeadSize, 1>(found), count_clusters<kHeadSize, 2>(found);
    return found;
  });
}

template <class Fp8, int kHeadSize, int kColumnTiles, bool kPerToken, Known kKnown>
void launch_tiled_kernel(const TiledArgs& args, cudaStream_t stream) {
  const auto kernel = attention_tiled<Fp8, kHeadSize, kColumnTiles, kPerToken, kKnown>;
  static PerDevice<bool> allowed;
  allowed.get([&] {
    allow(kernel);
    return true;
  });
  const auto blocks = static_cast<unsigned>(args.plan.blocks);
  const LaunchShape shape{.grid = blocks,
                          .threads = 32 * args.plan.warps,
                          .shared_memory = args.plan.shared_memory,
                          .cluster = args.plan.cluster,
                          .dependent = launches_dependent(blocks)};
  launch(kernel, shape, stream, args);
  check_launch("paged_attention");
}

template <int kHeadSize>
void launch_tiled(const AttentionLayout& layout, const AttentionPlan& plan, void* workspace, cudaStream_t stream) {
  const TiledArgs args{.layout = layout,
                       .plan = plan,
                       .keys = CacheStrides(layout.key_cache),
                       .values = CacheStrides(layout.value_cache),
                       .tiles_per_block = FastDiv(layout.block_size / kTile),
                       .divisors = Divisors(layout, plan),
                       .workspace = workspace,
                       .inverse_softcap = 1.0f / layout.softcap};
  core::visit_quantized(layout.cache_dtype, [&]<class Fp8>(core::Type<Fp8>) {
    const auto launch = [&]<int kColumnTiles>(std::integral_constant<int, kColumnTiles>) {
      const auto with = [&]<bool kPerToken>(std::bool_constant<kPerToken>) {
        if constexpr (kColumnTiles == 1 && !kPerToken) {
          if (KnownCall<kColumnTiles, kPerToken, Known::Plain>::is(layout, plan))
            return launch_tiled_kernel<Fp8, kHeadSize, kColumnTiles, kPerToken, Known::Plain>(args, stream);
          if (KnownCall<kColumnTiles, kPerToken, Known::Channels>::is(layout, plan))
            return launch_tiled_kernel<Fp8, kHeadSize, kColumnTiles, kPerToken, Known::Channels>(args, stream);
        }
        if constexpr (kColumnTiles == 1 || !kPerToken)
          if (KnownCall<kColumnTiles, kPerToken, Known::Usual>::is(layout, plan))
            return launch_tiled_kernel<Fp8, kHeadSize, kColumnTiles, kPerToken, Known::Usual>(args, stream);
        launch_tiled_kernel<Fp8, kHeadSize, kColumnTiles, kPerToken, Known::Nothing>(args, stream);
      };
      if (layout.k_scale.per_token() || layout.v_scale.per_token())
        with(std::true_type{});
      else
        with(std::false_type{});
    };
    if (plan.column_tiles == 1) return launch(std::integral_constant<int, 1>{});
    if (plan.column_tiles == 2) return launch(std::integral_constant<int, 2>{});
    if constexpr (kHeadSize <= 128) launch(std::integral_constant<int, 4>{});
  });
}

}  // namespace fp8kv::cuda::attention
