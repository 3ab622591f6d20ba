// paged_attention on the CPU: tiles of queries that share a KV head, over chunks of positions made fp32. The arithmetic is in
// kernels/attention.h.
#include "fp8kv/attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "core/attention_layout.h"
#include "core/check_indices.h"
#include "core/layout.h"
#include "cpu/parallel.h"
#include "cpu/rows.h"

namespace fp8kv::cpu {
namespace {

using core::AttentionLayout;
using core::ceil_div;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr std::int64_t kChunk = 32;          // positions whose keys and values are made fp32 at a time
constexpr std::int64_t kTileRows = 32;       // query tokens times query heads of a KV head
constexpr std::int64_t kSplitLength = 2048;  // positions that are worth a part of their own

// The index tensors of a problem.
class Sequences {
 public:
  explicit Sequences(const PagedAttention& p) : lengths_(p.seq_lens), table_(p.block_table) {
    if (p.seq_starts) starts_.emplace(*p.seq_starts);
    if (p.cu_query_lens) first_rows_.emplace(*p.cu_query_lens);
  }

  std::int64_t length(std::int64_t s) const { return lengths_[s]; }
  std::int64_t start(std::int64_t s) const { return starts_ ? (*starts_)[s] : 0; }
  std::int64_t first_row(std::int64_t s) const { return first_rows_ ? (*first_rows_)[s] : s; }
  std::int64_t num_queries(std::int64_t s) const { return first_row(s + 1) - first_row(s); }
  std::int64_t block(std::int64_t s, std::int64_t index) const { return table_(s, index); }

 private:
  core::Indices lengths_, table_;
  std::optional<core::Indices> starts_, first_rows_;
};

// The positions [begin, end) that a query sees.
struct Seen {
  std::int64_t begin, end;
};

Seen seen_by(const AttentionLayout& layout, std::int64_t start, std::int64_t position) {
  if (layout.sliding_window > 0) start = std::max(start, position + 1 - layout.sliding_window);
  return {start, std::max(start, position + 1)};
}

// A tile of the queries of one sequence and KV head, and a part of its positions.
struct Item {
  std::int64_t sequence, kv_head;
  std::int64_t first_query, num_queries;  // tokens
  std::int64_t split;
};

// What is known of a query row after some of its positions.
struct Partial {
  float maximum = -kInfinity;
  float sum = 0.0f;
};

void merge_into(Partial& into, float* out, const Partial& from, const float* other, std::int64_t columns) {
  const float maximum = std::max(into.maximum, from.maximum);
  if (maximum == -kInfinity && into.sum == 0.0f && from.sum == 0.0f) return;  // neither saw anything
  const float keep = into.sum == 0.0f ? 0.0f : std::exp(into.maximum - maximum);
  const float add = from.sum == 0.0f ? 0.0f : std::exp(from.maximum - maximum);
  for (std::int64_t i = 0; i < columns; ++i) out[i] = out[i] * keep + other[i] * add;
  into = {maximum, into.sum * keep + from.sum * add};
}

class Attention {
 public:
  Attention(const PagedAttention& problem, const AttentionLayout& layout)
      : layout_(layout),
        sequences_(problem),
        group_(layout.heads_per_kv_head()),
        k_columns_(padded(layout.head_size)),
        v_columns_(padded(layout.v_head_size)),
        load_query_(kernels_for(layout.query_dtype, DType::Float32)),
        load_keys_(kernels_for(layout.cache_dtype, DType::Float32)),
        load_values_(kernels_for(layout.v_cache_dtype, DType::Float32)),
        store_out_(kernels_for(DType::Float32, layout.out_dtype)),
        kernels_(kernels().attention) {
    // By the lengths alone, not by the number of threads: the same input gives the same bits. More parts than chunks would be
    // empty.
    std::int64_t longest = 0;
    for (std::int64_t s = 0; s < layout.num_seqs; ++s) longest = std::max(longest, sequences_.length(s));
    splits_ = layout.num_splits > 0 ? layout.num_splits : ceil_div(longest, kSplitLength);
    splits_ = std::clamp<std::int64_t>(splits_, 1, std::max<std::int64_t>(1, ceil_div(longest, kChunk)));
    if (layout.sinks.data) sinks_ = in_fp32(layout.sinks, 0, layout.num_heads, sinks_buffer_);
  }

