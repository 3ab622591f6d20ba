// Products of small matrices in fp16 with fp32 sums by the tensor cores, and what brings FP8 into their operands. Fragments are
// those of the PTX instructions: lane = 4 * g + t of a warp holds elements 2t and 2t + 1 of rows g and g + 8.
#pragma once

#include "device/convert.cuh"

namespace fp8kv::device {

// Two bytes of a quantized type, the lower or the upper ones of a word, to two fp16 values. Exact: every value of E4M3, E5M2
// and Int8 is one of fp16.
template <class Fp8, bool kUpper>
__device__ __forceinline__ std::uint32_t halves_of(std::uint32_t word);

// E5M2 is the upper byte of fp16.
template <>
__device__ __forceinline__ std::uint32_t halves_of<E5M2, false>(std::uint32_t word) {
  return __byte_perm(word, 0u, 0x1404);
}
template <>
__device__ __forceinline__ std::uint32_t halves_of<E5M2, true>(std::uint32_t word) {
  return __byte_perm(word, 0u, 0x3424);
}

template <bool kUpper>
__device__ __forceinline__ std::uint32_t halves_of_e4m3(std::uint32_t word) {
#if FP8KV_HAS_FP8_CVT
  // Taken apart like this, the upper half is an operand of the conversion; a shift would be an instruction of its own.
  std::uint32_t halves;
  if constexpr (kUpper)
    asm("{ .reg .b16 low, high; mov.b32 {low, high}, %1; cvt.rn.f16x2.e4m3x2 %0, high; }" : "=r"(halves) : "r"(word));
  else
    asm("{ .reg .b16 low, high; mov.b32 {low, high}, %1; cvt.rn.f16x2.e4m3x2 %0, low; }" : "=r"(halves) : "r"(word));
  return halves;
#else
  // Sign, exponent and mantissa in the places of fp16, times 2^8 for the other bias; NaN apart.
  const std::uint32_t bytes = __byte_perm(word, 0u, kUpper ? 0x3424 : 0x1404);  // each in the upper half of 16 bits
  const std::uint32_t magnitude = (bytes & 0x7f007f00u) >> 1;
  const __half2 scaled = __hmul2(*reinterpret_cast<const __half2*>(&magnitude), __half2half2(__ushort_as_half(0x5c00)));
  const std::uint32_t is_nan = __vcmpeq2(bytes & 0x7f007f00u, 0x7f007f00u);
  return (*reinterpret_cast<const std::uint32_t*>(&scaled) | (is_nan & 0x7fff7fffu)) | (bytes & 0x80008000u);
#endif
}
template <>
__device__ __forceinline__ std::uint32_t halves_of<E4M3, false>(std::uint32_t word) {
  return halves_of_e4m3<false>(word);
}
template <>
__device__ __forceinline__ std::uint32_t halves_of<E4M3, true>(std::uint32_t word) {
  return halves_of_e4m3<true>(word);
}

// With its sign bit inverted, an integer is itself plus 128; behind the byte 0x64 it is that plus 1024.
template <bool kUpper>
__device__ __forceinline__ std::uint32_t halves_of_int8(std::uint32_t word) {
  const std::uint32_t biased = __byte_perm(word ^ 0x80808080u, 0x64646464u, kUpper ? 0x4342 : 0x4140);
  const __half2 halves =
      __hsub2(*reinterpret_cast<const __half2*>(&biased), __half2half2(__ushort_as_half(0x6480)));  // 1024 + 128
  return *reinterpret_cast<const std::uint32_t*>(&halves);
}
template <>
__device__ __forceinline__ std::uint32_t halves_of<Int8, false>(std::uint32_t word) {
  return halves_of_int8<false>(word);
}
template <>
__device__ __forceinline__ std::uint32_t halves_of<Int8, true>(std::uint32_t word) {
  return halves_of_int8<true>(word);
}

// Whether any of the four bytes is infinite or NaN.
template <class Fp8>
__device__ __forceinline__ bool any_not_finite(std::uint32_t word) {
  if constexpr (DTypeOf<Fp8>::value == DType::Int8) return false;
  constexpr std::uint32_t kBits = DTypeOf<Fp8>::value == DType::E5M2 ? 0x7c7c7c7cu : 0x7f7f7f7fu;
  return __vcmpeq4(word & kBits, kBits) != 0;
}

// c += a * b, with a of 16 rows and 16 columns, b of 16 rows and 8 columns.
__device__ __forceinline__ void multiply_add(float (&c)[4], std::uint32_t a0, std::uint32_t a1, std::uint32_t a2,
                                             std::uint32_t a3, std::uint32_t b0, std::uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Of a matrix of 8 x 8 fp16 values, of which a lane holds elements 2t and 2t + 1 of row g.
__device__ __forceinline__ std::uint32_t transpose8x8(std::uint32_t pair) {
  std::uint32_t transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(pair));
  return transposed;
}

__device__ __forceinline__ float exp2_approximation(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float log2_approximation(float x) {
  float y;
  asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace fp8kv::device
