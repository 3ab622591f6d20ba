#include "cuda/quantize/elementwise.cuh"

namespace fp8kv::cuda {

void run(const Dequantize& problem, Stream stream) {
  constexpr const char* op = "scaled_fp8_dequant";
  const Layout layout = core::lower(problem);
  core::check_on_device({op, "input", problem.input}, current_device());
  if (layout.numel == 0) return;
  core::visit_quantized(problem.input.dtype, [&]<class In>(core::Type<In>) {
    core::visit_real(problem.result.dtype, [&]<class Out>(core::Type<Out>) {
      launch_elementwise<device::DequantizeOp, In, Out>(op, layout, problem.input, problem.result, problem.scale, stream);
    });
  });
}

}  // namespace fp8kv::cuda
