// Problems and devices for the tests of plans. Plans look at the alignment of addresses only, so these are made up.
#pragma once

#include <gtest/gtest.h>

#include "core/layout.h"
#include "core/plan.h"
#include "fp8kv/quantize.h"
#include "fp8kv/rope.h"

namespace fp8kv::testing_support {

inline constexpr int kMultiprocessors = 132;
inline constexpr core::DeviceLimits kLimits{
    .multiprocessors = kMultiprocessors, .shared_memory = 228 * 1024, .has_clusters = true, .has_dependent_launch = true};

// 1 TiB apart.
inline void* address(int number, std::int64_t misalignment = 0) {
  return reinterpret_cast<void*>((static_cast<std::uintptr_t>(number) << 40) + misalignment);
}

// Of bfloat16; `misalignment`, in elements, of the input and the result.
inline StaticQuantize quantize_problem(std::int64_t rows, std::int64_t cols, GroupShape shape, int misalignment = 0) {
  const auto count = [](std::int64_t size, std::int64_t group) { return group == -1 ? 1 : (size + group - 1) / group; };
  return {.result = contiguous(address(1, misalignment), DType::E4M3, {rows, cols}),
          .input = contiguous(address(2, 2 * misalignment), DType::BFloat16, {rows, cols}),
          .scale = contiguous(address(3), DType::Float32, {count(rows, shape.rows), count(cols, shape.cols)}),
          .group_shape = shape};
}

struct Geometry {
  std::int64_t tokens, heads, head_size;
  std::int64_t blocks = 64, block_size = 16;
  bool per_head = true;
  int misalignment = 0;  // of the caches, in bytes
};

// Of [num_kv_heads, head_size]; `misalignment` in bytes.
inline TensorView channels_of(const Geometry& g, int number, std::int64_t misalignment = 0) {
  return contiguous(address(number, misalignment), DType::Float32, {g.heads, g.head_size});
}

inline CacheAppend append_of(const Geometry& g) {
  const auto cache = [&](int number) {
    return contiguous(address(number, g.misalignment), DType::E4M3, {g.blocks, g.block_size, g.heads, g.head_size});
  };
  const auto rows = [&](int number) { return contiguous(address(number), DType::BFloat16, {g.tokens, g.heads, g.head_size}); };
  const TensorView scale = contiguous(address(6), DType::Float32, {g.per_head ? g.heads : 1});
  return {.key = rows(1),
          .value = rows(2),
          .key_cache = cache(3),
          .value_cache = cache(4),
          .slot_mapping = contiguous(address(5), DType::Int64, {g.tokens}),
          .k_scale = scale,
          .v_scale = scale};
}

}  // namespace fp8kv::testing_support
