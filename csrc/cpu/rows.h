// Kernels on rows of elements with any stride, by way of the stack.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/check.h"
#include "core/rope_layout.h"
#include "cpu/kernels/table.h"
#include "fp8kv/views.h"

namespace fp8kv::cpu {

// Those of the active instruction set.
const KernelTable& kernels();

// Those that quantize, dequantize, or copy (by rows only) from one type to another; within a quantized type they copy.
ElementwiseKernels kernels_for(DType in, DType out);

// dynamic_scale() of a format. Call it where the floating-point environment is the default one (parallel.h).
float dynamic_scale_of(DType quantized, float amax, float upper_bound);

// Rows whose magnitudes or scales are kept on the stack together.
inline constexpr std::int64_t kMaxRows = RowScales::kMaxCount;

struct StridedElements {
  std::byte* data;
  int size;             // of one, in bytes
  std::int64_t stride;  // to the next, in elements

  StridedElements at(std::int64_t offset) const { return {data + offset * size, size, stride}; }
};

// At most this many pass through the stack at a time.
inline constexpr std::int64_t kStaged = 512;

struct Stage {
  alignas(64) std::byte data[kStaged * sizeof(float)];
};

// Between elements of one size.
void copy_elements(const StridedElements& from, const StridedElements& to, std::int64_t count);

// kernel(from, to, n, i) for elements [i, i + n) of `count`, which are contiguous there.
template <class Kernel>
void convert_staged(const StridedElements& in, const StridedElements& out, std::int64_t count, const Kernel& kernel) {
  Stage before, after;
  for (std::int64_t i = 0; i < count; i += kStaged) {
    const std::int64_t n = std::min(kStaged, count - i);
    copy_elements(in.at(i * in.stride), {before.data, in.size, 1}, n);
    kernel(before.data, after.data, n, i);
    copy_elements({after.data, out.size, 1}, out.at(i * out.stride), n);
  }
}

// kernel(from, n, i) likewise.
template <class Kernel>
void read_staged(const StridedElements& in, std::int64_t count, const Kernel& kernel) {
  Stage stage;
  for (std::int64_t i = 0; i < count; i += kStaged) {
    const std::int64_t n = std::min(kStaged, count - i);
    copy_elements(in.at(i * in.stride), {stage.data, in.size, 1}, n);
    kernel(stage.data, n, i);
  }
}

// The kernels for elements of any stride. Row r has the scale number r * rows.scale.
void convert_strided_rows(const ElementwiseKernels& kernels, const StridedElements& in, const StridedElements& out,
                          std::int64_t columns, const Rows& rows, const RowScales& scales);
// The same with scales that aren't ready.
void convert_strided_rows(const ElementwiseKernels& kernels, const StridedElements& in, const StridedElements& out,
                          std::int64_t columns, const Rows& rows, const float* scale);
// One row of elements of any stride, each with a scale of its own: element i the number first + i; for `stream` see Rows.
void convert_strided_columns(const ElementwiseKernels& kernels, const StridedElements& in, const StridedElements& out,
                             std::int64_t columns, const ColumnScales& scales, std::int64_t first, bool stream = false);
// Makes `count` scales ready that are `stride` apart.
void load_row_scales(const ElementwiseKernels& kernels, RowScales& scales, const float* from, std::int64_t stride,
                     std::int64_t count);
// Dynamic scales of at most kMaxRows rows, row r with the scale at scale[r * rows.scale], and the rows with these.
void quantize_strided_rows(const ElementwiseKernels& kernels, const AmaxKernels& amax, const StridedElements& in,
                           const StridedElements& out, std::int64_t columns, const Rows& rows, float* scale, float upper_bound);
void amax_strided_rows(const AmaxKernels& kernels, const StridedElements& in, std::int32_t* amax, std::int64_t columns,
                       const Rows& rows);

// `count` elements of a view from `offset` (in elements) on, in fp32: where they are, or copied to `buffer`.
const float* in_fp32(const core::View1D& from, std::int64_t offset, std::int64_t count, std::vector<float>& buffer);

}  // namespace fp8kv::cpu
