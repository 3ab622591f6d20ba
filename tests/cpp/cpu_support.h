// What the tests of the CPU backend share.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "core/dispatch.h"
#include "fp8kv/fp8.h"
#include "fp8kv/parallel.h"
#include "fp8kv/runtime.h"
#include "fp8kv/views.h"
#include "support.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace fp8kv::testing_support {

inline constexpr float kInf = std::numeric_limits<float>::infinity();
inline constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
inline constexpr DType kReals[] = {DType::Float32, DType::Float16, DType::BFloat16};
inline constexpr DType kQuantized[] = {DType::E4M3, DType::E5M2, DType::Int8};

inline float float_of(std::uint32_t bits) { return std::bit_cast<float>(bits); }

// --- Tensors --------------------------------

inline std::int64_t product(const Sizes& sizes) {
  std::int64_t count = 1;
  for (std::int64_t size : sizes) count *= size;
  return count;
}

enum class Memory { Contiguous, Padded, Sparse, Reversed };

// A tensor with storage of its own. Gaps hold a pattern, so that a write next to the elements shows.
class Tensor {
 public:
  // `skip`: elements before the first, so that bases are not aligned to vectors.
  Tensor(DType dtype, const Sizes& sizes, Memory memory = Memory::Contiguous, std::int64_t skip = 0)
      : dtype_(dtype), sizes_(sizes), strides_(sizes.size(), 1), skip_(skip) {
    const int ndim = static_cast<int>(sizes.size());
    std::int64_t stride = memory == Memory::Sparse ? 2 : 1;
    for (int i = 0; i < ndim; ++i) {
      const int d = memory == Memory::Reversed ? i : ndim - 1 - i;
      strides_[d] = stride;
      stride *= std::max<std::int64_t>(1, sizes[d]);
      if (memory == Memory::Padded) stride += 3;
    }
    storage_.assign((skip + stride + 8) * size_of(dtype), 0xA5);
  }

  DType dtype() const { return dtype_; }
  const Sizes& sizes() const { return sizes_; }
  std::int64_t numel() const { return product(sizes_); }
  const std::vector<unsigned char>& storage() const { return storage_; }

  // Element number `index` in row-major order.
  unsigned char* at(std::int64_t index) {
    std::int64_t offset = skip_;
    for (int d = static_cast<int>(sizes_.size()) - 1; d >= 0; --d) {
      offset += index % sizes_[d] * strides_[d];
      index /= sizes_[d];
    }
    return storage_.data() + offset * size_of(dtype_);
  }

  template <class T>
  T get(std::int64_t index) {
    T value;
    std::memcpy(&value, at(index), sizeof value);
    return value;
  }

  template <class T>
  void set(std::int64_t index, T value) {
    std::memcpy(at(index), &value, sizeof value);
  }

  float get_real(std::int64_t index) {
    switch (dtype_) {
      case DType::Float32: return get<float>(index);
      case DType::Float16: return decode(get<Half>(index));
      case DType::BFloat16: return decode(get<BFloat16>(index));
      case DType::E4M3: return decode(get<E4M3>(index));
      case DType::Int8: return decode(get<Int8>(index));
      default: return decode(get<E5M2>(index));
    }
  }

  void set_real(std::int64_t index, float value) {
    switch (dtype_) {
      case DType::Float32: return set(index, from_float<float>(value));
      case DType::Float16: return set(index, from_float<Half>(value));
      default: return set(index, from_float<BFloat16>(value));
    }
  }

  // By the rule, in the format of the tensor.
  void quantize(std::int64_t index, float value, float scale) {
    core::visit_quantized(dtype_, [&]<class T>(core::Type<T>) { set(index, fp8kv::quantize<T>(value, scale)); });
  }

  TensorView view() {
    TensorView v{.data = storage_.data() + skip_ * size_of(dtype_), .dtype = dtype_, .ndim = static_cast<int>(sizes_.size())};
    std::copy(sizes_.begin(), sizes_.end(), v.sizes);
    std::copy(strides_.begin(), strides_.end(), v.strides);
    return v;
  }

 private:
  DType dtype_;
  Sizes sizes_, strides_;
  std::int64_t skip_;
  std::vector<unsigned char> storage_;
};

// The scale of a group, by the rule.
inline float dynamic_scale_of(DType quantized, float amax, float upper_bound) {
  float scale = 0.0f;
  core::visit_quantized(quantized, [&]<class T>(core::Type<T>) { scale = dynamic_scale<T>(amax, upper_bound); });
  return scale;
}

// Moderate values, and every now and then any bit pattern at all.
inline void fill(Tensor& t, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0f, 20.0f);
  for (std::int64_t i = 0; i < t.numel(); ++i) {
    const std::uint32_t bits = random();
    if (core::is_real(t.dtype()) && bits % 8 != 0) {
      t.set_real(i, normal(random));
    } else {
      const std::uint32_t any = random();
      std::memcpy(t.at(i), &any, size_of(t.dtype()));
    }
  }
}

inline void fill_scales(Tensor& t, unsigned seed) {
  constexpr float kSpecial[] = {0.0f,      -0.0f,     -1.5f,     kInf,    -kInf,    kNaN,
                                0x1p-149f, 0x1p-127f, 0x1p-126f, 0x1p96f, 0x1p100f, 0x1p127f};
  std::mt19937 random(seed);
  for (std::int64_t i = 0; i < t.numel(); ++i) {
    const std::uint32_t bits = random();
    float scale = float_of(0x3c000000u + (bits >> 9) * 2);  // a few binades around 0.1
    if (bits % 8 == 0) scale = kSpecial[bits / 8 % std::size(kSpecial)];
    if (bits % 8 == 1) scale = float_of((std::bit_cast<std::uint32_t>(scale) | 0xfffffu) - bits / 8 % 8);  // trap significands
    t.set(i, scale);
  }
}

