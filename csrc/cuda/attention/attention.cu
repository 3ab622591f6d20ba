// paged_attention: which kernels, and the workspace they need.
#include <string>
#include <type_traits>

#include "cuda/attention/kernels.h"
#include "cuda/common/debug.h"
#include "fp8kv/attention.h"

namespace fp8kv::cuda {
namespace {

using core::AttentionKernel;
using core::AttentionPlan;

constexpr const char* kOp = "paged_attention";
constexpr int kAlignment = 16;  // of the workspace

void check_plan(const PagedAttention& p, const AttentionLayout& layout, const AttentionPlan& plan) {
  if (plan.warps < 1)
    core::fail(kOp, "key_cache",
               "have heads of at most " + std::to_string(core::kMaxGenericHeadSizes) + " elements together with value_cache",
               std::to_string(layout.head_size) + " and " + std::to_string(layout.v_head_size));
  if (plan.blocks > INT32_MAX) core::fail(kOp, "query", "have less than 2^31 rows times heads", std::to_string(plan.blocks));
  if (plan.workspace_size == 0) return;
  const std::string expected = "have at least " + std::to_string(plan.workspace_size) + " bytes, aligned to 16";
  if (!p.workspace) core::fail(kOp, "workspace", expected, "None");
  if (p.workspace->numel() < plan.workspace_size)
    core::fail(kOp, "workspace", expected, std::to_string(p.workspace->numel()) + " bytes");
  if (reinterpret_cast<std::uintptr_t>(p.workspace->data) % kAlignment != 0)
    core::fail(kOp, "workspace", expected, "an address that is not");
}

// Calls f with the head size of a tiled kernel at compile time.
template <class F>
decltype(auto) with_head_size(std::int64_t head_size, const F& f) {
  switch (head_size) {
    case 64: return f(std::integral_constant<int, 64>{});
    case 96: return f(std::integral_constant<int, 96>{});
    case 128: return f(std::integral_constant<int, 128>{});
    case 192: return f(std::integral_constant<int, 192>{});
    default: return f(std::integral_constant<int, 256>{});
  }
}

void launch(const AttentionLayout& layout, const AttentionPlan& plan, void* workspace, cudaStream_t stream) {
  if (plan.kernel == AttentionKernel::Generic) return attention::launch_generic(layout, plan, stream);
  if (plan.kernel == AttentionKernel::Grouped)
    attention::launch_grouped(layout, plan, workspace, stream);
  else
    with_head_size(layout.head_size, [&](auto size) { attention::launch_tiled<size>(layout, plan, workspace, stream); });
  if (plan.merges > 0) attention::launch_merge(layout, plan, workspace, stream);
}

AttentionPlan plan_of(const AttentionLayout& layout) {
  const AttentionPlan plan = core::plan_attention(layout, device_limits());
  if (plan.kernel != AttentionKernel::Tiled || layout.num_seqs != 1) return plan;
  const auto& clusters =
      with_head_size(layout.head_size, [](auto size) -> const core::AttentionClusters& { return attention::clusters<size>(); });
  return core::plan_attention(layout, device_limits(), clusters);
}

}  // namespace

std::int64_t workspace_size(const PagedAttention& problem) { return plan_of(core::lower(problem)).workspace_size; }

void run(const PagedAttention& problem, Stream stream) {
  const AttentionLayout layout = core::lower(problem);
  core::check_on_device({kOp, "query", problem.query}, current_device());
  if (debugging(stream)) debug_check_attention(problem, layout, stream);
  if (layout.empty()) return;
  const AttentionPlan plan = plan_of(layout);
  check_plan(problem, layout, plan);
  launch(layout, plan, problem.workspace ? problem.workspace->data : nullptr, stream);
}

}  // namespace fp8kv::cuda
