// The ops on CUDA tensors, and the architectures they are compiled for.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "fp8kv/runtime.h"
#include "torch/ops.h"

namespace fp8kv::torch_ops {
namespace {

// Makes the device of the first tensor that is on a GPU current, and gives PyTorch's current stream there. That all tensors are
// on one device is checked with the problem.
class CurrentStream {
 public:
  template <class... Arguments>
  explicit CurrentStream(const Arguments&... arguments) {
    (void)(use(arguments) || ...);
  }
  cuda::Stream get() const { return static_cast<cuda::Stream>(stream_); }

 private:
  template <class T>
  bool use(const T&) {
    return false;
  }
  bool use(const Tensor& tensor) {
    const std::int32_t device = tensor.get_device_index();
    if (device < 0) return false;
    if (device != torch::stable::accelerator::getCurrentDeviceIndex()) guard_.emplace(device);
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream_));
    return true;
  }

  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  void* stream_ = nullptr;
};

// An op from the maker of its problem.
template <auto make>
struct CudaOp;
template <class Problem, class... Arguments, Problem (*make)(Arguments...)>
struct CudaOp<make> {
  static void run(Arguments... arguments) {
    check_defined(arguments...);
    const CurrentStream stream(arguments...);
    cuda::run(make(arguments...), stream.get());
  }
};

std::string cuda_architectures() { return cuda::architectures(); }

}  // namespace
}  // namespace fp8kv::torch_ops

STABLE_TORCH_LIBRARY_FRAGMENT(fp8kv, m) { m.def("cuda_architectures() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(fp8kv, CompositeExplicitAutograd, m) {
  m.impl("cuda_architectures", TORCH_BOX(&fp8kv::torch_ops::cuda_architectures));
}

STABLE_TORCH_LIBRARY_IMPL(fp8kv, CUDA, m) {
  namespace ops = fp8kv::torch_ops;
  m.impl("static_scaled_fp8_quant", TORCH_BOX(&ops::CudaOp<ops::static_scaled_fp8_quant>::run));
  m.impl("dynamic_scaled_fp8_quant", TORCH_BOX(&ops::CudaOp<ops::dynamic_scaled_fp8_quant>::run));
  m.impl("scaled_fp8_dequant", TORCH_BOX(&ops::CudaOp<ops::scaled_fp8_dequant>::run));
  m.impl("group_amax", TORCH_BOX(&ops::CudaOp<ops::group_amax>::run));
  m.impl("reshape_and_cache_flash", TORCH_BOX(&ops::CudaOp<ops::reshape_and_cache_flash>::run));
  m.impl("reshape_and_cache_flash_dynamic", TORCH_BOX(&ops::CudaOp<ops::reshape_and_cache_flash_dynamic>::run));
  m.impl("rope_quant_and_cache", TORCH_BOX(&ops::CudaOp<ops::rope_quant_and_cache>::run));
  m.impl("gather_and_dequant_cache", TORCH_BOX(&ops::CudaOp<ops::gather_and_dequant_cache>::run));
  m.impl("paged_attention", TORCH_BOX(&ops::CudaOp<ops::paged_attention>::run));
}
