// Quantize and dequantize rows with given scales.
#pragma once

#include <cstddef>
#include <type_traits>

#include "cpu/kernels/codec.h"
#include "cpu/kernels/table.h"

namespace fp8kv::cpu::FP8KV_ISA_NAMESPACE {
namespace {

constexpr int kTile = 4 * kLanes;  // elements handled per step

// --- The two operations on a tile ----------

// x / s without dividing: 1 / s = high + low with high rounded down and low > 0, so that both terms of x * high + x * low have
// the sign of x. It isn't always the fp32 quotient, but on the same side of every boundary between values of the format, for
// the scales that are `ordinary` (docs/numerics.md); the others take the division. With a `high` further below 1 / s, more
// scales would go wrong.
template <class Fp8>
struct Reciprocal {
  // Lanes of -1 for ordinary scales.
  FP8KV_INLINE I32 ordinary(F32 scale) {
    constexpr std::int32_t kFirst = 0x00800000, kLast = 0x6f800000;  // 2^-126, 2^96
    const I32 bits = bits_of(scale);
    if constexpr (!kHasFma) return I32{};
    const I32 in_window = (bits >= kFirst) & (bits <= kLast);
    if constexpr (std::is_same_v<Fp8, Int8>) return in_window & (((bits + 3) & 0x1ffff) >= 3) & ((bits & 0x1ffff) != 2);
    return in_window & (((bits + 4) & 0xfffff) >= 4);
  }
  FP8KV_INLINE F32 high(F32 scale) {
    const F32 nearest = 1.0f / scale;
    return float_of(bits_of(nearest) - (remainder(nearest, scale) > 0.0f ? I32{} : splat(1)));
  }
  FP8KV_INLINE F32 low(F32 scale, F32 high) { return remainder(high, scale) * high; }

  // Of rows.
  FP8KV_INLINE void prepare(RowScales& scales, std::int64_t count) {
    for (std::int64_t i = 0; i < count; i += kLanes) {
      for (std::int64_t rest = count; rest < i + kLanes; ++rest) scales.scale[rest] = 1.0f;
      const F32 scale = load(scales.scale + i), high_of_scale = high(scale);
      store_vector(scales.high + i, high_of_scale);
      store_vector(scales.low + i, low(scale, high_of_scale));
      store_vector(scales.ordinary + i, ordinary(scale));
    }
  }
  FP8KV_INLINE bool ordinary(const RowScales& scales, std::int64_t i) { return scales.ordinary[i] != 0; }
  FP8KV_INLINE float high(const RowScales& scales, std::int64_t i) { return scales.high[i]; }
  FP8KV_INLINE float low(const RowScales& scales, std::int64_t i) { return scales.low[i]; }

 private:
  FP8KV_INLINE F32 remainder(F32 reciprocal, F32 scale) { return multiply_add(-reciprocal, scale, splat(1.0f)); }
};

// The arithmetic is that of dynamic_scale() in fp8kv/fp8.h.
template <class Fp8>
void dynamic_rows(RowScales& scales, const std::int32_t* amax, std::int64_t count, float upper_bound) {
  for (std::int64_t i = 0; i < count; i += kLanes) {
    std::int32_t bits[kLanes] = {};
    for (int k = 0; k < kLanes && i + k < count; ++k) bits[k] = amax[i + k];
    const F32 largest = load_vector<F32>(bits);
    const F32 scale = (largest > upper_bound ? splat(upper_bound) : largest) / Fp8Traits<Fp8>::kMax;
    store_vector(scales.scale + i, scale > kMinScale<Fp8> ? scale : splat(kMinScale<Fp8>));
  }
  Reciprocal<Fp8>::prepare(scales, count);
}

template <bool kStream>
FP8KV_INLINE void store_tile(void* out, Bytes codes) {
  kStream ? stream_vector(out, codes) : store_vector(out, codes);
}

template <class Real, class Fp8>
struct QuantizeKernel {
  using In = Real;
  using Out = Fp8;
  using Split = Reciprocal<Fp8>;
  static constexpr auto kDynamicRows = dynamic_rows<Fp8>;
  static constexpr bool kInPairs = std::is_same_v<Real, BFloat16> && !std::is_same_v<Fp8, Int8>;

