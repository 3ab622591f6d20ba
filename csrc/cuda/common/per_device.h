// The current device, and values that are found once for each.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <mutex>

#include "fp8kv/views.h"

namespace fp8kv::cuda {

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

}  // namespace fp8kv::cuda
