// rope_quant_and_cache on the CPU: norm and RoPE of some heads of a token into a buffer, then the kernels that append.
#include <array>
#include <deque>
#include <vector>

#include "core/rope_layout.h"
#include "cpu/cache.h"

namespace fp8kv::cpu {
namespace {

using core::RopeLayout;

// Of a token: one, or time, height and width.
using Position = std::array<std::int64_t, 3>;

Position position_of(const RopeAppend& problem, const RopeLayout& layout, std::int64_t token) {
  const core::Indices positions(*problem.positions);
  if (layout.sections.axes == 1) return {positions[token]};
  return {positions(0, token), positions(1, token), positions(2, token)};
}

// Norm and RoPE of neighboring heads of Q (0) or K (1), with the memory they need.
class HeadTransformer {
 public:
  HeadTransformer(const RopeLayout& layout, int which)
      : layout_(layout),
        columns_(layout.cache.head_size),
        kernel_(kernels().transform[core::real_index(layout.cache.row_dtype)]),
        scratch_(columns_) {
    const core::View1D& weight = layout.norm_weights[which];
    if (weight.data) transform_.norm_weight = in_fp32(weight, 0, columns_, weight_);
    transform_.norm_eps = layout.norm_eps;
    transform_.pairs = layout.rotary_dim / 2;
    transform_.is_neox = layout.is_neox;
    transform_.norm_after_rope = layout.norm_after_rope;
  }

  void set_position(const Position& position) {
    transform_.cos = cos_sin_at(position[0], cos_sin_);
    if (layout_.sections.axes == 3) transform_.cos = mixed(position);
    transform_.sin = transform_.cos + transform_.pairs;
  }

  // Heads `stride` elements apart to heads that lie one after the other, which are valid until the next call.
  StridedElements operator()(const StridedElements& heads, std::int64_t stride, std::int64_t count) {
    const std::int64_t bytes = count * columns_ * heads.size;
    result_.resize(bytes);
    const void* from = heads.data;
    if (heads.stride != 1) {
      staged_.resize(bytes);
      for (std::int64_t r = 0; r < count; ++r)
        copy_elements(heads.at(r * stride), {staged_.data() + r * columns_ * heads.size, heads.size, 1}, columns_);
      from = staged_.data(), stride = columns_;
    }
    kernel_(from, result_.data(), columns_, {count, stride, columns_, 0}, transform_, scratch_.data());
    return {result_.data(), heads.size, 1};
  }

 private:
  const float* cos_sin_at(std::int64_t position, std::vector<float>& buffer) const {
    return in_fp32(layout_.cos_sin, position * layout_.cos_sin_row, layout_.rotary_dim, buffer);
  }

  // Each frequency of the position of its section.
  const float* mixed(const Position& position) {
    const float* rows[3] = {transform_.cos};
    for (int axis = 1; axis < 3; ++axis) rows[axis] = cos_sin_at(position[axis], other_cos_sin_[axis - 1]);
    mixed_.resize(layout_.rotary_dim);
    for (std::int64_t i = 0; i < transform_.pairs; ++i) {
      const float* row = rows[layout_.sections.axis_of(i)];
      mixed_[i] = row[i];
      mixed_[transform_.pairs + i] = row[transform_.pairs + i];
    }
    return mixed_.data();
  }

  const RopeLayout& layout_;
  std::int64_t columns_;
  TransformRows kernel_;
  HeadTransform transform_;
  std::vector<float> weight_, cos_sin_, other_cos_sin_[2], mixed_, scratch_;
  std::vector<std::byte> staged_, result_;
};

// Some heads of Q (0), K (1) or V (2), on their way to query_out or to a cache.
class HeadRoute {
 public:
  // Heads [first, first + count), up to kMaxRows.
  HeadRoute(const RopeLayout& layout, int which, std::int64_t first, std::int64_t count)
      : layout_(layout),
        which_(which),
        kv_(which == 1 ? layout.cache.k : layout.cache.v),
        range_{kv_, first, count, 0, layout.cache.head_size},
        offsets_(which == 0 ? std::nullopt : offsets_of(layout.cache, range_)) {
    const CacheLayout& cache = layout.cache;
    const HeadsView& in = which == 0 ? layout.query : kv_.rows;
    in_ = {static_cast<std::byte*>(in.data), size_of(cache.row_dtype), in.dim};
    in_ = in_.at(first * in.head), in_token_ = in.token, in_head_ = in.head;
    if (which < 2 && layout.transforms(which)) transform_.emplace(layout, which);
    float copies[kMaxRows];
    scales_.emplace(
        kernels_for(offsets_ ? DType::Float32 : cache.row_dtype, which == 0 ? layout.query_out_dtype : cache.cache_dtype),
        which == 0 ? query_scales(copies) : scales_of(range_), count, cache.head_size);
  }

