#include "launch.h"

#include <cstdlib>
#include <cstring>
#include <mutex>

#include "dependent_launch.h"

namespace fp8kv::cuda {
namespace {

__global__ void __launch_bounds__(1024) cluster_probe() {}

DeviceLimits query(int device) {
  DeviceLimits limits;
  int major = 0;
  cudaDeviceGetAttribute(&limits.multiprocessors, cudaDevAttrMultiProcessorCount, device);
  cudaDeviceGetAttribute(&limits.shared_memory, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (major < 9) return limits;
  limits.early_launches = true;
  // 8 thread blocks are always possible, 16 depend on the device.
  cudaFuncSetAttribute(cluster_probe, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  cudaLaunchConfig_t config{};
  config.gridDim = 16;
  config.blockDim = 1024;
  int size = 0;
  if (cudaOccupancyMaxPotentialClusterSize(&size, cluster_probe, &config) != cudaSuccess) (void)cudaGetLastError();
  limits.max_cluster = size >= 16 ? 16 : 8;
  return limits;
}

}  // namespace

const DeviceLimits& device_limits() {
  constexpr int kMaxDevices = 128;
  static DeviceLimits limits[kMaxDevices];
  static std::once_flag asked[kMaxDevices];
  int device = 0;
  cudaGetDevice(&device);
  if (device < 0 || device >= kMaxDevices) throw Error("fp8kv: no CUDA device, or one with a number above 127");
  std::call_once(asked[device], [&] { limits[device] = query(device); });
  return limits[device];
}

bool launches_early(unsigned blocks) {
  static const bool wanted = [] {
    const char* value = std::getenv("FP8KV_PDL");
    return value && std::strcmp(value, "1") == 0;
  }();
  return wanted && blocks <= device::kMaxDependentBlocks && device_limits().early_launches;
}

}  // namespace fp8kv::cuda
