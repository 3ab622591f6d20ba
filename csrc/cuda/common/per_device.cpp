#include "cuda/common/per_device.h"

#include <string>

#include "fp8kv/error.h"

namespace fp8kv::cuda {

void check_query(cudaError_t error) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();
  throw Error(std::string("fp8kv: the CUDA device can't be queried: ") + cudaGetErrorString(error));
}

int current_device_index() {
  int device = 0;
  check_query(cudaGetDevice(&device));
  if (device < 0 || device >= PerDevice<int>::kMaxDevices)
    throw Error("fp8kv: CUDA devices are supported up to number " + std::to_string(PerDevice<int>::kMaxDevices - 1) + ", got " +
                std::to_string(device));
  return device;
}

}  // namespace fp8kv::cuda
