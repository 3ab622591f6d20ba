// The schemas of all ops of the namespace fp8kv. The CPU library defines them; the CUDA library adds its kernels.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fp8kv, m) {
  m.def("static_scaled_fp8_quant(Tensor(a!) result, Tensor input, Tensor scale, int[]? group_shape=None) -> ()");
  m.def(
      "dynamic_scaled_fp8_quant(Tensor(a!) result, Tensor input, Tensor(b!) scale, Tensor? scale_ub=None, "
      "int[]? group_shape=None) -> ()");
  m.def("scaled_fp8_dequant(Tensor(a!) result, Tensor input, Tensor scale, int[]? group_shape=None) -> ()");
  m.def("group_amax(Tensor(a!) amax, Tensor input, int[] group_shape) -> ()");
}
