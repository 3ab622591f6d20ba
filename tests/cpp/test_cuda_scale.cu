// Proof that the split reciprocal gives the byte of the IEEE division, on the device, over all significands of the scale.
//
// Scaling x and the scale by powers of two changes nothing short of underflow and overflow, so it is enough to look at scales
// in [1, 2), and at quotients near the boundaries of one binade of FP8: the 5-bit significands cover the values and the
// midpoints of E4M3 and with them those of E5M2. INT8 has 127 boundaries. Around each boundary b the quotients of x = RN(b * s)
// and its neighbors are compared. The ends of the window of scales are looked at as they are, with subnormal results included.
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <type_traits>

#include "device/convert.cuh"

namespace fp8kv {
namespace {

template <class Fp8>
__device__ bool same_byte(float x, float s) {
  using Op = device::QuantizeOp<Fp8>;
  const auto prepared = Op::prepare(s);
  const float q = prepared.divide ? Op::divide(prepared, x) : Op::apply(prepared, x);
  return device::encode2<Fp8>(q, 0.0f) == device::encode2<Fp8>(__fdiv_rn(x, s), 0.0f);
}

// Beside the boundaries from first * step to (end - 1) * step, for scales of all significands, times a power of two.
template <class Fp8>
__global__ void compare(float power, int first, int end, float step, unsigned long long* differences) {
  const std::uint32_t significand = blockIdx.x * blockDim.x + threadIdx.x;  // 2^23 threads
  const float s = __uint_as_float(0x3f800000u | significand) * power;
  for (float x : {__uint_as_float(0x7f800000u), __uint_as_float(0x7f7fffffu), 0.0f})
    if (!same_byte<Fp8>(x, s) || !same_byte<Fp8>(-x, s)) atomicAdd(differences, 1ull);
  for (int boundary = first; boundary < end; ++boundary) {
    const std::uint32_t middle = __float_as_uint(__fmul_rn(boundary * step, s));
    for (int near = -3; near <= 3; ++near) {
      const float x = __uint_as_float(middle + near);
      if (!same_byte<Fp8>(x, s) || !same_byte<Fp8>(-x, s)) atomicAdd(differences, 1ull);
    }
  }
}

template <class Fp8>
__global__ void encode_all(unsigned long long* differences) {
  const std::uint32_t first = (blockIdx.x * blockDim.x + threadIdx.x) * 256u;
  for (std::uint32_t i = 0; i < 256; ++i) {
    const float x = __uint_as_float(first + i);
    if (device::encode2<Fp8>(x, 0.0f) != encode<Fp8>(x).bits) atomicAdd(differences, 1ull);
  }
}

// Both bytes of a pair.
template <class Fp8>
__global__ void decode_all(unsigned long long* differences) {
  const auto byte = static_cast<std::uint8_t>(threadIdx.x);
  const float2 pair = device::decode2<Fp8>(byte | (255u - byte) << 8);
  if (pair.x != decode(Fp8{byte}) || pair.y != decode(Fp8{static_cast<std::uint8_t>(255 - byte)})) atomicAdd(differences, 1ull);
}

template <class Fp8>
__global__ void dynamic_scale_of_all(unsigned long long* differences) {
  const std::uint32_t first = (blockIdx.x * blockDim.x + threadIdx.x) * 256u;
  for (std::uint32_t i = 0; i < 256; ++i) {
    const float amax = __uint_as_float(first + i);
    if (!is_finite(amax)) continue;
    for (std::uint32_t bits : {0x7f800000u, 0xff800000u, 0x7fc00000u, 0x00000000u, 0xbf800000u, 0x3f800000u, 0x7f7fffffu}) {
      const float bound = __uint_as_float(bits);
      const float expected = dynamic_scale<Fp8>(amax, bound);
      if (__float_as_uint(device::fast_dynamic_scale<Fp8>(amax, bound)) != __float_as_uint(expected))
        atomicAdd(differences, 1ull);
    }
  }
}

class CudaScale : public testing::Test {
 protected:
  void SetUp() override {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) GTEST_SKIP() << "no GPU";
    ASSERT_EQ(cudaMallocManaged(&differences, sizeof(*differences)), cudaSuccess);
    *differences = 0;
  }
  void TearDown() override { cudaFree(differences); }
  void finish() {
    ASSERT_EQ(cudaGetLastError(), cudaSuccess);
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    EXPECT_EQ(*differences, 0ull);
  }
  unsigned long long* differences = nullptr;
};

// Boundaries that cover one binade of FP8: of normal numbers for 2^-4 (1 to 2), of the smallest normal and of subnormals below.
// Those of INT8, and its values.
template <class Fp8>
void over_all_significands(unsigned long long* differences) {
  for (float power : {1.0f, 0x1p-126f, 0x1p-60f, 0x1p60f, 0x1p95f}) {
    if constexpr (std::is_same_v<Fp8, Int8>) {
      compare<Int8><<<(1 << 23) / 256, 256>>>(power, 1, 255, 0.5f, differences);
    } else {
      for (int exponent = -12; exponent <= 1; ++exponent)
        compare<Fp8><<<(1 << 23) / 256, 256>>>(
            power, 16, 32, ldexpf(1.0f, exponent - 4 + (Fp8Traits<Fp8>::kMantissaBits == 2 ? -7 : 0)), differences);
    }
  }
}

TEST_F(CudaScale, SplitReciprocalGivesTheBytesOfTheDivisionE4M3) {
  over_all_significands<E4M3>(differences);
  finish();
}

TEST_F(CudaScale, SplitReciprocalGivesTheBytesOfTheDivisionE5M2) {
  over_all_significands<E5M2>(differences);
  finish();
}

TEST_F(CudaScale, SplitReciprocalGivesTheBytesOfTheDivisionInt8) {
  over_all_significands<Int8>(differences);
  finish();
}

TEST_F(CudaScale, ConversionOfAllFloatsE4M3) {
  encode_all<E4M3><<<(1 << 24) / 256, 256>>>(differences);
  finish();
}

TEST_F(CudaScale, ConversionOfAllFloatsE5M2) {
  encode_all<E5M2><<<(1 << 24) / 256, 256>>>(differences);
  finish();
}

TEST_F(CudaScale, ConversionOfAllFloatsInt8) {
  encode_all<Int8><<<(1 << 24) / 256, 256>>>(differences);
  finish();
}

TEST_F(CudaScale, ConversionOfAllBytesInt8) {
  decode_all<Int8><<<1, 256>>>(differences);
  finish();
}

// All finite magnitudes.
TEST_F(CudaScale, ScaleOfAllMagnitudesIsTheDivision) {
  dynamic_scale_of_all<E4M3><<<(1 << 23) / 256, 256>>>(differences);
  dynamic_scale_of_all<E5M2><<<(1 << 23) / 256, 256>>>(differences);
  dynamic_scale_of_all<Int8><<<(1 << 23) / 256, 256>>>(differences);
  finish();
}

}  // namespace
}  // namespace fp8kv
