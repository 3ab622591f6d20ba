// Dynamic quantization of one input type: compiled in a source file each, since these kernels take long to compile.
#pragma once

#include <cuda_runtime.h>

#include "fp8kv/quantize.h"

namespace fp8kv::cuda {

template <class In>
void launch_dynamic(const DynamicQuantize& problem, const Layout& layout, cudaStream_t stream);

}  // namespace fp8kv::cuda
