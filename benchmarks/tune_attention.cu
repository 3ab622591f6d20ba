// Times of paged_attention on this GPU for plans other than the one that core::plan_attention makes: how many blocks and
// warps per block are best for a shape. In CUDA graphs over rotating caches that are larger than the L2 cache; as in `fp8kv
// bench attention`, each call has queries and a block table of its own, which are not in the L2 cache either.
//
//   nvcc -std=c++20 -O3 --expt-relaxed-constexpr -arch=sm_90 -Icsrc -Iinclude benchmarks/tune_attention.cu
//       libfp8kv_cuda.a libfp8kv.a -o tune_attention
//   ./tune_attention HEADS KV_HEADS HEAD_SIZE BATCH CONTEXT [QUERIES] [RAGGED] [PER_TOKEN]
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <vector>

#include "core/attention_memory.h"
#include "cuda/attention/kernels.h"
#include "fp8kv/attention.h"

using namespace fp8kv;
using core::AttentionPlan;

namespace {

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s\n", cudaGetErrorString(error));
  std::exit(1);
}

template <class T>
T* device_copy(const std::vector<T>& host) {
  T* data = nullptr;
  check(cudaMalloc(&data, std::max<std::size_t>(16, host.size() * sizeof(T))));
  check(cudaMemcpy(data, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
  return data;
}

void launch(const core::AttentionLayout& l, const AttentionPlan& plan, void* workspace, cudaStream_t stream) {
  switch (l.head_size) {
    case 64: cuda::attention::launch_tiled<64>(l, plan, workspace, stream); break;
    case 96: cuda::attention::launch_tiled<96>(l, plan, workspace, stream); break;
    case 128: cuda::attention::launch_tiled<128>(l, plan, workspace, stream); break;
    case 192: cuda::attention::launch_tiled<192>(l, plan, workspace, stream); break;
    default: cuda::attention::launch_tiled<256>(l, plan, workspace, stream);
  }
  if (plan.merges > 0) cuda::attention::launch_merge(l, plan, workspace, stream);
}

const core::AttentionClusters& clusters(std::int64_t head_size) {
  switch (head_size) {
    case 64: return cuda::attention::clusters<64>();
    case 96: return cuda::attention::clusters<96>();
    case 128: return cuda::attention::clusters<128>();
    case 192: return cuda::attention::clusters<192>();
    default: return cuda::attention::clusters<256>();
  }
}

// Median microseconds of one call.
template <class Call>
double time_of(int calls, const Call& call) {
  cudaStream_t stream;
  check(cudaStreamCreate(&stream));
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  for (int i = 0; i < calls; ++i) call(i, stream);
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  check(cudaStreamEndCapture(stream, &graph));
  check(cudaGraphInstantiate(&exec, graph, 0));
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin));
  check(cudaEventCreate(&end));
  std::vector<float> times;
  for (int i = 0; i < 12; ++i) {
    check(cudaEventRecord(begin, stream));
    check(cudaGraphLaunch(exec, stream));
    check(cudaEventRecord(end, stream));
    check(cudaEventSynchronize(end));
    float ms = 0;
    check(cudaEventElapsedTime(&ms, begin, end));
    if (i >= 2) times.push_back(1000 * ms / calls);
  }
  std::sort(times.begin(), times.end());
  check(cudaGraphExecDestroy(exec));
  check(cudaGraphDestroy(graph));
  check(cudaStreamDestroy(stream));
  return times[times.size() / 2];
}

// All of K and V once, in whole rows.
__global__ void read_all(const uint4* data, std::size_t count, unsigned* out) {
  unsigned x = 0;
  for (std::size_t i = blockIdx.x * std::size_t{blockDim.x} * 4 + threadIdx.x; i < count;
       i += gridDim.x * std::size_t{blockDim.x} * 4) {
    uint4 v[4] = {};
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (i + k * blockDim.x < count) v[k] = __ldcs(data + i + k * blockDim.x);
#pragma unroll
    for (int k = 0; k < 4; ++k) x ^= v[k].x ^ v[k].y ^ v[k].z ^ v[k].w;
  }
  if (x == 0x12345677u) *out = x;
}

}  // namespace

