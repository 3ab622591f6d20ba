#include "cuda/quantize/dynamic.cuh"

template void fp8kv::cuda::launch_dynamic<fp8kv::BFloat16>(const DynamicQuantize&, const Layout&, cudaStream_t);
