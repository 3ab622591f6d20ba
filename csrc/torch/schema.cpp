// The schemas of all ops of the namespace fp8kv. The CPU library defines them; the CUDA library adds its kernels.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fp8kv, m) {
  m.def("version() -> str");
  m.def("compiler() -> str");
  m.def("cpu_isa() -> str");
  m.def("cpu_isas() -> str[]");
  m.def("static_scaled_fp8_quant(Tensor(a!) result, Tensor input, Tensor scale, int[]? group_shape=None) -> ()");
  m.def(
      "dynamic_scaled_fp8_quant(Tensor(a!) result, Tensor input, Tensor(b!) scale, Tensor? scale_ub=None, "
      "int[]? group_shape=None) -> ()");
  m.def("scaled_fp8_dequant(Tensor(a!) result, Tensor input, Tensor scale, int[]? group_shape=None) -> ()");
  m.def("group_amax(Tensor(a!) amax, Tensor input, int[] group_shape) -> ()");
  m.def(
      "reshape_and_cache_flash(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor slot_mapping, "
      "str kv_cache_dtype, Tensor k_scale, Tensor v_scale, Tensor? k_offset=None, Tensor? v_offset=None, "
      "str? v_cache_dtype=None) -> ()");
  m.def(
      "reshape_and_cache_flash_dynamic(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, "
      "Tensor(c!) k_scale_cache, Tensor(d!) v_scale_cache, Tensor slot_mapping, str kv_cache_dtype, "
      "Tensor? k_offset=None, Tensor? v_offset=None, str? v_cache_dtype=None) -> ()");
  m.def(
      "rope_quant_and_cache(Tensor query, Tensor key, Tensor value, Tensor(a!) query_out, Tensor(b!) key_cache, "
      "Tensor(c!) value_cache, Tensor slot_mapping, str kv_cache_dtype, Tensor q_scale, Tensor k_scale, Tensor v_scale, "
      "Tensor? positions=None, Tensor? cos_sin_cache=None, bool is_neox=True, Tensor? q_norm_weight=None, "
      "Tensor? k_norm_weight=None, float norm_eps=1e-6, Tensor? k_offset=None, Tensor? v_offset=None, "
      "int[]? mrope_section=None, bool mrope_interleaved=False, bool norm_after_rope=False) -> ()");
  m.def(
      "gather_and_dequant_cache(Tensor key_cache, Tensor value_cache, Tensor(a!) key, Tensor(b!) value, Tensor block_table, "
      "Tensor cu_seq_lens, str kv_cache_dtype, Tensor k_scale, Tensor v_scale, Tensor? seq_starts=None, "
      "Tensor? k_offset=None, Tensor? v_offset=None, str? v_cache_dtype=None) -> ()");
  m.def(
      "paged_attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor(a!) out, Tensor block_table, Tensor "
      "seq_lens, "
      "str kv_cache_dtype, Tensor k_scale, Tensor v_scale, float softmax_scale, Tensor? cu_query_lens=None, "
      "int max_query_len=1, int max_seq_len=0, Tensor? q_scale=None, Tensor? seq_starts=None, int sliding_window=0, "
      "float softcap=0.0, Tensor? sinks=None, Tensor? k_offset=None, Tensor? v_offset=None, Tensor(b!)? lse=None, "
      "Tensor(c!)? workspace=None, int num_splits=0, str? v_cache_dtype=None) -> ()");
}
