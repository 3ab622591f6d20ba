// Cuts a Layout into pieces that kernels like better: of one scale a run, and small enough for 32-bit counting.
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

// Calls f(piece) for the one or two parts of a layout in which long blocks of a run divide it: where the last block of a run is
// smaller than the others, the whole blocks, whose runs then have one scale each, and the rest.
template <class F>
void for_each_even_part(const Layout& layout, F&& f) {
  constexpr std::int64_t kLongBlock = 16;
  const Layout::Dim& run = layout.run();
  const std::int64_t blocks = run.size / run.block, rest = run.size % run.block;
  if (layout.flat_rows || run.scale == 0 || run.block < kLongBlock || rest == 0) return f(Piece{layout});

  Piece whole_blocks{layout};
  whole_blocks.layout.numel = layout.numel / run.size * blocks * run.block;
  whole_blocks.layout.dims[layout.ndim - 1] = {blocks, run.in * run.block, run.out * run.block, run.scale, 1};
  whole_blocks.layout.dims[whole_blocks.layout.ndim++] = {run.block, run.in, run.out, 0, 1};
  f(whole_blocks);

  Piece last_block{layout};
  last_block.layout.numel = layout.numel / run.size * rest;
  last_block.layout.dims[layout.ndim - 1] = {rest, run.in, run.out, 0, 1};
  last_block.in = blocks * run.block * run.in;
  last_block.out = blocks * run.block * run.out;
  last_block.scale = blocks * run.scale;
  f(last_block);
}

}  // namespace fp8kv::core
