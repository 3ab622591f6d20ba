// Kernels for AVX2, FMA and F16C.
#define FP8KV_ISA_NAMESPACE avx2
#include "cpu/kernels/kernels.h"
