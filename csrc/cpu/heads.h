// Scales and offsets of some heads of K or V, made ready once for many tokens.
#pragma once

#include <memory>
#include <vector>

#include "core/cache_layout.h"
#include "cpu/rows.h"

namespace fp8kv::cpu {

// Scales per tensor, per head or per channel, of at most kMaxRows heads unless they are per channel.
class HeadScales {
 public:
  // `scales` begins at the first column of the first head; its strides of blocks and slots are ignored.
  HeadScales(const ElementwiseKernels& kernels, const core::PagedScales& scales, std::int64_t heads, std::int64_t columns);

  // The columns of all heads, which are `in_head` and `out_head` elements apart; for `stream` see Rows.
  void convert(const StridedElements& in, const StridedElements& out, std::int64_t in_head, std::int64_t out_head,
               bool stream = false) const {
    if (!batches_.empty()) return convert_channels(in, out, in_head, out_head, stream);
    convert_strided_rows(kernels_, in, out, columns_, {heads_, in_head, out_head, one_scale_ ? 0 : 1, stream}, rows_);
  }

 private:
  static constexpr std::int64_t kBatch = ColumnScales::kMaxCount;
  void load_channels(const core::PagedScales& scales);
  void convert_channels(const StridedElements& in, const StridedElements& out, std::int64_t in_head, std::int64_t out_head,
                        bool stream) const;

  const ElementwiseKernels kernels_;
  const std::int64_t heads_, columns_;
  const bool one_scale_;
  RowScales rows_;
  // Of channels: whole heads, or where not even one fits, parts of a head.
  std::int64_t heads_per_batch_ = 1;
  std::vector<std::unique_ptr<ColumnScales>> batches_;
};

// Offsets of some heads, and these heads in fp32 without them: contiguous, one head after the other.
class HeadOffsets {
 public:
  // `offsets` begins at the first column of the first head, as all views below do.
  HeadOffsets(const core::OffsetView& offsets, DType real, std::int64_t heads, std::int64_t columns);

  StridedElements heads() { return {reinterpret_cast<std::byte*>(heads_.data()), sizeof(float), 1}; }
  // Sets heads() to what is at `in`, less the offsets.
  StridedElements subtract_from(const StridedElements& in, std::int64_t in_head);
  // Writes heads() to `out`, plus the offsets, rounded.
  void add_to(const StridedElements& out, std::int64_t out_head);

 private:
  const OffsetKernels& kernels_;
  const std::int64_t columns_;
  std::vector<float> offsets_, heads_;
};

}  // namespace fp8kv::cpu