  FP8KV_INLINE_MEMBER void plain(const In* in, Out* out, const F32 (&scale)[4]) const {
    F32 x[4];
    for (int k = 0; k < 4; ++k) x[k] = load(in + k * kLanes) / scale[k];
    store_vector(out, encode(x, encoder));
  }

  // False, and nothing done, when there is a NaN.
  template <bool kStream>
  FP8KV_INLINE_MEMBER bool fast(const In* in, Out* out, const F32 (&high)[4], const F32 (&low)[4]) const {
    F32 x[4];
    for (int k = 0; k < 4; ++k) {
      const F32 value = load(in + k * kLanes);
      x[k] = multiply_add(value, high[k], value * low[k]);
    }
    if (any_nan(x)) return false;
    store_tile<kStream>(out, encode_numbers(x, encoder));
    return true;
  }

  const Encoder<Fp8> encoder;
};

// bf16 to FP8 with one scale. Two neighbors share a lane, one as its low half and one as its high half, from the load to the
// code: it takes less to widen them and to pack their codes.
template <class Fp8>
class QuantizePairs {
 public:
  FP8KV_INLINE_MEMBER QuantizePairs(float high, float low) : high_(splat(high)), low_(splat(low)) {}

  // As that of QuantizeKernel.
  template <bool kStream>
  FP8KV_INLINE_MEMBER bool fast(const BFloat16* in, Fp8* out) const {
    I16 words[2], codes[2];
    F32 even[2], odd[2];
    for (int k = 0; k < 2; ++k) {
      words[k] = load_vector<I16>(in + k * 2 * kLanes);
      const I32 magnitudes = reinterpret_cast<I32>(words[k]) & magnitudes_;
      even[k] = quotient(float_of(magnitudes << 16)), odd[k] = quotient(float_of(magnitudes & high_halves_));
    }
    if (any_nan({even[0], odd[0], even[1], odd[1]})) return false;
    for (int k = 0; k < 2; ++k) {
      const I32 low = encoder_.low(even[k]), high = encoder_.high(odd[k]);
      codes[k] = reinterpret_cast<I16>((low & ~high_halves_) | (high & high_halves_));
    }
    store_tile<kStream>(out, pack8_signed(codes, words, limit_));
    return true;
  }

 private:
  FP8KV_INLINE_MEMBER F32 quotient(F32 x) const { return multiply_add(x, high_, x * low_); }

  const F32 high_, low_;
  const WordEncoder<Fp8> encoder_;
  const Bytes limit_ = constant(Fp8Traits<Fp8>::kMaxBits - Bytes{});
  const I32 magnitudes_ = constant(splat(0x7fff7fff)), high_halves_ = constant(splat(std::int32_t{-0x10000}));
};

// Nothing to prepare: finite scales leave finite elements free of NaN.
struct Factor {
  FP8KV_INLINE I32 ordinary(F32 scale) { return (bits_of(scale) & kMagnitude) < kInfinity; }
  FP8KV_INLINE F32 high(F32 scale) { return scale; }
  FP8KV_INLINE F32 low(F32, F32) { return F32{}; }

  FP8KV_INLINE void prepare(RowScales&, std::int64_t) {}
  FP8KV_INLINE bool ordinary(const RowScales& scales, std::int64_t i) {
    return (__builtin_bit_cast(std::int32_t, scales.scale[i]) & kMagnitude) < kInfinity;
  }
  FP8KV_INLINE float high(const RowScales& scales, std::int64_t i) { return scales.scale[i]; }
  FP8KV_INLINE float low(const RowScales&, std::int64_t) { return 0.0f; }
};

template <class Fp8, class Real>
struct DequantizeKernel {
  using In = Fp8;
  using Out = Real;
  using Split = Factor;
  static constexpr std::nullptr_t kDynamicRows = nullptr;
  static constexpr bool kInPairs = false;

