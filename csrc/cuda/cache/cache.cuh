// Shared by the kernels of the paged cache: indices of tokens, places in views, launches in chunks of tokens.
#pragma once

#include <algorithm>

#include "core/dispatch.h"
#include "core/plan.h"
#include "cuda/common/debug.h"
#include "cuda/common/launch.h"
#include "device/convert.cuh"
#include "device/fastdiv.cuh"
#include "device/pdl.cuh"
#include "device/vec.cuh"

namespace fp8kv::cuda {

using core::CacheLayouts;
using core::CachePlan;
using core::HeadsView;
using core::KernelPath;
using core::kVecSize;
using core::KVViews;
using core::OffsetView;
using core::PagedView;
using device::FastDiv;
using device::Slice;
using device::slice_of;
using device::Vec;

// --- Places ----------

// The elements of slot_mapping, or of other indices of tokens, from some token on.
struct TokenIndices {
  const void* data = nullptr;
  std::int64_t stride = 1;
  std::int64_t limit = 0;  // slots of the cache, or rows of the table of positions
  bool wide = false;       // Int64

  static TokenIndices of(const TensorView& indices, std::int64_t limit) {
    return {indices.data, indices.strides[0], limit, indices.dtype == DType::Int64};
  }
  TokenIndices after(std::int64_t count) const {
    return {static_cast<const char*>(data) + count * stride * (wide ? 8 : 4), stride, limit, wide};
  }

  __device__ __forceinline__ std::int64_t operator[](std::int64_t token) const {
    const std::int64_t at = token * stride;
    return wide ? static_cast<const long long*>(data)[at] : static_cast<const int*>(data)[at];
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

// --- Channels ----------

// The offset of a channel, for values of type In; that of none if there are no offsets.
template <class In>
__device__ __forceinline__ float offset_of(const OffsetView& view, std::int64_t head, std::int64_t dim) {
  return view.data ? view.data[head * view.head + dim * view.dim] : device::kNoOffset<In>;
}

// An element with the parameters of its head, or of its channel. `scale`: the first of the head, or its only one.
template <class Op, class Out, bool kChannels, class In>
__device__ __forceinline__ Out convert_at(In raw, const KVViews& kv, const float* scale, std::int64_t head, std::int64_t dim) {
  if constexpr (kChannels)
    return device::convert_element<Op, Out>(raw, Op::prepare(scale[dim * kv.scales.dim]), offset_of<In>(kv.offsets, head, dim));
  else
    return device::convert_element<Op, Out>(raw, Op::prepare(*scale));
}

// What the channels of K and V have: scales each, and no offsets; or anything.
enum class ChannelParameters { None, Scales, Any };

constexpr int kHalf = kVecSize / 2;

// The columns of a vector: 4 neighbors from `first` on, and those `second` columns further on.
struct Columns {
  std::uint32_t first;
  std::uint32_t second = kHalf;
};

// Parameters of these columns, both halves of which are aligned to 16 bytes.
__device__ __forceinline__ void load_columns(const float* head, Columns columns, float (&to)[kVecSize]) {
  std::uint32_t words[kVecSize];
  device::load16(words, head + columns.first);
  device::load16(words + kHalf, head + columns.first + columns.second);
#pragma unroll
  for (int i = 0; i < kVecSize; ++i) to[i] = __uint_as_float(words[i]);
}

template <class In>
__device__ __forceinline__ void load_offsets(const OffsetView& view, std::uint32_t head, Columns columns,
                                             float (&to)[kVecSize]) {
  if (view.data) return load_columns(view.data + head * view.head, columns, to);
#pragma unroll
  for (int i = 0; i < kVecSize; ++i) to[i] = device::kNoOffset<In>;
}

// Scales and offsets; `scale` as above.
template <class Op, class In, ChannelParameters kChannels>
__device__ __forceinline__ device::Channels<Op> load_channels(const KVViews& kv, const float* scale, std::uint32_t head,
                                                              Columns columns) {
  device::Channels<Op> channels;
  load_offsets<In>(kChannels == ChannelParameters::Any ? kv.offsets : OffsetView{}, head, columns, channels.offsets);
  if (kChannels == ChannelParameters::Any && kv.scales.dim == 0) {
    const auto prepared = Op::prepare(*scale);
#pragma unroll
    for (int i = 0; i < kVecSize; ++i) channels.scales[i] = prepared;
  } else {
    float scales[kVecSize];
    load_columns(scale, columns, scales);
#pragma unroll
    for (int i = 0; i < kVecSize; ++i) channels.scales[i] = Op::prepare(scales[i]);
  }
  return channels;
}

// --- Launches ----------

// Parameters of the kernels that append anything, counting in 64 bits.
struct ScalarAppendArgs {
  KVViews kv[2];
  TokenIndices slots;
  std::int64_t count;  // of threads with work, or of warps
  std::int64_t num_heads;
  std::int64_t head_size;
  std::int64_t block_size;

  ScalarAppendArgs(const CacheLayout& layout, const TokenIndices& slots, std::int64_t count)
      : kv{layout.k, layout.v},
        slots(slots),
        count(count),
        num_heads(layout.num_heads),
        head_size(layout.head_size),
        block_size(layout.block_size) {}
};

// The view of rows from its token `count` on.
inline HeadsView after(HeadsView view, std::int64_t count, DType dtype) {
  view.data = static_cast<char*>(view.data) + count * view.token * size_of(dtype);
  return view;
}

// launch(layout, slots) for chunks of at most `tokens` tokens.
template <class Launch>
void for_each_token_chunk(const CacheLayout& layout, std::int64_t tokens, const TensorView& slot_mapping,
                          const Launch& launch) {
  CacheLayout chunk = layout;
  TokenIndices slots = TokenIndices::of(slot_mapping, layout.num_slots());
  for (std::int64_t left = layout.num_tokens; left > 0; left -= chunk.num_tokens) {
    chunk.num_tokens = std::min(tokens, left);
    launch(chunk, slots);
    for (KVViews* kv : {&chunk.k, &chunk.v}) kv->rows = after(kv->rows, chunk.num_tokens, layout.row_dtype);
    slots = slots.after(chunk.num_tokens);
  }
}

// Blocks for so many threads of each side; K and V in the second dimension of the grid.
inline dim3 grid_of(std::int64_t threads, const CachePlan& plan, const CacheLayout& layout) {
  return {static_cast<unsigned>(core::ceil_div(threads, plan.threads)), static_cast<unsigned>(layout.sides)};
}

// Calls f.operator()<Op, In, Out>() for an append of values of type `real` to a cache of type `element`.
template <class F>
void visit_append(DType real, DType element, const F& f) {
  core::visit_real(real, [&]<class In>(core::Type<In>) {
    if (core::is_quantized(element))
      core::visit_quantized(element,
                            [&]<class Out>(core::Type<Out>) { f.template operator()<device::QuantizeOp<Out>, In, Out>(); });
    else
      core::visit_real(element, [&]<class Out>(core::Type<Out>) { f.template operator()<device::CopyOp, In, Out>(); });
  });
}

}  // namespace fp8kv::cuda
