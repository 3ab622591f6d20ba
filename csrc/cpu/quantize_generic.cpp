// Quantization for the baseline processor.
#define FP8KV_ISA_NAMESPACE generic
#include "quantize_kernels.h"
