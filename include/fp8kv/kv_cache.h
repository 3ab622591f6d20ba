// The paged KV cache: one struct per operation, its validator, and its launchers. Rules: docs/numerics.md; layouts, slots and
// block tables: docs/layouts.md.
//
// A cache is always seen as [num_blocks, block_size, num_kv_heads, head_size]; layouts such as NHD and HND differ in strides
// only. Slot s is the place (s / block_size, s % block_size). Views may have any strides and any alignment and may be empty; K
// and V caches may be slices of one tensor. What is written must overlap nothing else.
//
// kv_cache_dtype says what the elements of a cache are:
//   "fp8", "fp8_e4m3"                 E4M3: tensors of that type or of UInt8
//   "fp8_e5m2"                        E5M2: likewise
//   "float32", "float16", "bfloat16"  not quantized: tensors of that type; scales are checked, not used
//   "auto"                            the same, whichever of the three types the cache tensors are
//
// Scales of a cache, k_scale and v_scale: Float32 with 1 element, or num_kv_heads elements in any shape with even steps.
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
//       .kv_cache_dtype = "fp8",
//       .k_scale = fp8kv::contiguous(k_scales, fp8kv::DType::Float32, {heads}),
//       .v_scale = fp8kv::contiguous(v_scales, fp8kv::DType::Float32, {heads}),
//   };
//   fp8kv::cpu::run(problem);
#pragma once

#include <optional>
#include <string_view>

#include "fp8kv/error.h"
#include "fp8kv/export.h"
#include "fp8kv/parallel.h"
#include "fp8kv/views.h"

namespace fp8kv {

// cache[slot of token t, h] = quantize(key[t, h], scale of h), for K and V. Op name: reshape_and_cache_flash.
// The same slot twice: the last token stays on the CPU; on CUDA any of them, not necessarily the same for all elements.
struct CacheAppend {
  TensorView key;           // Float32, Float16 or BFloat16 [at least num_tokens, num_kv_heads, head_size]
  TensorView value;         // likewise
  TensorView key_cache;     // [num_blocks, block_size, num_kv_heads, head_size], written
  TensorView value_cache;   // likewise
  TensorView slot_mapping;  // Int32 or Int64 [num_tokens]
  std::string_view kv_cache_dtype = "auto";
  TensorView k_scale;
  TensorView v_scale;
};

// The same with a scale for each token and head, dynamic_scale(largest finite |key[t, h]|), stored at the token's slot. Op
// name: reshape_and_cache_flash_dynamic. kv_cache_dtype must be one of FP8.
struct CacheAppendDynamic {
  TensorView key;
  TensorView value;
  TensorView key_cache;
  TensorView value_cache;
  TensorView k_scale_cache;  // Float32 [num_blocks, block_size, num_kv_heads], written
  TensorView v_scale_cache;  // likewise
  TensorView slot_mapping;
  std::string_view kv_cache_dtype = "fp8";
};

// A step of an attention layer in one launch, for the tokens of slot_mapping: RMSNorm of every head of Q and K where there are
// weights, RoPE of Q and K where there are positions, both in fp32 with one rounding to the type of query; then Q into
// query_out, quantized where that is FP8, and K and V into the caches as CacheAppend does. Op name: rope_quant_and_cache. Q is
// written for every token, whatever its slot. The bytes are those of the separate operations; with a norm they may differ by
// one step of FP8, as the order of the sum is not fixed.
//
//   RMSNorm: x[d] = (x[d] * (1 / sqrt(sum of x^2 / head_size + norm_eps))) * weight[d]
//   RoPE:    (a, b) = (a * cos[i] - b * sin[i], b * cos[i] + a * sin[i]), for i from 0 to rotary_dim / 2 - 1; the pair (a, b)
//   is
//            x[i], x[i + rotary_dim / 2] with is_neox, else x[2 * i], x[2 * i + 1]; other elements stay
//
// A position outside the table throws on the CPU; on CUDA nothing is written for its token.
struct RopeQuantAppend {
  TensorView query;      // Float32, Float16 or BFloat16 [at least num_tokens, num_heads, head_size]
  TensorView key;        // of that type [at least num_tokens, num_kv_heads, head_size]
  TensorView value;      // likewise
  TensorView query_out;  // [at least num_tokens, num_heads, head_size], written: the FP8 type of the caches, or not quantized
  TensorView key_cache;  // as for CacheAppend
  TensorView value_cache;
  TensorView slot_mapping;
  std::string_view kv_cache_dtype = "fp8";
  TensorView q_scale;  // Float32 with 1, num_kv_heads or num_heads elements; not used where query_out is not FP8
  TensorView k_scale;
  TensorView v_scale;
  std::optional<TensorView> positions{};      // Int32 or Int64 [at least num_tokens]
  std::optional<TensorView> cos_sin_cache{};  // Float32 or the type of query [max_position, rotary_dim]: cosines, then sines
  bool is_neox = true;
  std::optional<TensorView> q_norm_weight{};  // Float32 or the type of query [head_size]
  std::optional<TensorView> k_norm_weight{};
  float norm_eps = 1e-6f;
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
  std::string_view kv_cache_dtype = "auto";
  TensorView k_scale;                      // as for CacheAppend, or Float32 [num_blocks, block_size, num_kv_heads]
  TensorView v_scale;                      // likewise
  std::optional<TensorView> seq_starts{};  // Int32 [num_seqs]: the first position wanted of each sequence; 0 if absent
};

// What every backend works from. Strides count elements.
struct HeadsView {  // [token, head, dim]
  void* data = nullptr;
  std::int64_t token = 0;
  std::int64_t head = 0;
  std::int64_t dim = 1;
};
struct PagedView {  // [block, offset, head, dim]
  void* data = nullptr;
  std::int64_t block = 0;
  std::int64_t offset = 0;
  std::int64_t head = 0;
  std::int64_t dim = 1;
};
struct PagedScales {  // per tensor: all strides 0; per head: only `head` is not
  float* data = nullptr;
  std::int64_t block = 0;
  std::int64_t offset = 0;
  std::int64_t head = 0;
};
struct CacheSide {  // K or V
  HeadsView heads;
  PagedView cache;
  PagedScales scales;
};

struct CacheLayout {
  // Heads that follow each other in memory on both sides and share a scale are taken as one head.
  std::int64_t num_tokens = 0;  // to append; for a gather, rows of key and value
  std::int64_t num_heads = 0;
  std::int64_t head_size = 0;
  std::int64_t num_blocks = 0;
  std::int64_t block_size = 0;
  DType real = DType::Float32;     // of key and value
  DType element = DType::Float32;  // of the caches; not FP8: a plain copy, rounded where the types differ
  CacheSide key;
  CacheSide value;

