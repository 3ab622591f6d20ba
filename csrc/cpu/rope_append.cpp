// rope_quant_and_cache on the CPU: norm and RoPE of a head on the stack of a thread, then the kernels that append.
#include <cmath>
#include <vector>

#include "cache.h"

namespace fp8kv::cpu {
namespace {

// Elements of a vector in fp32.
void load(const VectorView& from, std::int64_t offset, std::int64_t count, float* to) {
  core::visit_real(from.dtype, [&]<class T>(core::Type<T>) {
    const T* x = static_cast<const T*>(from.data) + offset;
    for (std::int64_t i = 0; i < count; ++i) to[i] = decode(x[i * from.step]);
  });
}

// Norm and RoPE of heads of Q or K, with the memory they need.
template <class Real>
class Transform {
 public:
  Transform(const RopeLayout& layout, int side)
      : layout_(layout),
        size_(layout.cache.head_size),
        half_(layout.rotary_dim / 2),
        normalizes_(layout.norm_weights[side].data != nullptr),
        weight_(normalizes_ ? size_ : 0),
        cos_sin_(layout.rotary_dim),
        x_(size_),
        result_(size_) {
    if (normalizes_) load(layout.norm_weights[side], 0, size_, weight_.data());
  }

  void set_position(std::int64_t position) {
    if (half_ > 0) load(layout_.cos_sin, position * layout_.cos_sin_row, layout_.rotary_dim, cos_sin_.data());
  }

  // Contiguous; valid until the next call.
  const Real* operator()(const Elements& head) {
    const auto* in = reinterpret_cast<const Real*>(head.data);
    for (std::int64_t d = 0; d < size_; ++d) x_[d] = decode(in[d * head.stride]);
    if (normalizes_) normalize();
    if (half_ > 0) layout_.is_neox ? rotate(1, half_) : rotate(2, 1);
    for (std::int64_t d = 0; d < size_; ++d) result_[d] = from_float<Real>(x_[d]);
    return result_.data();
  }

 private:
  void normalize() {
    float sum = 0.0f;
    for (float x : x_) sum += x * x;
    const float factor = 1.0f / std::sqrt(sum / static_cast<float>(size_) + layout_.norm_eps);
    for (std::int64_t d = 0; d < size_; ++d) x_[d] = x_[d] * factor * weight_[d];
  }

  // Pairs x[i * step], x[i * step + distance].
  void rotate(std::int64_t step, std::int64_t distance) {
    const float *cos = cos_sin_.data(), *sin = cos + half_;
    float *first = x_.data(), *second = first + distance;
    for (std::int64_t i = 0; i < half_; ++i) {
      const float a = first[i * step], b = second[i * step];
      first[i * step] = a * cos[i] - b * sin[i];
      second[i * step] = b * cos[i] + a * sin[i];
    }
  }

  const RopeLayout& layout_;
  std::int64_t size_, half_;
  bool normalizes_;
  std::vector<float> weight_, cos_sin_, x_;
  std::vector<Real> result_;
};

// A head of Q, K or V for all tokens: where it comes from, where its place for a token is, and its scale.
template <class Real, class Place>
void run_head(const RopeQuantAppend& problem, const RopeLayout& layout, int side, const HeadsView& view, std::int64_t head,
              DType element, const float* scale, const Place& place) {
  const MapKernels map = row_kernels(layout.cache.real, element);
  RowScales scales;
  prepare_rows(map, scales, scale, 0, 1);
  std::optional<Transform<Real>> transform;
  if (side < 2 && layout.transforms(side)) transform.emplace(layout, side);
  const Elements rows{static_cast<std::byte*>(view.data), size_of(layout.cache.real), view.dim};
  for (std::int64_t token = 0; token < layout.cache.num_tokens; ++token) {
    const std::optional<Elements> to = place(token);
    if (!to) continue;
    Elements from = rows.at(token * view.token + head * view.head);
    if (transform) {
      if (layout.rotary_dim > 0) transform->set_position(core::Indices(*problem.positions)[token]);
      from = {reinterpret_cast<std::byte*>(const_cast<Real*>((*transform)(from))), from.size, 1};
    }
    map_rows(map, from, *to, layout.cache.head_size, Rows{}, scales);
  }
}

template <class Real>
void run_heads(const RopeQuantAppend& problem, const RopeLayout& layout, std::int64_t begin, std::int64_t end) {
  const CacheLayout& cache = layout.cache;
  const core::Indices slots(problem.slot_mapping);
  for (std::int64_t i = begin; i < end; ++i) {
    if (i < layout.num_heads) {
      const HeadsView& out = layout.query_out;
      const Elements all{static_cast<std::byte*>(out.data), size_of(layout.query_element), out.dim};
      const float* scale = layout.q_scale + i / layout.heads_per_scale * layout.q_scale_step;
      run_head<Real>(problem, layout, 0, layout.query, i, layout.query_element, scale,
                     [&](std::int64_t token) { return std::optional(all.at(token * out.token + i * out.head)); });
      continue;
    }
    const std::int64_t side = (i - layout.num_heads) / cache.num_heads, head = (i - layout.num_heads) % cache.num_heads;
    const Part part{side == 0 ? cache.key : cache.value, head, 1, 0, cache.head_size};
    run_head<Real>(problem, layout, 1 + static_cast<int>(side), part.side.heads, head, cache.element, scales_of(part, 0, 0),
                   [&](std::int64_t token) -> std::optional<Elements> {
                     const std::int64_t slot = slots[token];
                     if (slot < 0) return std::nullopt;
                     return in_cache(cache, part, slot / cache.block_size, slot % cache.block_size);
                   });
  }
}

}  // namespace

// A thread takes whole heads, with all their tokens in order: of several with one slot the last stays.
void run(const RopeQuantAppend& problem, const ParallelFor& parallel_for) {
  constexpr const char* op = "rope_quant_and_cache";
  const RopeLayout layout = validate(problem);
  const CacheLayout& cache = layout.cache;
  check_cpu(op, "query", problem.query);
  core::check_slots(op, problem.slot_mapping, cache);
  if (problem.positions) core::check_positions(op, *problem.positions, layout);
  if (layout.empty()) return;
  parallel(parallel_for, layout.num_heads + 2 * cache.num_heads, cache.num_tokens * cache.head_size,
           [&](std::int64_t begin, std::int64_t end) {
             core::visit_real(cache.real, [&]<class Real>(core::Type<Real>) { run_heads<Real>(problem, layout, begin, end); });
           });
}

}  // namespace fp8kv::cpu
