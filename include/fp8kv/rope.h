// The fused step in one launch: RMSNorm, RoPE and quantization of Q and K, quantization of V, and the append to the paged
// cache of kv_cache.h, whose rules on caches, slots, scales and offsets hold here too.
#pragma once

#include <array>

#include "fp8kv/kv_cache.h"

namespace fp8kv {

// A step of an attention layer in one launch, for the tokens of slot_mapping: RMSNorm of every head of Q and K where there are
// weights, RoPE of Q and K where there are positions, the norm first or last, both in fp32 with one rounding to the type of
// query; then Q into query_out, quantized where that is FP8, and K and V into the caches as CacheAppend does. Op name:
// rope_quant_and_cache. Q is written for every token, whatever its slot. The bytes are the same as with the separate
// operations; with a norm they may differ by one step of FP8, as the order of the sum is not fixed.
//
//   RMSNorm: x[d] = (x[d] * (1 / sqrt(sum of x^2 / head_size + norm_eps))) * weight[d]
//   RoPE:    (a, b) = (a * cos[i] - b * sin[i], b * cos[i] + a * sin[i]), for i from 0 to rotary_dim / 2 - 1; the pair (a, b)
//            is x[i], x[i + rotary_dim / 2] with is_neox, else x[2 * i], x[2 * i + 1]; other elements stay
//
// Cosines and sines are those of a token's one position. With mrope_section a token has three, time, height and width, and i
// takes that of its section: these are the sections' lengths, in this order. With mrope_interleaved i takes height where
// i % 3 == 1 and i < 3 * (length of height), width where i % 3 == 2 and i < 3 * (length of width), else time.
//
// A position outside the table throws on the CPU; on CUDA nothing is written for its token.
struct RopeAppend {
  TensorView query;      // Float32, Float16 or BFloat16 [at least num_tokens, num_heads, head_size]
  TensorView key;        // of that type [at least num_tokens, num_kv_heads, head_size]
  TensorView value;      // likewise
  TensorView query_out;  // [at least num_tokens, num_heads, head_size], written: the FP8 type of the caches, or not quantized
  TensorView key_cache;  // as for CacheAppend
  TensorView value_cache;
  TensorView slot_mapping;
  std::optional<DType> kv_cache_dtype{};
  TensorView q_scale;  // Float32 with 1, num_kv_heads or num_heads elements; not used where query_out is not FP8
  TensorView k_scale;
  TensorView v_scale;
  std::optional<TensorView> positions{};  // Int32 or Int64 [at least num_tokens]; with mrope_section [3, at least num_tokens]
  std::optional<TensorView> cos_sin_cache{};  // Float32 or the type of query [max_position, rotary_dim]: cosines, then sines
  bool is_neox = true;
  std::optional<TensorView> q_norm_weight{};  // Float32 or the type of query [head_size]
  std::optional<TensorView> k_norm_weight{};
  float norm_eps = 1e-6f;
  std::optional<TensorView> k_offset{};
  std::optional<TensorView> v_offset{};
  std::optional<std::array<std::int64_t, 3>> mrope_section{};  // with the sum rotary_dim / 2
  bool mrope_interleaved = false;
  bool norm_after_rope = false;
};

// Checks everything about a problem that can be checked without reading its elements. Throws Error.
FP8KV_API void validate(const RopeAppend& problem);

namespace cpu {

// On the calling thread, unless `parallel_for` spreads the work. All views must be on the CPU.
FP8KV_API void run(const RopeAppend& problem, const ParallelFor& parallel_for = {});

}  // namespace cpu

namespace cuda {

// Enqueues on `stream` of the current device, on which all views must be. Allocates nothing and, without FP8KV_DEBUG=1, waits
// for nothing, so it can be captured into a CUDA graph. Launch failures throw Error.
FP8KV_API void run(const RopeAppend& problem, Stream stream = nullptr);

}  // namespace cuda
}  // namespace fp8kv
