// What every launcher does around its kernels: checks, sizes of the device, dependent launches.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <mutex>
#include <string>

#include "core/check.h"
#include "core/plan.h"
#include "fp8kv/error.h"

namespace fp8kv::cuda {

using core::DeviceLimits;

inline void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw Error(std::string("fp8kv::") + op + ": CUDA launch failed: " + cudaGetErrorString(error));
}

// For calls that ask the driver something. The error does not stay behind for the next launch to report.
void check_query(cudaError_t error);

int current_device_index();

inline Device current_device() { return {Device::Type::CUDA, current_device_index()}; }

// A value found once per device and kept; not where finding it throws.
template <class T>
class PerDevice {
 public:
  template <class F>
  const T& get(const F& find) {
    const int device = current_device_index();
    if (!known_[device].load(std::memory_order_acquire)) {
      const std::lock_guard lock(mutex_);
      if (!known_[device].load(std::memory_order_relaxed)) {
        values_[device] = find();
        known_[device].store(true, std::memory_order_release);
      }
    }
    return values_[device];
  }

  static constexpr int kMaxDevices = 128;

 private:
  std::mutex mutex_;
  std::atomic<bool> known_[kMaxDevices] = {};
  T values_[kMaxDevices] = {};
};

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
