#include "dynamic_quantize.h"

#include "launch.h"
#include "visit.h"

namespace fp8kv::cuda {

extern template void launch_dynamic<float>(const DynamicQuantize&, const Layout&, cudaStream_t);
extern template void launch_dynamic<Half>(const DynamicQuantize&, const Layout&, cudaStream_t);
extern template void launch_dynamic<BFloat16>(const DynamicQuantize&, const Layout&, cudaStream_t);

void run(const DynamicQuantize& problem, void* stream) {
  const Layout layout = validate(problem);
  check_cuda_device({"dynamic_scaled_fp8_quant", "input", problem.input});
  core::visit_real(problem.input.dtype,
                   [&]<class In>(core::Type<In>) { launch_dynamic<In>(problem, layout, static_cast<cudaStream_t>(stream)); });
}

}  // namespace fp8kv::cuda
