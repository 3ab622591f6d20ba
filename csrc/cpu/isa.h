// The instruction set in use. Kernels are compiled once per instruction set; tables of their addresses meet here.
#pragma once

#include "fp8kv/runtime.h"

namespace fp8kv::cpu {

// The table of kernels for the active instruction set. `generic`, `avx2` and `avx512` are tables of one type; where the
// build has no AVX kernels, all three are the generic one.
template <class Table>
const Table& pick(const Table& generic, [[maybe_unused]] const Table& avx2, [[maybe_unused]] const Table& avx512) {
  switch (active()) {
    case Isa::AVX512: return avx512;
    case Isa::AVX2: return avx2;
    case Isa::Generic: break;
  }
  return generic;
}

}  // namespace fp8kv::cpu
