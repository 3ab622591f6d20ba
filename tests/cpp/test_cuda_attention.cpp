// Attention on CUDA without torch, against the CPU backend, on allocations of exactly the size the views need: a memory checker
// sees every byte read or written beside them. The Python tests compare both with the reference.
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "cuda_support.h"
#include "fp8kv/attention.h"
#include "fp8kv/fp8.h"
#include "support.h"

namespace fp8kv {
namespace {

using testing_support::Cuda;
using testing_support::error_of;
using testing_support::Sizes;
using testing_support::Tensor;

enum class Scales { Head, Token };

struct Case {
  const char* name;
  std::int64_t heads, kv_heads, head_size, block_size;
  std::vector<int> lengths;
  std::vector<int> queries;  // empty: one each
  std::int64_t num_splits = 0;
  DType cache = DType::E4M3;
  Scales scales = Scales::Head;
  std::int64_t window = 0;
  bool hnd = false;
  std::int64_t skip = 0;         // elements before the first of query and out
  std::int64_t v_head_size = 0;  // 0: head_size
  DType v_cache = DType::Other;  // of V; Other: `cache`
  bool shared = false;           // V is the first elements of the heads of K

  std::int64_t v_size() const { return v_head_size > 0 ? v_head_size : head_size; }
  DType v_dtype() const { return v_cache == DType::Other ? cache : v_cache; }
};

// K and V of two kinds: E4M3, scales per head, no window.
Case of_two_kinds(const char* name, std::int64_t heads, std::int64_t kv_heads, std::int64_t head_size, std::int64_t v_head_size,
                  std::vector<int> lengths, std::vector<int> queries = {}, std::int64_t num_splits = 0,
                  DType v_cache = DType::Other) {
  return {
      name, heads, kv_heads, head_size,   16,     std::move(lengths), std::move(queries), num_splits, DType::E4M3, Scales::Head,
      0,    false, 0,        v_head_size, v_cache};
}

// So many, up to `longest` tokens long.
std::vector<int> lengths_of(int count, int longest) {
  std::vector<int> lengths(count);
  for (int i = 0; i < count; ++i) lengths[i] = 37 * i * i % (longest + 1);
  return lengths;
}

Case changed(Case c, const std::function<void(Case&)>& change) {
  change(c);
  return c;
}

const Case kCases[] = {
    {"head_64", 8, 2, 64, 16, {1, 17, 200}, {}},
    {"head_96", 3, 1, 96, 16, {100, 0}, {}},
    {"head_128", 32, 8, 128, 16, {1000, 33, 2}, {}},
    {"head_128_hnd", 32, 8, 128, 32, {1000, 33, 2}, {}, 0, DType::E4M3, Scales::Head, 0, true},
    {"head_128_e5m2", 32, 8, 128, 16, {70}, {}, 0, DType::E5M2},
    {"head_192", 4, 4, 192, 16, {70, 300}, {}},
    {"head_256", 8, 1, 256, 64, {70, 300}, {}},
    {"one_part", 32, 8, 128, 16, {1000, 33, 2}, {}, 1},
    {"five_parts", 32, 8, 128, 16, {1000, 33, 2}, {}, 5},
    {"five_parts_of_few_tiles", 16, 4, 128, 16, {1000, 20, 5}, {4, 4, 4}, 5},
    {"columns_16", 16, 4, 128, 16, {300, 5}, {4, 2}},
    {"columns_32", 16, 4, 128, 16, {300, 50}, {8, 8}},
    {"columns_64", 32, 4, 128, 16, {300, 50}, {8, 8}},
    {"columns_64_of_256", 32, 4, 256, 16, {300, 50}, {8, 8}},
    {"prompts", 8, 2, 64, 16, {100, 37, 5}, {100, 20, 7}},
    {"window", 8, 2, 128, 16, {1000, 37}, {3, 1}, 0, DType::E4M3, Scales::Head, 50},
    {"scales_of_tokens", 8, 2, 128, 16, {500, 37}, {}, 0, DType::E4M3, Scales::Token},
    {"scales_of_tokens_64", 8, 2, 64, 16, {500, 37}, {5, 5}, 3, DType::E5M2, Scales::Token},
    {"one_sequence", 32, 8, 128, 16, {1900}, {}},
    {"one_sequence_64", 8, 2, 64, 16, {2000}, {}},
    {"one_sequence_256", 16, 1, 256, 64, {1500}, {}, 0, DType::E5M2},
    {"one_sequence_of_tokens", 8, 2, 192, 16, {1500}, {3}, 0, DType::E4M3, Scales::Token},
    {"one_sequence_in_a_cluster", 8, 2, 128, 16, {700}, {}},
    {"one_sequence_of_int8_in_a_cluster", 16, 4, 64, 16, {1000}, {}, 0, DType::Int8},
    {"one_sequence_of_tokens_in_a_cluster", 8, 2, 128, 32, {900}, {2}, 0, DType::E4M3, Scales::Token},
    {"one_sequence_with_a_window", 32, 8, 128, 16, {1500}, {}, 0, DType::E4M3, Scales::Head, 20},
    {"one_sequence_of_16_parts", 32, 8, 128, 16, {5000}, {}},
    {"one_sequence_of_66_parts", 8, 2, 128, 16, {9000}, {}},
    {"one_sequence_of_132_parts", 4, 1, 256, 16, {17000}, {}},
    {"more_items_than_blocks", 32, 16, 64, 16, lengths_of(70, 200), {}},
    {"more_items_than_blocks_128", 16, 16, 128, 16, lengths_of(60, 150), {}},
    {"more_items_than_blocks_256", 16, 16, 256, 16, lengths_of(20, 150), std::vector<int>(20, 2)},
    {"more_items_than_blocks_alike", 16, 16, 128, 16, std::vector<int>(64, 100), {}},
    {"misaligned", 8, 2, 128, 16, {100, 37}, {}, 0, DType::E4M3, Scales::Head, 0, false, 1},
    {"blocks_of_7", 6, 3, 80, 7, {100, 37}, {2, 1}},
    {"plain", 6, 3, 40, 7, {100, 37}, {}, 0, DType::BFloat16},
    {"no_sequences", 8, 2, 128, 16, {}, {}},
    // The grouped kernel, with 8, 16, 32 and 64 columns.
    of_two_kinds("grouped_192_128", 16, 2, 192, 128, {1000, 33, 2, 0}),
    of_two_kinds("grouped_24_16_is_generic", 4, 2, 24, 16, {100, 33, 1}),
    of_two_kinds("grouped_16_columns", 32, 2, 64, 96, {300, 5}, {4, 2}),
    of_two_kinds("grouped_32_columns", 32, 1, 576, 512, {300, 50}, {3, 1}, 1),
    of_two_kinds("grouped_64_columns", 48, 1, 192, 128, {300, 50}, {}, 3),
    of_two_kinds("grouped_72_heads", 72, 1, 48, 32, {300, 50}, {}, 5),
    of_two_kinds("grouped_of_two_formats", 8, 2, 128, 128, {300, 50}, {8, 8}, 0, DType::E5M2),
    of_two_kinds("grouped_of_int8_values", 8, 2, 96, 256, {300, 50}, {}, 0, DType::Int8),
    of_two_kinds("grouped_prompts", 8, 2, 64, 48, {100, 37, 5}, {100, 20, 7}),
    of_two_kinds("generic_of_two_formats", 6, 3, 40, 56, {100, 37}, {2, 1}, 0, DType::BFloat16),
    of_two_kinds("generic_of_plain_values", 8, 2, 64, 64, {100, 37}, {2, 1}, 0, DType::BFloat16),
    changed(of_two_kinds("latent", 128, 1, 576, 512, {1000, 33, 2}), [](Case& c) { c.shared = true; }),
    changed(of_two_kinds("latent_of_one_sequence", 16, 1, 576, 512, {3000}), [](Case& c) { c.shared = true; }),
    changed(of_two_kinds("latent_of_odd_blocks", 16, 1, 576, 512, {300, 7}),
            [](Case& c) { c.shared = true, c.block_size = 7, c.window = 50; }),
    changed(of_two_kinds("grouped_of_tokens", 8, 2, 192, 128, {500, 37}, {3, 1}, 2),
            [](Case& c) { c.scales = Scales::Token, c.hnd = true, c.block_size = 32; }),
    changed(of_two_kinds("grouped_misaligned", 8, 2, 192, 128, {100, 37}), [](Case& c) { c.skip = 1; }),
};

struct Problem {
  explicit Problem(const Case& c) : c(c) {}

