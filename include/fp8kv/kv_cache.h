// The paged KV cache: one struct per operation, its validator, and its launchers. Rules: docs/numerics.md; layouts, slots and
// block tables: docs/layouts.md.
//
// A cache is always seen as [num_blocks, block_size, num_kv_heads, head_size]; layouts such as NHD and HND differ in strides
// only. Slot s is the place (s / block_size, s % block_size). Views may have any strides and any alignment and may be empty; K
// and V caches may be slices of one tensor. What is written must overlap nothing else.
//
// K and V may have heads of two sizes: `head_size` is that of key_cache for key, k_scale and k_offset, that of value_cache for
// value, v_scale and v_offset. A size of 0 means that there is no K or no V, as in a cache of latent vectors.
//
// kv_cache_dtype is the format of key_cache; absent, its type. v_cache_dtype is the format of value_cache; absent, the same as
// that of key_cache:
//   E4M3, E5M2                   quantized: tensors of that type or of UInt8
//   Int8                         quantized: tensors of that type
//   Float32, Float16, BFloat16   a plain copy, rounded where the types differ: tensors of that type; scales are checked, not
//   used
//
// Scales of a cache, k_scale and v_scale: Float32 with 1 element, or num_kv_heads elements in any shape, evenly strided, or one
// per channel, [num_kv_heads, head_size] with any strides.
//
// Offsets of a quantized cache, k_offset and v_offset: Float32 [num_kv_heads, head_size] with any strides. What is quantized is
// x - offset, in fp32; what is dequantized is q * scale + offset, in fp32, each rounded.
//
// Index tensors are read on the device. A negative slot is skipped. What their elements show to be wrong (a slot or a block
// beyond the cache) throws on the CPU before anything is written. On CUDA such rows are skipped; with the environment variable
// FP8KV_DEBUG=1 the host waits for the indices and throws as on the CPU, except while a stream is captured.
//
// Example (per head, on the CPU):
//   fp8kv::CacheAppend problem{
//       .key = fp8kv::contiguous(key, fp8kv::DType::BFloat16, {tokens, heads, head_size}),
//       .value = fp8kv::contiguous(value, fp8kv::DType::BFloat16, {tokens, heads, head_size}),
//       .key_cache = fp8kv::contiguous(key_cache, fp8kv::DType::E4M3, {blocks, block_size, heads, head_size}),
//       .value_cache = fp8kv::contiguous(value_cache, fp8kv::DType::E4M3, {blocks, block_size, heads, head_size}),
//       .slot_mapping = fp8kv::contiguous(slots, fp8kv::DType::Int64, {tokens}),
//       .k_scale = fp8kv::contiguous(k_scales, fp8kv::DType::Float32, {heads}),
//       .v_scale = fp8kv::contiguous(v_scales, fp8kv::DType::Float32, {heads}),
//   };
//   fp8kv::cpu::run(problem);
#pragma once

#include <optional>

#include "fp8kv/cuda_stream.h"
#include "fp8kv/error.h"
#include "fp8kv/export.h"
#include "fp8kv/parallel.h"
#include "fp8kv/views.h"

namespace fp8kv {

// cache[slot of token t, h] = quantize(key[t, h] - offset, scale), for K and V. Op name: reshape_and_cache_flash.
// If a slot occurs twice, the last token wins on the CPU; on CUDA each element comes from any of them.
//
// Rows may also be of the quantized type of their cache (or UInt8, where that is FP8): what has been quantized with the scale
// and the offset that are given is stored as it is.
struct CacheAppend {
  TensorView key;           // Float32, Float16 or BFloat16 [at least num_tokens, num_kv_heads, head_size]
  TensorView value;         // likewise; of the type of key, unless one of them is quantized
  TensorView key_cache;     // [num_blocks, block_size, num_kv_heads, head_size], written
  TensorView value_cache;   // likewise
  TensorView slot_mapping;  // Int32 or Int64 [num_tokens]
  std::optional<DType> kv_cache_dtype{};
  TensorView k_scale;
  TensorView v_scale;
  std::optional<TensorView> k_offset{};
  std::optional<TensorView> v_offset{};
  std::optional<DType> v_cache_dtype{};
};

// The same with a scale for each token and head, dynamic_scale(largest finite |key[t, h] - offset|), stored at the token's
// slot. Op name: reshape_and_cache_flash_dynamic. The caches must be quantized.
struct CacheAppendDynamic {
  TensorView key;
  TensorView value;
  TensorView key_cache;
  TensorView value_cache;
  TensorView k_scale_cache;  // Float32 [num_blocks, block_size, num_kv_heads], written
  TensorView v_scale_cache;  // likewise
  TensorView slot_mapping;
  std::optional<DType> kv_cache_dtype{};
  std::optional<TensorView> k_offset{};
  std::optional<TensorView> v_offset{};
  std::optional<DType> v_cache_dtype{};
};

// The inverse: key[cu_seq_lens[s] + t] = dequantize(cache[position seq_starts[s] + t of sequence s]), for K and V. Op name:
// gather_and_dequant_cache. Position p of sequence s lies in block block_table[s, p / block_size] at p % block_size. Rows from
// cu_seq_lens[num_seqs] on are left alone.
struct CacheGather {
  TensorView key_cache;    // as for CacheAppend, read
  TensorView value_cache;  // likewise
  TensorView key;          // Float32, Float16 or BFloat16 [at least the sum of lengths, num_kv_heads, head_size], written
  TensorView value;        // likewise
  TensorView block_table;  // Int32 [num_seqs, max_blocks]
  TensorView cu_seq_lens;  // Int32 [num_seqs + 1], beginning with 0: the sums of the lengths
  std::optional<DType> kv_cache_dtype{};
  TensorView k_scale;                      // as for CacheAppend, or Float32 [num_blocks, block_size, num_kv_heads]
  TensorView v_scale;                      // likewise
  std::optional<TensorView> seq_starts{};  // Int32 [num_seqs]: the first position wanted of each sequence; 0 if absent
  std::optional<TensorView> k_offset{};
  std::optional<TensorView> v_offset{};
  std::optional<DType> v_cache_dtype{};
};

// Checks everything about a problem that can be checked without reading its elements. Throws Error.
FP8KV_API void validate(const CacheAppend& problem);
FP8KV_API void validate(const CacheAppendDynamic& problem);
FP8KV_API void validate(const CacheGather& problem);

namespace cpu {

// On the calling thread, unless `parallel_for` spreads the work. All views must be on the CPU.
FP8KV_API void run(const CacheAppend& problem, const ParallelFor& parallel_for = {});
FP8KV_API void run(const CacheAppendDynamic& problem, const ParallelFor& parallel_for = {});
FP8KV_API void run(const CacheGather& problem, const ParallelFor& parallel_for = {});

}  // namespace cpu

namespace cuda {

// Enqueues on `stream` of the current device, on which all views must be. Allocates nothing and, without FP8KV_DEBUG=1, waits
// for nothing, so it can be captured into a CUDA graph. Launch failures throw Error.
FP8KV_API void run(const CacheAppend& problem, Stream stream = nullptr);
FP8KV_API void run(const CacheAppendDynamic& problem, Stream stream = nullptr);
FP8KV_API void run(const CacheGather& problem, Stream stream = nullptr);

}  // namespace cuda
}  // namespace fp8kv