  FP8KV_INLINE_MEMBER void plain(const In* in, Out* out, const F32 (&scale)[4]) const {
    F32 x[4];
    for (int k = 0; k < 4; ++k) x[k] = float_of(quiet(load(in + k * kLanes) * scale[k]));
    store(out, x);
  }

  template <bool>
  FP8KV_INLINE_MEMBER bool fast(const In* in, Out* out, const F32 (&scale)[4], const F32 (&)[4]) const {
    if (!all_finite(in)) return false;
    F32 x[4];
    for (int k = 0; k < 4; ++k) x[k] = load_number(in + k * kLanes) * scale[k];
    store(out, x);
    return true;
  }
};

// --- Rows and columns ----------

FP8KV_INLINE void splat4(F32 (&to)[4], float x) {
  for (int k = 0; k < 4; ++k) to[k] = splat(x);
}
FP8KV_INLINE void load4(F32 (&to)[4], const float* from) {
  for (int k = 0; k < 4; ++k) to[k] = load(from + k * kLanes);
}

// step(i) for tiles that cover [0, count), count >= kTile. The last may overlap the one before: the same bytes again.
template <class Step>
FP8KV_INLINE void for_each_tile(std::int64_t count, const Step& step) {
  std::int64_t i = 0;
  for (; i + kTile <= count; i += kTile) step(i);
  if (i < count) step(count - kTile);
}

// The rest that the fast path leaves, out of line. `stride` is 0 where all elements have one scale.
template <class Op>
[[gnu::noinline, gnu::cold]] void convert_plain(const typename Op::In* in, typename Op::Out* out, std::int64_t count,
                                                const float* scale, std::int64_t stride) {
  const Op op;
  for_each_tile(count, [&](std::int64_t i) __attribute__((always_inline)) {
    F32 scales[4];
    stride == 0 ? splat4(scales, *scale) : load4(scales, scale + i);
    op.plain(in + i, out + i, scales);
  });
}

template <bool kStream, class Op>
FP8KV_INLINE void convert_row(const Op& op, const typename Op::In* in, typename Op::Out* out, std::int64_t count,
                              const RowScales& scales, std::int64_t number, std::int64_t ahead) {
  const float* scale = scales.scale + number;
  if (!Op::Split::ordinary(scales, number)) [[unlikely]]
    return convert_plain<Op>(in, out, count, scale, 0);
  const float high = Op::Split::high(scales, number), low = Op::Split::low(scales, number);
  const auto convert = [&](const auto& fast) __attribute__((always_inline)) {
    for_each_tile(count, [&](std::int64_t i) __attribute__((always_inline)) {
      prefetch<typename Op::In, kTile>(in + i, ahead);
      if (!fast(in + i, out + i)) [[unlikely]]
        convert_plain<Op>(in + i, out + i, kTile, scale, 0);
    });
  };
  if constexpr (Op::kInPairs) {
    const QuantizePairs<typename Op::Out> pairs(high, low);
    convert([&](auto* x, auto* y) __attribute__((always_inline)) { return pairs.template fast<kStream>(x, y); });
  } else {
    F32 highs[4], lows[4];
    splat4(highs, high), splat4(lows, low);
    convert([&](auto* x, auto* y) __attribute__((always_inline)) { return op.template fast<kStream>(x, y, highs, lows); });
  }
}

// Less than a tile: through a tile on the stack.
template <class Op, class ConvertTile>
FP8KV_INLINE void convert_short(const typename Op::In* in, typename Op::Out* out, std::int64_t count,
                                const ConvertTile& convert_tile) {
  typename Op::In x[kTile] = {};
  typename Op::Out y[kTile];
  for (int i = 0; i < count; ++i) x[i] = in[i];
  convert_tile(x, y);
  for (int i = 0; i < count; ++i) out[i] = y[i];
}

// Whole tiles of bytes, at addresses for which there are instructions.
template <class Out>
FP8KV_INLINE bool can_stream(const Out* out, std::int64_t columns) {
  return sizeof(Out) == 1 && columns % kTile == 0 && reinterpret_cast<std::uintptr_t>(out) % kTile == 0;
}

template <class Op>
void prepare_rows(RowScales& scales, std::int64_t count) {
  Op::Split::prepare(scales, count);
}

template <class Op>
void convert_rows(const void* in_data, void* out_data, std::int64_t columns, const Rows& rows, const RowScales& scales,
                  std::int64_t first) {
  const auto* in = static_cast<const typename Op::In*>(in_data);
  auto* out = static_cast<typename Op::Out*>(out_data);
  const Op op;
  for (std::int64_t r = 0; r < rows.count; ++r, in += rows.in, out += rows.out, first += rows.scale) {
    if (rows.stream && can_stream(out, columns)) {
      convert_row<true>(op, in, out, columns, scales, first, rows.ahead);
    } else if (columns >= kTile) {
      convert_row<false>(op, in, out, columns, scales, first, rows.ahead);
    } else {
      convert_short<Op>(in, out, columns,
                        [&](auto* x, auto* y) { convert_row<false>(op, x, y, kTile, scales, first, rows.ahead); });
    }
  }
}

template <class Op>
void prepare_columns(ColumnScales& scales, std::int64_t count) {
  for (std::int64_t i = count; i < count + kTile; ++i) scales.scale[i] = 1.0f;
  I32 ordinary = splat(-1);
  for (std::int64_t i = 0; i < count + kTile - kLanes + 1; i += kLanes) {
    const F32 scale = load(scales.scale + i);
    const F32 high = Op::Split::high(scale);
    ordinary &= Op::Split::ordinary(scale);
    store_vector(scales.high + i, high);
    store_vector(scales.low + i, Op::Split::low(scale, high));
  }
  scales.ordinary = true;
  for (int i = 0; i < kLanes; ++i) scales.ordinary &= ordinary[i] != 0;
}

template <bool kStream, class Op>
FP8KV_INLINE void convert_row_of_columns(const Op& op, const typename Op::In* in, typename Op::Out* out, std::int64_t count,
                                         const ColumnScales& scales, std::int64_t first) {
  if (!scales.ordinary) [[unlikely]]
    return convert_plain<Op>(in, out, count, scales.scale + first, 1);
  for_each_tile(count, [&](std::int64_t i) __attribute__((always_inline)) {
    F32 high[4], low[4];
    load4(high, scales.high + first + i);
    load4(low, scales.low + first + i);
    prefetch<typename Op::In, kTile>(in + i);
    if (!op.template fast<kStream>(in + i, out + i, high, low)) [[unlikely]]
      convert_plain<Op>(in + i, out + i, kTile, scales.scale + first + i, 1);
  });
}

template <class Op>
void convert_columns(const void* in_data, void* out_data, std::int64_t columns, const ColumnScales& scales, std::int64_t first,
                     bool stream) {
  const auto* in = static_cast<const typename Op::In*>(in_data);
  auto* out = static_cast<typename Op::Out*>(out_data);
  const Op op;
  if (stream && can_stream(out, columns)) return convert_row_of_columns<true>(op, in, out, columns, scales, first);
  if (columns >= kTile) return convert_row_of_columns<false>(op, in, out, columns, scales, first);
  convert_short<Op>(in, out, columns, [&](auto* x, auto* y) { convert_row_of_columns<false>(op, x, y, kTile, scales, first); });
}

}  // namespace
}  // namespace fp8kv::cpu::FP8KV_ISA_NAMESPACE
