// Division of 32-bit counts by a divisor that is known on the host (Granlund and Montgomery, PLDI 1994).
#pragma once

#include <bit>
#include <cstdint>

namespace fp8kv::device {

// Exact for numerators below 2^31 and divisors from 1 to 2^31.
struct FastDiv {
  struct Result {
    std::uint32_t quotient;
    std::uint32_t remainder;
  };

  std::uint32_t divisor = 1;
  std::uint32_t multiplier = 1;
  std::uint32_t shift = 0;

  FastDiv() = default;
  explicit FastDiv(std::int64_t d) : divisor(static_cast<std::uint32_t>(d)) {
    shift = static_cast<std::uint32_t>(std::bit_width(divisor - 1));
    multiplier = static_cast<std::uint32_t>(((std::uint64_t{1} << 32) * ((std::uint64_t{1} << shift) - divisor)) / divisor + 1);
  }

  __device__ std::uint32_t div(std::uint32_t n) const { return (__umulhi(n, multiplier) + n) >> shift; }

  __device__ Result divmod(std::uint32_t n) const {
    const std::uint32_t quotient = div(n);
    return {quotient, n - quotient * divisor};
  }
};

}  // namespace fp8kv::device
