// What the kernels of the paged cache share: slots, launches in pieces, and units and elements from one side to the other.
#pragma once

#include <algorithm>

#include "debug.h"
#include "dependent_launch.h"
#include "fastdiv.h"
#include "fp8kv/kv_cache.h"
#include "fp8kv/plan.h"
#include "launch.h"
#include "layout.h"
#include "scale.h"
#include "unit.h"
#include "visit.h"

namespace fp8kv::cuda {

using device::Cut;
using device::cut_unit;
using device::FastDiv;
using device::Unit;

// --- Slots --------------------------------

// The elements of slot_mapping, or of other indices of tokens, from some token on.
struct Slots {
  const void* data = nullptr;
  std::int64_t step = 1;
  std::int64_t limit = 0;  // slots of the cache
  bool wide = false;       // Int64

  static Slots of(const TensorView& indices, std::int64_t limit) {
    return {indices.data, indices.strides[0], limit, indices.dtype == DType::Int64};
  }
  Slots after(std::int64_t count) const {
    return {static_cast<const char*>(data) + count * step * (wide ? 8 : 4), step, limit, wide};
  }

  __device__ __forceinline__ std::int64_t operator[](std::int64_t token) const {
    const std::int64_t at = token * step;
    return wide ? __ldg(static_cast<const long long*>(data) + at) : __ldg(static_cast<const int*>(data) + at);
  }

  // False for negative ones too.
  __device__ __forceinline__ bool contains(std::int64_t slot) const {
    return static_cast<std::uint64_t>(slot) < static_cast<std::uint64_t>(limit);
  }
};

// The offset of a place in a PagedView or PagedScales.
template <class View, class Index>
__device__ __forceinline__ std::int64_t at(const View& view, Index block, Index offset, Index head) {
  return block * view.block + offset * view.offset + head * view.head;
}

template <class T, class Index>
__device__ __forceinline__ T* row(const HeadsView& view, Index token, Index head) {
  return static_cast<T*>(view.data) + token * view.token + head * view.head;
}

template <class T, class Index>
__device__ __forceinline__ T* row(const PagedView& view, Index block, Index offset, Index head) {
  return static_cast<T*>(view.data) + at(view, block, offset, head);
}

// --- Launches --------------------------------

// Parameters of the kernels that append anything, counting in 64 bits.
struct AppendElements {
  CacheSide sides[2];
  Slots slots;
  std::int64_t count;  // of threads with work, or of warps
  std::int64_t num_heads;
  std::int64_t head_size;
  std::int64_t block_size;

  AppendElements(const CacheLayout& layout, const Slots& slots, std::int64_t count)
      : sides{layout.key, layout.value},
        slots(slots),
        count(count),
        num_heads(layout.num_heads),
        head_size(layout.head_size),
        block_size(layout.block_size) {}
};

// What an append does first, once validated: the checks of FP8KV_DEBUG=1.
inline bool anything_to_append(const char* op, const TensorView& slot_mapping, const CacheLayout& layout, cudaStream_t stream) {
  if (layout.empty()) return false;
  if (debugging(stream)) check_slots(op, slot_mapping, layout, stream);
  return layout.num_slots() > 0;
}

// The view of rows from its token `count` on.
inline HeadsView after(HeadsView view, std::int64_t count, DType dtype) {
  view.data = static_cast<char*>(view.data) + count * view.token * size_of(dtype);
  return view;
}

// launch(layout, slots) for pieces of at most `tokens` tokens.
template <class Launch>
void for_each_piece(const CacheLayout& layout, std::int64_t tokens, const TensorView& slot_mapping, const Launch& launch) {
  CacheLayout piece = layout;
  Slots slots = Slots::of(slot_mapping, layout.num_slots());
  for (std::int64_t left = layout.num_tokens; left > 0; left -= piece.num_tokens) {
    piece.num_tokens = std::min(tokens, left);
    launch(piece, slots);
    for (CacheSide* side : {&piece.key, &piece.value}) side->heads = after(side->heads, piece.num_tokens, layout.real);
    slots = slots.after(piece.num_tokens);
  }
}

// Blocks for so many threads; K and V in the second dimension of the grid.
inline dim3 grid_of(std::int64_t threads, const CachePlan& plan) {
  return {static_cast<unsigned>(core::ceil_div(threads, plan.threads)), 2};
}

}  // namespace fp8kv::cuda
