// torch::stable::Tensor -> TensorView: the only place that knows both.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>
#include <vector>

#include "fp8kv/error.h"
#include "fp8kv/kv_cache.h"
#include "fp8kv/quantize.h"

namespace fp8kv::torch_ops {

using Tensor = torch::stable::Tensor;
using IntList = std::optional<std::vector<std::int64_t>>;

inline DType dtype_of(const Tensor& tensor) {
  std::int32_t code = -1;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &code));
  using torch::headeronly::ScalarType;
  switch (static_cast<ScalarType>(code)) {
    case ScalarType::Float: return DType::Float32;
    case ScalarType::Half: return DType::Float16;
    case ScalarType::BFloat16: return DType::BFloat16;
    case ScalarType::Float8_e4m3fn: return DType::E4M3;
    case ScalarType::Float8_e5m2: return DType::E5M2;
    case ScalarType::Double: return DType::Float64;
    case ScalarType::Float8_e4m3fnuz: return DType::E4M3Fnuz;
    case ScalarType::Float8_e5m2fnuz: return DType::E5M2Fnuz;
    case ScalarType::Byte: return DType::UInt8;
    case ScalarType::Char: return DType::Int8;
    case ScalarType::Short: return DType::Int16;
    case ScalarType::Int: return DType::Int32;
    case ScalarType::Long: return DType::Int64;
    case ScalarType::Bool: return DType::Bool;
    default: return DType::Other;
  }
}

inline TensorView view(const Tensor& tensor) {
  static const std::int32_t cpu = aoti_torch_device_type_cpu(), cuda = aoti_torch_device_type_cuda();
  TensorView v{.data = tensor.data_ptr(), .dtype = dtype_of(tensor)};
  std::int32_t type = 0;
  std::int64_t *sizes = nullptr, *strides = nullptr;  // of the tensor's; sizes() and strides() would each ask for ndim too
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor.get(), &sizes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor.get(), &strides));
  v.device.type = type == cpu ? Device::Type::CPU : type == cuda ? Device::Type::CUDA : Device::Type::Other;
  v.device.index = tensor.get_device_index();
  v.ndim = static_cast<int>(tensor.dim());
  for (int i = 0; i < v.ndim && i < kMaxDims; ++i) {
    v.sizes[i] = sizes[i];
    v.strides[i] = strides[i];
  }
  return v;
}

inline std::optional<TensorView> view(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional(view(*tensor)) : std::nullopt;
}

inline std::optional<GroupShape> group_shape(const char* op, const IntList& extents) {
  if (!extents) return std::nullopt;
  if (extents->size() != 2) fail(op, "group_shape", "have two extents, rows and columns", std::to_string(extents->size()));
  return GroupShape{(*extents)[0], (*extents)[1]};
}

// The problems of quantize.h from the arguments of the ops.
inline StaticQuantize static_quantize(const Tensor& result, const Tensor& input, const Tensor& scale, const IntList& shape) {
  return {.result = view(result),
          .input = view(input),
          .scale = view(scale),
          .group_shape = group_shape("static_scaled_fp8_quant", shape)};
}

inline DynamicQuantize dynamic_quantize(const Tensor& result, const Tensor& input, const Tensor& scale,
                                        const std::optional<Tensor>& scale_ub, const IntList& shape) {
  return {.result = view(result),
          .input = view(input),
          .scale = view(scale),
          .scale_ub = view(scale_ub),
          .group_shape = group_shape("dynamic_scaled_fp8_quant", shape)};
}

inline Dequantize dequantize(const Tensor& result, const Tensor& input, const Tensor& scale, const IntList& shape) {
  return {.result = view(result),
          .input = view(input),
          .scale = view(scale),
          .group_shape = group_shape("scaled_fp8_dequant", shape)};
}

inline GroupAmax group_amax(const Tensor& amax, const Tensor& input, const std::vector<std::int64_t>& shape) {
  return {.amax = view(amax), .input = view(input), .group_shape = *group_shape("group_amax", shape)};
}

// The problems of kv_cache.h. They refer to `format`.
inline CacheAppend cache_append(const Tensor& key, const Tensor& value, const Tensor& key_cache, const Tensor& value_cache,
                                const Tensor& slot_mapping, const std::string& format, const Tensor& k_scale,
                                const Tensor& v_scale) {
  return {.key = view(key),
          .value = view(value),
          .key_cache = view(key_cache),
          .value_cache = view(value_cache),
          .slot_mapping = view(slot_mapping),
          .kv_cache_dtype = format,
          .k_scale = view(k_scale),
          .v_scale = view(v_scale)};
}

inline CacheAppendDynamic cache_append_dynamic(const Tensor& key, const Tensor& value, const Tensor& key_cache,
                                               const Tensor& value_cache, const Tensor& k_scale_cache,
                                               const Tensor& v_scale_cache, const Tensor& slot_mapping,
                                               const std::string& format) {
  return {.key = view(key),
          .value = view(value),
          .key_cache = view(key_cache),
          .value_cache = view(value_cache),
          .k_scale_cache = view(k_scale_cache),
          .v_scale_cache = view(v_scale_cache),
          .slot_mapping = view(slot_mapping),
          .kv_cache_dtype = format};
}

inline RopeQuantAppend rope_quant_append(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& query_out,
                                         const Tensor& key_cache, const Tensor& value_cache, const Tensor& slot_mapping,
                                         const std::string& format, const Tensor& q_scale, const Tensor& k_scale,
                                         const Tensor& v_scale, const std::optional<Tensor>& positions,
                                         const std::optional<Tensor>& cos_sin_cache, bool is_neox,
                                         const std::optional<Tensor>& q_norm_weight, const std::optional<Tensor>& k_norm_weight,
                                         double norm_eps) {
  return {.query = view(query),
          .key = view(key),
          .value = view(value),
          .query_out = view(query_out),
          .key_cache = view(key_cache),
          .value_cache = view(value_cache),
          .slot_mapping = view(slot_mapping),
          .kv_cache_dtype = format,
          .q_scale = view(q_scale),
          .k_scale = view(k_scale),
          .v_scale = view(v_scale),
          .positions = view(positions),
          .cos_sin_cache = view(cos_sin_cache),
          .is_neox = is_neox,
          .q_norm_weight = view(q_norm_weight),
          .k_norm_weight = view(k_norm_weight),
          .norm_eps = static_cast<float>(norm_eps)};
}

inline CacheGather cache_gather(const Tensor& key_cache, const Tensor& value_cache, const Tensor& key, const Tensor& value,
                                const Tensor& block_table, const Tensor& cu_seq_lens, const std::string& format,
                                const Tensor& k_scale, const Tensor& v_scale, const std::optional<Tensor>& seq_starts) {
  return {.key_cache = view(key_cache),
          .value_cache = view(value_cache),
          .key = view(key),
          .value = view(value),
          .block_table = view(block_table),
          .cu_seq_lens = view(cu_seq_lens),
          .kv_cache_dtype = format,
          .k_scale = view(k_scale),
          .v_scale = view(v_scale),
          .seq_starts = view(seq_starts)};
}

}  // namespace fp8kv::torch_ops
