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

// Multiprocessors of the current device, asked once a device.
inline int multiprocessors() {
  constexpr int kMaxDevices = 64;
  static int counts[kMaxDevices] = {};
  int device = 0;
  cudaGetDevice(&device);
  if (device >= kMaxDevices || counts[device] == 0) {
    int count = 1;
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    if (device >= kMaxDevices) return count;
    counts[device] = count;
  }
  return counts[device];
}

}  // namespace fp8kv::cuda
