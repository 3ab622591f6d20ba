// A paged FP8 cache: three tokens of one sequence stored in blocks 3 and 1, and attention to them.
#include <fp8kv/attention.h>
#include <fp8kv/kv_cache.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <vector>

int main() {
  using fp8kv::contiguous;
  using fp8kv::DType;
  const std::int64_t tokens = 3, blocks = 4, block_size = 2, kv_heads = 1, heads = 2, head_size = 4;

  // The token at position t has keys of t and values of 1, 2 and 3.
  std::vector<float> key(tokens * kv_heads * head_size), value(key.size());
  for (std::int64_t i = 0; i < tokens * kv_heads * head_size; ++i) {
    key[i] = static_cast<float>(i / head_size);
    value[i] = key[i] + 1;
  }
  std::vector<fp8kv::E4M3> key_cache(blocks * block_size * kv_heads * head_size), value_cache(key_cache.size());
  const float scale = 0.5f;  // of K and of V
  const std::vector<std::int32_t> block_table = {3, 1}, seq_lens = {tokens};
  const std::vector<std::int64_t> slots = {3 * block_size, 3 * block_size + 1, 1 * block_size};

  const auto cache = [&](const std::vector<fp8kv::E4M3>& data) {
    return contiguous(data.data(), DType::E4M3, {blocks, block_size, kv_heads, head_size});
  };
  fp8kv::cpu::run(fp8kv::CacheAppend{
      .key = contiguous(key.data(), DType::Float32, {tokens, kv_heads, head_size}),
      .value = contiguous(value.data(), DType::Float32, {tokens, kv_heads, head_size}),
      .key_cache = cache(key_cache),
      .value_cache = cache(value_cache),
      .slot_mapping = contiguous(slots.data(), DType::Int64, {tokens}),
      .k_scale = contiguous(&scale, DType::Float32, {1}),
      .v_scale = contiguous(&scale, DType::Float32, {1}),
  });

  // Two query heads of the last token. The first is 0, so it takes the mean of the values; the second looks for large keys.
  std::vector<float> query(heads * head_size), out(query.size());
  for (std::int64_t i = 0; i < head_size; ++i) query[head_size + i] = 2.0f;
  fp8kv::cpu::run(fp8kv::PagedAttention{
      .query = contiguous(query.data(), DType::Float32, {1, heads, head_size}),
      .key_cache = cache(key_cache),
      .value_cache = cache(value_cache),
      .out = contiguous(out.data(), DType::Float32, {1, heads, head_size}),
      .block_table = contiguous(block_table.data(), DType::Int32, {1, 2}),
      .seq_lens = contiguous(seq_lens.data(), DType::Int32, {1}),
      .k_scale = contiguous(&scale, DType::Float32, {1}),
      .v_scale = contiguous(&scale, DType::Float32, {1}),
      .softmax_scale = 1.0f / std::sqrt(static_cast<float>(head_size)),
  });
  std::printf("mean of the values: %.3f\n", out[0]);
  std::printf("nearer to the last value: %.3f\n", out[head_size]);
}
