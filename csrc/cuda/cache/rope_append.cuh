// What the vectorized kernels of rope_quant_and_cache share: their parameters, loads of tables and weights, RoPE.
#pragma once

#include "cuda/cache/cache.cuh"

namespace fp8kv::cuda {

using core::RopeLayout;

inline constexpr unsigned kAllLanes = 0xffffffffu;

enum class Rope { None, Neox, Interleaved };

// The positions of tokens: one for each, or time, height and width.
struct Positions {
  TokenIndices axes[3];  // with the rows of the table as their limit
  core::Sections sections;

  static Positions of(const RopeAppend& problem, const RopeLayout& layout) {
    Positions positions{.sections = layout.sections};
    if (!problem.positions) return positions;
    const TensorView& view = *problem.positions;
    for (int i = 0; i < layout.sections.axes; ++i)
      positions.axes[i] = {core::address_of(view, i * view.strides[0]), view.strides[view.ndim - 1], layout.max_position,
                           view.dtype == DType::Int64};
    return positions;
  }
  Positions after(std::int64_t count) const {
    Positions rest = *this;
    for (int i = 0; i < sections.axes; ++i) rest.axes[i] = axes[i].after(count);
    return rest;
  }

  // Whether all positions of a token are in the table, of which the first is known.
  __device__ __forceinline__ bool in_table(std::int64_t token, std::int64_t first) const {
    bool all = axes[0].contains(first);
    for (int i = 1; i < sections.axes; ++i) all &= axes[i].contains(axes[i][token]);
    return all;
  }
  __device__ __forceinline__ std::int64_t of_frequency(std::int64_t token, std::int64_t frequency) const {
    return axes[sections.axes == 1 ? 0 : sections.axis_of(frequency)][token];
  }
};

// Q, K or V, in blocks of its own.
struct Segment {
  const void* in;
  std::int64_t in_token, in_head;
  void* out;
  std::int64_t out_block, out_offset, out_head;  // of query_out: out_offset is that of the token
  const float* scales;
  std::int64_t scale_stride;
  const void* norm_weight;  // nullptr: none
  FastDiv heads_per_scale;
  FastDiv threads_per_token;
  std::uint32_t heads;
  std::uint32_t heads_per_thread;
  std::uint32_t threads;      // with work
  std::uint32_t first_block;  // of the grid
};

// Of the usual calls.
struct RopeAppendArgs {
  Segment segments[3];
  TokenIndices slots;
  TokenIndices positions;  // the first ones, if there are three
  const void* cos_sin;
  std::int64_t cos_sin_row;
  FastDiv block_size;
  FastDiv threads_per_head;      // with a norm a power of two up to 32; some of them may hold no elements
  std::uint32_t units_per_head;  // of a thread: one or two vectors
  std::uint32_t rotary_units;
  float norm_eps;
  float per_element;  // 1 / head_size
  bool wide_cos_sin;  // Float32
  bool wide_weights[2];
  bool quantizes_query;
  static constexpr bool norm_after_rope = false;  // hidden where there is one

  // Whether the positions of a token are in the table; `position` is the first.
  __device__ __forceinline__ bool in_table(std::uint32_t, std::int64_t position) const { return positions.contains(position); }
  __device__ __forceinline__ int segment_of(std::uint32_t block) const {
    return block >= segments[2].first_block ? 2 : block >= segments[1].first_block ? 1 : 0;
  }
};

// With three positions, or a norm after RoPE.
struct ManyHeadsArgs : RopeAppendArgs {
  Positions all_positions;
  bool norm_after_rope;
};

// With two vectors per thread, of several heads: rope_append_many.cu.
template <class In, class Fp8>
void launch_many_heads(const ManyHeadsArgs& args, unsigned blocks, const RopeLayout& layout, cudaStream_t stream);

// Half a vector as fp32, from an address aligned to it.
template <class T>
__device__ __forceinline__ void load_half(const T* p, float (&to)[kHalf]) {
  if constexpr (sizeof(T) == 4) {
    std::uint32_t words[4];
    device::load16(words, p);
#pragma unroll
    for (int i = 0; i < kHalf; ++i) to[i] = __uint_as_float(words[i]);
  } else {
    Vec<T> vec{};
    device::load8(vec.words, p);
    float values[kVecSize];
    device::unpack(vec, values);
#pragma unroll
    for (int i = 0; i < kHalf; ++i) to[i] = values[i];
  }
}

// The same from fp32, if it is `wide`, or In.
template <class In>
__device__ __forceinline__ void load_half(const void* data, bool wide, std::int64_t offset, float (&to)[kHalf]) {
  if (wide)
    load_half(static_cast<const float*>(data) + offset, to);
  else
    load_half(static_cast<const In*>(data) + offset, to);
}

// (a, b) rotated; no contraction.
__device__ __forceinline__ void rotate(float& a, float& b, float cos, float sin) {
  const float first = __fsub_rn(__fmul_rn(a, cos), __fmul_rn(b, sin));
  b = __fadd_rn(__fmul_rn(b, cos), __fmul_rn(a, sin));
  a = first;
}

// Calls f.operator()<kRope, kNorm>() for what a layout has.
template <class F>
void visit_transforms(const RopeLayout& layout, const F& f) {
  const auto visit_norm = [&]<Rope kRope>() {
    if (layout.has_norm())
      f.template operator()<kRope, true>();
    else
      f.template operator()<kRope, false>();
  };
  if (layout.rotary_dim == 0)
    visit_norm.template operator()<Rope::None>();
  else if (layout.is_neox)
    visit_norm.template operator()<Rope::Neox>();
  else
    visit_norm.template operator()<Rope::Interleaved>();
}

}  // namespace fp8kv::cuda
