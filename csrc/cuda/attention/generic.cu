// paged_attention for anything: every head size, stride, alignment, dtype and kind of scale, one block per query row and head.
// Right everywhere, and not made for speed.
#include <algorithm>
#include <bit>

#include "core/attention_layout.h"
#include "core/dispatch.h"
#include "cuda/common/debug.h"
#include "cuda/common/launch.h"
#include "device/pdl.cuh"

namespace fp8kv::cuda {
namespace {

using core::AttentionLayout;

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kInfinity = std::bit_cast<float>(0x7f800000u);

struct AttentionArgs {
  AttentionLayout layout;
  int warps;  // of a block, each with positions of its own
};

__device__ __forceinline__ std::int64_t index_at(const core::View1D& view, std::int64_t i) {
  return __ldg(static_cast<const int*>(view.data) + i * view.stride);
}

// Element i of memory of a type that is known at run time.
__device__ float load_any(const void* data, DType dtype, std::int64_t i) {
  switch (dtype) {
    case DType::Float32: return static_cast<const float*>(data)[i];
    case DType::Float16: return decode(static_cast<const Half*>(data)[i]);
    case DType::BFloat16: return decode(static_cast<const BFloat16*>(data)[i]);
    case DType::E4M3: return decode(static_cast<const E4M3*>(data)[i]);
    default: return decode(static_cast<const E5M2*>(data)[i]);
  }
}

__device__ void store_real(void* data, DType dtype, std::int64_t i, float x) {
  switch (dtype) {
    case DType::Float32: static_cast<float*>(data)[i] = from_float<float>(x); return;
    case DType::Float16: static_cast<Half*>(data)[i] = from_float<Half>(x); return;
    default: static_cast<BFloat16*>(data)[i] = from_float<BFloat16>(x);
  }
}

// The sequence of a query row: the last that begins at or before it; -1 for a row of none.
__device__ std::int64_t sequence_of(const AttentionLayout& l, std::int64_t row) {
  if (!l.cu_query_lens.data) return row < l.num_seqs ? row : -1;
  std::int64_t low = 0, high = l.num_seqs;  // index_at(high) > row, or high is the end
  if (row >= index_at(l.cu_query_lens, l.num_seqs)) return -1;
  while (high - low > 1) {
    const std::int64_t middle = low + (high - low) / 2;
    if (index_at(l.cu_query_lens, middle) <= row)
      low = middle;
    else
      high = middle;
  }
  return low;
}

__device__ __forceinline__ float sum_of_warp(float x) {
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kAllLanes, x, lanes);
  return x;
}

__device__ __forceinline__ float max_of_warp(float x) {
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, lanes));
  return x;
}

