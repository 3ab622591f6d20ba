// launch_tiled of one head size: the instantiations of the kernel in tiled.cuh.
#pragma once

#include "core/dispatch.h"
#include "cuda/attention/kernels.h"
#include "cuda/attention/tiled.cuh"

namespace fp8kv::cuda::attention {

template <class Fp8, int kHeadSize, int kColumnTiles, bool kPerToken>
void launch_tiled_kernel(const TiledArgs& args, cudaStream_t stream) {
  const auto kernel = attention_tiled<Fp8, kHeadSize, kColumnTiles, kPerToken>;
  // Set once, to the most that any plan asks for: it can't fall below what another thread is about to launch with.
  static PerDevice<bool> raised;
  raised.get([&] {
    check_query(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device_limits().shared_memory - 1024));
    return true;
  });
  const auto blocks = static_cast<unsigned>(args.plan.blocks);
  const LaunchShape shape{.grid = blocks,
                          .threads = 32 * args.plan.warps,
                          .shared_memory = args.plan.shared_memory,
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
                       .group = FastDiv(layout.heads_per_kv_head()),
                       .workspace = workspace};
  core::visit_quantized(layout.cache_dtype, [&]<class Fp8>(core::Type<Fp8>) {
    const auto launch = [&]<int kColumnTiles>(std::integral_constant<int, kColumnTiles>) {
      if (layout.k_scale.per_token() || layout.v_scale.per_token())
        launch_tiled_kernel<Fp8, kHeadSize, kColumnTiles, true>(args, stream);
      else
        launch_tiled_kernel<Fp8, kHeadSize, kColumnTiles, false>(args, stream);
    };
    if (plan.column_tiles == 1) return launch(std::integral_constant<int, 1>{});
    if (plan.column_tiles == 2) return launch(std::integral_constant<int, 2>{});
    if constexpr (kHeadSize <= 128) launch(std::integral_constant<int, 4>{});
  });
}

}  // namespace fp8kv::cuda::attention