int main(int argc, char** argv) {
  const auto arg = [&](int i, long d) { return argc > i ? std::atol(argv[i]) : d; };
  const std::int64_t H = arg(1, 32), KV = arg(2, 8), D = arg(3, 128), B = arg(4, 16), N = arg(5, 8192), L = arg(6, 1), bs = 16;
  const bool ragged = arg(7, 0), per_token = arg(8, 0);
  const std::int64_t max_blocks = (N + bs - 1) / bs, blocks = B * max_blocks;
  std::mt19937 random(1);
  std::vector<int> lengths(B, static_cast<int>(N)), sums(B + 1);
  std::int64_t tokens = 0;
  for (int s = 0; s < B; ++s) {
    if (ragged) lengths[s] = static_cast<int>(N / 16 + random() % (N - N / 16));
    tokens += lengths[s], sums[s + 1] = sums[s] + static_cast<int>(L);
  }
  const std::size_t cache_bytes = blocks * bs * KV * D, read_bytes = 2 * tokens * KV * (D + (per_token ? 4 : 0));
  const int copies = static_cast<int>(std::min<std::size_t>(24, std::max<std::size_t>(1, (400 << 20) / (2 * cache_bytes) + 1)));
  std::vector<std::uint8_t> bytes(cache_bytes);
  for (auto& x : bytes) x = static_cast<std::uint8_t>((random() & 0x8f) + 0x30);  // of magnitude 0.5 to 1
  std::vector<std::uint8_t*> caches(copies);
  std::vector<std::uint16_t*> queries(copies), results(copies);
  std::vector<int*> tables(copies);
  for (int i = 0; i < copies; ++i) {
    check(cudaMalloc(&caches[i], 2 * cache_bytes));
    for (int half : {0, 1})
      check(cudaMemcpy(caches[i] + half * cache_bytes, bytes.data(), cache_bytes, cudaMemcpyHostToDevice));
    std::vector<std::uint16_t> query(B * L * H * D);
    for (auto& x : query) x = static_cast<std::uint16_t>(0x3f80 + random() % 64 + (random() % 2) * 0x8000);
    queries[i] = device_copy(query), results[i] = device_copy(query);
    std::vector<int> table(blocks);
    std::iota(table.begin(), table.end(), 0);
    std::shuffle(table.begin(), table.end(), random);
    tables[i] = device_copy(table);
  }
  auto *lens = device_copy(lengths), *cu = device_copy(sums);
  auto* scale = device_copy(std::vector<float>(per_token ? blocks * bs * KV : KV, 0.01f));
  const Device cuda_device{Device::Type::CUDA, 0};
  const auto on_device = [&](TensorView v) { return v.device = cuda_device, v; };
  const auto problem = [&](int copy) {
    const TensorView scales =
        on_device(per_token ? contiguous(scale, DType::Float32, {blocks, bs, KV}) : contiguous(scale, DType::Float32, {KV}));
    PagedAttention p{.query = on_device(contiguous(queries[copy], DType::BFloat16, {B * L, H, D})),
                     .key_cache = on_device(contiguous(caches[copy], DType::E4M3, {blocks, bs, KV, D})),
                     .value_cache = on_device(contiguous(caches[copy] + cache_bytes, DType::E4M3, {blocks, bs, KV, D})),
                     .out = on_device(contiguous(results[copy], DType::BFloat16, {B * L, H, D})),
                     .block_table = on_device(contiguous(tables[copy], DType::Int32, {B, max_blocks})),
                     .seq_lens = on_device(contiguous(lens, DType::Int32, {B})),
                     .k_scale = scales,
                     .v_scale = scales,
                     .softmax_scale = 0.088f};
    if (L > 1) p.cu_query_lens = on_device(contiguous(cu, DType::Int32, {B + 1})), p.max_query_len = L;
    return p;
  };
  std::vector<core::AttentionLayout> layouts;
  for (int i = 0; i < copies; ++i) layouts.push_back(core::lower(problem(i)));
  void* workspace = nullptr;
  check(cudaMalloc(&workspace, 256 << 20));
  unsigned* sink = nullptr;
  check(cudaMalloc(&sink, 4));
  const int calls = std::max(copies, static_cast<int>(std::min<std::size_t>(40, (1u << 30) / read_bytes + 1)));
  const double floor = time_of(calls, [&](int i, cudaStream_t s) {
    read_all<<<132 * 4, 512, 0, s>>>(reinterpret_cast<const uint4*>(caches[i % copies]), read_bytes / 16, sink);
  });
  std::printf("%ld/%ld/%ld batch %ld context %ld queries %ld%s%s: %.1f MB, read %.2f us\n", H, KV, D, B, N, L,
              ragged ? " ragged" : "", per_token ? " per token" : "", read_bytes / 1e6, floor);

  const auto limits = cuda::device_limits();
  const AttentionPlan chosen = core::plan_attention(layouts[0], limits, clusters(D));
  const auto run = [&](const AttentionPlan& plan, const char* what) {
    const double us = time_of(calls, [&](int i, cudaStream_t s) { launch(layouts[i % copies], plan, workspace, s); });
    std::printf(
        "  %-8s cluster %d warps %d tiles %d cw %d parts %ld blocks %4ld least %3ld overhead %2d merges %4ld: %8.2f us"
        "  %5.1f%%\n",
        what, plan.cluster, plan.warps, plan.column_tiles, plan.column_warps, long(plan.parts), long(plan.blocks),
        long(plan.least_units), plan.item_overhead, long(plan.merges), us, 100 * floor / us);
  };
  run(chosen, "chosen");
  if (chosen.slots > 0) {
    AttentionPlan other = chosen;
    other.merges = chosen.merges > 0 ? 0 : chosen.parts == 0 ? chosen.blocks : chosen.slots / chosen.parts;
    run(other, "merge");
  }
  const auto with = [&](int warps, std::int64_t blocks_wanted, std::int64_t least, std::int64_t parts, int overhead) {
    AttentionPlan plan = chosen;
    plan.cluster = 1, plan.warps = warps;
    plan.parts = parts, plan.least_units = least;
    plan.shared_memory = core::AttentionMemory(int(D), plan.column_tiles, per_token, plan.warps, plan.columns).size;
    const std::int64_t items = B * KV * ((L * H / KV + plan.columns - 1) / plan.columns);
    plan.blocks = parts == 0 ? blocks_wanted : items * parts;
    plan.item_overhead = overhead;
    plan.slots = parts == 1 ? 0 : parts == 0 ? 2 * plan.blocks : items * parts;
    plan.merges = 0;
    plan.workspace_size = core::slot_counters_size(plan.slots) + plan.slots * plan.columns * (D + 4) * 4;
    return plan;
  };
  const std::int64_t sms = limits.multiprocessors;
  for (int warps : {8, 4}) {
    if (chosen.column_warps > warps) continue;
    const std::int64_t tiles = B * N / bs * KV;
    for (std::int64_t n : {sms, 2 * sms, 4 * sms})
      for (std::int64_t least : {warps, 4 * warps}) {
        if (least > warps && tiles / n > least) continue;
        for (int overhead : {0, 16, 32, 64, 128})
          if (ragged || overhead == 0) run(with(warps, n, least, 0, overhead), "share");
      }
    for (std::int64_t parts : {1, 2, 4, 8, 16, 32}) {
      const AttentionPlan plan = with(warps, 0, 1, parts, 0);
      if (plan.workspace_size > (256 << 20) || plan.blocks < sms / 4 || (parts > 1 && plan.blocks > 6 * sms)) continue;
      run(plan, "parts");
    }
  }
  check(cudaDeviceSynchronize());
}
