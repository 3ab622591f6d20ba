#include "cpu/rows.h"

#include <cstring>
#include <type_traits>

#include "core/check.h"
#include "core/dispatch.h"
#include "cpu/isa.h"

namespace fp8kv::cpu {
namespace {

template <class T>
void copy_sized(const StridedElements& from, const StridedElements& to, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i)
    std::memcpy(to.data + i * to.stride * sizeof(T), from.data + i * from.stride * sizeof(T), sizeof(T));
}

// A plain copy: the bits where the types are the same, otherwise rounded. It uses no scales.
template <class In, class Out>
void copy_rows(const void* in_data, void* out_data, std::int64_t columns, const Rows& rows, const RowScales&, std::int64_t) {
  const auto* in = static_cast<const In*>(in_data);
  auto* out = static_cast<Out*>(out_data);
  for (std::int64_t r = 0; r < rows.count; ++r, in += rows.in, out += rows.out) {
    if constexpr (std::is_same_v<In, Out>) {
      std::memcpy(out, in, columns * sizeof(In));
    } else {
      for (std::int64_t i = 0; i < columns; ++i) out[i] = from_float<Out>(decode(in[i]));
    }
  }
}

void prepare_nothing(RowScales&, std::int64_t) {}

}  // namespace

const KernelTable& kernels() {
#if defined(FP8KV_X86)
  return pick(generic::kernel_table, avx2::kernel_table, avx512::kernel_table);
#else
  return pick(generic::kernel_table, generic::kernel_table, generic::kernel_table);
#endif
}

ElementwiseKernels kernels_for(DType in, DType out) {
  if (in == out && core::is_quantized(in)) return {.prepare_rows = prepare_nothing, .rows = copy_rows<Int8, Int8>};
  if (core::is_quantized(out)) return kernels().quantize[core::real_index(in)][core::quantized_index(out)];
  if (core::is_quantized(in)) return kernels().dequantize[core::quantized_index(in)][core::real_index(out)];
  ElementwiseKernels copy{.prepare_rows = prepare_nothing};
  core::visit_real(in, [&]<class In>(core::Type<In>) {
    core::visit_real(out, [&]<class Out>(core::Type<Out>) { copy.rows = copy_rows<In, Out>; });
  });
  return copy;
}

// Not inlined or analyzed: its division must stay where the floating-point environment is set.
[[gnu::noipa]] float dynamic_scale_of(DType quantized, float amax, float upper_bound) {
  float scale = 0.0f;
  core::visit_quantized(quantized, [&]<class T>(core::Type<T>) { scale = dynamic_scale<T>(amax, upper_bound); });
  return scale;
}

void copy_elements(const StridedElements& from, const StridedElements& to, std::int64_t count) {
  switch (from.size) {
    case 1: return copy_sized<std::uint8_t>(from, to, count);
    case 2: return copy_sized<std::uint16_t>(from, to, count);
    default: return copy_sized<std::uint32_t>(from, to, count);
  }
}

void load_row_scales(const ElementwiseKernels& kernels, RowScales& scales, const float* from, std::int64_t stride,
                     std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) scales.scale[i] = from[i * stride];
  kernels.prepare_rows(scales, count);
}

void convert_strided_rows(const ElementwiseKernels& kernels, const StridedElements& in, const StridedElements& out,
                          std::int64_t columns, const Rows& rows, const RowScales& scales) {
  if (in.stride == 1 && out.stride == 1) return kernels.rows(in.data, out.data, columns, rows, scales, 0);
  for (std::int64_t r = 0; r < rows.count; ++r)
    convert_staged(in.at(r * rows.in), out.at(r * rows.out), columns,
                   [&](const void* from, void* to, std::int64_t n, std::int64_t) {
                     kernels.rows(from, to, n, Rows{}, scales, r * rows.scale);
                   });
}

void convert_strided_rows(const ElementwiseKernels& kernels, const StridedElements& in, const StridedElements& out,
                          std::int64_t columns, const Rows& rows, const float* scale) {
  const bool one_scale = rows.scale == 0;
  RowScales scales;
  for (std::int64_t r = 0; r < rows.count;) {
    const std::int64_t count = one_scale ? rows.count : std::min(kMaxRows, rows.count - r);
    load_row_scales(kernels, scales, scale + r * rows.scale, rows.scale, one_scale ? 1 : count);
    convert_strided_rows(kernels, in.at(r * rows.in), out.at(r * rows.out), columns,
                         {count, rows.in, rows.out, one_scale ? 0 : 1, rows.stream, rows.ahead}, scales);
    r += count;
  }
}

void convert_strided_columns(const ElementwiseKernels& kernels, const StridedElements& in, const StridedElements& out,
                             std::int64_t columns, const ColumnScales& scales, std::int64_t first, bool stream) {
  if (in.stride == 1 && out.stride == 1) return kernels.columns(in.data, out.data, columns, scales, first, stream);
  convert_staged(in, out, columns, [&](const void* from, void* to, std::int64_t n, std::int64_t i) {
    kernels.columns(from, to, n, scales, first + i, false);
  });
}

void amax_strided_rows(const AmaxKernels& kernels, const StridedElements& in, std::int32_t* amax, std::int64_t columns,
                       const Rows& rows) {
  if (in.stride == 1) return kernels.rows(in.data, amax, columns, rows);
  for (std::int64_t r = 0; r < rows.count; ++r) {
    amax[r] = 0;
    read_staged(in.at(r * rows.in), columns, [&](const void* from, std::int64_t n, std::int64_t) {
      std::int32_t part;
      kernels.rows(from, &part, n, Rows{});
      amax[r] = std::max(amax[r], part);
    });
  }
}

void quantize_strided_rows(const ElementwiseKernels& kernels, const AmaxKernels& amax, const StridedElements& in,
                           const StridedElements& out, std::int64_t columns, const Rows& rows, float* scale,
                           float upper_bound) {
  std::int32_t largest[kMaxRows];
  amax_strided_rows(amax, in, largest, columns, rows);
  RowScales scales;
  kernels.dynamic_rows(scales, largest, rows.count, upper_bound);
  for (std::int64_t r = 0; r < rows.count; ++r) scale[r * rows.scale] = scales.scale[r];
  convert_strided_rows(kernels, in, out, columns, {rows.count, rows.in, rows.out, 1, rows.stream, rows.ahead}, scales);
}

const float* in_fp32(const core::View1D& from, std::int64_t offset, std::int64_t count, std::vector<float>& buffer) {
  if (from.dtype == DType::Float32 && from.stride == 1) return static_cast<const float*>(from.data) + offset;
  buffer.resize(count);
  core::visit_real(from.dtype, [&]<class T>(core::Type<T>) {
    const T* x = static_cast<const T*>(from.data) + offset;
    for (std::int64_t i = 0; i < count; ++i) buffer[i] = decode(x[i * from.stride]);
  });
  return buffer.data();
}

}  // namespace fp8kv::cpu
