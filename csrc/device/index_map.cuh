// From the index of a row or an element to where it lies: a Layout in the form kernels use.
#pragma once

#include "core/layout.h"
#include "device/fastdiv.cuh"

namespace fp8kv::device {

using core::Layout;

struct Offsets {
  std::int64_t in = 0;
  std::int64_t out = 0;
  std::int64_t scale = 0;
};

// The outer dimensions. Counting in 32 bits: core::for_each_chunk keeps them small enough.
struct IndexMap {
  struct Dim {
    FastDiv size;
    FastDiv block;
    std::int64_t in, out, scale;
  };
  // In this order, as most kernels read few dimensions, and parameters that lie together arrive together.
  int ndim = 0;
  std::uint32_t count = 0;  // threads with work, or whatever the kernel counts
  FastDiv vecs_per_row;
  std::int64_t row_size = 0;  // elements
  Dim dims[Layout::kMaxLayoutDims];

  // The first `ndim` dimensions of the layout.
  static IndexMap over(const Layout& layout, int ndim, std::int64_t vecs_per_row, std::int64_t count) {
    IndexMap map;
    map.ndim = ndim;
    for (int d = 0; d < ndim; ++d) {
      const Layout::Dim& dim = layout.dims[d];
      map.dims[d] = {FastDiv(dim.size), FastDiv(dim.scale ? dim.block : 1), dim.in, dim.out, dim.scale};
    }
    map.vecs_per_row = FastDiv(vecs_per_row);
    map.count = static_cast<std::uint32_t>(count);
    map.row_size = layout.inner().size;
    return map;
  }

  // Where item `index` of the outer dimensions begins. kOuter: their number up to 2, or -1 for any.
  template <int kOuter>
  __device__ __forceinline__ Offsets at(std::uint32_t index) const {
    Offsets offsets;
    if constexpr (kOuter == 1) {
      add(offsets, dims[0], index);
    } else if constexpr (kOuter == 2) {
      const auto [outer, inner] = dims[1].size.divmod(index);
      add(offsets, dims[0], outer);
      add(offsets, dims[1], inner);
    } else if constexpr (kOuter < 0) {
      for (int d = ndim - 1; d > 0; --d) {
        const auto [outer, inner] = dims[d].size.divmod(index);
        add(offsets, dims[d], inner);
        index = outer;
      }
      if (ndim > 0) add(offsets, dims[0], index);
    }
    return offsets;
  }

  static __device__ __forceinline__ void add(Offsets& offsets, const Dim& dim, std::uint32_t i) {
    offsets.in += i * dim.in;
    offsets.out += i * dim.out;
    offsets.scale += dim.block.div(i) * dim.scale;
  }
};

}  // namespace fp8kv::device
