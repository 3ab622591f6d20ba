#include "cuda/attention/tiled_launch.cuh"

namespace fp8kv::cuda::attention {

template const core::AttentionClusters& clusters<64>();
template void launch_tiled<64>(const AttentionLayout&, const AttentionPlan&, void*, cudaStream_t);

}  // namespace fp8kv::cuda::attention
