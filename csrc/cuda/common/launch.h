// Launch checks, device limits, dependent launches (PDL).
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

// Whether a kernel of so many blocks that calls device::wait_then_release() can begin before its predecessor in the stream
// ends.
bool can_depend(unsigned blocks);
// Whether it does so behind kernels that may be anybody's: with FP8KV_PDL=1.
bool launches_dependent(unsigned blocks);

struct LaunchShape {
  dim3 grid;
  dim3 threads;
  int shared_memory = 0;   // bytes, dynamic
  int cluster = 1;         // blocks per cluster, in x
  bool dependent = false;  // of a kernel that calls device::wait_then_release(): it may begin before its predecessor ends
};

template <class... Params, class... Arguments>
void launch(void (*kernel)(Params...), const LaunchShape& shape, cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchAttribute attributes[2] = {};
  unsigned count = 0;
  if (shape.dependent) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (shape.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
  }
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = shape.threads;
  config.dynamicSmemBytes = shape.shared_memory;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  cudaLaunchKernelEx(&config, kernel, arguments...);
}

// Dependent where launches_dependent() says so. Only for kernels whose loads stay behind their wait in machine code, which
// ptxas does not promise of ld.global.nc (__ldg, __restrict__): tests/python/test_dependent_launch.py looks.
template <class... Params, class... Arguments>
void launch_dependent(void (*kernel)(Params...), dim3 grid, int threads, cudaStream_t stream, const Arguments&... arguments) {
  const LaunchShape shape{.grid = grid, .threads = threads, .dependent = launches_dependent(grid.x * grid.y)};
  launch(kernel, shape, stream, arguments...);
}

}  // namespace fp8kv::cuda
