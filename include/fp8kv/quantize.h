// FP8 and INT8 quantization: one struct per operation, its validator, and its launchers. Formulas: fp8.h and docs/numerics.md.
//
// Scales. The input, whatever its number of dimensions, is seen as a matrix [prod(shape[:-1]), shape[-1]] = [M, N]. A
// GroupShape (rows, cols) divides that matrix into groups that share a scale, R = ceil(M / rows) by C = ceil(N / cols) of them;
// -1 means the whole extent, and a last group may be smaller than the others.
//   per tensor   (-1, -1)         scale []  or [1]
//   per token    (1, -1)          scale [M] or [M, 1]
//   per channel  (-1, 1)          scale [N] or [1, N]
//   per head     (-1, head_size)  scale [H] or [1, H], of an input [T, H * head_size]
//   per block    (gm, gn)         scale [R, C]
// With rows = 1 the scale may also have the input's own leading dimensions, shape[:-1] + [C].
// Without a GroupShape, a scale of one element is per tensor, and a scale with as many dimensions (at least 2) as the input
// defines its blocks itself: each of its sizes must divide the input's. So [1, H, 1] on an input [T, H, D] is per head.
//
// Views may have any strides and any alignment and may be empty. Results must not overlap inputs.
//
// Example (per token, on the CPU):
//   fp8kv::StaticQuantize problem{
//       .result = fp8kv::contiguous(q, fp8kv::DType::E4M3, {tokens, hidden}),
//       .input = fp8kv::contiguous(x, fp8kv::DType::BFloat16, {tokens, hidden}),
//       .scale = fp8kv::contiguous(scales, fp8kv::DType::Float32, {tokens}),
//       .group_shape = fp8kv::GroupShape{1, -1},
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

// Extent of a scale group over the matrix view; -1 is the whole extent. Any other value below 1 is refused.
struct GroupShape {
  std::int64_t rows = -1;
  std::int64_t cols = -1;
};

// result[i] = quantize(input[i], scale of i's group). Op name: static_scaled_fp8_quant.
struct StaticQuantize {
  TensorView result;  // E4M3, E5M2 or Int8, the input's shape
  TensorView input;   // Float32, Float16 or BFloat16
  TensorView scale;   // Float32
  std::optional<GroupShape> group_shape{};
};

// scale[g] = dynamic_scale(largest finite |input| of group g), then as StaticQuantize. Op name: dynamic_scaled_fp8_quant.
struct DynamicQuantize {
  TensorView result;                     // E4M3, E5M2 or Int8, the input's shape
  TensorView input;                      // Float32, Float16 or BFloat16
  TensorView scale;                      // Float32, written
  std::optional<TensorView> scale_ub{};  // Float32, one element: amax is clipped to it
  std::optional<GroupShape> group_shape{};
};

// result[i] = input[i] * scale of i's group. Op name: scaled_fp8_dequant.
struct Dequantize {
  TensorView result;  // Float32, Float16 or BFloat16, the input's shape
  TensorView input;   // E4M3, E5M2 or Int8
  TensorView scale;   // Float32
  std::optional<GroupShape> group_shape{};
};

// amax[g] = max(amax[g], largest finite |input| of group g): a running maximum, to be filled with 0 at first. Op name:
// group_amax. The fp32 bit patterns are compared as signed integers: exact for all values >= 0, a NaN in amax
// stays.
struct GroupAmax {
  TensorView amax;   // Float32, read and written, shaped like a scale
  TensorView input;  // Float32, Float16 or BFloat16
  GroupShape group_shape{};
};

// Checks everything about a problem that can be checked without reading its elements. Throws Error.
FP8KV_API void validate(const StaticQuantize& problem);
FP8KV_API void validate(const DynamicQuantize& problem);
FP8KV_API void validate(const Dequantize& problem);
FP8KV_API void validate(const GroupAmax& problem);

namespace cpu {

// On the calling thread, unless `parallel_for` spreads the work. All views must be on the CPU.
FP8KV_API void run(const StaticQuantize& problem, const ParallelFor& parallel_for = {});
FP8KV_API void run(const DynamicQuantize& problem, const ParallelFor& parallel_for = {});
FP8KV_API void run(const Dequantize& problem, const ParallelFor& parallel_for = {});
FP8KV_API void run(const GroupAmax& problem, const ParallelFor& parallel_for = {});

}  // namespace cpu

namespace cuda {

// Enqueues on `stream` of the current device, on which all views must be. Allocates nothing and waits for nothing, so it can be
// captured into a CUDA graph. Launch failures throw Error.
FP8KV_API void run(const StaticQuantize& problem, Stream stream = nullptr);
FP8KV_API void run(const DynamicQuantize& problem, Stream stream = nullptr);
FP8KV_API void run(const Dequantize& problem, Stream stream = nullptr);
FP8KV_API void run(const GroupAmax& problem, Stream stream = nullptr);

}  // namespace cuda
}  // namespace fp8kv
