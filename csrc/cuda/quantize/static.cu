#include "cuda/quantize/static.h"

#include "cuda/quantize/elementwise.cuh"

namespace fp8kv::cuda {

void run(const StaticQuantize& problem, Stream stream) {
  constexpr const char* op = "static_scaled_fp8_quant";
  const Layout layout = core::lower(problem);
  core::check_on_device({op, "input", problem.input}, current_device());
  if (layout.numel == 0) return;
  quantize_with(op, layout, problem.input, problem.result, problem.scale, stream);
}

void quantize_with(const char* op, const Layout& layout, const TensorView& input, const TensorView& result,
                   const TensorView& scale, cudaStream_t stream) {
  core::visit_real(input.dtype, [&]<class In>(core::Type<In>) {
    core::visit_quantized(result.dtype, [&]<class Out>(core::Type<Out>) {
      launch_elementwise<device::QuantizeOp<Out>, In, Out>(op, layout, input, result, scale, stream);
    });
  });
}

}  // namespace fp8kv::cuda
