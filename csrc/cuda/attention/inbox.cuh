// What blocks of a cluster send each other: stores to the shared memory of another block, which count at a barrier there
// (compute capability 9.0 and higher). A block waits for what it gets, and no longer.
#pragma once

#include <cstdint>

#include "core/attention_memory.h"
#include "device/async_copy.cuh"

namespace fp8kv::cuda::attention {

// At the same place in all blocks: a barrier, and the bytes that are received.
class Inbox {
 public:
  __device__ explicit Inbox(std::byte* memory) : memory_(memory) {}

  // Before the first call of send() in the cluster; by all threads.
  __device__ void open() const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (threadIdx.x == 0) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(device::shared_address(memory_)) : "memory");
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
#endif
  }
  // Waits until all blocks have opened theirs; once, by all threads.
  __device__ void wait_for_all_open() const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
  }

  __device__ float* at(int offset) const { return reinterpret_cast<float*>(memory_ + core::kInboxBarrier + offset); }

  // One or two elements to the same place, which is aligned to as many, in the block `rank`.
  __device__ void send(const float* to, int rank, float x) const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(address_in(to, rank)),
                 "f"(x), "r"(address_in(memory_, rank))
                 : "memory");
#endif
  }
  __device__ void send(const float* to, int rank, float x, float y) const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(address_in(to, rank)),
        "f"(x), "f"(y), "r"(address_in(memory_, rank))
        : "memory");
#endif
  }

  // Waits until so many bytes have come; by all threads. `time`: how often it was called before.
  __device__ void receive(int bytes, int time) const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    const std::uint32_t barrier = device::shared_address(memory_);
    if (threadIdx.x == 0)
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
    std::uint32_t received = 0;
    while (!received)
      asm volatile(
          "{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
          : "=r"(received)
          : "r"(barrier), "r"(time & 1)
          : "memory");
#endif
  }

 private:
  __device__ static std::uint32_t address_in(const void* p, int rank) {
    std::uint32_t address = 0;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(device::shared_address(p)), "r"(rank));
#endif
    return address;
  }

  std::byte* memory_;
};

}  // namespace fp8kv::cuda::attention
