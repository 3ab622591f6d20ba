// Divides a Layout into chunks that kernels prefer: with one scale per row, and small enough for 32-bit counting.
#pragma once

#include <algorithm>

#include "core/layout.h"

namespace fp8kv::core {

// Kernels count vectors and elements of one launch in 32 bits; larger problems are launched in chunks.
inline constexpr std::int64_t kMaxChunk = std::int64_t{1} << 31;

// Blocks of a scale along a row from this length on are worth rows of their own; with shorter ones, kernels look up a scale for
// each column.
inline constexpr std::int64_t kLongBlock = 16;

// A part of a problem: its own layout, and where its first element and first scale lie (in elements from the views' data).
struct Chunk {
  Layout layout;
  std::int64_t in = 0;
  std::int64_t out = 0;
  std::int64_t scale = 0;
  std::int64_t flat_row = 0;  // of the first element; counts only where layout.flat_rows is set
};

// Calls f(chunk) for chunks of at most `limit` elements that cover the layout. The last dimension is only divided at multiples
// of `limit`, so a `limit` that is a multiple of 8 keeps alignment.
template <class F>
void for_each_chunk(const Chunk& whole, std::int64_t limit, F&& f, int dim = 0) {
  const Layout& layout = whole.layout;
  if (layout.numel <= limit) return f(whole);
  while (layout.dims[dim].size == 1) ++dim;
  const Layout::Dim& divided = layout.dims[dim];
  const std::int64_t elements = layout.numel / divided.size;  // per index of the divided dimension
  std::int64_t rows = 1;
  for (int d = dim + 1; d + 1 < layout.ndim; ++d) rows *= layout.dims[d].size;

  std::int64_t step = std::max<std::int64_t>(1, limit / elements);
  const bool whole_blocks = step >= divided.block;
  if (whole_blocks) step -= step % divided.block;
  for (std::int64_t begin = 0, end; begin < divided.size; begin = end) {
    end = std::min(divided.size, begin + step);
    if (!whole_blocks) end = std::min(end, (begin / divided.block + 1) * divided.block);
    Chunk chunk = whole;
    Layout::Dim& part = chunk.layout.dims[dim];
    part.size = end - begin;
    if (!whole_blocks) part.scale = 0, part.block = 1;  // one block only
    chunk.layout.numel = elements * part.size;
    chunk.in += begin * divided.in;
    chunk.out += begin * divided.out;
    chunk.scale += begin / divided.block * divided.scale;
    if (dim + 1 < layout.ndim) chunk.flat_row += begin * rows;
    for_each_chunk(chunk, limit, f, dim);
  }
}

// Calls f(chunk) for the whole layout, or, where rows have long blocks of one scale and a last block that is smaller, for the
// whole blocks, whose rows then have one scale each, and for the last blocks.
template <class F>
void for_each_uniform_part(const Layout& layout, F&& f) {
  const Layout::Dim& inner = layout.inner();
  const std::int64_t blocks = inner.size / inner.block, rest = inner.size % inner.block;
  if (layout.flat_rows || inner.scale == 0 || inner.block < kLongBlock || rest == 0) return f(Chunk{layout});

  Chunk whole_blocks{layout};
  whole_blocks.layout.numel = layout.numel / inner.size * blocks * inner.block;
  whole_blocks.layout.dims[layout.ndim - 1] = {blocks, inner.in * inner.block, inner.out * inner.block, inner.scale, 1};
  whole_blocks.layout.dims[whole_blocks.layout.ndim++] = {inner.block, inner.in, inner.out, 0, 1};
  f(whole_blocks);

  Chunk last_block{layout};
  last_block.layout.numel = layout.numel / inner.size * rest;
  last_block.layout.dims[layout.ndim - 1] = {rest, inner.in, inner.out, 0, 1};
  last_block.in = blocks * inner.block * inner.in;
  last_block.out = blocks * inner.block * inner.out;
  last_block.scale = blocks * inner.scale;
  f(last_block);
}

}  // namespace fp8kv::core
