// What every launcher does around its kernels: checks, sizes of the device, dependent launches.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "core/check.h"
#include "core/plan.h"
#include "cuda/common/per_device.h"

namespace fp8kv::cuda {

using core::DeviceLimits;

inline void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw Error(std::string("fp8kv::") + op + ": CUDA launch failed: " + cudaGetErrorString(error));
}

// Of the current device.
const DeviceLimits& device_limits();

// Whether kernels of few blocks may begin before their predecessor in the stream ends: with FP8KV_PDL=1, on devices that can.
bool launches_dependent(unsigned blocks);

// kernel<<<grid, threads, 0, stream>>>(arguments...) of a kernel that calls device::wait_then_release().
template <class... Params, class... Arguments>
void launch_dependent(void (*kernel)(Params...), dim3 grid, int threads, cudaStream_t stream, const Arguments&... arguments) {
  if (!launches_dependent(grid.x * grid.y)) {
    kernel<<<grid, threads, 0, stream>>>(arguments...);
    return;
  }
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = threads;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = 1;
  cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace fp8kv::cuda
