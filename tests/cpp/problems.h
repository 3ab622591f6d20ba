// Sound problems of every kind, for tests that change something about them. Validation and plans look at no element, so the
// addresses are made up.
#pragma once

#include <optional>

#include "fp8kv/attention.h"
#include "fp8kv/kv_cache.h"
#include "fp8kv/quantize.h"
#include "fp8kv/rope.h"
#include "support.h"

namespace fp8kv::testing_support {

inline constexpr Device kCuda{Device::Type::CUDA, 0};

// --- Quantization --------------------------------

inline constexpr std::uintptr_t kInput = 0x1'0000'0000, kResult = 0x2'0000'0000, kScale = 0x3'0000'0000, kBound = 0x4'0000'0000;

inline TensorView input(const Sizes& sizes, const Sizes& strides = {}) {
  return view_at(kInput, DType::BFloat16, sizes, strides);
}
inline TensorView result(const Sizes& sizes, const Sizes& strides = {}) {
  return view_at(kResult, DType::E4M3, sizes, strides);
}
inline TensorView scale(const Sizes& sizes, const Sizes& strides = {}) {
  return view_at(kScale, DType::Float32, sizes, strides);
}

inline StaticQuantize static_problem(const Sizes& sizes, const Sizes& scale_sizes, std::optional<GroupShape> shape = {}) {
  return {.result = result(sizes), .input = input(sizes), .scale = scale(scale_sizes), .group_shape = shape};
}

inline DynamicQuantize dynamic_problem(const Sizes& sizes, const Sizes& scale_sizes, std::optional<GroupShape> shape = {}) {
  return {.result = result(sizes), .input = input(sizes), .scale = scale(scale_sizes), .group_shape = shape};
}

inline Dequantize dequantize_problem(const Sizes& sizes, const Sizes& scale_sizes, std::optional<GroupShape> shape = {}) {
  return {.result = view_at(kResult, DType::BFloat16, sizes),
          .input = view_at(kInput, DType::E4M3, sizes),
          .scale = scale(scale_sizes),
          .group_shape = shape};
}

inline GroupAmax amax_problem(const Sizes& sizes, const Sizes& amax_sizes, GroupShape shape) {
  return {.amax = scale(amax_sizes), .input = input(sizes), .group_shape = shape};
}

// --- The paged cache --------------------------------

inline constexpr std::uintptr_t kKey = 0x10000000, kValue = 0x20000000, kKeyCache = 0x30000000, kValueCache = 0x40000000,
                                kSlots = 0x50000000, kKeyScale = 0x60000000, kValueScale = 0x70000000, kTable = 0x80000000,
                                kSums = 0x90000000, kStarts = 0xa0000000;

// 10 blocks of 16 slots, 4 heads of 64.
inline const Sizes kCacheSizes = {10, 16, 4, 64};

inline TensorView key(const Sizes& sizes, const Sizes& strides = {}) { return view_at(kKey, DType::BFloat16, sizes, strides); }
inline TensorView value(const Sizes& sizes, const Sizes& strides = {}) {
  return view_at(kValue, DType::BFloat16, sizes, strides);
}
inline TensorView key_cache(const Sizes& sizes, const Sizes& strides = {}) {
  return view_at(kKeyCache, DType::E4M3, sizes, strides);
}
inline TensorView value_cache(const Sizes& sizes, const Sizes& strides = {}) {
  return view_at(kValueCache, DType::E4M3, sizes, strides);
}
inline TensorView k_scale(const Sizes& sizes, const Sizes& strides = {}) {
  return view_at(kKeyScale, DType::Float32, sizes, strides);
}
inline TensorView v_scale(const Sizes& sizes, const Sizes& strides = {}) {
  return view_at(kValueScale, DType::Float32, sizes, strides);
}

inline CacheAppend append_problem(const Sizes& cache = kCacheSizes, std::int64_t tokens = 5) {
  return {.key = key({tokens, cache[2], cache[3]}),
          .value = value({tokens, cache[2], cache[3]}),
          .key_cache = key_cache(cache),
          .value_cache = value_cache(cache),
          .slot_mapping = view_at(kSlots, DType::Int64, {tokens}),
          .k_scale = k_scale({1}),
          .v_scale = v_scale({1})};
}

inline CacheAppendDynamic append_dynamic_problem() {
  const CacheAppend p = append_problem();
  return {.key = p.key,
          .value = p.value,
          .key_cache = p.key_cache,
          .value_cache = p.value_cache,
          .k_scale_cache = k_scale({10, 16, 4}),
          .v_scale_cache = v_scale({10, 16, 4}),
          .slot_mapping = p.slot_mapping};
}

inline CacheGather gather_problem() {
  const CacheAppend p = append_problem();
  return {.key_cache = p.key_cache,
          .value_cache = p.value_cache,
          .key = p.key,
          .value = p.value,
          .block_table = view_at(kTable, DType::Int32, {3, 7}),
          .cu_seq_lens = view_at(kSums, DType::Int32, {4}),
          .k_scale = p.k_scale,
          .v_scale = p.v_scale,
          .seq_starts = view_at(kStarts, DType::Int32, {3})};
}

// --- The attention step --------------------------------

inline constexpr std::uintptr_t kQuery = 0x1'1000'0000, kQueryOut = 0x1'2000'0000, kQueryScale = 0x1'3000'0000,
                                kPositions = 0x1'4000'0000, kCosSin = 0x1'5000'0000, kQueryWeight = 0x1'6000'0000,
                                kKeyWeight = 0x1'7000'0000;

// 8 query heads over the 4 heads of the cache, RoPE of half a head, both norms.
inline RopeAppend rope_problem() {
  const CacheAppend p = append_problem();
  return {.query = view_at(kQuery, DType::BFloat16, {5, 8, 64}),
          .key = p.key,
          .value = p.value,
          .query_out = view_at(kQueryOut, DType::E4M3, {5, 8, 64}),
          .key_cache = p.key_cache,
          .value_cache = p.value_cache,
          .slot_mapping = p.slot_mapping,
          .q_scale = view_at(kQueryScale, DType::Float32, {1}),
          .k_scale = p.k_scale,
          .v_scale = p.v_scale,
          .positions = view_at(kPositions, DType::Int64, {5}),
          .cos_sin_cache = view_at(kCosSin, DType::Float32, {100, 32}),
          .q_norm_weight = view_at(kQueryWeight, DType::BFloat16, {64}),
          .k_norm_weight = view_at(kKeyWeight, DType::BFloat16, {64})};
}

// --- Attention --------------------------------

inline constexpr std::uintptr_t kSeqLens = 0x1'8000'0000, kSinks = 0x1'9000'0000, kKeyOffset = 0x1'a000'0000,
                                kValueOffset = 0x1'b000'0000, kLse = 0x1'c000'0000, kWorkspace = 0x1'd000'0000;

// 3 sequences of up to 7 blocks with 5 queries in FP8, 8 query heads over the 4 heads of the cache, and all that is optional.
inline PagedAttention attention_problem() {
  const CacheAppend p = append_problem();
  return {.query = view_at(kQuery, DType::E4M3, {5, 8, 64}),
          .key_cache = p.key_cache,
          .value_cache = p.value_cache,
          .out = view_at(kQueryOut, DType::BFloat16, {5, 8, 64}),
          .block_table = view_at(kTable, DType::Int32, {3, 7}),
          .seq_lens = view_at(kSeqLens, DType::Int32, {3}),
          .k_scale = p.k_scale,
          .v_scale = p.v_scale,
          .softmax_scale = 0.125f,
          .cu_query_lens = view_at(kSums, DType::Int32, {4}),
          .max_query_len = 2,
          .q_scale = view_at(kQueryScale, DType::Float32, {1}),
          .seq_starts = view_at(kStarts, DType::Int32, {3}),
          .sinks = view_at(kSinks, DType::Float32, {8}),
          .k_offset = view_at(kKeyOffset, DType::Float32, {4, 64}),
          .v_offset = view_at(kValueOffset, DType::Float32, {4, 64}),
          .lse = view_at(kLse, DType::Float32, {5, 8}),
          .workspace = view_at(kWorkspace, DType::UInt8, {4, 1024})};
}

// One bfloat16 query per sequence, and nothing that is optional.
inline PagedAttention plain_attention_problem() {
  const PagedAttention p = attention_problem();
  return {.query = view_at(kQuery, DType::BFloat16, {3, 8, 64}),
          .key_cache = p.key_cache,
          .value_cache = p.value_cache,
          .out = view_at(kQueryOut, DType::BFloat16, {3, 8, 64}),
          .block_table = p.block_table,
          .seq_lens = p.seq_lens,
          .k_scale = p.k_scale,
          .v_scale = p.v_scale,
          .softmax_scale = p.softmax_scale};
}

}  // namespace fp8kv::testing_support