// The first difference, in words; "" when there is none. Gaps count.
inline std::string difference(const Tensor& found, const Tensor& expected) {
  const auto& a = found.storage();
  const auto& b = expected.storage();
  const auto [at, other] = std::mismatch(a.begin(), a.end(), b.begin());
  if (at == a.end()) return "";
  return "byte " + std::to_string(at - a.begin()) + " is " + std::to_string(*at) + ", expected " + std::to_string(*other);
}

// --- Numbers --------------------------------

inline std::vector<float> hostile_scales() {
  std::vector<float> scales = {1.0f,           0.013f,
                               3.0f,           float_of(0x3fffffffu),
                               0.0f,           -0.0f,
                               -0.7f,          kInf,
                               -kInf,          kNaN,
                               0x1p-149f,      0x1.8p-140f,
                               0x1p-126f,      0x1p96f,
                               0x1.2p96f,      0x1p127f,
                               1e-30f,         1e30f,
                               0x1p-100f,      448.0f,
                               1.0f / 448.0f,  kMinScale<E4M3>,
                               kMinScale<E5M2>};
  scales.push_back(float_of(0x007fffffu));  // the largest subnormal
  scales.push_back(float_of(0x6f7fffffu));  // just below 2^96
  scales.push_back(std::numeric_limits<float>::max());
  for (std::uint32_t significand : {0x11ffffu, 0x23fffeu, 0x43fffeu, 0x47fffeu, 0x6bfffdu, 0x6c0002u, 0x77fffdu})
    scales.push_back(float_of(0x3c000000u + significand));  // of INT8
  for (std::uint32_t multiple : {0x100000u, 0x300000u, 0x400000u, 0x700000u, 0x800000u})
    for (std::uint32_t below = 0; below <= 6; ++below) {
      scales.push_back(float_of(0x3c000000u + multiple - below));
      scales.push_back(float_of(0x00800000u + multiple - below));
    }
  std::mt19937 random(11);
  for (int i = 0; i < 40; ++i) scales.push_back(float_of(0x38000000u + (random() >> 5)));
  return scales;
}

// All 65536 patterns of a 16-bit type, as many of fp32.
inline Tensor every_pattern(DType real, unsigned seed) {
  Tensor input(real, {65536});
  std::mt19937 random(seed);
  for (std::int64_t i = 0; i < 65536; ++i) {
    if (real == DType::Float32) {
      input.set(i, static_cast<std::uint32_t>(i << 16 | (random() & (i % 3 ? 0xffff : 0))));
    } else {
      input.set(i, static_cast<std::uint16_t>(i));
    }
  }
  return input;
}

// --- Every instruction set --------------------------------

template <class Base>
class Forced : public Base {
 protected:
  void SetUp() override { before_ = cpu::active(); }
  void TearDown() override { cpu::force(before_); }

 private:
  cpu::Isa before_;
};

class CpuIsa : public Forced<testing::TestWithParam<cpu::Isa>> {
 protected:
  void SetUp() override {
    Forced::SetUp();
    cpu::force(GetParam());
  }
};

inline std::string isa_name(const testing::TestParamInfo<cpu::Isa>& info) { return cpu::name(info.param); }

inline std::string pair_name(DType a, DType b) { return std::string(name(a)) + " to " + name(b); }

// --- Threads --------------------------------

// Small uneven ranges from the last to the first.
inline void backwards(std::int64_t count, std::int64_t, const std::function<void(std::int64_t, std::int64_t)>& body) {
  const std::int64_t step = count / 7 + 1;
  for (std::int64_t begin = (count - 1) / step * step; begin >= 0; begin -= step) body(begin, std::min(count, begin + step));
}

inline void with_threads(std::int64_t count, std::int64_t, const std::function<void(std::int64_t, std::int64_t)>& body) {
  std::vector<std::thread> threads;
  const std::int64_t step = (count + 2) / 3;
  for (std::int64_t begin = 0; begin < count; begin += step)
    threads.emplace_back([&, begin] { body(begin, std::min(count, begin + step)); });
  for (std::thread& thread : threads) thread.join();
}

struct Spread {
  const char* name;
  cpu::ParallelFor parallel_for;
};

inline const Spread kSpreads[] = {{"backwards", backwards}, {"threads", with_threads}};

using SpreadParam = std::tuple<cpu::Isa, Spread>;

class CpuThreads : public Forced<testing::TestWithParam<SpreadParam>> {
 protected:
  void SetUp() override {
    Forced::SetUp();
    cpu::force(std::get<0>(GetParam()));
  }
};

inline std::string spread_name(const testing::TestParamInfo<SpreadParam>& info) {
  return std::string(cpu::name(std::get<0>(info.param))) + "_" + std::get<1>(info.param).name;
}

// --- The floating-point environment --------------------------------

#if defined(__x86_64__)
class Mxcsr {
 public:
  explicit Mxcsr(unsigned bits) : before_(_mm_getcsr()) { _mm_setcsr(before_ | bits); }
  ~Mxcsr() { _mm_setcsr(before_); }

 private:
  unsigned before_;
};
#endif

}  // namespace fp8kv::testing_support