  bool is_query() const { return which_ == 0; }
  const HeadRange& range() const { return range_; }  // of K or V

  // Of a token at a position, if there are positions; `place` is ignored for Q.
  void run(std::int64_t token, const Position& position, const Place& place) {
    StridedElements from = in_.at(token * in_token_);
    std::int64_t from_head = in_head_;
    if (transform_) {
      if (layout_.rotary_dim > 0) transform_->set_position(position);
      from = (*transform_)(from, from_head, range_.heads), from_head = range_.columns;
    }
    if (offsets_) from = offsets_->subtract_from(from, from_head), from_head = range_.columns;
    if (is_query()) {
      const HeadsView& out = layout_.query_out;
      const StridedElements all{static_cast<std::byte*>(out.data), size_of(layout_.query_out_dtype), out.dim};
      scales_->convert(from, all.at(token * out.token + range_.head * out.head), from_head, out.head);
    } else {
      scales_->convert(from, in_cache(layout_.cache, range_, place.block, place.offset), from_head, kv_.cache.head,
                       streams(layout_.cache));
    }
  }

 private:
  // Where several heads share a scale, a copy for each in `copies`.
  PagedScales query_scales(float (&copies)[kMaxRows]) const {
    const std::int64_t stride = layout_.q_scale_stride;
    for (std::int64_t r = 0; r < range_.heads; ++r)
      copies[r] = layout_.q_scale[(range_.head + r) / layout_.heads_per_scale * stride];
    return {.data = copies, .head = stride == 0 ? 0 : 1};
  }

  const RopeLayout& layout_;
  int which_;
  const KVViews& kv_;
  HeadRange range_;
  std::optional<HeadOffsets> offsets_;
  StridedElements in_{};
  std::int64_t in_token_, in_head_;
  std::optional<HeadTransformer> transform_;
  std::optional<HeadScales> scales_;
};

// Asks for the cosines and sines of a position of one axis. Inlined for the reason of touch_pages.
[[gnu::always_inline]] inline void touch_position(const RopeLayout& layout, std::int64_t position) {
  constexpr std::int64_t kLine = 64;
  const std::int64_t size = size_of(layout.cos_sin.dtype);
  const std::byte* row = static_cast<const std::byte*>(layout.cos_sin.data) + position * layout.cos_sin_row * size;
  for (std::int64_t i = 0; i < layout.rotary_dim * layout.cos_sin.stride * size; i += kLine) __builtin_prefetch(row + i);
}

// Items [begin, end) of the heads of Q, then those of K, then those of V. Of each token all are run before the next token: in
// most models they are neighbors in memory.
void run_items(const RopeAppend& problem, const RopeLayout& layout, std::int64_t begin, std::int64_t end) {
  const CacheLayout& cache = layout.cache;
  std::deque<HeadRoute> routes;
  std::vector<HeadRange> ranges;
  while (begin < end) {
    const std::int64_t of_kv = begin - layout.num_heads;
    const int which = of_kv < 0 ? 0 : static_cast<int>(1 + of_kv / cache.num_heads);
    const std::int64_t heads = which == 0 ? layout.num_heads : cache.num_heads;
    const std::int64_t first = which == 0 ? begin : of_kv % cache.num_heads;
    const std::int64_t count = std::min({end - begin, heads - first, kMaxRows});
    const HeadRoute& route = routes.emplace_back(layout, which, first, count);
    if (which != 0) ranges.push_back(route.range());
    begin += count;
  }
  for_each_token(cache, ranges, problem.slot_mapping, [&](std::int64_t token, const Place& place) {
    Position position{};
    if (problem.positions) {
      position = position_of(problem, layout, token);
      if (token + 1 < cache.num_tokens) {
        const Position next = position_of(problem, layout, token + 1);
        for (int axis = 0; axis < layout.sections.axes; ++axis) touch_position(layout, next[axis]);
      }
    }
    for (HeadRoute& route : routes)
      if (route.is_query() || place.block >= 0) route.run(token, position, place);
  });
}

}  // namespace

// A thread takes whole heads, with all their tokens in order: of several with one slot the last stays.
void run(const RopeAppend& problem, const ParallelFor& parallel_for) {
  constexpr const char* op = "rope_quant_and_cache";
  const RopeLayout layout = core::lower(problem);
  const CacheLayout& cache = layout.cache;
  core::check_on_device({op, "query", problem.query}, Device{});
  core::check_slots(op, problem.slot_mapping, cache);
  if (problem.positions) core::check_positions(op, *problem.positions, layout);
  if (layout.empty()) return;
  parallel(parallel_for, layout.num_heads + 2 * cache.num_heads, cache.num_tokens * cache.head_size,
           [&](std::int64_t begin, std::int64_t end) { run_items(problem, layout, begin, end); });
}

}  // namespace fp8kv::cpu
