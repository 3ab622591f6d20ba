// FP8KV_DEBUG=1: the checks of index tensors that need their elements, on copies in host memory. They wait for the stream.
#pragma once

#include <cuda_runtime.h>

#include "core/attention_layout.h"

namespace fp8kv::cuda {

using core::AttentionLayout;
using core::CacheLayout;
using core::RopeLayout;

// Whether FP8KV_DEBUG is 1 and the stream can be waited for: not while it is captured.
bool debugging(cudaStream_t stream);

// As in core/check_indices.h.
void debug_check_slots(const char* op, const TensorView& slot_mapping, const CacheLayout& layout, cudaStream_t stream);
void debug_check_positions(const char* op, const TensorView& positions, const RopeLayout& layout, cudaStream_t stream);
void debug_check_sequences(const CacheGather& problem, const CacheLayout& layout, cudaStream_t stream);
void debug_check_attention(const PagedAttention& problem, const AttentionLayout& layout, cudaStream_t stream);

}  // namespace fp8kv::cuda
