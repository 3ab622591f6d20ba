#include "cpu/heads.h"

#include <algorithm>

#include "core/formats.h"
#include "core/layout.h"

namespace fp8kv::cpu {

HeadScales::HeadScales(const ElementwiseKernels& kernels, const core::PagedScales& scales, std::int64_t heads,
                       std::int64_t columns)
    : kernels_(kernels), heads_(heads), columns_(columns), one_scale_(scales.head == 0 && scales.dim == 0) {
  if (scales.dim != 0)
    load_channels(scales);
  else
    load_row_scales(kernels_, rows_, scales.data, scales.head, one_scale_ ? 1 : heads);
}

void HeadScales::load_channels(const core::PagedScales& scales) {
  heads_per_batch_ = std::max<std::int64_t>(1, kBatch / columns_);
  for (std::int64_t head = 0; head < heads_; head += heads_per_batch_)
    for (std::int64_t column = 0; column < columns_; column += kBatch) {
      ColumnScales& batch = *batches_.emplace_back(std::make_unique_for_overwrite<ColumnScales>());
      std::int64_t count = 0;
      for (std::int64_t h = head; h < std::min(heads_, head + heads_per_batch_); ++h)
        for (std::int64_t c = column; c < std::min(columns_, column + kBatch); ++c)
          batch.scale[count++] = scales.data[h * scales.head + c * scales.dim];
      kernels_.prepare_columns(batch, count);
    }
}

void HeadScales::convert_channels(const StridedElements& in, const StridedElements& out, std::int64_t in_head,
                                  std::int64_t out_head, bool stream) const {
  auto batch = batches_.begin();
  std::int64_t first = 0;  // number of the head's first scale in its batch
  for (std::int64_t h = 0; h < heads_; ++h) {
    for (std::int64_t c = 0; c < columns_; c += kBatch)
      convert_strided_columns(kernels_, in.at(h * in_head + c * in.stride), out.at(h * out_head + c * out.stride),
                              std::min(kBatch, columns_ - c), **(batch + c / kBatch), first, stream);
    first += columns_;
    if (first >= heads_per_batch_ * columns_) first = 0, batch += core::ceil_div(columns_, kBatch);
  }
}

HeadOffsets::HeadOffsets(const core::OffsetView& offsets, DType real, std::int64_t heads, std::int64_t columns)
    : kernels_(kernels().offsets[core::real_index(real)]), columns_(columns), heads_(heads * columns) {
  offsets_.reserve(heads * columns);
  for (std::int64_t h = 0; h < heads; ++h)
    for (std::int64_t c = 0; c < columns; ++c) offsets_.push_back(offsets.data[h * offsets.head + c * offsets.dim]);
}

StridedElements HeadOffsets::subtract_from(const StridedElements& in, std::int64_t in_head) {
  for (std::size_t first = 0; first < heads_.size(); first += columns_) {
    const float* offsets = offsets_.data() + first;
    float* to = heads_.data() + first;
    const StridedElements head = in.at(static_cast<std::int64_t>(first) / columns_ * in_head);
    if (head.stride == 1)
      kernels_.subtract(head.data, offsets, to, columns_);
    else
      read_staged(head, columns_,
                  [&](const void* from, std::int64_t n, std::int64_t i) { kernels_.subtract(from, offsets + i, to + i, n); });
  }
  return heads();
}

void HeadOffsets::add_to(const StridedElements& out, std::int64_t out_head) {
  for (std::size_t first = 0; first < heads_.size(); first += columns_) {
    const float* offsets = offsets_.data() + first;
    const StridedElements to = out.at(static_cast<std::int64_t>(first) / columns_ * out_head);
    if (to.stride == 1)
      kernels_.add(heads_.data() + first, offsets, to.data, columns_);
    else
      convert_staged(heads().at(first), to, columns_, [&](const void* x, void* y, std::int64_t n, std::int64_t i) {
        kernels_.add(static_cast<const float*>(x), offsets + i, y, n);
      });
  }
}

}  // namespace fp8kv::cpu
