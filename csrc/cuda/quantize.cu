#include "quantize.h"

#include "map.cuh"

namespace fp8kv::cuda {

void run(const StaticQuantize& problem, void* stream) {
  constexpr const char* op = "static_scaled_fp8_quant";
  const Layout layout = validate(problem);
  check_cuda_device({op, "input", problem.input});
  if (layout.numel == 0) return;
  quantize_with(op, layout, problem.input, problem.result, problem.scale, static_cast<cudaStream_t>(stream));
}

void quantize_with(const char* op, const Layout& layout, const TensorView& input, const TensorView& result,
                   const TensorView& scale, cudaStream_t stream) {
  core::visit_real(input.dtype, [&]<class In>(core::Type<In>) {
    core::visit_fp8(result.dtype, [&]<class Fp8>(core::Type<Fp8>) {
      launch_map<device::QuantizeOp<Fp8>, In, Fp8>(op, layout, input, result, scale, stream);
    });
  });
}

}  // namespace fp8kv::cuda
