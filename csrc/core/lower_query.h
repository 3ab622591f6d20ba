// Checks and conversions of query arguments that several problems have: defined in lower_rope.cpp, used by lower_attention.cpp
// too.
#pragma once

#include "core/check.h"
#include "core/rope_layout.h"

namespace fp8kv::core {

// The number of query heads, and that it is a multiple of that of the caches.
std::int64_t count_query_heads(const Argument& query);
void check_group_of_heads(const Argument& query, std::int64_t num_heads, const CacheLayout& cache);

// Rows of query heads: of query, or of what it becomes. `size`: what messages call the head size.
HeadsView lower_query_rows(const Argument& a, std::int64_t num_heads, const CacheLayout& cache, const char* size = "head_size");

// The format of an argument: an unquantized type, or the format of quantized caches, which messages call `caches`.
DType real_or_as_caches(const Argument& a, DType cache, const char* caches = "the caches are");

// Scales with 1, num_kv_heads or num_heads elements. Neighboring heads share one.
struct QueryScales {
  const float* data = nullptr;
  std::int64_t stride = 0;  // from one scale to the next
  std::int64_t heads_per_scale = 1;
};
QueryScales lower_query_scales(const Argument& q_scale, std::int64_t num_heads, const CacheLayout& cache, const Argument& key);

// Float32 or the type of query. Its stride is that of the last dimension.
View1D lower_vector(const Argument& a, const Argument& query);

}  // namespace fp8kv::core
