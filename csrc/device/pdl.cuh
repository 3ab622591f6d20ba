// Programmatic dependent launch (compute capability 9.0 and higher): a kernel that begins before its predecessor in the stream
// has ended. Without the launch attribute this does nothing.
#pragma once

namespace fp8kv::device {

// Grids of more blocks don't take part: the instructions cost large grids of small blocks 15%.
inline constexpr unsigned kMaxDependentBlocks = 2048;

// Called by every kernel of cuda::launch_dependent before its first access to global memory: waits until the predecessor has
// ended and all it wrote can be read, then lets the next kernel begin, if that was launched so. In this order no kernel begins
// before the one before its predecessor has ended, so that at most two overlap.
//
// `dependent`, a parameter of the kernel: whether it was launched so. In launches that were not, both instructions do nothing
// but took 0.03 to 0.06 us in short kernels.
__device__ __forceinline__ void wait_then_release(bool dependent) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if (!dependent) return;
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// The same in kernels without such a parameter.
__device__ __forceinline__ void wait_then_release() { wait_then_release(gridDim.x * gridDim.y <= kMaxDependentBlocks); }

}  // namespace fp8kv::device
