#include <algorithm>
#include <bit>

#include "core/formats.h"
#include "core/plan.h"

namespace fp8kv::core {
namespace {

constexpr int kWarp = 32;
constexpr std::int64_t kMaxSharedChannels = 2048;  // of K, and of V

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

bool fits_vectorized(const RopeLayout& layout) {
  const CacheLayout& cache = layout.cache;
  const bool types = size_of(cache.row_dtype) == 2 && is_quantized(cache.cache_dtype) &&
                     (is_quantized(layout.query_out_dtype) || layout.query_out_dtype == cache.row_dtype);
  const bool sizes = cache.head_size % kVecSize == 0 && layout.rotary_dim % kVecSize == 0 &&
                     layout.cos_sin_row % (kVecSize / 2) == 0 && cache.num_slots() < kMaxChunk &&
                     layout.max_position < kMaxChunk && (layout.num_heads + cache.num_heads) * cache.head_size <= 1 << 22 &&
                     (!layout.has_norm() || cache.head_size / kVecSize <= kWarp) && channels_aligned(cache);
  return types && sizes && heads_aligned(layout.query, cache.row_dtype) &&
         heads_aligned(layout.query_out, layout.query_out_dtype) && heads_aligned(cache.k.rows, cache.row_dtype) &&
         heads_aligned(cache.v.rows, cache.row_dtype) && cache_aligned(cache.k.cache, cache.cache_dtype) &&
         cache_aligned(cache.v.cache, cache.cache_dtype) && halves_aligned(layout.cos_sin) &&
         halves_aligned(layout.norm_weights[0]) && halves_aligned(layout.norm_weights[1]);
}

// Heads of a thread: the largest divisor of `heads` up to `most`, or the smallest up to 8; 1 if there is none.
int shared_heads(std::int64_t heads, int most) {
  for (int divisor = most; divisor > 1; --divisor)
    if (heads % divisor == 0) return divisor;
  for (int divisor = 2; divisor <= 8; ++divisor)
    if (most > 1 && heads % divisor == 0) return divisor;
  return 1;
}

// Whether threads can have two vectors of several heads.
bool fits_many_heads(const RopeLayout& layout) {
  const auto divides = [](std::int64_t heads) { return heads < 2 || (heads <= kMaxSharedHeads && shared_heads(heads, 2) > 1); };
  const View1D& table = layout.cos_sin;
  const bool table_aligned =
      reinterpret_cast<std::uintptr_t>(table.data) % 16 == 0 && layout.cos_sin_row * size_of(table.dtype) % 16 == 0;
  const CacheLayout& cache = layout.cache;
  const bool channels_fit = !cache.has_channels() || cache.num_heads * cache.head_size <= kMaxSharedChannels;
  return table_aligned && cache.head_size % (2 * kVecSize) == 0 && layout.rotary_dim % (2 * kVecSize) == 0 && channels_fit &&
         divides(layout.num_heads) && divides(cache.num_heads) && std::max(layout.num_heads, cache.num_heads) > 1;
}

// More vectors of Q, K and V than these are worth it: about what a large GPU has threads for at once.
std::int64_t least_for_many_heads(const RopeLayout& layout) {
  if (layout.cache.has_channels()) return 1 << 19;
  return layout.has_norm() ? 5 << 15 : 7 << 15;
}

// Of a block, for one of its tokens: as many as K takes, so that few have nothing to do, but enough for Q to take at most 64
// blocks. With a norm, whole warps.
int threads_of_token(const RopeLayout& layout, std::int64_t threads_per_head) {
  const std::int64_t heads = std::max(layout.cache.num_heads, ceil_div(layout.num_heads, std::int64_t{64}));
  const std::int64_t unit = layout.has_norm() ? kWarp : 1;
  return static_cast<int>(std::clamp<std::int64_t>(ceil_div(heads * threads_per_head, unit) * unit, 1, 128));
}

}  // namespace

RopeAppendPlan plan_rope_append(const RopeLayout& layout) {
  const CacheLayout& cache = layout.cache;
  RopeAppendPlan plan;
  if (fits_vectorized(layout)) {
    plan.path = KernelPath::Vectorized;
    const bool norm = layout.has_norm(), transforms = norm || layout.rotary_dim > 0, channels = cache.has_channels();
    std::int64_t units = cache.head_size / kVecSize;  // one for each thread
    const std::int64_t work = cache.num_tokens * (layout.num_heads + 2 * cache.num_heads) * units;
    const auto threads_per_head = [&] {
      return static_cast<int>(norm ? std::bit_ceil(static_cast<std::uint64_t>(units)) : units);
    };
    // Several heads share cosines, sines, weights and channels, once there is enough to do for as many fewer threads.
    if ((transforms || channels) && fits_many_heads(layout) && work > least_for_many_heads(layout)) {
      const int most = work <= 1 << 19 ? 2 : norm && work > 1 << 22 ? 8 : 4;
      plan.vecs_per_thread = 2;
      plan.query_heads_per_thread = shared_heads(layout.num_heads, transforms ? most : 2);
      plan.kv_heads_per_thread = shared_heads(cache.num_heads, most);
      units /= 2;
      plan.threads_per_head = threads_per_head();
      plan.threads = kManyHeadsThreads;
    } else {
      if (!transforms && !channels && cache.head_size % (2 * kVecSize) == 0 && work > 1 << 15) {
        plan.vecs_per_thread = 2;
        units /= 2;
      }
      plan.threads_per_head = threads_per_head();
      plan.threads = threads_of_token(layout, plan.threads_per_head);
    }
  }
  const std::int64_t heads = std::max<std::int64_t>(1, layout.num_heads + cache.num_heads);
  const std::int64_t most = (kMaxChunk - 1) / (2 * heads * plan.threads_per_head);
  plan.tokens = std::min(cache.num_tokens, std::max<std::int64_t>(1, most));
  return plan;
}

}  // namespace fp8kv::core