  static std::int64_t rows_of(const Case& c) {
    if (c.queries.empty()) return static_cast<std::int64_t>(c.lengths.size());
    return std::accumulate(c.queries.begin(), c.queries.end(), std::int64_t{0});
  }
  static std::int64_t max_blocks_of(const Case& c) {
    std::int64_t most = 1;
    for (int length : c.lengths) most = std::max<std::int64_t>(most, (length + c.block_size - 1) / c.block_size);
    return most;
  }

  Tensor cache(DType dtype, std::int64_t d) const {
    const std::int64_t n = c.block_size, h = c.kv_heads;
    if (c.hnd) return Tensor(dtype, {blocks, n, h, d}, {n * h * d, d, n * d, 1}, 0);
    return Tensor(dtype, {blocks, n, h, d}, {n * h * d, h * d, d, 1}, 0);
  }
  Tensor heads(DType dtype, std::int64_t head_size) const {
    return Tensor(dtype, {rows, c.heads, head_size}, {c.heads * head_size, head_size, 1}, c.skip);
  }
  Tensor scale() const {
    if (c.scales == Scales::Head) return Tensor(DType::Float32, {c.kv_heads}, {1}, 0);
    return Tensor(DType::Float32, {blocks, c.block_size, c.kv_heads}, {c.block_size * c.kv_heads, c.kv_heads, 1}, 0);
  }
  static Tensor indices(std::int64_t rows, std::int64_t columns = 1) {
    return Tensor(DType::Int32, {rows, columns}, {columns, 1}, 0);
  }

