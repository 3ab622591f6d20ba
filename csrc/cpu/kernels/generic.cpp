// Kernels for the baseline processor.
#define FP8KV_ISA_NAMESPACE generic
#include "cpu/kernels/kernels.h"
