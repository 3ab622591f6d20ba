// The launchers of the attention kernels, which attention.cu chooses among.
#pragma once

#include "core/attention_layout.h"
#include "cuda/common/launch.h"

namespace fp8kv::cuda::attention {

using core::AttentionLayout;
using core::AttentionPlan;

void launch_generic(const AttentionLayout& layout, const AttentionPlan& plan, cudaStream_t stream);

// `workspace`: of plan.workspace_size bytes, aligned to 16.
void launch_grouped(const AttentionLayout& layout, const AttentionPlan& plan, void* workspace, cudaStream_t stream);

// Likewise.
template <int kHeadSize>
void launch_tiled(const AttentionLayout& layout, const AttentionPlan& plan, void* workspace, cudaStream_t stream);

// Clusters of its blocks that the device runs at once.
template <int kHeadSize>
const core::AttentionClusters& clusters();

// Merges the parts of items that tiled and grouped kernels left in the workspace for it.
void launch_merge(const AttentionLayout& layout, const AttentionPlan& plan, void* workspace, cudaStream_t stream);

}  // namespace fp8kv::cuda::attention
