// Cuts a Layout into pieces small enough for 32-bit counting in a kernel.
#pragma once

#include <algorithm>

#include "fp8kv/quantize.h"

namespace fp8kv::core {

// A part of a problem: its own layout, and where its first element and first scale lie (in elements from the views' data).
struct Piece {
  Layout layout;
  std::int64_t in = 0;
  std::int64_t out = 0;
  std::int64_t scale = 0;
  std::int64_t flat_row = 0;  // of the first element; counts only where layout.flat_rows is set
};

// Calls f(piece) for pieces of at most `limit` elements that cover the layout. The last dimension is only cut at multiples of
// `limit`, so a `limit` that is a multiple of 8 keeps alignment.
template <class F>
void for_each_piece(const Piece& whole, std::int64_t limit, F&& f, int dim = 0) {
  const Layout& layout = whole.layout;
  if (layout.numel <= limit) return f(whole);
  while (layout.dims[dim].size == 1) ++dim;
  const Layout::Dim& cut = layout.dims[dim];
  const std::int64_t inner = layout.numel / cut.size;
  std::int64_t inner_rows = 1;
  for (int d = dim + 1; d + 1 < layout.ndim; ++d) inner_rows *= layout.dims[d].size;

  std::int64_t step = std::max<std::int64_t>(1, limit / inner);
  const bool whole_blocks = step >= cut.block;
  if (whole_blocks) step -= step % cut.block;
  for (std::int64_t begin = 0, end; begin < cut.size; begin = end) {
    end = std::min(cut.size, begin + step);
    if (!whole_blocks) end = std::min(end, (begin / cut.block + 1) * cut.block);
    Piece piece = whole;
    Layout::Dim& part = piece.layout.dims[dim];
    part.size = end - begin;
    if (!whole_blocks) part.scale = 0, part.block = 1;  // one block only
    piece.layout.numel = inner * part.size;
    piece.in += begin * cut.in;
    piece.out += begin * cut.out;
    piece.scale += begin / cut.block * cut.scale;
    if (dim + 1 < layout.ndim) piece.flat_row += begin * inner_rows;
    for_each_piece(piece, limit, f, dim);
  }
}

}  // namespace fp8kv::core
