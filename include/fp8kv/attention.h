// Attention that reads the paged cache of kv_cache.h: one struct, its validator, and its launchers.
//
// Sequence s has seq_lens[s] tokens in the cache, those of its own queries included; position p lies in block
// block_table[s, p / block_size] at p % block_size. Its queries are rows cu_query_lens[s] to cu_query_lens[s + 1] of `query`,
// or row s where cu_query_lens is absent. The i-th of its L queries is the token at position seq_lens[s] - L + i; it sees the
// positions from seq_starts[s] (0 if absent) to its own, and with sliding_window = w > 0 only the last w of them. Rows that
// belong to no sequence stay untouched.
//
//   logit = softmax_scale * (q . k),  with q = q_scale * query and k = k_scale * key_cache + k_offset, in fp32
//   logit = softcap * tanh(logit / softcap), where softcap > 0
//   out   = sum of softmax(logits, sinks[head])[p] * (v_scale * value_cache[p] + v_offset)
//   lse   = log(sum of exp(logit) + exp(sinks[head]))
//
// A sink is one more logit in the denominator, without a value. A query that sees nothing gets zeros, and the logit of its sink
// as lse, or -infinity. Bytes of positions that are not seen never matter, NaN included; a NaN that is seen gives NaN.
//
// K and V may have heads of two sizes and elements of two types. They may share memory, such as V as the first 512 of the 576
// elements of K in a cache of latent attention.
//
// Example (one query per sequence, scales per head, on the CPU):
//   fp8kv::PagedAttention problem{
//       .query = fp8kv::contiguous(query, fp8kv::DType::BFloat16, {seqs, heads, head_size}),
//       .key_cache = fp8kv::contiguous(key_cache, fp8kv::DType::E4M3, {blocks, block_size, kv_heads, head_size}),
//       .value_cache = fp8kv::contiguous(value_cache, fp8kv::DType::E4M3, {blocks, block_size, kv_heads, head_size}),
//       .out = fp8kv::contiguous(out, fp8kv::DType::BFloat16, {seqs, heads, head_size}),
//       .block_table = fp8kv::contiguous(table, fp8kv::DType::Int32, {seqs, max_blocks}),
//       .seq_lens = fp8kv::contiguous(lens, fp8kv::DType::Int32, {seqs}),
//       .k_scale = fp8kv::contiguous(k_scales, fp8kv::DType::Float32, {kv_heads}),
//       .v_scale = fp8kv::contiguous(v_scales, fp8kv::DType::Float32, {kv_heads}),
//       .softmax_scale = 1.0f / std::sqrt(float(head_size)),
//   };
//   fp8kv::cpu::run(problem);
#pragma once

#include <cstdint>
#include <optional>

#include "fp8kv/cuda_stream.h"
#include "fp8kv/error.h"
#include "fp8kv/export.h"
#include "fp8kv/parallel.h"
#include "fp8kv/views.h"

namespace fp8kv {

// Op name: paged_attention. num_heads is a multiple of num_kv_heads: query head h reads KV head h / (num_heads / num_kv_heads).
struct PagedAttention {
  TensorView query;        // [at least num_tokens, num_heads, head_size]: Float32, Float16, BFloat16, or K's FP8 type
  TensorView key_cache;    // [num_blocks, block_size, num_kv_heads, head_size], as for CacheAppend
  TensorView value_cache;  // [num_blocks, block_size, num_kv_heads, v_head_size], likewise
  TensorView out;          // [at least num_tokens, num_heads, v_head_size]: Float32, Float16 or BFloat16, written
  TensorView block_table;  // Int32 [num_seqs, max_blocks]
  TensorView seq_lens;     // Int32 [num_seqs]
  std::optional<DType> kv_cache_dtype{};
  // Float32 with 1 or num_kv_heads elements, or per channel [num_kv_heads, head_size] (of V v_head_size), or per token and head
  // [num_blocks, block_size, num_kv_heads]. Checked and not used where the cache is not quantized.
  TensorView k_scale;
  TensorView v_scale;
  float softmax_scale = 1.0f;
  std::optional<TensorView> cu_query_lens{};  // Int32 [num_seqs + 1], beginning with 0
  std::int64_t max_query_len = 1;             // upper bounds that the host knows: they choose the plan only
  std::int64_t max_seq_len = 0;               // 0: what the block table can hold
  std::optional<TensorView> q_scale{};     // Float32 with 1, num_kv_heads or num_heads elements; for FP8 queries, and only them
  std::optional<TensorView> seq_starts{};  // Int32 [num_seqs]
  std::int64_t sliding_window = 0;         // 0: none
  float softcap = 0.0f;                    // 0: none
  std::optional<TensorView> sinks{};       // Float32 or the type of query [num_heads]
  std::optional<TensorView> k_offset{};    // Float32 [num_kv_heads, head_size]; quantized caches only
  std::optional<TensorView> v_offset{};    // Float32 [num_kv_heads, v_head_size]; likewise
  std::optional<TensorView> lse{};         // Float32 [at least num_tokens, num_heads], written
  std::optional<TensorView> workspace{};   // UInt8, on CUDA of cuda::workspace_size(problem) bytes, aligned to 16; written
  std::int64_t num_splits = 0;             // parts that the keys of a sequence are divided into; 0: the plan chooses
  std::optional<DType> v_cache_dtype{};    // format of value_cache; absent: that of key_cache
};

// Checks everything about a problem that can be checked without reading its elements. Throws Error.
FP8KV_API void validate(const PagedAttention& problem);

namespace cpu {

// On the calling thread, unless `parallel_for` spreads the work. All views must be on the CPU. Lengths, starts and blocks that
// are out of range throw Error before anything is written. Needs no workspace.
FP8KV_API void run(const PagedAttention& problem, const ParallelFor& parallel_for = {});

}  // namespace cpu

namespace cuda {

// The bytes of workspace that a problem needs on the current device; `workspace` itself is ignored. 0: none. It depends
// on shapes, bounds and num_splits, not on what the index tensors hold, and may have any contents. Calls behind each other on
// one stream can share it.
FP8KV_API std::int64_t workspace_size(const PagedAttention& problem);

// Enqueues on `stream` of the current device, on which all views must be. Allocates nothing and, without FP8KV_DEBUG=1, waits
// for nothing. A position whose block is out of range is not seen.
FP8KV_API void run(const PagedAttention& problem, Stream stream = nullptr);

}  // namespace cuda
}  // namespace fp8kv