// Shared memory: the query [head_size], then for each warp its sum of values [head_size]. A warp takes every warps-th position;
// its lanes share the elements of a head.
template <class Cache>
__global__ void __launch_bounds__(128) attention_generic(const __grid_constant__ AttentionArgs args) {
  extern __shared__ float shared[];
  __shared__ float maxima[4], sums[4], powers[2];
  const AttentionLayout& l = args.layout;
  device::wait_then_release();
  const std::int64_t row = blockIdx.x / l.num_heads, head = blockIdx.x % l.num_heads;
  const std::int64_t s = sequence_of(l, row);
  if (s < 0) return;
  const std::int64_t kv_head = head / (l.num_heads / l.num_kv_heads);
  const int lane = static_cast<int>(threadIdx.x % kWarp), warp = static_cast<int>(threadIdx.x / kWarp);
  const std::int64_t first_row = l.cu_query_lens.data ? index_at(l.cu_query_lens, s) : s;
  const std::int64_t last_row = l.cu_query_lens.data ? index_at(l.cu_query_lens, s + 1) : s + 1;
  const std::int64_t length = index_at(l.seq_lens, s), position = length - (last_row - row);
  std::int64_t begin = l.seq_starts.data ? index_at(l.seq_starts, s) : 0;
  if (l.sliding_window > 0) begin = max(begin, position + 1 - l.sliding_window);
  begin = max(begin, std::int64_t{0});
  const std::int64_t end = min(min(position + 1, length), l.max_blocks * l.block_size);

  // The query times a power of two, so that products neither overflow nor vanish, and times the scales of K's channels.
  float* query = shared;
  float* values = shared + (1 + warp) * l.head_size;
  if (warp == 0) {
    const float q_scale = l.q_scale ? l.q_scale[head / l.heads_per_q_scale * l.q_scale_stride] : 1.0f;
    float largest = 0.0f, base = 0.0f;
    for (std::int64_t d = lane; d < l.head_size; d += kWarp) {
      const float x = __fmul_rn(
          load_any(l.query.data, l.query_dtype, row * l.query.token + head * l.query.head + d * l.query.dim), q_scale);
      query[d] = x;
      if (is_finite(x)) largest = fmaxf(largest, fabsf(x));
      if (l.k_offset.data) base += x * l.k_offset.data[kv_head * l.k_offset.head + d * l.k_offset.dim];
    }
    largest = max_of_warp(largest);
    base = sum_of_warp(base);
    const int exponent = largest > 0.0f ? ilogbf(largest) : 0;
    for (std::int64_t d = lane; d < l.head_size; d += kWarp) {
      float x = ldexpf(query[d], -exponent);
      if (l.k_scale.dim != 0) x *= l.k_scale.data[kv_head * l.k_scale.head + d * l.k_scale.dim];
      query[d] = x;
    }
    if (lane == 0) powers[0] = ldexpf(l.softmax_scale, exponent), powers[1] = l.softmax_scale * base;
  }
  for (std::int64_t d = lane; d < l.head_size; d += kWarp) values[d] = 0.0f;
  __syncthreads();

  float maximum = -kInfinity, sum = 0.0f;
  bool any = false;
  for (std::int64_t p = begin + warp; p < end; p += args.warps) {
    const std::int64_t block =
        __ldg(static_cast<const int*>(l.block_table.data) + s * l.block_table_row + p / l.block_size * l.block_table.stride);
    if (block < 0 || block >= l.num_blocks) continue;
    const std::int64_t offset = p % l.block_size;
    const Cache* key = static_cast<const Cache*>(l.key_cache.data) + block * l.key_cache.block + offset * l.key_cache.offset +
                       kv_head * l.key_cache.head;
    float product = 0.0f;
    for (std::int64_t d = lane; d < l.head_size; d += kWarp)
      product = __fmaf_rn(query[d], decode(key[d * l.key_cache.dim]), product);
    float logit = sum_of_warp(product) * powers[0];
    const auto scale_at = [&](const core::ChannelScales& scale) {
      return scale.data[block * scale.block + offset * scale.offset + kv_head * scale.head];
    };
    if (l.k_scale.data && l.k_scale.dim == 0) logit *= scale_at(l.k_scale);
    logit += powers[1];
    if (l.softcap > 0.0f) logit = l.softcap * tanhf(logit / l.softcap);
    const float larger = logit > maximum ? logit : maximum;  // a NaN makes the sum one
    const float keep = any ? expf(maximum - larger) : 0.0f, weight = expf(logit - larger);
    maximum = larger;
    sum = sum * keep + weight;
    any = true;
    const float by = l.v_scale.data && l.v_scale.per_token() ? weight * scale_at(l.v_scale) : weight;
    const Cache* value = static_cast<const Cache*>(l.value_cache.data) + block * l.value_cache.block +
                         offset * l.value_cache.offset + kv_head * l.value_cache.head;
    for (std::int64_t d = lane; d < l.head_size; d += kWarp)
      values[d] = __fmaf_rn(by, decode(value[d * l.value_cache.dim]), values[d] * keep);
  }
  if (lane == 0) maxima[warp] = maximum, sums[warp] = any ? sum : 0.0f;
  __syncthreads();

  // Of all warps; a warp that saw nothing has sum 0. With the sink as one more logit.
  float total_max = -kInfinity, total = 0.0f;
  for (int w = 0; w < args.warps; ++w)
    if (sums[w] != 0.0f && maxima[w] > total_max) total_max = maxima[w];
  const float sink = l.sinks.data ? load_any(l.sinks.data, l.sinks.dtype, head * l.sinks.stride) : -kInfinity;
  bool saw_nothing = true;
  for (int w = 0; w < args.warps; ++w) saw_nothing = saw_nothing && sums[w] == 0.0f;
  if (sink > total_max) total_max = sink;
  float seen = 0.0f;
  for (int w = 0; w < args.warps; ++w)
    if (sums[w] != 0.0f) seen += sums[w] * expf(maxima[w] - total_max);
  total = seen + (sink != -kInfinity ? expf(sink - total_max) : 0.0f);
  for (std::int64_t d = threadIdx.x; d < l.head_size; d += blockDim.x) {
    float x = 0.0f;
    if (!saw_nothing) {
      for (int w = 0; w < args.warps; ++w)
        if (sums[w] != 0.0f) x += shared[(1 + w) * l.head_size + d] * expf(maxima[w] - total_max);
      x /= total;
      if (l.v_scale.data && !l.v_scale.per_token()) x *= l.v_scale.data[kv_head * l.v_scale.head + d * l.v_scale.dim];
      if (l.v_offset.data) x += seen / total * l.v_offset.data[kv_head * l.v_offset.head + d * l.v_offset.dim];
    }
    store_real(l.out.data, l.out_dtype, row * l.out.token + head * l.out.head + d * l.out.dim, x);
  }
  if (l.lse.data && threadIdx.x == 0)
    l.lse.data[row * l.lse.token + head * l.lse.head] = total == 0.0f ? -kInfinity : total_max + logf(total);
}

}  // namespace

void run(const PagedAttention& problem, Stream stream) {
  constexpr const char* op = "paged_attention";
  const AttentionLayout layout = core::lower(problem);
  core::check_on_device({op, "query", problem.query}, current_device());
  if (debugging(stream)) debug_check_attention(problem, layout, stream);
  if (layout.empty()) return;
  // As many warps as fit what every kernel may have of shared memory.
  constexpr std::int64_t kSharedFloats = 48 * 1024 / sizeof(float) - 64;
  const std::int64_t warps = std::min<std::int64_t>(4, kSharedFloats / layout.head_size - 1);
  if (warps < 1)
    core::fail(op, "query", "have a head_size of at most " + std::to_string(kSharedFloats / 2),
               "head_size=" + std::to_string(layout.head_size));
  const std::int64_t blocks = layout.num_rows * layout.num_heads;
  if (blocks > INT32_MAX) core::fail(op, "query", "have at most 2^31 - 1 rows times heads", std::to_string(blocks));
  const AttentionArgs args{layout, static_cast<int>(warps)};
  const auto launch = [&]<class Cache>(core::Type<Cache>) {
    attention_generic<Cache><<<static_cast<unsigned>(blocks), static_cast<unsigned>(warps * kWarp),
                               (1 + warps) * layout.head_size * sizeof(float), stream>>>(args);
    check_launch(op);
  };
  core::visit(core::RealTypes{} + core::QuantizedTypes{}, layout.cache_dtype, launch);
}

}  // namespace fp8kv::cuda
