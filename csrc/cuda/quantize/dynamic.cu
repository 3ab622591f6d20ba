#include "cuda/quantize/dynamic.h"

#include "core/dispatch.h"
#include "cuda/common/launch.h"

namespace fp8kv::cuda {

extern template void launch_dynamic<float>(const DynamicQuantize&, const Layout&, cudaStream_t);
extern template void launch_dynamic<Half>(const DynamicQuantize&, const Layout&, cudaStream_t);
extern template void launch_dynamic<BFloat16>(const DynamicQuantize&, const Layout&, cudaStream_t);

void run(const DynamicQuantize& problem, Stream stream) {
  const Layout layout = core::lower(problem);
  core::check_on_device({"dynamic_scaled_fp8_quant", "input", problem.input}, current_device());
  core::visit_real(problem.input.dtype, [&]<class In>(core::Type<In>) { launch_dynamic<In>(problem, layout, stream); });
}

}  // namespace fp8kv::cuda
