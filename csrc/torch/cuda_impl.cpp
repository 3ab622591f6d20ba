// The ops on CUDA tensors, and what only this library knows.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "fp8kv/runtime.h"
#include "tensor.h"

namespace fp8kv::torch_ops {
namespace {

// Makes the tensors' device current and gives PyTorch's current stream there.
class Launch {
 public:
  explicit Launch(const Tensor& tensor) {
    const std::int32_t device = tensor.get_device_index();
    if (device < 0) return;  // the validator names the argument that is not on a GPU
    if (device != torch::stable::accelerator::getCurrentDeviceIndex()) guard_.emplace(device);
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream_));
  }
  void* stream() const { return stream_; }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  void* stream_ = nullptr;
};

void static_scaled_fp8_quant(const Tensor& result, const Tensor& input, const Tensor& scale, const IntList& shape) {
  const Launch launch(input);
  cuda::run(static_quantize(result, input, scale, shape), launch.stream());
}

void dynamic_scaled_fp8_quant(const Tensor& result, const Tensor& input, const Tensor& scale,
                              const std::optional<Tensor>& scale_ub, const IntList& shape) {
  const Launch launch(input);
  cuda::run(dynamic_quantize(result, input, scale, scale_ub, shape), launch.stream());
}

void scaled_fp8_dequant(const Tensor& result, const Tensor& input, const Tensor& scale, const IntList& shape) {
  const Launch launch(input);
  cuda::run(dequantize(result, input, scale, shape), launch.stream());
}

void group_amax_(const Tensor& amax, const Tensor& input, const std::vector<std::int64_t>& shape) {
  const Launch launch(input);
  cuda::run(group_amax(amax, input, shape), launch.stream());
}

void reshape_and_cache_flash(const Tensor& key, const Tensor& value, const Tensor& key_cache, const Tensor& value_cache,
                             const Tensor& slot_mapping, const std::string& format, const Tensor& k_scale,
                             const Tensor& v_scale) {
  const Launch launch(key);
  cuda::run(cache_append(key, value, key_cache, value_cache, slot_mapping, format, k_scale, v_scale), launch.stream());
}

void reshape_and_cache_flash_dynamic(const Tensor& key, const Tensor& value, const Tensor& key_cache, const Tensor& value_cache,
                                     const Tensor& k_scale_cache, const Tensor& v_scale_cache, const Tensor& slot_mapping,
                                     const std::string& format) {
  const Launch launch(key);
  cuda::run(cache_append_dynamic(key, value, key_cache, value_cache, k_scale_cache, v_scale_cache, slot_mapping, format),
            launch.stream());
}

void rope_quant_and_cache(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& query_out,
                          const Tensor& key_cache, const Tensor& value_cache, const Tensor& slot_mapping,
                          const std::string& format, const Tensor& q_scale, const Tensor& k_scale, const Tensor& v_scale,
                          const std::optional<Tensor>& positions, const std::optional<Tensor>& cos_sin_cache, bool is_neox,
                          const std::optional<Tensor>& q_norm_weight, const std::optional<Tensor>& k_norm_weight,
                          double norm_eps) {
  const Launch launch(query);
  cuda::run(rope_quant_append(query, key, value, query_out, key_cache, value_cache, slot_mapping, format, q_scale, k_scale,
                              v_scale, positions, cos_sin_cache, is_neox, q_norm_weight, k_norm_weight, norm_eps),
            launch.stream());
}

void gather_and_dequant_cache(const Tensor& key_cache, const Tensor& value_cache, const Tensor& key, const Tensor& value,
                              const Tensor& block_table, const Tensor& cu_seq_lens, const std::string& format,
                              const Tensor& k_scale, const Tensor& v_scale, const std::optional<Tensor>& seq_starts) {
  const Launch launch(key_cache);
  cuda::run(cache_gather(key_cache, value_cache, key, value, block_table, cu_seq_lens, format, k_scale, v_scale, seq_starts),
            launch.stream());
}

std::string cuda_architectures() { return cuda::architectures(); }

}  // namespace
}  // namespace fp8kv::torch_ops

STABLE_TORCH_LIBRARY_FRAGMENT(fp8kv, m) { m.def("cuda_architectures() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(fp8kv, CompositeExplicitAutograd, m) {
  m.impl("cuda_architectures", TORCH_BOX(&fp8kv::torch_ops::cuda_architectures));
}

STABLE_TORCH_LIBRARY_IMPL(fp8kv, CUDA, m) {
  m.impl("static_scaled_fp8_quant", TORCH_BOX(&fp8kv::torch_ops::static_scaled_fp8_quant));
  m.impl("dynamic_scaled_fp8_quant", TORCH_BOX(&fp8kv::torch_ops::dynamic_scaled_fp8_quant));
  m.impl("scaled_fp8_dequant", TORCH_BOX(&fp8kv::torch_ops::scaled_fp8_dequant));
  m.impl("group_amax", TORCH_BOX(&fp8kv::torch_ops::group_amax_));
  m.impl("reshape_and_cache_flash", TORCH_BOX(&fp8kv::torch_ops::reshape_and_cache_flash));
  m.impl("reshape_and_cache_flash_dynamic", TORCH_BOX(&fp8kv::torch_ops::reshape_and_cache_flash_dynamic));
  m.impl("rope_quant_and_cache", TORCH_BOX(&fp8kv::torch_ops::rope_quant_and_cache));
  m.impl("gather_and_dequant_cache", TORCH_BOX(&fp8kv::torch_ops::gather_and_dequant_cache));
}
