// Quantization with scales that are already there, for the launchers that first compute them.
#pragma once

#include <cuda_runtime.h>

#include "core/layout.h"

namespace fp8kv::cuda {

using core::Layout;

void quantize_with(const char* op, const Layout& layout, const TensorView& input, const TensorView& result,
                   const TensorView& scale, cudaStream_t stream);

}  // namespace fp8kv::cuda
