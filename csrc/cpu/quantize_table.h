// The kernels of quantization as every instruction set exports them: each handles one contiguous piece.
#pragma once

#include <cstdint>

#include "fp8kv/dtype.h"

namespace fp8kv::cpu {

// `count` elements from `in` to `out`. Neither is aligned beyond its elements, and they don't overlap.
using MapKernel = void (*)(const void* in, void* out, std::int64_t count, const float* scale);

struct MapKernels {
  MapKernel run;      // *scale is that of all elements
  MapKernel columns;  // scale[i] is that of element i
};

// The largest finite magnitude of `count` elements, as the bit pattern of an fp32: these compare like the values.
using AmaxKernel = std::int32_t (*)(const void* in, std::int64_t count);

// The same for each column: amax[i] = max(amax[i], |element i| if finite).
using AmaxColumnsKernel = void (*)(const void* in, std::int64_t count, std::int32_t* amax);

struct QuantizeTable {
  MapKernels quantize[3][2];    // [real_index(input)][fp8_index(result)]
  MapKernels dequantize[2][3];  // [fp8_index(input)][real_index(result)]
  AmaxKernel amax[3];           // [real_index(input)]
  AmaxColumnsKernel amax_columns[3];
};

constexpr int real_index(DType dtype) { return dtype == DType::Float32 ? 0 : dtype == DType::Float16 ? 1 : 2; }
constexpr int fp8_index(DType dtype) { return dtype == DType::E4M3 ? 0 : 1; }

namespace generic {
extern const QuantizeTable quantize_table;
}
namespace avx2 {
extern const QuantizeTable quantize_table;
}
namespace avx512 {
extern const QuantizeTable quantize_table;
}

}  // namespace fp8kv::cpu