  void run(const ParallelFor& parallel_for) {
    std::vector<Item> items;
    const std::int64_t tile = std::max<std::int64_t>(1, kTileRows / group_);
    for (std::int64_t s = 0; s < layout_.num_seqs; ++s)
      for (std::int64_t h = 0; h < layout_.num_kv_heads; ++h)
        for (std::int64_t q = 0, count = sequences_.num_queries(s); q < count; q += tile)
          for (std::int64_t split = 0; split < splits_; ++split) items.push_back({s, h, q, std::min(tile, count - q), split});
    const std::int64_t rows = layout_.num_rows * layout_.num_heads;
    if (splits_ > 1) {
      partials_.assign(rows * splits_, {});
      outputs_.assign(rows * splits_ * v_columns_, 0.0f);
    }
    const std::int64_t elements = kSplitLength * (layout_.head_size + layout_.v_head_size);
    parallel(parallel_for, static_cast<std::int64_t>(items.size()), elements, [&](std::int64_t begin, std::int64_t end) {
      Buffers buffers(*this);
      for (; begin < end; ++begin) attend(items[begin], buffers);
    });
    if (splits_ == 1) return;
    parallel(parallel_for, layout_.num_seqs, splits_ * layout_.num_heads * v_columns_,
             [&](std::int64_t begin, std::int64_t end) {
               for (; begin < end; ++begin) merge_splits(begin);
             });
  }

 private:
  static constexpr std::int64_t padded(std::int64_t columns) {
    return ceil_div(columns, kAttentionPadding) * kAttentionPadding;
  }

  // What one thread needs. Padding stays zero.
  struct Buffers {
    explicit Buffers(const Attention& a)
        : tile_rows(std::max<std::int64_t>(1, kTileRows / a.group_) * a.group_),
          queries(tile_rows * a.k_columns_),
          outputs(tile_rows * a.v_columns_),
          keys(kChunk * a.k_columns_),
          values(kChunk * a.v_columns_),
          scores(tile_rows * kChunk),
          bases(tile_rows),
          powers(tile_rows),
          partials(tile_rows) {}
    std::int64_t tile_rows;
    std::vector<float> queries, outputs, keys, values, scores, bases, powers;
    std::vector<Partial> partials;
    float key_scales[kChunk], value_scales[kChunk];
  };

  std::int64_t row_of(const Item& item, std::int64_t token) const {
    return sequences_.first_row(item.sequence) + item.first_query + token;
  }
  std::int64_t position_of(const Item& item, std::int64_t token) const {
    return sequences_.length(item.sequence) - sequences_.num_queries(item.sequence) + item.first_query + token;
  }

  // A query row in fp32, times what of the scales of K lies along the row; logits are its products with keys, times `power` and
  // the scale of the key, plus `base`.
  void load_query(const Item& item, std::int64_t token, std::int64_t in_group, Buffers& b, std::int64_t r) const {
    const std::int64_t head = item.kv_head * group_ + in_group;
    float* query = b.queries.data() + r * k_columns_;
    const StridedElements all{static_cast<std::byte*>(layout_.query.data), size_of(layout_.query_dtype), layout_.query.dim};
    const float one = 1.0f;
    const float* scale = layout_.q_scale ? layout_.q_scale + head / layout_.heads_per_q_scale * layout_.q_scale_stride : &one;
    convert_strided_rows(load_query_, all.at(row_of(item, token) * layout_.query.token + head * layout_.query.head),
                         {reinterpret_cast<std::byte*>(query), sizeof(float), 1}, layout_.head_size, Rows{}, scale);
    // Times a power of two, so that products neither overflow nor vanish.
    float largest = 0.0f;
    for (std::int64_t d = 0; d < layout_.head_size; ++d) largest = std::max(largest, std::abs(query[d]));
    const int exponent = largest > 0.0f && largest < kInfinity ? std::ilogb(largest) : 0;
    const core::OffsetView& offset = layout_.k_offset;
    double base = 0.0;
    for (std::int64_t d = 0; d < layout_.head_size; ++d) {
      if (offset.data) base += double{query[d]} * offset.data[item.kv_head * offset.head + d * offset.dim];
      query[d] = std::ldexp(query[d], -exponent);
      if (layout_.k_scale.dim != 0)
        query[d] *= layout_.k_scale.data[item.kv_head * layout_.k_scale.head + d * layout_.k_scale.dim];
    }
    b.bases[r] = layout_.softmax_scale * static_cast<float>(base);
    b.powers[r] = std::ldexp(layout_.softmax_scale, exponent);
  }

