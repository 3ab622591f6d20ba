// paged_attention: which kernels, and the workspace they need.
#include <string>

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
    core::fail(kOp, "query", "have a head_size of at most 6112", "head_size=" + std::to_string(layout.head_size));
  if (plan.blocks > INT32_MAX) core::fail(kOp, "query", "have less than 2^31 rows times heads", std::to_string(plan.blocks));
  if (plan.workspace_size == 0) return;
  const std::string expected = "have at least " + std::to_string(plan.workspace_size) + " bytes, aligned to 16";
  if (!p.workspace) core::fail(kOp, "workspace", expected, "None");
  if (p.workspace->numel() < plan.workspace_size)
    core::fail(kOp, "workspace", expected, std::to_string(p.workspace->numel()) + " bytes");
  if (reinterpret_cast<std::uintptr_t>(p.workspace->data) % kAlignment != 0)
    core::fail(kOp, "workspace", expected, "an address that is not");
}

void launch(const AttentionLayout& layout, const AttentionPlan& plan, void* workspace, cudaStream_t stream) {
  if (plan.kernel == AttentionKernel::Generic) return attention::launch_generic(layout, plan, stream);
  switch (layout.head_size) {
    case 64: attention::launch_tiled<64>(layout, plan, workspace, stream); break;
    case 96: attention::launch_tiled<96>(layout, plan, workspace, stream); break;
    case 128: attention::launch_tiled<128>(layout, plan, workspace, stream); break;
    case 192: attention::launch_tiled<192>(layout, plan, workspace, stream); break;
    default: attention::launch_tiled<256>(layout, plan, workspace, stream);
  }
  if (plan.slots > 0) attention::launch_merge(layout, plan, workspace, stream);
}

AttentionPlan plan_of(const AttentionLayout& layout) { return core::plan_attention(layout, device_limits()); }

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
