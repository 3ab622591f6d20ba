#include <algorithm>
#include <bit>

#include "core/formats.h"
#include "core/plan.h"

namespace fp8kv::core {
namespace {

constexpr int kWarp = 32;

bool heads_aligned(const HeadsView& v, DType dtype) {
  return v.dim == 1 && v.head % kVecSize == 0 && v.token % kVecSize == 0 && base_aligned(v.data, dtype);
}

bool cache_aligned(const PagedView& v, DType dtype) {
  return v.dim == 1 && v.head % kVecSize == 0 && v.offset % kVecSize == 0 && v.block % kVecSize == 0 &&
         base_aligned(v.data, dtype);
}

// Read by half vectors.
bool halves_aligned(const View1D& v) {
  return !v.data || (v.stride == 1 && reinterpret_cast<std::uintptr_t>(v.data) % (kVecSize / 2 * size_of(v.dtype)) == 0);
}

bool has_norm(const RopeLayout& layout) { return layout.norm_weights[0].data || layout.norm_weights[1].data; }

bool fits_vectorized(const RopeLayout& layout) {
  const CacheLayout& cache = layout.cache;
  const bool types = size_of(cache.row_dtype) == 2 && is_quantized(cache.cache_dtype) &&
                     (is_quantized(layout.query_out_dtype) || layout.query_out_dtype == cache.row_dtype);
  const bool sizes = cache.head_size % kVecSize == 0 && layout.rotary_dim % kVecSize == 0 &&
                     layout.cos_sin_row % (kVecSize / 2) == 0 && cache.num_slots() < kMaxChunk &&
                     (!has_norm(layout) || cache.head_size / kVecSize <= kWarp) && channels_aligned(cache);
  return types && sizes && heads_aligned(layout.query, cache.row_dtype) &&
         heads_aligned(layout.query_out, layout.query_out_dtype) && heads_aligned(cache.k.rows, cache.row_dtype) &&
         heads_aligned(cache.v.rows, cache.row_dtype) && cache_aligned(cache.k.cache, cache.cache_dtype) &&
         cache_aligned(cache.v.cache, cache.cache_dtype) && halves_aligned(layout.cos_sin) &&
         halves_aligned(layout.norm_weights[0]) && halves_aligned(layout.norm_weights[1]);
}

}  // namespace

RopeAppendPlan plan_rope_append(const RopeLayout& layout) {
  const CacheLayout& cache = layout.cache;
  RopeAppendPlan plan;
  if (fits_vectorized(layout)) {
    const std::int64_t vecs = cache.head_size / kVecSize;
    const bool norm = has_norm(layout);
    plan.path = KernelPath::Vectorized;
    plan.threads_per_head = static_cast<int>(norm ? std::bit_ceil(static_cast<std::uint64_t>(vecs)) : vecs);
    // Two heads share the loads of cosines, sines and weights, once there is enough to do for half as many threads.
    const std::int64_t work = cache.num_tokens * (layout.num_heads + 2 * cache.num_heads) * vecs;
    if (!cache.has_channels() && (norm ? work > 1 << 17 : layout.rotary_dim > 0 && work > 1 << 18)) plan.heads_per_thread = 2;
  }
  const std::int64_t heads = std::max<std::int64_t>(1, layout.num_heads + cache.num_heads);
  const std::int64_t most = (kMaxChunk - 1) / (2 * heads * plan.threads_per_head);
  plan.tokens = std::min(cache.num_tokens, std::max<std::int64_t>(1, most));
  return plan;
}

}  // namespace fp8kv::core
