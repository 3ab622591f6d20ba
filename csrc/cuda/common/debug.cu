#include "cuda/common/debug.h"

#include <optional>
#include <vector>

#include "core/check_indices.h"
#include "core/environment.h"
#include "cuda/common/launch.h"

namespace fp8kv::cuda {
namespace {

// A copy in host memory of all bytes from the first element to the last.
class HostCopy {
 public:
  HostCopy(const char* op, const TensorView& view, cudaStream_t stream) : view_(view) {
    if (view.numel() == 0) return;
    std::size_t last = 0;
    for (int i = 0; i < view.ndim; ++i) last += static_cast<std::size_t>((view.sizes[i] - 1) * view.strides[i]);
    bytes_.resize((last + 1) * size_of(view.dtype));
    cudaError_t error = cudaMemcpyAsync(bytes_.data(), view.data, bytes_.size(), cudaMemcpyDeviceToHost, stream);
    if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
    if (error != cudaSuccess)
      throw Error(std::string("fp8kv::") + op + ": FP8KV_DEBUG=1 could not read the indices: " + cudaGetErrorString(error));
    view_.data = bytes_.data();
    view_.device = {};
  }

  const TensorView& view() const { return view_; }

 private:
  TensorView view_;
  std::vector<char> bytes_;
};

class OptionalHostCopy {
 public:
  OptionalHostCopy(const char* op, const std::optional<TensorView>& view, cudaStream_t stream) {
    if (view) copy_.emplace(op, *view, stream);
  }

  std::optional<TensorView> view() const { return copy_ ? std::optional(copy_->view()) : std::nullopt; }

 private:
  std::optional<HostCopy> copy_;
};

}  // namespace

bool debugging(cudaStream_t stream) {
  static const bool wanted = core::environment_flag("FP8KV_DEBUG");
  if (!wanted) return false;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  return cudaStreamIsCapturing(stream, &status) == cudaSuccess && status == cudaStreamCaptureStatusNone;
}

void debug_check_slots(const char* op, const TensorView& slot_mapping, const CacheLayout& layout, cudaStream_t stream) {
  core::check_slots(op, HostCopy(op, slot_mapping, stream).view(), layout);
}

void debug_check_positions(const char* op, const TensorView& positions, const RopeLayout& layout, cudaStream_t stream) {
  core::check_positions(op, HostCopy(op, positions, stream).view(), layout);
}

void debug_check_sequences(const CacheGather& problem, const CacheLayout& layout, cudaStream_t stream) {
  constexpr const char* op = "gather_and_dequant_cache";
  const HostCopy table(op, problem.block_table, stream), sums(op, problem.cu_seq_lens, stream);
  const OptionalHostCopy starts(op, problem.seq_starts, stream);
  CacheGather on_host = problem;
  on_host.block_table = table.view();
  on_host.cu_seq_lens = sums.view();
  on_host.seq_starts = starts.view();
  core::check_sequences(on_host, layout);
}

void debug_check_attention(const PagedAttention& problem, const AttentionLayout& layout, cudaStream_t stream) {
  constexpr const char* op = "paged_attention";
  const HostCopy table(op, problem.block_table, stream), lens(op, problem.seq_lens, stream);
  const OptionalHostCopy sums(op, problem.cu_query_lens, stream), starts(op, problem.seq_starts, stream);
  PagedAttention on_host = problem;
  on_host.block_table = table.view();
  on_host.seq_lens = lens.view();
  on_host.cu_query_lens = sums.view();
  on_host.seq_starts = starts.view();
  core::check_attention(on_host, layout);
}

}  // namespace fp8kv::cuda
