// From the arguments of the ops to problems: the only place that knows torch::stable::Tensor and TensorView. Each maker has the
// arguments of its schema (schema.cpp), in order.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "core/check.h"
#include "core/formats.h"
#include "fp8kv/attention.h"
#include "fp8kv/kv_cache.h"
#include "fp8kv/quantize.h"
#include "fp8kv/rope.h"

namespace fp8kv::torch_ops {

using Tensor = torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using OptionalString = std::optional<std::string>;
using IntList = std::optional<std::vector<std::int64_t>>;

// None in place of a tensor arrives as one that is not defined, of which nothing can be asked.
template <class... Arguments>
void check_defined(const Arguments&... arguments) {
  int position = 0;
  const auto check = [&](const auto& argument) {
    ++position;
    if constexpr (std::is_same_v<std::remove_cvref_t<decltype(argument)>, Tensor>)
      if (!argument.defined()) throw Error("fp8kv: argument " + std::to_string(position) + " must be a tensor, got None");
  };
  (check(arguments), ...);
}

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
  std::int64_t *sizes = nullptr, *strides = nullptr;  // owned by the tensor; sizes() and strides() would each ask for ndim too
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

inline std::optional<TensorView> view(const OptionalTensor& tensor) {
  return tensor ? std::optional(view(*tensor)) : std::nullopt;
}

inline std::optional<GroupShape> group_shape(const char* op, const IntList& extents) {
  if (!extents) return std::nullopt;
  if (extents->size() != 2)
    core::fail(op, "group_shape", "have two extents, rows and columns", std::to_string(extents->size()));
  return GroupShape{(*extents)[0], (*extents)[1]};
}

// What names the format of a cache, and the cache.
struct CacheNames {
  const char* dtype = "kv_cache_dtype";
  const char* cache = "key_cache";
};

// The format that kv_cache_dtype names. "auto" is a plain copy to whatever unquantized type the cache has.
inline DType cache_dtype(const char* op, const std::string& text, const Tensor& cache, bool must_quantize = false,
                         const CacheNames& argument = {}) {
  if (text == "auto" && !must_quantize) {
    const DType actual = dtype_of(cache);
    if (!core::is_real(actual))
      core::fail(op, argument.cache, "be " + core::names_of(core::RealTypes{}) + " as " + argument.dtype + " is \"auto\"",
                 name(actual));
    return actual;
  }
  std::vector<std::string> names;
  if (!must_quantize) names.emplace_back("auto");
  for (const core::CacheFormat& format : core::kCacheFormats) {
    if (must_quantize && !core::is_quantized(format.dtype)) continue;
    if (format.name == text) return format.dtype;
    names.emplace_back(format.name);
  }
  std::string expected = "be ";
  for (std::size_t i = 0; i < names.size(); ++i)
    expected += (i == 0 ? "\"" : i + 1 < names.size() ? ", \"" : " or \"") + names[i] + "\"";
  core::fail(op, argument.dtype, expected, "\"" + text + "\"");
}

// The same of v_cache_dtype, which may be absent.
inline std::optional<DType> v_cache_dtype(const char* op, const OptionalString& text, const Tensor& value_cache,
                                          bool must_quantize = false) {
  if (!text) return std::nullopt;
  return cache_dtype(op, *text, value_cache, must_quantize, {"v_cache_dtype", "value_cache"});
}

// --- quantize.h ----------

inline StaticQuantize static_scaled_fp8_quant(const Tensor& result, const Tensor& input, const Tensor& scale,
                                              const IntList& shape) {
  return {.result = view(result),
          .input = view(input),
          .scale = view(scale),
          .group_shape = group_shape("static_scaled_fp8_quant", shape)};
}

inline DynamicQuantize dynamic_scaled_fp8_quant(const Tensor& result, const Tensor& input, const Tensor& scale,
                                                const OptionalTensor& scale_ub, const IntList& shape) {
  return {.result = view(result),
          .input = view(input),
          .scale = view(scale),
          .scale_ub = view(scale_ub),
          .group_shape = group_shape("dynamic_scaled_fp8_quant", shape)};
}

inline Dequantize scaled_fp8_dequant(const Tensor& result, const Tensor& input, const Tensor& scale, const IntList& shape) {
  return {.result = view(result),
          .input = view(input),
          .scale = view(scale),
          .group_shape = group_shape("scaled_fp8_dequant", shape)};
}

inline GroupAmax group_amax(const Tensor& amax, const Tensor& input, const std::vector<std::int64_t>& shape) {
  return {.amax = view(amax), .input = view(input), .group_shape = *group_shape("group_amax", shape)};
}

// --- kv_cache.h ----------

inline CacheAppend reshape_and_cache_flash(const Tensor& key, const Tensor& value, const Tensor& key_cache,
                                           const Tensor& value_cache, const Tensor& slot_mapping,
                                           const std::string& kv_cache_dtype, const Tensor& k_scale, const Tensor& v_scale,
                                           const OptionalTensor& k_offset, const OptionalTensor& v_offset,
                                           const OptionalString& v_dtype) {
  constexpr const char* op = "reshape_and_cache_flash";
  return {.key = view(key),
          .value = view(value),
          .key_cache = view(key_cache),
          .value_cache = view(value_cache),
          .slot_mapping = view(slot_mapping),
          .kv_cache_dtype = cache_dtype(op, kv_cache_dtype, key_cache),
          .k_scale = view(k_scale),
          .v_scale = view(v_scale),
          .k_offset = view(k_offset),
          .v_offset = view(v_offset),
          .v_cache_dtype = v_cache_dtype(op, v_dtype, value_cache)};
}

inline CacheAppendDynamic reshape_and_cache_flash_dynamic(const Tensor& key, const Tensor& value, const Tensor& key_cache,
                                                          const Tensor& value_cache, const Tensor& k_scale_cache,
                                                          const Tensor& v_scale_cache, const Tensor& slot_mapping,
                                                          const std::string& kv_cache_dtype, const OptionalTensor& k_offset,
                                                          const OptionalTensor& v_offset, const OptionalString& v_dtype) {
  constexpr const char* op = "reshape_and_cache_flash_dynamic";
  return {.key = view(key),
          .value = view(value),
          .key_cache = view(key_cache),
          .value_cache = view(value_cache),
          .k_scale_cache = view(k_scale_cache),
          .v_scale_cache = view(v_scale_cache),
          .slot_mapping = view(slot_mapping),
          .kv_cache_dtype = cache_dtype(op, kv_cache_dtype, key_cache, true),
          .k_offset = view(k_offset),
          .v_offset = view(v_offset),
          .v_cache_dtype = v_cache_dtype(op, v_dtype, value_cache, true)};
}

inline CacheGather gather_and_dequant_cache(const Tensor& key_cache, const Tensor& value_cache, const Tensor& key,
                                            const Tensor& value, const Tensor& block_table, const Tensor& cu_seq_lens,
                                            const std::string& kv_cache_dtype, const Tensor& k_scale, const Tensor& v_scale,
                                            const OptionalTensor& seq_starts, const OptionalTensor& k_offset,
                                            const OptionalTensor& v_offset, const OptionalString& v_dtype) {
  constexpr const char* op = "gather_and_dequant_cache";
  return {.key_cache = view(key_cache),
          .value_cache = view(value_cache),
          .key = view(key),
          .value = view(value),
          .block_table = view(block_table),
          .cu_seq_lens = view(cu_seq_lens),
          .kv_cache_dtype = cache_dtype(op, kv_cache_dtype, key_cache),
          .k_scale = view(k_scale),
          .v_scale = view(v_scale),
          .seq_starts = view(seq_starts),
          .k_offset = view(k_offset),
          .v_offset = view(v_offset),
          .v_cache_dtype = v_cache_dtype(op, v_dtype, value_cache)};
}

// --- rope.h ----------

inline std::optional<std::array<std::int64_t, 3>> mrope_section(const IntList& lengths) {
  if (!lengths) return std::nullopt;
  if (lengths->size() != 3)
    core::fail("rope_quant_and_cache", "mrope_section", "have three lengths, of time, height and width",
               std::to_string(lengths->size()));
  return std::array{(*lengths)[0], (*lengths)[1], (*lengths)[2]};
}

inline RopeAppend rope_quant_and_cache(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& query_out,
                                       const Tensor& key_cache, const Tensor& value_cache, const Tensor& slot_mapping,
                                       const std::string& kv_cache_dtype, const Tensor& q_scale, const Tensor& k_scale,
                                       const Tensor& v_scale, const OptionalTensor& positions,
                                       const OptionalTensor& cos_sin_cache, bool is_neox, const OptionalTensor& q_norm_weight,
                                       const OptionalTensor& k_norm_weight, double norm_eps, const OptionalTensor& k_offset,
                                       const OptionalTensor& v_offset, const IntList& sections, bool mrope_interleaved,
                                       bool norm_after_rope) {
  return {.query = view(query),
          .key = view(key),
          .value = view(value),
          .query_out = view(query_out),
          .key_cache = view(key_cache),
          .value_cache = view(value_cache),
          .slot_mapping = view(slot_mapping),
          .kv_cache_dtype = cache_dtype("rope_quant_and_cache", kv_cache_dtype, key_cache),
          .q_scale = view(q_scale),
          .k_scale = view(k_scale),
          .v_scale = view(v_scale),
          .positions = view(positions),
          .cos_sin_cache = view(cos_sin_cache),
          .is_neox = is_neox,
          .q_norm_weight = view(q_norm_weight),
          .k_norm_weight = view(k_norm_weight),
          .norm_eps = static_cast<float>(norm_eps),
          .k_offset = view(k_offset),
          .v_offset = view(v_offset),
          .mrope_section = mrope_section(sections),
          .mrope_interleaved = mrope_interleaved,
          .norm_after_rope = norm_after_rope};
}

// --- attention.h ----------

inline PagedAttention paged_attention(const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
                                      const Tensor& out, const Tensor& block_table, const Tensor& seq_lens,
                                      const std::string& kv_cache_dtype, const Tensor& k_scale, const Tensor& v_scale,
                                      double softmax_scale, const OptionalTensor& cu_query_lens, std::int64_t max_query_len,
                                      std::int64_t max_seq_len, const OptionalTensor& q_scale, const OptionalTensor& seq_starts,
                                      std::int64_t sliding_window, double softcap, const OptionalTensor& sinks,
                                      const OptionalTensor& k_offset, const OptionalTensor& v_offset, const OptionalTensor& lse,
                                      const OptionalTensor& workspace, std::int64_t num_splits, const OptionalString& v_dtype) {
  return {.query = view(query),
          .key_cache = view(key_cache),
          .value_cache = view(value_cache),
          .out = view(out),
          .block_table = view(block_table),
          .seq_lens = view(seq_lens),
          .kv_cache_dtype = cache_dtype("paged_attention", kv_cache_dtype, key_cache),
          .k_scale = view(k_scale),
          .v_scale = view(v_scale),
          .softmax_scale = static_cast<float>(softmax_scale),
          .cu_query_lens = view(cu_query_lens),
          .max_query_len = max_query_len,
          .max_seq_len = max_seq_len,
          .q_scale = view(q_scale),
          .seq_starts = view(seq_starts),
          .sliding_window = sliding_window,
          .softcap = static_cast<float>(softcap),
          .sinks = view(sinks),
          .k_offset = view(k_offset),
          .v_offset = view(v_offset),
          .lse = view(lse),
          .workspace = view(workspace),
          .num_splits = num_splits,
          .v_cache_dtype = v_cache_dtype("paged_attention", v_dtype, value_cache)};
}

}  // namespace fp8kv::torch_ops
