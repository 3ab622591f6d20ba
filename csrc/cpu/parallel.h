// Work in ranges, each in the default floating-point environment.
#pragma once

#include <cstdint>

#include "fp8kv/parallel.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#else
#include <cfenv>
#endif

namespace fp8kv::cpu {

// Rounding to nearest, subnormals kept, no traps: what the rules are defined for, whatever the thread is set to
// (torch.set_flush_denormal, for one). The thread's own environment comes back at the end.
class DefaultFloatEnvironment {
 public:
#if defined(__x86_64__)
  DefaultFloatEnvironment() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~DefaultFloatEnvironment() { _mm_setcsr(saved_); }
#else
  DefaultFloatEnvironment() { std::fegetenv(&saved_), std::fesetenv(FE_DFL_ENV); }
  ~DefaultFloatEnvironment() { std::fesetenv(&saved_); }
#endif
  DefaultFloatEnvironment(const DefaultFloatEnvironment&) = delete;
  DefaultFloatEnvironment& operator=(const DefaultFloatEnvironment&) = delete;

 private:
#if defined(__x86_64__)
  unsigned saved_;
#else
  std::fenv_t saved_;
#endif
};

// About as many elements as are worth waking a thread for.
inline constexpr std::int64_t kGrain = 1 << 15;

// Before other threads read what this one has streamed (Rows::stream).
inline void fence_streams() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// body(begin, end) over spans of [0, count); an item of the count stands for `item_size` elements.
template <class Body>
void parallel(const ParallelFor& parallel_for, std::int64_t count, std::int64_t item_size, const Body& body) {
  if (count <= 0) return;
  const auto in_environment = [&body](std::int64_t begin, std::int64_t end) {
    const DefaultFloatEnvironment environment;
    body(begin, end);
    fence_streams();
  };
  const std::int64_t grain = item_size >= kGrain ? 1 : kGrain / (item_size > 0 ? item_size : 1);
  if (!parallel_for || count <= grain) return in_environment(0, count);
  parallel_for(count, grain, in_environment);
}

}  // namespace fp8kv::cpu
