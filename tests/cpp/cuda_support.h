// What the tests of the CUDA backend share.
#pragma once

#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <limits>
#include <random>
#include <utility>
#include <vector>

#include "fp8kv/views.h"

namespace fp8kv::testing_support {

using Sizes = std::vector<std::int64_t>;

inline void check(cudaError_t error) { ASSERT_EQ(error, cudaSuccess) << cudaGetErrorString(error); }

inline bool have_gpu() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
}

// A tensor in host memory and its copy in device memory; `skip` elements lie before the first.
class Tensor {
 public:
  Tensor(DType dtype, const Sizes& sizes, const Sizes& strides, std::int64_t skip) : skip_(skip) {
    view_.dtype = dtype;
    view_.ndim = static_cast<int>(sizes.size());
    std::int64_t extent = skip + 1;
    for (int d = 0; d < view_.ndim; ++d) {
      view_.sizes[d] = sizes[d];
      view_.strides[d] = strides[d];
      extent += (std::max<std::int64_t>(sizes[d], 1) - 1) * strides[d];
    }
    host_.assign(extent * size_of(dtype), 0xA5);
    check(cudaMalloc(&device_, host_.size()));
  }
  Tensor(Tensor&& other)
      : skip_(other.skip_), view_(other.view_), host_(std::move(other.host_)), device_(std::exchange(other.device_, nullptr)) {}
  ~Tensor() { cudaFree(device_); }

  std::vector<unsigned char>& bytes() { return host_; }
  void upload() { check(cudaMemcpy(device_, host_.data(), host_.size(), cudaMemcpyHostToDevice)); }

  std::vector<unsigned char> download() const {
    std::vector<unsigned char> bytes(host_.size());
    check(cudaMemcpy(bytes.data(), device_, bytes.size(), cudaMemcpyDeviceToHost));
    return bytes;
  }

  TensorView on_host() { return at(host_.data(), {}); }
  TensorView on_device() const { return at(device_, {Device::Type::CUDA, 0}); }

 private:
  TensorView at(void* memory, Device device) const {
    TensorView view = view_;
    view.data = static_cast<char*>(memory) + skip_ * size_of(view.dtype);
    view.device = device;
    return view;
  }

  std::int64_t skip_;
  TensorView view_;
  std::vector<unsigned char> host_;
  void* device_ = nullptr;
};

class Cuda : public testing::Test {
 protected:
  void SetUp() override {
    if (!have_gpu()) GTEST_SKIP() << "no GPU";
  }

  // Any pattern is a value: bytes at random give all magnitudes, with NaN and infinity among them.
  void fill_reals(Tensor& tensor) {
    for (auto& byte : tensor.bytes()) byte = static_cast<unsigned char>(random());
  }

  // Magnitudes of 2^-7 to 2, in any of the wider types: their dynamic scales do not divide.
  void fill_moderate_reals(Tensor& tensor, DType dtype) {
    fill_reals(tensor);
    const std::size_t size = size_of(dtype);
    for (std::size_t i = size - 1; i < tensor.bytes().size(); i += size) tensor.bytes()[i] = (tensor.bytes()[i] & 0x83) | 0x3c;
  }

  void fill_scales(Tensor& tensor) {
    constexpr float kSpecial[] = {0.0f, -1.0f, 1e-45f, 0x1p-126f, 0x1p96f, 0x1p127f, 1.0f};
    // Significands just below a multiple of 2^20; of INT8 just below one of 2^17 and above.
    constexpr std::uint32_t kTraps[] = {0x3fffffffu, 0x3ffffffeu, 0x3ffffffdu, 0x3ffffffcu, 0x3fa3fffeu, 0x3fec0002u};
    std::uniform_real_distribution<float> usual(0.001f, 4.0f);
    auto* values = reinterpret_cast<float*>(tensor.bytes().data());
    for (std::size_t i = 0; i < tensor.bytes().size() / 4; ++i) {
      const auto pick = random() % 32;
      values[i] = pick < 7 ? kSpecial[pick] : pick < 13 ? std::bit_cast<float>(kTraps[pick - 7]) : usual(random);
    }
  }

  void fill_offsets(Tensor& tensor) {
    constexpr float kInf = std::numeric_limits<float>::infinity();
    constexpr float kSpecial[] = {0.0f, -0.0f, kInf, -kInf, std::numeric_limits<float>::quiet_NaN(), 3e38f, 1e-40f};
    std::uniform_real_distribution<float> usual(-100.0f, 100.0f);
    auto* values = reinterpret_cast<float*>(tensor.bytes().data());
    for (std::size_t i = 0; i < tensor.bytes().size() / 4; ++i) {
      const auto pick = random() % 64;
      values[i] = pick < 7 ? kSpecial[pick] : usual(random);
    }
  }

  // The copy on the device against the one on the host.
  static void expect_same(Tensor& tensor, const char* what) {
    const std::vector<unsigned char>& expected = tensor.bytes();
    const std::vector<unsigned char> actual = tensor.download();
    ASSERT_EQ(expected.size(), actual.size());
    const auto [e, a] = std::mismatch(expected.begin(), expected.end(), actual.begin());
    EXPECT_TRUE(a == actual.end()) << what << " differs at byte " << (a - actual.begin()) << " of " << actual.size()
                                   << ": expected " << int{*e} << ", got " << int{*a};
  }

  std::mt19937 random{20251125};
};

}  // namespace fp8kv::testing_support
