#include "cuda/quantize/dynamic.cuh"

template void fp8kv::cuda::launch_dynamic<float>(const DynamicQuantize&, const Layout&, cudaStream_t);