  constexpr std::int64_t num_slots() const { return num_blocks * block_size; }
  constexpr bool empty() const { return num_tokens == 0 || num_heads == 0 || head_size == 0; }
};

struct VectorView {  // Float32 or the type of query; nullptr: none
  const void* data = nullptr;
  std::int64_t step = 1;
  DType dtype = DType::Float32;
};
struct RopeLayout {
  CacheLayout cache;  // no heads are taken together
  std::int64_t num_heads = 0;
  HeadsView query;
  HeadsView query_out;
  DType query_element = DType::Float32;  // of query_out
  const float* q_scale = nullptr;
  std::int64_t q_scale_step = 0;     // from one scale to the next
  std::int64_t heads_per_scale = 1;  // neighbouring query heads that share one
  std::int64_t rotary_dim = 0;       // 0 without positions
  std::int64_t max_position = 0;
  VectorView cos_sin;  // row 0
  std::int64_t cos_sin_row = 0;
  bool is_neox = true;
  VectorView norm_weights[2];  // of Q and K
  float norm_eps = 0.0f;

  constexpr bool empty() const { return cache.num_tokens == 0 || cache.head_size == 0 || num_heads + cache.num_heads == 0; }
  constexpr bool transforms(int side) const { return rotary_dim > 0 || norm_weights[side].data; }
};

// Checks everything about a problem that can be checked without reading its elements. Throws Error.
FP8KV_API CacheLayout validate(const CacheAppend& problem);
FP8KV_API CacheLayout validate(const CacheAppendDynamic& problem);
FP8KV_API CacheLayout validate(const CacheGather& problem);
FP8KV_API RopeLayout validate(const RopeQuantAppend& problem);

namespace cpu {

// On the calling thread, unless `parallel_for` spreads the work. All views must be on the CPU.
FP8KV_API void run(const CacheAppend& problem, const ParallelFor& parallel_for = {});
FP8KV_API void run(const CacheAppendDynamic& problem, const ParallelFor& parallel_for = {});
FP8KV_API void run(const CacheGather& problem, const ParallelFor& parallel_for = {});
FP8KV_API void run(const RopeQuantAppend& problem, const ParallelFor& parallel_for = {});

}  // namespace cpu

namespace cuda {

// Enqueues on `stream` (a cudaStream_t; nullptr is the default stream) of the current device, on which all views must be.
// Allocates nothing and, without FP8KV_DEBUG=1, waits for nothing, so it can be captured into a CUDA graph. Launch failures
// throw Error.
FP8KV_API void run(const CacheAppend& problem, void* stream = nullptr);
FP8KV_API void run(const CacheAppendDynamic& problem, void* stream = nullptr);
FP8KV_API void run(const CacheGather& problem, void* stream = nullptr);
FP8KV_API void run(const RopeQuantAppend& problem, void* stream = nullptr);

}  // namespace cuda
}  // namespace fp8kv
