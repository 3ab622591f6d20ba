// Programmatic dependent launch (compute capability 9.0 and higher): a kernel that begins before its predecessor in the stream
// has ended. Without the launch attribute both functions do nothing.
#pragma once

namespace fp8kv::device {

// Lets the next kernel begin, if it was launched so.
__device__ __forceinline__ void release_successor() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Returns when the predecessor has ended and all it wrote can be read. Before the first access to global memory.
__device__ __forceinline__ void wait_for_predecessor() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace fp8kv::device
