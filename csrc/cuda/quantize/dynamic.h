// Dynamic quantization of one input type: compiled in a source file each, since these kernels take long to compile.
#pragma once

#include <cuda_runtime.h>

#include "core/layout.h"

namespace fp8kv::cuda {

using core::Layout;

template <class In>
void launch_dynamic(const DynamicQuantize& problem, const Layout& layout, cudaStream_t stream);

}  // namespace fp8kv::cuda
