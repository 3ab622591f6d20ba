// The ops on CPU tensors.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "tensor.h"

namespace fp8kv::torch_ops {
namespace {

// PyTorch's thread pool as the backend's ParallelFor.
void parallel_for(std::int64_t count, std::int64_t grain, const std::function<void(std::int64_t, std::int64_t)>& body) {
  torch::stable::parallel_for(0, count, grain, body);
}

void static_scaled_fp8_quant(const Tensor& result, const Tensor& input, const Tensor& scale, const IntList& shape) {
  cpu::run(static_quantize(result, input, scale, shape), parallel_for);
}

void dynamic_scaled_fp8_quant(const Tensor& result, const Tensor& input, const Tensor& scale,
                              const std::optional<Tensor>& scale_ub, const IntList& shape) {
  cpu::run(dynamic_quantize(result, input, scale, scale_ub, shape), parallel_for);
}

void scaled_fp8_dequant(const Tensor& result, const Tensor& input, const Tensor& scale, const IntList& shape) {
  cpu::run(dequantize(result, input, scale, shape), parallel_for);
}

void group_amax_(const Tensor& amax, const Tensor& input, const std::vector<std::int64_t>& shape) {
  cpu::run(group_amax(amax, input, shape), parallel_for);
}

void reshape_and_cache_flash(const Tensor& key, const Tensor& value, const Tensor& key_cache, const Tensor& value_cache,
                             const Tensor& slot_mapping, const std::string& format, const Tensor& k_scale,
                             const Tensor& v_scale) {
  cpu::run(cache_append(key, value, key_cache, value_cache, slot_mapping, format, k_scale, v_scale), parallel_for);
}

void reshape_and_cache_flash_dynamic(const Tensor& key, const Tensor& value, const Tensor& key_cache, const Tensor& value_cache,
                                     const Tensor& k_scale_cache, const Tensor& v_scale_cache, const Tensor& slot_mapping,
                                     const std::string& format) {
  cpu::run(cache_append_dynamic(key, value, key_cache, value_cache, k_scale_cache, v_scale_cache, slot_mapping, format),
           parallel_for);
}

void rope_quant_and_cache(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& query_out,
                          const Tensor& key_cache, const Tensor& value_cache, const Tensor& slot_mapping,
                          const std::string& format, const Tensor& q_scale, const Tensor& k_scale, const Tensor& v_scale,
                          const std::optional<Tensor>& positions, const std::optional<Tensor>& cos_sin_cache, bool is_neox,
                          const std::optional<Tensor>& q_norm_weight, const std::optional<Tensor>& k_norm_weight,
                          double norm_eps) {
  cpu::run(rope_quant_append(query, key, value, query_out, key_cache, value_cache, slot_mapping, format, q_scale, k_scale,
                             v_scale, positions, cos_sin_cache, is_neox, q_norm_weight, k_norm_weight, norm_eps),
           parallel_for);
}

void gather_and_dequant_cache(const Tensor& key_cache, const Tensor& value_cache, const Tensor& key, const Tensor& value,
                              const Tensor& block_table, const Tensor& cu_seq_lens, const std::string& format,
                              const Tensor& k_scale, const Tensor& v_scale, const std::optional<Tensor>& seq_starts) {
  cpu::run(cache_gather(key_cache, value_cache, key, value, block_table, cu_seq_lens, format, k_scale, v_scale, seq_starts),
           parallel_for);
}

}  // namespace
}  // namespace fp8kv::torch_ops

STABLE_TORCH_LIBRARY_IMPL(fp8kv, CPU, m) {
  m.impl("static_scaled_fp8_quant", TORCH_BOX(&fp8kv::torch_ops::static_scaled_fp8_quant));
  m.impl("dynamic_scaled_fp8_quant", TORCH_BOX(&fp8kv::torch_ops::dynamic_scaled_fp8_quant));
  m.impl("scaled_fp8_dequant", TORCH_BOX(&fp8kv::torch_ops::scaled_fp8_dequant));
  m.impl("group_amax", TORCH_BOX(&fp8kv::torch_ops::group_amax_));
  m.impl("reshape_and_cache_flash", TORCH_BOX(&fp8kv::torch_ops::reshape_and_cache_flash));
  m.impl("reshape_and_cache_flash_dynamic", TORCH_BOX(&fp8kv::torch_ops::reshape_and_cache_flash_dynamic));
  m.impl("rope_quant_and_cache", TORCH_BOX(&fp8kv::torch_ops::rope_quant_and_cache));
  m.impl("gather_and_dequant_cache", TORCH_BOX(&fp8kv::torch_ops::gather_and_dequant_cache));
}
