// From the number of a run or an element to where it lies: a Layout in the form kernels use.
#pragma once

#include "fastdiv.h"
#include "fp8kv/quantize.h"

namespace fp8kv::device {

struct Offsets {
  std::int64_t in = 0;
  std::int64_t out = 0;
  std::int64_t scale = 0;
};

// The dimensions outside the run. Counting in 32 bits: core::for_each_piece keeps them small enough.
struct Walk {
  struct Dim {
    FastDiv size;
    FastDiv block;
    std::int64_t in, out, scale;
  };
  // In this order, as most kernels read few dimensions, and parameters that lie together arrive together.
  int ndim = 0;
  std::uint32_t count = 0;  // threads with work, or whatever the kernel counts
  FastDiv units_per_run;
  std::int64_t run = 0;  // elements
  Dim dims[Layout::kMaxLayoutDims];

  // The first `ndim` dimensions of the layout.
  static Walk over(const Layout& layout, int ndim, std::int64_t units_per_run, std::int64_t count) {
    Walk walk;
    walk.ndim = ndim;
    for (int d = 0; d < ndim; ++d) {
      const Layout::Dim& dim = layout.dims[d];
      walk.dims[d] = {FastDiv(dim.size), FastDiv(dim.scale ? dim.block : 1), dim.in, dim.out, dim.scale};
    }
    walk.units_per_run = FastDiv(units_per_run);
    walk.count = static_cast<std::uint32_t>(count);
    walk.run = layout.run().size;
    return walk;
  }

  // Where item `index` of the outer dimensions begins. kOuter: their number up to 2, or -1 for any.
  template <int kOuter>
  __device__ __forceinline__ Offsets at(std::uint32_t index) const {
    Offsets offsets;
    if constexpr (kOuter == 1) {
      add(offsets, dims[0], index);
    } else if constexpr (kOuter == 2) {
      const std::uint32_t outer = dims[1].size.divide(index);
      add(offsets, dims[0], outer);
      add(offsets, dims[1], index);
    } else if constexpr (kOuter < 0) {
      for (int d = ndim - 1; d > 0; --d) {
        const std::uint32_t outer = dims[d].size.quotient(index);
        add(offsets, dims[d], index - outer * dims[d].size.divisor);
        index = outer;
      }
      if (ndim > 0) add(offsets, dims[0], index);
    }
    return offsets;
  }

  static __device__ __forceinline__ void add(Offsets& offsets, const Dim& dim, std::uint32_t i) {
    offsets.in += i * dim.in;
    offsets.out += i * dim.out;
    offsets.scale += dim.block.quotient(i) * dim.scale;
  }
};

}  // namespace fp8kv::device
