// What this build is and what it uses on this machine.
#pragma once

#include <string>
#include <vector>

#include "fp8kv/export.h"

namespace fp8kv {

FP8KV_API const char* version();  // "MAJOR.MINOR.PATCH", FP8KV_VERSION_STRING when the library was built

namespace cpu {

enum class Isa { Generic, AVX2, AVX512 };

FP8KV_API const char* name(Isa isa);
FP8KV_API std::vector<Isa> available();  // compiled in and supported by this processor, best last

// The instruction set the kernels use: the best available, unless the environment variable FP8KV_CPU_ISA ("generic", "avx2",
// "avx512") names another one, read once; what is not available there is ignored.
FP8KV_API Isa active();

// For tests and benchmarks: use `isa` from now on. Throws Error when it is not available.
FP8KV_API void force(Isa isa);

}  // namespace cpu

namespace cuda {

// Architectures compiled into the CUDA library, such as "90-real;120-virtual".
FP8KV_API const char* architectures();

}  // namespace cuda
}  // namespace fp8kv