  Case c;
  std::int64_t rows = rows_of(c), seqs = static_cast<std::int64_t>(c.lengths.size()), max_blocks = max_blocks_of(c);
  std::int64_t blocks = std::max<std::int64_t>(1, seqs* max_blocks);
  Tensor query = heads(DType::BFloat16, c.head_size), out = heads(DType::Float32, c.v_size());
  Tensor key_cache = cache(c.cache, c.head_size), value_cache = cache(c.v_dtype(), c.v_size());
  Tensor lse = Tensor(DType::Float32, {rows, c.heads}, {c.heads, 1}, 0);
  Tensor table = indices(seqs, max_blocks), lengths = indices(1, seqs), sums = indices(1, seqs + 1);
  Tensor k_scale = scale(), v_scale = scale();

  static TensorView row(TensorView view) {
    view.sizes[0] = view.sizes[1], view.strides[0] = view.strides[1], view.ndim = 1;
    return view;
  }

  template <class At>
  PagedAttention at(const At& at) {
    PagedAttention p{.query = at(query),
                     .key_cache = at(key_cache),
                     .value_cache = at(value_cache),
                     .out = at(out),
                     .block_table = at(table),
                     .seq_lens = row(at(lengths)),
                     .k_scale = at(k_scale),
                     .v_scale = at(v_scale),
                     .softmax_scale = 1.0f / std::sqrt(static_cast<float>(c.head_size)),
                     .sliding_window = c.window,
                     .lse = at(lse),
                     .num_splits = c.num_splits};
    if (c.v_cache != DType::Other) p.v_cache_dtype = c.v_cache;
    if (c.shared) p.value_cache = p.key_cache, p.value_cache.sizes[3] = c.v_size();
    if (!c.queries.empty())
      p.cu_query_lens = row(at(sums)), p.max_query_len = *std::max_element(c.queries.begin(), c.queries.end());
    return p;
  }
  PagedAttention on_host() {
    return at([](Tensor& t) { return t.on_host(); });
  }
  PagedAttention on_device() {
    return at([](Tensor& t) { return t.on_device(); });
  }
  void upload() {
    for (Tensor* t : {&query, &key_cache, &value_cache, &out, &lse, &table, &lengths, &sums, &k_scale, &v_scale}) t->upload();
  }
};

template <class T>
T* values(Tensor& tensor) {
  return reinterpret_cast<T*>(tensor.bytes().data());
}

class CudaAttention : public Cuda, public testing::WithParamInterface<Case> {
 protected:
  // Values of magnitude up to about 2, scales about 1, a table of distinct blocks.
  void fill(Problem& p) {
    std::uniform_real_distribution<float> real(-2.0f, 2.0f), positive(0.5f, 1.5f);
    for (Tensor* t : {&p.query, &p.key_cache, &p.value_cache}) {
      const TensorView view = t->on_host();
      for (std::size_t i = 0; i < t->bytes().size() / size_of(view.dtype); ++i) {
        const float x = real(random);
        switch (view.dtype) {
          case DType::BFloat16: values<BFloat16>(*t)[i] = from_float<BFloat16>(x); break;
          case DType::E4M3: values<E4M3>(*t)[i] = encode<E4M3>(x); break;
          case DType::Int8: values<std::int8_t>(*t)[i] = static_cast<std::int8_t>(std::lround(x)); break;
          default: values<E5M2>(*t)[i] = encode<E5M2>(x);
        }
      }
    }
    for (Tensor* t : {&p.k_scale, &p.v_scale})
      for (std::size_t i = 0; i < t->bytes().size() / 4; ++i) values<float>(*t)[i] = positive(random);
    std::vector<int> blocks(p.blocks);
    for (int i = 0; i < p.blocks; ++i) blocks[i] = i;
    std::shuffle(blocks.begin(), blocks.end(), random);
    for (std::int64_t i = 0; i < p.seqs * p.max_blocks; ++i) values<int>(p.table)[i] = blocks[i];
    values<int>(p.sums)[0] = 0;
    for (std::int64_t s = 0; s < p.seqs; ++s) {
      values<int>(p.lengths)[s] = p.c.lengths[s];
      values<int>(p.sums)[s + 1] = values<int>(p.sums)[s] + (p.c.queries.empty() ? 1 : p.c.queries[s]);
    }
  }

