#include "fp8kv/runtime.h"

namespace fp8kv::cuda {

const char* architectures() { return FP8KV_CUDA_ARCHITECTURES; }

}  // namespace fp8kv::cuda
