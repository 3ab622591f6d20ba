#include "launch.h"

#include <cstring>

#include "dispatch.h"
#include "fp8kv/error.h"
#include "fp8kv/fp8.h"

namespace fp8kv::cpu {
namespace {

template <class T>
void copy_sized(const Elements& from, const Elements& to, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i)
    std::memcpy(to.data + i * to.stride * sizeof(T), from.data + i * from.stride * sizeof(T), sizeof(T));
}

}  // namespace

void check_cpu(const char* op, const char* argument, const TensorView& view) {
  if (view.device.type != Device::Type::CPU) fail(op, argument, "be on the cpu", device_string(view.device));
}

const QuantizeTable& kernels() {
#if defined(FP8KV_X86)
  return pick(generic::quantize_table, avx2::quantize_table, avx512::quantize_table);
#else
  return pick(generic::quantize_table, generic::quantize_table, generic::quantize_table);
#endif
}

// Not inlined or analysed: its division must stay where the floating-point environment is set.
[[gnu::noipa]] float scale_of(DType fp8, float amax, float upper_bound) {
  return fp8 == DType::E4M3 ? dynamic_scale<E4M3>(amax, upper_bound) : dynamic_scale<E5M2>(amax, upper_bound);
}

void copy_elements(const Elements& from, const Elements& to, std::int64_t count) {
  switch (from.size) {
    case 1: return copy_sized<std::uint8_t>(from, to, count);
    case 2: return copy_sized<std::uint16_t>(from, to, count);
    default: return copy_sized<std::uint32_t>(from, to, count);
  }
}

void prepare_rows(const MapKernels& kernels, RowScales& scales, const float* from, std::int64_t step, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) scales.scale[i] = from[i * step];
  kernels.prepare_rows(scales, count);
}

void map_rows(const MapKernels& kernels, const Elements& in, const Elements& out, std::int64_t columns, const Rows& rows,
              const RowScales& scales) {
  if (in.stride == 1 && out.stride == 1) return kernels.rows(in.data, out.data, columns, rows, scales, 0);
  for (std::int64_t r = 0; r < rows.count; ++r)
    map_staged(in.at(r * rows.in), out.at(r * rows.out), columns,
               [&](const void* from, void* to, std::int64_t n, std::int64_t) {
                 kernels.rows(from, to, n, Rows{}, scales, r * rows.scale);
               });
}

void map_rows(const MapKernels& kernels, const Elements& in, const Elements& out, std::int64_t columns, const Rows& rows,
              const float* scale) {
  const bool one_scale = rows.scale == 0;
  RowScales scales;
  for (std::int64_t r = 0; r < rows.count;) {
    const std::int64_t count = one_scale ? rows.count : std::min(kMaxRows, rows.count - r);
    prepare_rows(kernels, scales, scale + r * rows.scale, rows.scale, one_scale ? 1 : count);
    map_rows(kernels, in.at(r * rows.in), out.at(r * rows.out), columns, {count, rows.in, rows.out, one_scale ? 0 : 1}, scales);
    r += count;
  }
}

void amax_rows(const AmaxKernels& kernels, const Elements& in, std::int32_t* amax, std::int64_t columns, const Rows& rows) {
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

}  // namespace fp8kv::cpu
