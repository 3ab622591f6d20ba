// paged_attention for anything: every head size, block size, stride, alignment, dtype and kind of scale, one block per query
// row and head. Right everywhere, and not made for speed.
#include "core/dispatch.h"
#include "cuda/attention/finish.cuh"
#include "cuda/attention/kernels.h"
#include "cuda/attention/rows.cuh"
#include "device/pdl.cuh"

namespace fp8kv::cuda::attention {
namespace {

constexpr int kWarp = 32;
constexpr int kMaxWarps = 4;

struct GenericArgs {
  AttentionLayout layout;
  AttentionPlan plan;
};

// The query of a row and head in fp32, times the scales of K's channels and a power of two, so that products neither overflow
// nor vanish. Logits are products with it times `factor`, plus `base`. By one warp.
struct Query {
  float factor;
  float base;

  __device__ static Query load(const AttentionLayout& l, const Column& column, std::int64_t kv_head, float* to) {
    const int lane = static_cast<int>(threadIdx.x % kWarp);
    const float q_scale = l.q_scale ? l.q_scale[column.head / l.heads_per_q_scale * l.q_scale_stride] : 1.0f;
    const std::int64_t row = column.row * l.query.token + column.head * l.query.head;
    float largest = 0.0f, product = 0.0f;
    for (std::int64_t d = lane; d < l.head_size; d += kWarp) {
      float x = load_element(l.query.data, l.query_dtype, row + d * l.query.dim) * q_scale;
      if (l.k_offset.data) product += x * l.k_offset.data[kv_head * l.k_offset.head + d * l.k_offset.dim];
      if (l.k_scale.dim != 0) x *= l.k_scale.data[kv_head * l.k_scale.head + d * l.k_scale.dim];
      if (is_finite(x)) largest = fmaxf(largest, fabsf(x));
      to[d] = x;
    }
    largest = max_of_warp(largest);
    const PowerOfTwo down(-exponent_of(largest)), up(exponent_of(largest));
    for (std::int64_t d = lane; d < l.head_size; d += kWarp) to[d] = down.times(to[d]);
    return {up.times(l.softmax_scale), l.softmax_scale * sum_of_warp(product)};
  }
};

// The elements of K or V, of a type that is known at compile time.
template <class T>
struct Elements {
  const T* data;

  __device__ Elements(const core::PagedView& view, DType) : data(static_cast<const T*>(view.data)) {}
  __device__ float at(std::int64_t i) const { return decode(data[i]); }
};

// Of any type.
template <>
struct Elements<void> {
  const void* data;
  DType dtype;

