#include "cuda/common/launch.h"

#include "core/environment.h"
#include "device/pdl.cuh"

namespace fp8kv::cuda {
namespace {

DeviceLimits find_limits() {
  const int device = current_device_index();
  const auto attribute = [device](cudaDeviceAttr which) {
    int value = 0;
    check_query(cudaDeviceGetAttribute(&value, which, device));
    return value;
  };
  DeviceLimits limits;
  limits.multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
  limits.shared_memory = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  limits.has_clusters = limits.has_dependent_launch = attribute(cudaDevAttrComputeCapabilityMajor) >= 9;
  return limits;
}

}  // namespace

const DeviceLimits& device_limits() {
  static PerDevice<DeviceLimits> limits;
  return limits.get(find_limits);
}

bool can_depend(unsigned blocks) { return blocks <= device::kMaxDependentBlocks && device_limits().has_dependent_launch; }

bool launches_dependent(unsigned blocks) {
  static const bool wanted = core::environment_flag("FP8KV_PDL");
  return wanted && can_depend(blocks);
}

}  // namespace fp8kv::cuda
