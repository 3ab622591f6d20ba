// Query rows that blocks of threads have for themselves.
#pragma once

#include "cuda/attention/schedule.cuh"

namespace fp8kv::cuda::attention {

// The sequence of a query row: the last that begins at or before it; -1 for a row of none.
__device__ inline std::int64_t sequence_of(const AttentionLayout& l, std::int64_t row) {
  if (!l.cu_query_lens.data) return row < l.num_seqs ? row : -1;
  if (row >= index_at(l.cu_query_lens, l.num_seqs)) return -1;
  std::int64_t low = 0, high = l.num_seqs;  // index_at(high) > row, or high is the end
  while (high - low > 1) {
    const std::int64_t middle = low + (high - low) / 2;
    (index_at(l.cu_query_lens, middle) <= row ? low : high) = middle;
  }
  return low;
}

__device__ __forceinline__ float sum_of_warp(float x) {
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kAllLanes, x, lanes);
  return x;
}

__device__ __forceinline__ float max_of_warp(float x) {
  for (int lanes = 16; lanes > 0; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, lanes));
  return x;
}

}  // namespace fp8kv::cuda::attention
