// What every launcher does around its kernels.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "check.h"
#include "fp8kv/error.h"

namespace fp8kv::cuda {

inline void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw Error(std::string("fp8kv::") + op + ": CUDA launch failed: " + cudaGetErrorString(error));
}

inline void check_cuda_device(const core::Argument& a) {
  if (a.view.device.type != Device::Type::CUDA) fail(a.op, a.name, "be on a CUDA device", device_string(a.view.device));
}

// The view from its element `offset` on: plans depend on where a piece begins.
inline TensorView shifted(TensorView view, std::int64_t offset) {
  view.data = static_cast<char*>(view.data) + offset * size_of(view.dtype);
  return view;
}

// What plans ask of the current device.
struct DeviceLimits {
  int multiprocessors = 0;
  int max_cluster = 0;    // thread blocks of 1024 threads, 0 without clusters
  int shared_memory = 0;  // bytes of one multiprocessor
  bool early_launches = false;
};

const DeviceLimits& device_limits();

inline int multiprocessors() { return device_limits().multiprocessors; }

// Whether kernels of few blocks may begin before their predecessor in the stream ends: with FP8KV_PDL=1, which is read once, on
// devices that can.
bool launches_early(unsigned blocks);

// kernel<<<grid, threads, 0, stream>>>(arguments...) of a kernel that calls device::overlap_neighbors().
template <class... Params, class... Arguments>
void launch_dependent(void (*kernel)(Params...), dim3 grid, int threads, cudaStream_t stream, const Arguments&... arguments) {
  if (!launches_early(grid.x * grid.y)) {
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
