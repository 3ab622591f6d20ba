// The ways through a Layout: row after row, or panel of columns after panel.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/layout.h"
#include "cpu/kernels/table.h"

namespace fp8kv::cpu {

using core::Layout;

// The rows of a Layout one after the other: where each begins in the input, the result and the scales.
class RowIterator {
 public:
  // At row number `first` in row-major order of all dimensions but the last.
  RowIterator(const Layout& layout, std::int64_t first) : layout_(layout), number_(first) {
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

  static std::int64_t count(const Layout& layout) { return layout.numel / layout.inner().size; }

  std::int64_t in() const { return in_; }
  std::int64_t out() const { return out_; }
  std::int64_t scale() const {
    return layout_.flat_rows == 0 ? scale_ : scale_ + number_ / layout_.flat_rows * layout_.flat_scale;
  }

  // This row and those after it, at most `limit`, that are equal steps apart.
  Rows rows(std::int64_t limit) const {
    const int d = layout_.ndim - 2;
    if (d < 0 || layout_.flat_rows != 0) return {};
    const Layout::Dim& dim = layout_.dims[d];
    const bool one_scale = dim.scale == 0 || dim.block > 1;
    const std::int64_t size = one_scale && dim.scale != 0 ? std::min(dim.size, index_[d] - phase_[d] + dim.block) : dim.size;
    return {.count = std::min(limit, size - index_[d]), .in = dim.in, .out = dim.out, .scale = one_scale ? 0 : dim.scale};
  }

  // By some of rows().
  void advance(std::int64_t count = 1) {
    number_ += count;
    for (int d = layout_.ndim - 2; d >= 0; --d, count = 1) {
      const Layout::Dim& dim = layout_.dims[d];
      in_ += count * dim.in;
      out_ += count * dim.out;
      phase_[d] += count;
      if (dim.block == 1) {
        phase_[d] = 0, scale_ += count * dim.scale;
      } else if (phase_[d] == dim.block) {
        phase_[d] = 0, scale_ += dim.scale;
      }
      index_[d] += count;
      if (index_[d] < dim.size) return;
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

// visit(in, out, scale, columns, rows) for the elements [begin, end) in row-major order of all dimensions: where a part of a
// row with one scale begins, how many elements it has, and how many rows that follow have such a part too, at most `max_rows`.
template <class Visit>
void for_each_row_segment(const Layout& layout, std::int64_t begin, std::int64_t end, std::int64_t max_rows,
                          const Visit& visit) {
  const Layout::Dim& inner = layout.inner();
  RowIterator row(layout, begin / inner.size);
  std::int64_t column = begin % inner.size;
  while (begin < end) {
    if (column == 0 && inner.scale == 0 && end - begin >= inner.size) {
      const Rows rows = row.rows(std::min(max_rows, (end - begin) / inner.size));
      visit(row.in(), row.out(), row.scale(), inner.size, rows);
      begin += rows.count * inner.size;
      row.advance(rows.count);
      continue;
    }
    const std::int64_t group = inner.scale == 0 ? 0 : column / inner.block;
    const std::int64_t stop = inner.scale == 0 ? inner.size : std::min(inner.size, (group + 1) * inner.block);
    const std::int64_t count = std::min(stop - column, end - begin);
    visit(row.in() + column * inner.in, row.out() + column * inner.out, row.scale() + group * inner.scale, count, Rows{});
    begin += count;
    column += count;
    if (column == inner.size) column = 0, row.advance();
  }
}

// How many columns a panel has at most, and what counts as an item of its range.
inline constexpr std::int64_t kPanelColumns = ColumnScales::kMaxCount;

inline std::int64_t panel_items(const Layout& layout) {
  return core::ceil_div(layout.inner().size, kPanelColumns) * RowIterator::count(layout);
}

// The items [begin, end) of an order that goes down all rows of a panel of columns before it takes the next panel. For each
// part of a panel makes a Panel(owner, first column, number of columns), and calls its row(in, out, scale) with the offsets of
// the first column in each row and of the row's scales.
template <class Panel, class Owner>
void for_each_panel(const Owner& owner, const Layout& layout, std::int64_t begin, std::int64_t end) {
  const Layout::Dim& inner = layout.inner();
  const std::int64_t rows = RowIterator::count(layout);
  while (begin < end) {
    const std::int64_t first_column = begin / rows * kPanelColumns, first_row = begin % rows;
    const std::int64_t count = std::min(rows - first_row, end - begin);
    Panel panel(owner, first_column, std::min(kPanelColumns, inner.size - first_column));
    RowIterator row(layout, first_row);
    for (std::int64_t i = 0; i < count; ++i, row.advance())
      panel.row(row.in() + first_column * inner.in, row.out() + first_column * inner.out, row.scale());
    begin += count;
  }
}

}  // namespace fp8kv::cpu
