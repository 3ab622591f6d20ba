#include "cuda/quantize/dynamic.cuh"

template void fp8kv::cuda::launch_dynamic<fp8kv::Half>(const DynamicQuantize&, const Layout&, cudaStream_t);
