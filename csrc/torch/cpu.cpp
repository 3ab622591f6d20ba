// The ops on CPU tensors, and those that say what the library is.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "fp8kv/runtime.h"
#include "torch/ops.h"

namespace fp8kv::torch_ops {
namespace {

// PyTorch's thread pool as the backend's ParallelFor.
void parallel_for(std::int64_t count, std::int64_t grain, const std::function<void(std::int64_t, std::int64_t)>& body) {
  torch::stable::parallel_for(0, count, grain, body);
}

// An op from the maker of its problem.
template <auto make>
struct CpuOp;
template <class Problem, class... Arguments, Problem (*make)(Arguments...)>
struct CpuOp<make> {
  static void run(Arguments... arguments) {
    check_defined(arguments...);
    cpu::run(make(arguments...), parallel_for);
  }
};

std::string library_version() { return version(); }
std::string compiler() { return __VERSION__; }
std::string cpu_isa() { return cpu::name(cpu::active()); }

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (cpu::Isa isa : cpu::available()) names.emplace_back(cpu::name(isa));
  return names;
}

}  // namespace
}  // namespace fp8kv::torch_ops

STABLE_TORCH_LIBRARY_IMPL(fp8kv, CPU, m) {
  namespace ops = fp8kv::torch_ops;
  m.impl("static_scaled_fp8_quant", TORCH_BOX(&ops::CpuOp<ops::static_scaled_fp8_quant>::run));
  m.impl("dynamic_scaled_fp8_quant", TORCH_BOX(&ops::CpuOp<ops::dynamic_scaled_fp8_quant>::run));
  m.impl("scaled_fp8_dequant", TORCH_BOX(&ops::CpuOp<ops::scaled_fp8_dequant>::run));
  m.impl("group_amax", TORCH_BOX(&ops::CpuOp<ops::group_amax>::run));
  m.impl("reshape_and_cache_flash", TORCH_BOX(&ops::CpuOp<ops::reshape_and_cache_flash>::run));
  m.impl("reshape_and_cache_flash_dynamic", TORCH_BOX(&ops::CpuOp<ops::reshape_and_cache_flash_dynamic>::run));
  m.impl("rope_quant_and_cache", TORCH_BOX(&ops::CpuOp<ops::rope_quant_and_cache>::run));
  m.impl("gather_and_dequant_cache", TORCH_BOX(&ops::CpuOp<ops::gather_and_dequant_cache>::run));
  m.impl("paged_attention", TORCH_BOX(&ops::CpuOp<ops::paged_attention>::run));
}

STABLE_TORCH_LIBRARY_IMPL(fp8kv, CompositeExplicitAutograd, m) {
  namespace ops = fp8kv::torch_ops;
  m.impl("version", TORCH_BOX(&ops::library_version));
  m.impl("compiler", TORCH_BOX(&ops::compiler));
  m.impl("cpu_isa", TORCH_BOX(&ops::cpu_isa));
  m.impl("cpu_isas", TORCH_BOX(&ops::cpu_isas));
}
