#include "map.cuh"

namespace fp8kv::cuda {

void run(const Dequantize& problem, void* stream) {
  constexpr const char* op = "scaled_fp8_dequant";
  const Layout layout = validate(problem);
  check_cuda_device({op, "input", problem.input});
  if (layout.numel == 0) return;
  core::visit_fp8(problem.input.dtype, [&]<class Fp8>(core::Type<Fp8>) {
    core::visit_real(problem.result.dtype, [&]<class Out>(core::Type<Out>) {
      launch_map<device::DequantizeOp, Fp8, Out>(op, layout, problem.input, problem.result, problem.scale,
                                                 static_cast<cudaStream_t>(stream));
    });
  });
}

}  // namespace fp8kv::cuda
