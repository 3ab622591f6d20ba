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
  const float* scales;
  std::int64_t scale_stride;
  FastDiv heads_per_scale;
  std::uint32_t heads;
  const void* norm_weight;  // nullptr: none
  void* out;
  std::int64_t out_block, out_offset, out_head;  // of query_out: out_offset is that of the token
  // With several heads per thread.
  FastDiv threads_per_token;
  std::uint32_t heads_per_thread;
  std::uint32_t threads;  // with work
};

// Of the usual calls. What a kernel needs first is in front, as it is not in the processor's cache yet.
struct RopeAppendArgs {
  TokenIndices positions;  // the first ones, if there are three
  TokenIndices slots;
  std::uint32_t tokens;
  std::uint32_t first_blocks[3];  // of Q, K and V, of the grid, or of a token
  FastDiv threads_per_head;       // with a norm a power of two up to 32; some of them may hold no elements
  std::uint32_t units_per_head;   // of a thread: one or two vectors
  std::uint32_t rotary_units;
  bool wide_cos_sin;  // Float32
  bool wide_weights[2];
  bool quantizes_query;
  float norm_eps;
  float per_element;  // 1 / head_size
  FastDiv block_size;
  const void* cos_sin;
  std::int64_t cos_sin_row;
  Segment segments[3];

  __device__ __forceinline__ int segment_of(std::uint32_t block) const {
    return block >= first_blocks[2] ? 2 : block >= first_blocks[1] ? 1 : 0;
  }
};

// With three positions, a norm after RoPE, or scales or offsets per channel.
struct ExtendedArgs : RopeAppendArgs {
  Positions all_positions;
  bool norm_after_rope;
  bool has_channels[2];  // K and V
  KVViews kv[2];
};

// With two vectors per thread, of several heads: rope_append_many.cu.
template <class In, class Fp8>
void launch_many_heads(const ExtendedArgs& args, unsigned blocks, const RopeLayout& layout, cudaStream_t stream);

// A load under a condition; else the words stay. As one instruction, for which the compiler makes no copies of them.
__device__ __forceinline__ void load16_if(bool condition, std::uint32_t* words, const void* p) {
  asm volatile(
      "{\n"
      ".reg .pred condition;\n"
      "setp.ne.u32 condition, %5, 0;\n"
      "@condition ld.global.v4.b32 {%0, %1, %2, %3}, [%4];\n"
      "}"
      : "+r"(words[0]), "+r"(words[1]), "+r"(words[2]), "+r"(words[3])
      : "l"(p), "r"(static_cast<std::uint32_t>(condition))
      : "memory");
}
__device__ __forceinline__ void load8_if(bool condition, std::uint32_t* words, const void* p) {
  asm volatile(
      "{\n"
      ".reg .pred condition;\n"
      "setp.ne.u32 condition, %3, 0;\n"
      "@condition ld.global.v2.b32 {%0, %1}, [%2];\n"
      "}"
      : "+r"(words[0]), "+r"(words[1])
      : "l"(p), "r"(static_cast<std::uint32_t>(condition))
      : "memory");
}
__device__ __forceinline__ void load4_if(bool condition, std::uint32_t& word, const void* p) {
  asm volatile(
      "{\n"
      ".reg .pred condition;\n"
      "setp.ne.u32 condition, %2, 0;\n"
      "@condition ld.global.b32 %0, [%1];\n"
      "}"
      : "+r"(word)
      : "l"(p), "r"(static_cast<std::uint32_t>(condition))
      : "memory");
}
__device__ __forceinline__ std::uint32_t load4(const void* p) {
  std::uint32_t word;
  asm volatile("ld.global.b32 %0, [%1];" : "=r"(word) : "l"(p) : "memory");
  return word;
}

// An index on its way, of either type without a branch: what first asks for its value waits for it. Limits are below 2^31, so
// that the lower word is the value of all that are below it.
struct LoadedIndex {
  std::uint32_t low, high = 0;

  __device__ __forceinline__ LoadedIndex(const TokenIndices& indices, std::uint32_t token) {
    const char* at = static_cast<const char*>(indices.data) + (token * indices.stride << (indices.wide ? 3 : 2));
    low = load4(at);
    load4_if(indices.wide, high, at + 4);
  }
  __device__ __forceinline__ bool within(const TokenIndices& indices) const {
    return high == 0 && low < static_cast<std::uint32_t>(indices.limit);
  }
};

// One element as fp32.
template <class In>
__device__ __forceinline__ float load_element(const void* data, bool wide, std::int64_t offset) {
  return wide ? static_cast<const float*>(data)[offset] : decode(static_cast<const In*>(data)[offset]);
}

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

// What a thread takes of a head: two parts of 4 * kVecs elements, `second` elements apart. With RoPE of neox they turn with
// each other.
template <int kVecs>
struct Unit {
  static constexpr int kPart = kHalf * kVecs;
  std::uint32_t index;
  std::uint32_t begin, second;
  bool holds;  // elements; a norm has threads that do not
  bool rotates;
};

template <Rope kRope, int kVecs>
__device__ __forceinline__ Unit<kVecs> unit_of(const RopeAppendArgs& p, std::uint32_t index) {
  constexpr int kPart = Unit<kVecs>::kPart;
  const bool rotates = kRope != Rope::None && index < p.rotary_units;
  const bool apart = kRope == Rope::Neox && rotates;
  return {index, index * (apart ? kPart : 2 * kPart), apart ? p.rotary_units * kPart : kPart, index < p.units_per_head,
          rotates};
}

template <int kPart>
__device__ __forceinline__ float sum_of_squares(const float (&x)[2][kPart]) {
  float sums[2] = {};
#pragma unroll
  for (int i = 0; i < kPart; ++i) {
    sums[0] = __fmaf_rn(x[0][i], x[0][i], sums[0]);
    sums[1] = __fmaf_rn(x[1][i], x[1][i], sums[1]);
  }
  return __fadd_rn(sums[0], sums[1]);
}

// What a norm multiplies a head by, besides the weights.
__device__ __forceinline__ float norm_factor(const RopeAppendArgs& p, float sum) {
  return rsqrtf(__fmaf_rn(sum, p.per_element, p.norm_eps));
}

// (a, b) rotated; no contraction.
__device__ __forceinline__ void rotate(float& a, float& b, float cos, float sin) {
  const float first = __fsub_rn(__fmul_rn(a, cos), __fmul_rn(b, sin));
  b = __fadd_rn(__fmul_rn(b, cos), __fmul_rn(a, sin));
  a = first;
}

// Cosines and sines as the bits of fp32.
template <Rope kRope, int kPart>
__device__ __forceinline__ void rotate_pairs(const std::uint32_t (&cos)[kPart], const std::uint32_t (&sin)[kPart],
                                             float (&x)[2][kPart]) {
#pragma unroll
  for (int i = 0; i < kPart; ++i) {
    float& a = kRope == Rope::Neox ? x[0][i] : x[2 * i / kPart][2 * i % kPart];
    float& b = kRope == Rope::Neox ? x[1][i] : x[2 * i / kPart][2 * i % kPart + 1];
    rotate(a, b, __uint_as_float(cos[i]), __uint_as_float(sin[i]));
  }
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
