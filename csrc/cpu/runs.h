// The runs of a Layout one after the other: where each begins in the input, the result and the scales.
#pragma once

#include <cstdint>

#include "fp8kv/quantize.h"

namespace fp8kv::cpu {

class Runs {
 public:
  // At run number `first` in row-major order of all dimensions but the last.
  Runs(const Layout& layout, std::int64_t first) : layout_(layout), number_(first) {
    for (int d = layout.ndim - 2; d >= 0; --d) {
      const Layout::Dim& dim = layout.dims[d];
      const std::int64_t i = first % dim.size;
      first /= dim.size;
      index_[d] = i;
      phase_[d] = i % dim.block;
      in_ += i * dim.in;
      out_ += i * dim.out;
      scale_ += i / dim.block * dim.scale;
    }
  }

  static std::int64_t count(const Layout& layout) { return layout.numel / layout.run().size; }

  std::int64_t in() const { return in_; }
  std::int64_t out() const { return out_; }
  std::int64_t scale() const {
    return layout_.flat_rows == 0 ? scale_ : scale_ + number_ / layout_.flat_rows * layout_.flat_scale;
  }

  // To the next run; divides nothing but where an outer dimension wraps around.
  void advance() {
    ++number_;
    for (int d = layout_.ndim - 2; d >= 0; --d) {
      const Layout::Dim& dim = layout_.dims[d];
      in_ += dim.in;
      out_ += dim.out;
      if (++phase_[d] == dim.block) phase_[d] = 0, scale_ += dim.scale;
      if (++index_[d] < dim.size) return;
      in_ -= dim.size * dim.in;
      out_ -= dim.size * dim.out;
      scale_ -= dim.size / dim.block * dim.scale;
      index_[d] = phase_[d] = 0;
    }
  }

 private:
  const Layout& layout_;
  std::int64_t number_;
  std::int64_t in_ = 0, out_ = 0, scale_ = 0;
  std::int64_t index_[Layout::kMaxLayoutDims] = {};
  std::int64_t phase_[Layout::kMaxLayoutDims] = {};  // index within the block of one scale
};

// visit(runs, column, count) for the elements [begin, end) in row-major order: a part of a run, whole runs, a part again.
template <class Visit>
void for_each_run_part(const Layout& layout, std::int64_t begin, std::int64_t end, const Visit& visit) {
  const std::int64_t size = layout.run().size;
  Runs runs(layout, begin / size);
  std::int64_t column = begin % size;
  while (begin < end) {
    const std::int64_t count = size - column < end - begin ? size - column : end - begin;
    visit(runs, column, count);
    begin += count;
    column = 0;
    if (begin < end) runs.advance();
  }
}

}  // namespace fp8kv::cpu
