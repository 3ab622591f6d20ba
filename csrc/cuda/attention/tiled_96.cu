#include "cuda/attention/tiled_launch.cuh"

namespace fp8kv::cuda::attention {

template const core::AttentionClusters& clusters<96>();
template void launch_tiled<96>(const AttentionLayout&, const AttentionPlan&, void*, cudaStream_t);

}  // namespace fp8kv::cuda::attention
