// The type of a CUDA stream, so that the headers need no CUDA header.
#pragma once

struct CUstream_st;

namespace fp8kv::cuda {

// The same type as cudaStream_t; nullptr is the default stream.
using Stream = CUstream_st*;

}  // namespace fp8kv::cuda
