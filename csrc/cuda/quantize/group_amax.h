// Maxima of groups of any form, for GroupAmax and for dynamic quantization in two passes.
#pragma once

#include <cuda_runtime.h>

#include "core/layout.h"

namespace fp8kv::cuda {

using core::Layout;

// target[g] = max(target[g], f(amax of group g)), with f the dynamic scale of `fp8` (bounded by *upper_bound, unless that is
// null), or the identity where `fp8` is no quantized type.
void raise_to_amax(const char* op, const Layout& layout, const TensorView& input, float* target, DType fp8,
                   const float* upper_bound, cudaStream_t stream);

// Fills all groups of a scale tensor.
void fill_groups(const char* op, const Layout& layout, float* target, float value, cudaStream_t stream);

}  // namespace fp8kv::cuda