  __device__ Elements(const core::PagedView& view, DType dtype) : data(view.data), dtype(dtype) {}
  __device__ float at(std::int64_t i) const {
    return dtype == DType::Int8 ? decode(static_cast<const Int8*>(data)[i]) : load_element(data, dtype, i);
  }
};

// Shared memory: the query [head_size], then for each warp its sum of values [v_head_size]. A warp takes every warps-th
// position; its lanes share the elements of a head. `Cache`: the type of K and V; void: of two types.
template <class Cache>
__global__ void __launch_bounds__(kMaxWarps* kWarp) attention_generic(const __grid_constant__ GenericArgs args) {
  extern __shared__ __align__(16) std::byte shared_memory[];
  __shared__ Softmax parts[kMaxWarps];
  __shared__ Query shared_query;
  const AttentionLayout& l = args.layout;
  const int warps = args.plan.warps;
  device::wait_then_release();
  const Column column{static_cast<int>(blockIdx.x / l.num_heads), static_cast<int>(blockIdx.x % l.num_heads)};
  const std::int64_t s = sequence_of(l, column.row);
  if (s < 0) return;
  const Sequence sequence = Sequence::load(l, s);
  const Positions seen = sequence.seen_by(l, column.row - sequence.first_row);
  const std::int64_t kv_head = column.head / l.heads_per_kv_head();
  const int lane = static_cast<int>(threadIdx.x % kWarp), warp = static_cast<int>(threadIdx.x / kWarp);
  float* query = reinterpret_cast<float*>(shared_memory);
  float* values = query + l.head_size + warp * l.v_head_size;
  if (warp == 0) {
    const Query loaded = Query::load(l, column, kv_head, query);
    if (lane == 0) shared_query = loaded;
  }
  for (std::int64_t d = lane; d < l.v_head_size; d += kWarp) values[d] = 0.0f;
  __syncthreads();

  const Elements<Cache> keys(l.key_cache, l.cache_dtype), all_values(l.value_cache, l.v_cache_dtype);
  Softmax softmax;
  for (std::int64_t p = seen.begin + warp; p < seen.end; p += warps) {
    const std::int64_t block =
        __ldg(static_cast<const int*>(l.block_table.data) + s * l.block_table_row + p / l.block_size * l.block_table.stride);
    if (block < 0 || block >= l.num_blocks) continue;
    const std::int64_t offset = p % l.block_size;
    const auto row = [&](const core::PagedView& view) {
      return block * view.block + offset * view.offset + kv_head * view.head;
    };
    const auto scale_at = [&](const core::ChannelScales& scale) {
      return scale.data[block * scale.block + offset * scale.offset + kv_head * scale.head];
    };
    const std::int64_t key = row(l.key_cache), value = row(l.value_cache);
    float product = 0.0f;
    for (std::int64_t d = lane; d < l.head_size; d += kWarp)
      product = __fmaf_rn(query[d], keys.at(key + d * l.key_cache.dim), product);
    float logit = sum_of_warp(product) * shared_query.factor;
    if (l.k_scale.data && l.k_scale.dim == 0) logit *= scale_at(l.k_scale);
    if (l.softcap > 0.0f) logit = l.softcap * tanhf((logit + shared_query.base) / l.softcap);
    logit *= kLog2e;
    const float maximum = fmaxf(softmax.maximum, logit);  // a NaN makes the sum one
    const float keep = exp2f(softmax.maximum - maximum), weight = exp2f(logit - maximum);
    softmax = {maximum, softmax.sum * keep + weight};
    const float by = l.v_scale.per_token() ? weight * scale_at(l.v_scale) : weight;
    for (std::int64_t d = lane; d < l.v_head_size; d += kWarp)
      values[d] = __fmaf_rn(by, all_values.at(value + d * l.value_cache.dim), values[d] * keep);
  }
  if (lane == 0) parts[warp] = softmax;
  __syncthreads();

  Softmax total;
  for (int w = 0; w < warps; ++w) total.maximum = fmaxf(total.maximum, parts[w].maximum);
  for (int w = 0; w < warps; ++w) total.sum += parts[w].sum * exp2f(parts[w].maximum - total.maximum);
  const Finish end(l, column, static_cast<int>(kv_head), total, l.softcap > 0.0f ? 0.0f : shared_query.base * kLog2e);
  for (std::int64_t d = threadIdx.x; d < l.v_head_size; d += blockDim.x) {
    float sum = 0.0f;
    for (int w = 0; w < warps; ++w) sum += query[l.head_size + w * l.v_head_size + d] * exp2f(parts[w].maximum - total.maximum);
    end.store(d, sum);
  }
  if (threadIdx.x == 0) end.store_lse();
}

}  // namespace

void launch_generic(const AttentionLayout& layout, const AttentionPlan& plan, cudaStream_t stream) {
  const GenericArgs args{layout, plan};
  const auto blocks = static_cast<unsigned>(plan.blocks);
  const LaunchShape shape{.grid = blocks,
                          .threads = plan.warps * kWarp,
                          .shared_memory = plan.shared_memory,
                          .dependent = launches_dependent(blocks)};
  if (layout.cache_dtype != layout.v_cache_dtype) {
    launch(attention_generic<void>, shape, stream, args);
  } else {
    core::visit(core::RealTypes{} + core::QuantizedTypes{}, layout.cache_dtype,
                [&]<class Cache>(core::Type<Cache>) { launch(attention_generic<Cache>, shape, stream, args); });
  }
  check_launch("paged_attention");
}

}  // namespace fp8kv::cuda::attention