  // Keys and values of the positions [begin, end), at most kChunk, as fp32 rows without their scales.
  void load_chunk(const Item& item, std::int64_t begin, std::int64_t end, Buffers& b) const {
    RowScales ones;
    ones.scale[0] = 1.0f;
    load_keys_.prepare_rows(ones, 1);
    for (std::int64_t p = begin; p < end;) {
      const std::int64_t offset = p % layout_.block_size, count = std::min(end - p, layout_.block_size - offset);
      const std::int64_t block = sequences_.block(item.sequence, p / layout_.block_size);
      const auto load = [&](const ElementwiseKernels& kernels, const core::PagedView& view, DType dtype, std::int64_t head_size,
                            std::int64_t columns, float* to) {
        const StridedElements all{static_cast<std::byte*>(view.data), size_of(dtype), view.dim};
        convert_strided_rows(kernels, all.at(block * view.block + offset * view.offset + item.kv_head * view.head),
                             {reinterpret_cast<std::byte*>(to + (p - begin) * columns), sizeof(float), 1}, head_size,
                             Rows{.count = count, .in = view.offset, .out = columns, .scale = 0}, ones);
      };
      load(load_keys_, layout_.key_cache, layout_.cache_dtype, layout_.head_size, k_columns_, b.keys.data());
      load(load_values_, layout_.value_cache, layout_.v_cache_dtype, layout_.v_head_size, v_columns_, b.values.data());
      const auto scale = [&](const core::ChannelScales& view, std::int64_t i) {
        if (!view.data || view.dim != 0) return 1.0f;
        return view.data[block * view.block + (offset + i) * view.offset + item.kv_head * view.head];
      };
      for (std::int64_t i = 0; i < count; ++i) {
        b.key_scales[p - begin + i] = scale(layout_.k_scale, i);
        b.value_scales[p - begin + i] = layout_.v_scale.per_token() ? scale(layout_.v_scale, i) : 1.0f;
      }
      p += count;
    }
  }

  // The positions [begin, end) of a chunk for one row of the tile, of which it sees [first, last).
  void attend_row(Buffers& b, std::int64_t r, std::int64_t first, std::int64_t last) const {
    float* scores = b.scores.data() + r * kChunk + first;
    const std::int64_t count = last - first;
    Partial& partial = b.partials[r];
    float maximum = partial.maximum;
    for (std::int64_t i = 0; i < count; ++i) {
      float logit = scores[i] * b.powers[r] * b.key_scales[first + i] + b.bases[r];
      if (layout_.softcap > 0.0f) logit = layout_.softcap * std::tanh(logit / layout_.softcap);
      scores[i] = logit;
      if (logit > maximum) maximum = logit;  // a NaN stays what it is, and makes the sum one
    }
    const float keep = partial.sum == 0.0f ? 0.0f : std::exp(partial.maximum - maximum);
    partial.sum = partial.sum * keep + kernels_.exponentials(scores, count, maximum);
    partial.maximum = maximum;
    if (layout_.v_scale.per_token())
      for (std::int64_t i = 0; i < count; ++i) scores[i] *= b.value_scales[first + i];
    kernels_.accumulate(scores, b.values.data() + first * v_columns_, b.outputs.data() + r * v_columns_, keep, count,
                        v_columns_);
  }

  void attend(const Item& item, Buffers& b) const {
    const std::int64_t rows = item.num_queries * group_, start = sequences_.start(item.sequence);
    std::vector<Seen> seen(item.num_queries);
    std::int64_t begin = std::numeric_limits<std::int64_t>::max(), end = 0;
    for (std::int64_t token = 0; token < item.num_queries; ++token) {
      seen[token] = seen_by(layout_, start, position_of(item, token));
      if (seen[token].begin >= seen[token].end) continue;
      begin = std::min(begin, seen[token].begin), end = std::max(end, seen[token].end);
    }
    // Parts of equal length, in whole chunks, of all that any query of the sequence can see.
    const std::int64_t length = sequences_.length(item.sequence), part = ceil_div(ceil_div(length, splits_), kChunk) * kChunk;
    begin = std::max(begin, item.split * part), end = std::min(end, (item.split + 1) * part);
    for (std::int64_t r = 0; r < rows; ++r) load_query(item, r / group_, r % group_, b, r);
    std::fill(b.outputs.begin(), b.outputs.begin() + rows * v_columns_, 0.0f);
    std::fill(b.partials.begin(), b.partials.begin() + rows, Partial{});
    for (std::int64_t next; begin < end; begin = next) {
      next = std::min(end, (begin / kChunk + 1) * kChunk);
      load_chunk(item, begin, next, b);
      kernels_.scores(b.queries.data(), b.keys.data(), b.scores.data(), rows, next - begin, k_columns_, kChunk);
      for (std::int64_t r = 0; r < rows; ++r) {
        const std::int64_t first = std::max(seen[r / group_].begin, begin), last = std::min(seen[r / group_].end, next);
        if (first < last) attend_row(b, r, first - begin, last - begin);
      }
    }
    for (std::int64_t r = 0; r < rows; ++r) {
      const std::int64_t row = row_of(item, r / group_), head = item.kv_head * group_ + r % group_;
      float* out = b.outputs.data() + r * v_columns_;
      if (splits_ == 1) {
        finish(row, head, b.partials[r], out);
      } else {
        const std::int64_t at = (row * layout_.num_heads + head) * splits_ + item.split;
        partials_[at] = b.partials[r];
        std::copy(out, out + v_columns_, outputs_.begin() + at * v_columns_);
      }
    }
  }

