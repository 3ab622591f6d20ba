#include <algorithm>
#include <bit>

#include "core/plan.h"

namespace fp8kv::core {
namespace {

constexpr int kWarp = 32;

bool contiguous_heads(const CacheLayout& layout) {
  for (const KVViews* kv : {&layout.k, &layout.v})
    if ((kv->rows.dim != 1 || kv->cache.dim != 1) && layout.head_size > 1) return false;
  return true;
}

bool cache_vecs_aligned(const CacheLayout& layout) {
  const auto fits = [](std::int64_t stride, std::int64_t size) { return stride % kVecSize == 0 || size == 1; };
  for (const KVViews* kv : {&layout.k, &layout.v}) {
    const HeadsView& rows = kv->rows;
    const PagedView& cache = kv->cache;
    if (!base_aligned(rows.data, layout.row_dtype) || !base_aligned(cache.data, layout.cache_dtype)) return false;
    if (!fits(rows.token, layout.num_tokens) || !fits(rows.head, layout.num_heads)) return false;
    if (!fits(cache.block, layout.num_blocks) || !fits(cache.offset, layout.block_size) || !fits(cache.head, layout.num_heads))
      return false;
  }
  return layout.head_size % kVecSize == 0;
}

// Whether strides in bytes have 32 bits, wherever an index is not always 0.
bool strides_are_short(const CacheLayout& layout) {
  const auto is_short = [](std::int64_t stride, DType dtype, std::int64_t size) {
    return size <= 1 || (stride >= 0 && stride < (std::int64_t{1} << 32) / size_of(dtype));
  };
  const auto all_are_short = [&](const KVViews& kv) {
    const auto of_heads = [&](std::int64_t stride, DType dtype) { return is_short(stride, dtype, layout.num_heads); };
    return is_short(kv.rows.token, layout.row_dtype, layout.num_tokens) && of_heads(kv.rows.head, layout.row_dtype) &&
           is_short(kv.cache.block, layout.cache_dtype, layout.num_blocks) &&
           is_short(kv.cache.offset, layout.cache_dtype, layout.block_size) && of_heads(kv.cache.head, layout.cache_dtype) &&
           is_short(kv.scales.block, DType::Float32, layout.num_blocks) &&
           is_short(kv.scales.offset, DType::Float32, layout.block_size) && of_heads(kv.scales.head, DType::Float32) &&
           of_heads(kv.offsets.head, DType::Float32);
  };
  return all_are_short(layout.k) && (layout.sides == 1 || all_are_short(layout.v));
}

// With given scales; the start of a plan with dynamic ones. `max_slot`: the last that a token may be at.
CachePlan plan_given_scales(const CacheLayout& layout, std::int64_t max_slot) {
  CachePlan plan;
  plan.tokens = layout.num_tokens;
  if (!contiguous_heads(layout) || max_slot >= kMaxChunk || layout.num_heads * layout.head_size >= kMaxChunk) return plan;
  const bool aligned = cache_vecs_aligned(layout) && strides_are_short(layout);
  if (layout.has_channels() && !(aligned && channels_aligned(layout))) return plan;
  plan.path = layout.has_channels() ? KernelPath::PerColumn : KernelPath::Vectorized;
  plan.aligned = aligned;
  plan.vecs_per_head = vecs_covering(layout.head_size, plan.aligned);
  plan.tokens = std::min(plan.tokens, (kMaxChunk - 1) / (layout.num_heads * plan.vecs_per_head));
  return plan;
}

}  // namespace

CachePlan plan_append(const CacheLayout& layout) {
  CachePlan plan = plan_given_scales(layout, layout.num_slots() - 1);
  const std::int64_t vecs = plan.tokens * layout.num_heads * plan.vecs_per_head;
  if (plan.path == KernelPath::PerColumn) {
    // Once there is enough to do for a fourth of the threads, they share what preparing 8 scales takes. They hold many
    // registers: smaller blocks fill a multiprocessor better.
    plan.tokens_per_thread = vecs >= 1 << 16 ? 4 : 1;
    plan.threads = plan.tokens_per_thread == 4 ? 64 : 128;
  } else if (plan.aligned && vecs >= 1 << 19) {
    plan.tokens_per_thread = 2;
    plan.threads = 64;  // 2% faster than 256 where rows are half a line of memory
  }
  return plan;
}

namespace {

// Whether 8 threads can hold two neighboring heads of 128, with one store for 16 elements.
bool can_pair_heads(const CacheLayout& layout, const CachePlan& plan) {
  const auto stores_aligned = [](const KVViews& kv) {
    const PagedView& cache = kv.cache;
    return (reinterpret_cast<std::uintptr_t>(cache.data) | cache.block | cache.offset | cache.head) % 16 == 0;
  };
  return plan.path == KernelPath::Vectorized && plan.aligned && size_of(layout.row_dtype) == 2 && layout.num_heads % 2 == 0 &&
         plan.threads_per_head == 8 && plan.vecs_per_head == 16 && stores_aligned(layout.k) && stores_aligned(layout.v);
}

}  // namespace

CachePlan plan_append_dynamic(const CacheLayout& layout) {
  CachePlan plan = plan_given_scales(layout, layout.num_slots() - 1);
  for (int vecs : {2, 4}) {
    if (plan.path == KernelPath::Scalar || plan.vecs_per_head > kWarp * vecs) continue;
    plan.vecs_per_thread = vecs;
    plan.threads_per_head = static_cast<int>(std::bit_ceil(static_cast<std::uint64_t>(ceil_div(plan.vecs_per_head, vecs))));
    plan.tokens = std::min(plan.tokens, (kMaxChunk - 1) / (layout.num_heads * plan.threads_per_head));
    // Once there is enough to do for half as many threads, two heads share what is found of their token.
    if (can_pair_heads(layout, plan) && plan.tokens * layout.num_heads * plan.vecs_per_head >= 1 << 20) {
      plan.heads_per_thread = 2;
      plan.threads = 64;
    }
    return plan;
  }
  // One warp per head, whatever its size.
  return {.tokens = layout.num_tokens, .threads_per_head = kWarp};
}

// Positions are int32 by themselves.
CachePlan plan_gather(const CacheLayout& layout) {
  CachePlan plan = plan_given_scales(layout, 0);
  const std::int64_t vecs = plan.tokens * layout.num_heads * plan.vecs_per_head;
  if (plan.path == KernelPath::PerColumn) {
    // Once the threads of one token each would come in several waves, two tokens share what their channels have.
    plan.tokens_per_thread = vecs >= 1 << 18 ? 2 : 1;
    plan.threads = 128;
  } else if (plan.path == KernelPath::Vectorized && plan.aligned && vecs >= 1 << 17) {
    // Once there is enough to do for fewer threads, vectors share what is found of their token. Two are faster than four where
    // there is so much to do that places for threads are what lacks.
    const auto divides = [&](int n) { return layout.num_heads % n == 0 || plan.vecs_per_head % n == 0; };
    plan.vecs_per_thread = vecs < 1 << 20 && divides(4) ? 4 : divides(2) ? 2 : 1;
    if (plan.vecs_per_thread > 1) plan.threads = 128;
  }
  return plan;
}

}  // namespace fp8kv::core
