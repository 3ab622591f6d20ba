// rope_quant_and_cache on the CPU: norm and RoPE of some heads of a token into a buffer, then the kernels that append.
#include <vector>

#include "core/rope_layout.h"
#include "cpu/cache.h"

namespace fp8kv::cpu {
namespace {

using core::RopeLayout;

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
  }

  void set_position(std::int64_t position) {
    transform_.cos = in_fp32(layout_.cos_sin, position * layout_.cos_sin_row, layout_.rotary_dim, cos_sin_);
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
  const RopeLayout& layout_;
  std::int64_t columns_;
  TransformRows kernel_;
  HeadTransform transform_;
  std::vector<float> weight_, cos_sin_, scratch_;
  std::vector<std::byte> staged_, result_;
};

// Where heads of Q (0), K (1) or V (2) come from and go to, their scales, and their offsets.
struct HeadRoute {
  int which;
  HeadsView in;
  DType out_dtype;
  std::int64_t out_head;
  PagedScales scales;
  std::int64_t heads_per_scale = 1;
  core::OffsetView offsets{};
};

// Scales of neighboring heads: those of the route, or where several heads share one, a copy for each in `copies`.
PagedScales scales_of(const HeadRoute& route, std::int64_t first, std::int64_t count, float (&copies)[kMaxRows]) {
  PagedScales scales = route.scales;
  if (route.heads_per_scale == 1) return scales.data += first * scales.head, scales;
  for (std::int64_t r = 0; r < count; ++r) copies[r] = scales.data[(first + r) / route.heads_per_scale * scales.head];
  return {.data = copies, .head = 1};
}

// Heads [first, first + count) for all tokens, up to kMaxRows; place(token) is where head 0 of a token goes, if anywhere.
template <class Place>
void run_heads(const RopeAppend& problem, const RopeLayout& layout, const HeadRoute& route, std::int64_t first,
               std::int64_t count, const Place& place) {
  const CacheLayout& cache = layout.cache;
  std::optional<HeadOffsets> offsets;
  core::OffsetView view = route.offsets;
  if (view.data) view.data += first * view.head, offsets.emplace(view, cache.row_dtype, count, cache.head_size);
  float copies[kMaxRows];
  const HeadScales scales(kernels_for(offsets ? DType::Float32 : cache.row_dtype, route.out_dtype),
                          scales_of(route, first, count, copies), count, cache.head_size);
  std::optional<HeadTransformer> transform;
  if (route.which < 2 && layout.transforms(route.which)) transform.emplace(layout, route.which);

  const StridedElements in{static_cast<std::byte*>(route.in.data), size_of(cache.row_dtype), route.in.dim};
  for (std::int64_t token = 0; token < cache.num_tokens; ++token) {
    const std::optional<StridedElements> to = place(token);
    if (!to) continue;
    StridedElements from = in.at(token * route.in.token + first * route.in.head);
    std::int64_t from_head = route.in.head;
    if (transform) {
      if (layout.rotary_dim > 0) transform->set_position(core::Indices(*problem.positions)[token]);
      from = (*transform)(from, from_head, count), from_head = cache.head_size;
    }
    if (offsets) from = offsets->subtract_from(from, from_head), from_head = cache.head_size;
    scales.convert(from, to->at(first * route.out_head), from_head, route.out_head);
  }
}

// Items [begin, end) of the heads of Q, then those of K, then those of V.
void run_items(const RopeAppend& problem, const RopeLayout& layout, std::int64_t begin, std::int64_t end) {
  const CacheLayout& cache = layout.cache;
  const core::Indices slots(problem.slot_mapping);
  while (begin < end) {
    const std::int64_t of_kv = begin - layout.num_heads;
    const int which = of_kv < 0 ? 0 : static_cast<int>(1 + of_kv / cache.num_heads);
    const std::int64_t heads = which == 0 ? layout.num_heads : cache.num_heads;
    const std::int64_t first = which == 0 ? begin : of_kv % cache.num_heads;
    const std::int64_t count = std::min({end - begin, heads - first, kMaxRows});
    if (which == 0) {
      const HeadsView& out = layout.query_out;
      const PagedScales scales{.data = const_cast<float*>(layout.q_scale), .head = layout.q_scale_stride};
      const HeadRoute route{0, layout.query, layout.query_out_dtype, out.head, scales, layout.heads_per_scale};
      const StridedElements all{static_cast<std::byte*>(out.data), size_of(layout.query_out_dtype), out.dim};
      run_heads(problem, layout, route, first, count,
                [&](std::int64_t token) { return std::optional(all.at(token * out.token)); });
    } else {
      const KVViews& kv = which == 1 ? cache.k : cache.v;
      const HeadRoute route{which, kv.rows, cache.cache_dtype, kv.cache.head, kv.scales, 1, kv.offsets};
      run_heads(problem, layout, route, first, count, [&](std::int64_t token) -> std::optional<StridedElements> {
        const std::int64_t slot = slots[token];
        if (slot < 0) return std::nullopt;
        return in_cache(cache, HeadRange{kv, 0, 1, 0, cache.head_size}, slot / cache.block_size, slot % cache.block_size);
      });
    }
    begin += count;
  }
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