  void merge_splits(std::int64_t s) const {
    for (std::int64_t row = sequences_.first_row(s), last = sequences_.first_row(s + 1); row < last; ++row)
      for (std::int64_t head = 0; head < layout_.num_heads; ++head) {
        const std::int64_t at = (row * layout_.num_heads + head) * splits_;
        Partial total = partials_[at];
        float* out = outputs_.data() + at * v_columns_;
        for (std::int64_t split = 1; split < splits_; ++split)
          merge_into(total, out, partials_[at + split], out + split * v_columns_, v_columns_);
        finish(row, head, total, out);
      }
  }

  // Sink, scale and offset of V, and the rounding to the type of out.
  void finish(std::int64_t row, std::int64_t head, const Partial& partial, float* out) const {
    const std::int64_t kv_head = head / group_;
    const bool saw_nothing = partial.sum == 0.0f;  // of what is seen, the largest logit counts 1
    Partial total = partial;
    const float sink = sinks_ ? sinks_[head] : -kInfinity;
    if (sink != -kInfinity) {
      total.maximum = std::max(partial.maximum, sink);
      total.sum =
          (saw_nothing ? 0.0f : partial.sum * std::exp(partial.maximum - total.maximum)) + std::exp(sink - total.maximum);
    }
    const float factor = saw_nothing ? 0.0f : std::exp(partial.maximum - total.maximum) / total.sum;
    const float seen = saw_nothing ? 0.0f : partial.sum * factor;  // the weight of all values together
    const core::ChannelScales& scale = layout_.v_scale;
    for (std::int64_t d = 0; d < layout_.v_head_size; ++d) {
      const float by = scale.data && !scale.per_token() ? scale.data[kv_head * scale.head + d * scale.dim] : 1.0f;
      out[d] = saw_nothing ? 0.0f : out[d] * factor * by;
      if (layout_.v_offset.data)
        out[d] += seen * layout_.v_offset.data[kv_head * layout_.v_offset.head + d * layout_.v_offset.dim];
    }
    const StridedElements all{static_cast<std::byte*>(layout_.out.data), size_of(layout_.out_dtype), layout_.out.dim};
    const float one = 1.0f;
    convert_strided_rows(store_out_, {reinterpret_cast<std::byte*>(out), sizeof(float), 1},
                         all.at(row * layout_.out.token + head * layout_.out.head), layout_.v_head_size, Rows{}, &one);
    if (layout_.lse.data)
      layout_.lse.data[row * layout_.lse.token + head * layout_.lse.head] =
          total.sum == 0.0f ? -kInfinity : total.maximum + std::log(total.sum);
  }

  const AttentionLayout& layout_;
  const Sequences sequences_;
  const std::int64_t group_, k_columns_, v_columns_;  // columns: of padded rows
  const ElementwiseKernels load_query_, load_keys_, load_values_, store_out_;
  const AttentionKernels& kernels_;
  std::int64_t splits_ = 1;
  std::vector<float> sinks_buffer_;
  const float* sinks_ = nullptr;           // of each query head; nullptr: none
  mutable std::vector<Partial> partials_;  // [row, head, split], each written by one item
  mutable std::vector<float> outputs_;
};

}  // namespace

void run(const PagedAttention& problem, const ParallelFor& parallel_for) {
  constexpr const char* op = "paged_attention";
  const AttentionLayout layout = core::lower(problem);
  core::check_on_device({op, "query", problem.query}, Device{});
  core::check_attention(problem, layout);
  if (layout.empty()) return;
  Attention(problem, layout).run(parallel_for);
}

}  // namespace fp8kv::cpu
