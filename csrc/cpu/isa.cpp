// Chooses the instruction set at run time.
//
// Compile flags of the kernel files, on top of the project's (never fast-math, -ffp-contract=off):
//   all of them       -O3 -fno-math-errno -fno-trapping-math
//   avx2.cpp          -mavx2 -mfma -mf16c
//   avx512.cpp        -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl
//                     -mprefer-vector-width=512
// FP8KV_X86 says that the AVX files are part of the build. Every other file is compiled for the baseline processor.
#include "cpu/isa.h"

#include <atomic>

#include "core/check.h"
#include "core/environment.h"

namespace fp8kv::cpu {
namespace {

bool supported([[maybe_unused]] Isa isa) {
  if (isa == Isa::Generic) return true;
#if defined(FP8KV_X86)
  // Also asks the operating system whether it saves the wide registers.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (isa == Isa::AVX2) return avx2;
  return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

Isa initial() {
  const std::vector<Isa> choices = available();
  const std::string wanted = core::environment("FP8KV_CPU_ISA");
  for (Isa isa : choices)
    if (wanted == name(isa)) return isa;
  return choices.back();
}

std::atomic<Isa>& current() {
  static std::atomic<Isa> isa{initial()};
  return isa;
}

}  // namespace

const char* name(Isa isa) {
  switch (isa) {
    case Isa::AVX512: return "avx512";
    case Isa::AVX2: return "avx2";
    case Isa::Generic: break;
  }
  return "generic";
}

std::vector<Isa> available() {
  std::vector<Isa> found;
  for (Isa isa : {Isa::Generic, Isa::AVX2, Isa::AVX512})
    if (supported(isa)) found.push_back(isa);
  return found;
}

Isa active() { return current().load(std::memory_order_relaxed); }

void force(Isa isa) {
  if (!supported(isa)) {
    std::string names;
    for (Isa choice : available()) names += (names.empty() ? "" : ", ") + std::string(name(choice));
    core::fail("force", "isa", "be one that this build and this processor have (" + names + ")", name(isa));
  }
  current().store(isa, std::memory_order_relaxed);
}

}  // namespace fp8kv::cpu
