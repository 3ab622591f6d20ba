// Kernels for AVX-512 F, BW, DQ and VL.
#define FP8KV_ISA_NAMESPACE avx512
#include "cpu/kernels/kernels.h"
