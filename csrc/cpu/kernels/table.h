// The kernel table of an instruction set: signatures, and the struct that kernels.h fills.
//
// A kernel handles rows of contiguous elements. Neither input nor output is aligned beyond its elements, and they don't
// overlap.
#pragma once

#include <array>
#include <cstdint>

#include "core/formats.h"

namespace fp8kv::cpu {

// How many rows, and the step from one to the next in elements of each view.
struct Rows {
  std::int64_t count = 1;
  std::int64_t in = 0;
  std::int64_t out = 0;
  std::int64_t scale = 0;
  bool stream = false;        // a hint: the result is larger than the caches and had better not pass through them
  std::int64_t ahead = 4096;  // a hint: memory so many bytes after what is read is soon read too
};

// The scales of some rows, prepared by a kernel of the same ElementwiseKernels, which defines the other fields.
struct RowScales {
  static constexpr std::int64_t kMaxCount = 64;
  alignas(64) float scale[kMaxCount];
  alignas(64) float high[kMaxCount];
  alignas(64) float low[kMaxCount];
  alignas(64) std::int32_t ordinary[kMaxCount];  // not 0: the fast path is exact
};

// The scales of neighboring columns, prepared by a kernel of the same ElementwiseKernels, which defines the other fields.
struct ColumnScales {
  static constexpr std::int64_t kMaxCount = 4096;
  static constexpr std::int64_t kCapacity = kMaxCount + 64;  // a last vector may reach beyond
  bool ordinary = false;                                     // all scales are such that the fast path is exact
  alignas(64) float scale[kCapacity];
  alignas(64) float high[kCapacity];
  alignas(64) float low[kCapacity];
};

struct ElementwiseKernels {
  // `scale` is set for this many rows.
  void (*prepare_rows)(RowScales& scales, std::int64_t count) = nullptr;
  // Row r has the scale number first + r * rows.scale.
  void (*rows)(const void* in, void* out, std::int64_t columns, const Rows& rows, const RowScales& scales,
               std::int64_t first) = nullptr;
  // `scale` is set for this many columns.
  void (*prepare_columns)(ColumnScales& scales, std::int64_t columns) = nullptr;
  // A row in which element i has the scale number first + i; for `stream` see Rows.
  void (*columns)(const void* in, void* out, std::int64_t columns, const ColumnScales& scales, std::int64_t first,
                  bool stream) = nullptr;
  // Kernels that quantize have it: finds the scales of rows from their largest magnitudes (AmaxKernels), and makes them ready.
  void (*dynamic_rows)(RowScales& scales, const std::int32_t* amax, std::int64_t count, float upper_bound) = nullptr;
};

struct AmaxKernels {
  // amax[r] = the largest finite magnitude of row r, as the bit pattern of an fp32: these compare like the values.
  void (*rows)(const void* in, std::int32_t* amax, std::int64_t columns, const Rows& rows);
  // The same for each column of a row: amax[i] = max(amax[i], |element i| if finite).
  void (*columns)(const void* in, std::int32_t* amax, std::int64_t columns);
};

struct OffsetKernels {
  // out = in - offsets, in fp32.
  void (*subtract)(const void* in, const float* offsets, float* out, std::int64_t count);
  // out = in + offsets, in fp32, then rounded; NaN becomes the quiet NaN.
  void (*add)(const float* in, const float* offsets, void* out, std::int64_t count);
};

// Norm and RoPE of a head, in fp32 with one rounding; fp8kv/rope.h has the formulas.
struct HeadTransform {
  const float* norm_weight = nullptr;  // nullptr: no norm
  float norm_eps = 0.0f;
  const float* cos = nullptr;
  const float* sin = nullptr;
  std::int64_t pairs = 0;  // rotated
  bool is_neox = true;
  bool norm_after_rope = false;
};

// `scratch` has room for a row.
using TransformRows = void (*)(const void* in, void* out, std::int64_t columns, const Rows& rows,
                               const HeadTransform& transform, float* scratch);

// Attention on fp32 rows. Rows have `columns` elements, a multiple of kAttentionPadding, and are padded with zeros.
inline constexpr std::int64_t kAttentionPadding = 16;

struct AttentionKernels {
  // scores[r * scores_stride + k] = product of row r of the queries and row k of the keys.
  void (*scores)(const float* queries, const float* keys, float* scores, std::int64_t num_rows, std::int64_t num_keys,
                 std::int64_t columns, std::int64_t scores_stride);
  // x[i] = exp(x[i] - maximum), for a maximum that no x exceeds; the sum of these.
  float (*exponentials)(float* x, std::int64_t count, float maximum);
  // out = factor * out + sum of weights[v] * row v of the values.
  void (*accumulate)(const float* weights, const float* values, float* out, float factor, std::int64_t num_values,
                     std::int64_t columns);
};

using QuantizeRow = std::array<ElementwiseKernels, core::QuantizedTypes::kSize>;
using DequantizeRow = std::array<ElementwiseKernels, core::RealTypes::kSize>;

struct KernelTable {
  std::array<QuantizeRow, core::RealTypes::kSize> quantize;           // [real_index(input)][quantized_index(result)]
  std::array<DequantizeRow, core::QuantizedTypes::kSize> dequantize;  // [quantized_index(input)][real_index(result)]
  std::array<AmaxKernels, core::RealTypes::kSize> amax;               // [real_index(input)]
  std::array<OffsetKernels, core::RealTypes::kSize> offsets;          // [real_index(unquantized side)]
  std::array<TransformRows, core::RealTypes::kSize> transform;        // [real_index(input)]
  AttentionKernels attention;
};

namespace generic {
extern const KernelTable kernel_table;
}
namespace avx2 {
extern const KernelTable kernel_table;
}
namespace avx512 {
extern const KernelTable kernel_table;
}

}  // namespace fp8kv::cpu