  // With a workspace of exactly the size it needs, of any contents.
  void run(const PagedAttention& problem) {
    Tensor workspace = make_workspace(problem);
    for (auto& byte : workspace.bytes()) byte = static_cast<unsigned char>(random());
    run(problem, workspace);
  }

  // As in a usual decode step: a result in 16 bits, and nothing else.
  static PagedAttention step_of(Problem& p, const Tensor& out) {
    PagedAttention step = p.on_device();
    step.out = out.on_device(), step.lse.reset();
    return step;
  }

  static Tensor make_workspace(const PagedAttention& problem) {
    return Tensor(DType::UInt8, {std::max<std::int64_t>(1, cuda::workspace_size(problem))}, {1}, 0);
  }

  static void run(PagedAttention problem, Tensor& workspace) {
    workspace.upload();
    problem.workspace = workspace.on_device();
    cuda::run(problem);
    testing_support::check(cudaDeviceSynchronize());
  }

  static void expect_near(Tensor& tensor, float tolerance, const char* what) {
    const std::vector<unsigned char> downloaded = tensor.download();
    const float* actual = reinterpret_cast<const float*>(downloaded.data());
    const float* expected = values<float>(tensor);
    for (std::size_t i = 0; i < downloaded.size() / 4; ++i)
      ASSERT_TRUE(actual[i] == expected[i] || std::abs(actual[i] - expected[i]) <= tolerance)
          << what << " " << i << ": expected " << expected[i] << ", got " << actual[i];
  }
};

// Both are within 2^-8 of the largest value, 3, of the exact result.
TEST_P(CudaAttention, GivesTheResultOfTheCpu) {
  Problem p(GetParam());
  fill(p);
  p.upload();
  run(p.on_device());
  cpu::run(p.on_host());
  expect_near(p.out, 0x1p-7f * 3.0f, "out");
  expect_near(p.lse, 4e-3f, "lse");
}

TEST_P(CudaAttention, SequencesMayBeShorterThanTheirTables) {
  Problem p(GetParam());
  fill(p);
  for (std::int64_t s = 0; s < p.seqs; ++s) values<int>(p.lengths)[s] /= 3;
  p.upload();
  run(p.on_device());
  cpu::run(p.on_host());
  expect_near(p.out, 0x1p-7f * 3.0f, "out");
  expect_near(p.lse, 4e-3f, "lse");
}

TEST_P(CudaAttention, GivesTheSameBitsAgain) {
  Problem p(GetParam());
  fill(p);
  p.upload();
  run(p.on_device());
  p.out.bytes() = p.out.download(), p.lse.bytes() = p.lse.download();
  run(p.on_device());
  expect_same(p.out, "out");
  expect_same(p.lse, "lse");
}

// What the call before left there, too.
TEST_P(CudaAttention, TheWorkspaceMayHoldAnything) {
  Problem p(GetParam());
  fill(p);
  p.upload();
  Tensor workspace = make_workspace(p.on_device());
  run(p.on_device(), workspace);
  p.out.bytes() = p.out.download(), p.lse.bytes() = p.lse.download();
  for (int contents : {-1, 0x00, 0xff}) {
    if (contents < 0)
      workspace.bytes() = workspace.download();
    else
      std::fill(workspace.bytes().begin(), workspace.bytes().end(), static_cast<unsigned char>(contents));
    for (Tensor* t : {&p.out, &p.lse}) {
      std::vector<unsigned char> expected(t->bytes().size(), 0xA5);
      t->bytes().swap(expected);
      t->upload();
      t->bytes().swap(expected);
    }
    run(p.on_device(), workspace);
    expect_same(p.out, "out");
    expect_same(p.lse, "lse");
  }
}

// Usual decode steps have a kernel of their own.
TEST_P(CudaAttention, AResultIn16BitsIsThatIn32Rounded) {
  Problem p(GetParam());
  fill(p);
  p.upload();
  run(p.on_device());
  const std::vector<unsigned char> exact = p.out.download();
  Tensor out = p.heads(DType::BFloat16, p.c.v_size());
  out.upload();
  run(step_of(p, out));
  const std::vector<unsigned char> rounded = out.download();
  ASSERT_EQ(exact.size(), 2 * rounded.size());
  for (std::size_t i = p.c.skip; i < exact.size() / 4; ++i) {
    const float expected = reinterpret_cast<const float*>(exact.data())[i];
    const float actual = decode(reinterpret_cast<const BFloat16*>(rounded.data())[i]);
    ASSERT_NEAR(actual, expected, 0x1p-8f * std::abs(expected)) << i;
  }
}

// Index tensors and values of any contents: whatever they say, nothing else is touched.
TEST_P(CudaAttention, SurvivesNonsense) {
  Problem p(GetParam());
  for (int round = 0; round < 4; ++round) {
    fill(p);
    for (Tensor* t : {&p.query, &p.key_cache, &p.value_cache, &p.k_scale, &p.v_scale}) fill_reals(*t);
    for (Tensor* t : {&p.table, &p.lengths, &p.sums})
      for (std::size_t i = 0; i < t->bytes().size() / 4; ++i)
        values<int>(*t)[i] = round % 2 ? static_cast<int>(random() % 200) - 20 : static_cast<int>(random());
    p.upload();
    run(p.on_device());
    Tensor out = p.heads(DType::BFloat16, p.c.v_size());
    run(step_of(p, out));
  }
}

INSTANTIATE_TEST_SUITE_P(Cases, CudaAttention, testing::ValuesIn(kCases),
                         [](const auto& info) { return std::string(info.param.name); });

class CudaAttentionWorkspace : public CudaAttention {};

TEST_F(CudaAttentionWorkspace, TooSmallIsRefused) {
  Problem p(kCases[2]);
  fill(p);
  p.upload();
  PagedAttention problem = p.on_device();
  const std::int64_t size = cuda::workspace_size(problem);
  ASSERT_GT(size, 0);
  const std::string expected =
      "fp8kv::paged_attention: workspace must have at least " + std::to_string(size) + " bytes, aligned to 16, got ";
  EXPECT_EQ(error_of([&] { cuda::run(problem); }), expected + "None");
  Tensor workspace(DType::UInt8, {size + 8}, {1}, 0);
  problem.workspace = workspace.on_device();
  problem.workspace->sizes[0] = size - 1;
  EXPECT_EQ(error_of([&] { cuda::run(problem); }), expected + std::to_string(size - 1) + " bytes");
  problem.workspace->sizes[0] = size;
  problem.workspace->data = static_cast<char*>(problem.workspace->data) + 8;
  EXPECT_EQ(error_of([&] { cuda::run(problem); }), expected + "an address that is not");
  expect_same(p.out, "out");
}

}  // namespace
}  // namespace fp8kv
