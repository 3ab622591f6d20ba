// The paged cache on CUDA without torch, against the CPU backend, on allocations of exactly the size the views need: a memory
// checker sees every byte read or written beside them.
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "core/formats.h"
#include "cuda_support.h"
#include "fp8kv/kv_cache.h"
#include "fp8kv/rope.h"
#include "support.h"

namespace fp8kv {
namespace {

using testing_support::Cuda;
using testing_support::error_of;
using testing_support::Sizes;
using testing_support::Tensor;

// Where K and V lie in the one tensor of both.
enum class Store { Nhd, Hnd, HalvesOfBlocks, HalvesOfHeads };

struct Case {
  const char* name;
  std::int64_t tokens, heads, head_size, blocks, block_size;
  Store store = Store::Nhd;
  bool per_head = true;
  std::int64_t skip = 0;   // elements before the first of each tensor
  std::int64_t gap = 0;    // elements between the rows of key and value, as in a fused QKV tensor
  std::int64_t space = 1;  // stride of head_size in key and value
};

const Case kCases[] = {
    {"one_token", 1, 8, 128, 4, 16},
    {"nhd", 37, 8, 128, 6, 16},
    {"nhd_tensor", 37, 8, 128, 6, 16, Store::Nhd, false},
    {"hnd", 37, 8, 128, 6, 16, Store::Hnd},
    {"fused", 37, 4, 64, 6, 16, Store::HalvesOfBlocks, true, 0, 512},
    {"halves_of_heads", 37, 4, 64, 6, 16, Store::HalvesOfHeads, true, 8, 64},
    {"head_1", 20, 3, 1, 5, 7},
    {"head_20", 20, 3, 20, 5, 7, Store::Hnd, true, 3},
    {"head_20_merged", 20, 2, 20, 5, 7, Store::Nhd, false},
    {"head_80", 20, 3, 80, 5, 7, Store::HalvesOfBlocks},
    {"head_120_misaligned", 20, 3, 120, 5, 7, Store::Nhd, true, 5, 3},
    {"head_256", 9, 2, 256, 5, 4, Store::Hnd},
    {"head_576", 9, 1, 576, 5, 4},
    {"head_577", 9, 2, 577, 5, 4, Store::Hnd, true, 1},
    {"head_1032", 9, 2, 1032, 5, 4},
    {"spaced", 9, 2, 40, 5, 4, Store::Nhd, true, 1, 0, 3},
    {"many_tokens", 517, 8, 128, 40, 16},
    {"no_tokens", 0, 2, 64, 5, 4},
    {"no_blocks", 9, 2, 64, 0, 4},
};

struct Formats {
  DType real, element;
};

struct Param {
  Case c;
  Formats formats;
};

// Scales and offsets of K and V. Heads: scales per tensor or head, as the case says.
enum class Form { Heads, ScalesOfKey, Scales, ScalesAndOffsets, OffsetsOfKey, Strided };

// The forms of a format, the usual one first.
std::vector<Form> forms_of(DType element) {
  if (!core::is_quantized(element)) return {Form::Heads};
  return {Form::Heads, Form::ScalesOfKey, Form::Scales, Form::ScalesAndOffsets, Form::OffsetsOfKey, Form::Strided};
}

struct Parameters {
  Tensor k_scale, v_scale;
  std::optional<Tensor> k_offset{}, v_offset{};

  void upload() {
    for (Tensor* t : {&k_scale, &v_scale}) t->upload();
    for (auto* t : {&k_offset, &v_offset})
      if (*t) (*t)->upload();
  }
};

// `at(tensor)`, if there is one.
template <class At>
std::optional<TensorView> optional_at(const At& at, std::optional<Tensor>& tensor) {
  return tensor ? std::optional(at(*tensor)) : std::nullopt;
}

constexpr auto kOnHost = [](Tensor& t) { return t.on_host(); };
constexpr auto kOnDevice = [](Tensor& t) { return t.on_device(); };

class CudaCache : public Cuda, public testing::WithParamInterface<Param> {
 protected:
  // Of FP8 where the caches are.
  static DType query_out_dtype(const Formats& formats) {
    return core::is_fp8(formats.element) ? formats.element : formats.real;
  }

  // The caches of K and V in one tensor.
  static Tensor make_caches(const Case& c, DType element) {
    const std::int64_t n = c.blocks, s = c.block_size, h = c.heads, d = c.head_size;
    Sizes sizes{2, n, s, h, d}, strides;
    switch (c.store) {
      case Store::Nhd: strides = {n * s * h * d, s * h * d, h * d, d, 1}; break;
      case Store::Hnd: strides = {n * s * h * d, s * h * d, d, s * d, 1}; break;
      case Store::HalvesOfBlocks: strides = {s * h * d, 2 * s * h * d, h * d, d, 1}; break;
      case Store::HalvesOfHeads: strides = {d, 2 * s * h * d, 2 * h * d, 2 * d, 1}; break;
    }
    return Tensor(element, sizes, strides, c.skip);
  }

  static Tensor make_rows(const Case& c, DType real) {
    return Tensor(real, {c.tokens, c.heads, c.head_size},
                  {c.heads * c.head_size * c.space + c.gap, c.head_size * c.space, c.space}, c.skip);
  }

  // Distinct slots in any order, some of them negative. `beyond`: in place of these.
  Tensor make_slots(const Case& c, std::int64_t beyond = -1) {
    Tensor slots(DType::Int64, {c.tokens}, {2}, 0);
    std::vector<std::int64_t> all(std::max(c.tokens, c.blocks * c.block_size));
    std::iota(all.begin(), all.end(), 0);
    for (auto& slot : all)
      if (slot >= c.blocks * c.block_size) slot = -1;
    std::shuffle(all.begin(), all.end(), random);
    auto* values = reinterpret_cast<std::int64_t*>(slots.bytes().data());
    for (std::int64_t t = 0; t < c.tokens; ++t) values[2 * t] = t % 5 == 3 || all[t] < 0 ? beyond : all[t];
    return slots;
  }

  // `of_slots`: the scales of K are those of a dynamic append.
  Parameters make_parameters(const Case& c, Form form, bool of_slots = false) {
    const bool strided = form == Form::Strided;
    const auto channels = [&] {
      return Tensor(DType::Float32, {c.heads, c.head_size}, {strided ? 2 * c.head_size + 1 : c.head_size, strided ? 2 : 1},
                    strided ? 1 : 0);
    };
    const auto scale = [&](bool each) {
      return each ? channels() : Tensor(DType::Float32, {c.per_head ? c.heads : 1, 1}, {2, 1}, 0);
    };
    const bool of_heads = form == Form::Heads || form == Form::OffsetsOfKey;
    const Sizes slots{c.blocks, c.block_size, c.heads}, steps{c.block_size * c.heads, c.heads, 1};
    Parameters all{of_slots ? Tensor(DType::Float32, slots, steps, 0) : scale(!of_heads),
                   scale(!of_heads && form != Form::ScalesOfKey)};
    if (form >= Form::ScalesAndOffsets) all.k_offset.emplace(channels());
    if (form == Form::ScalesAndOffsets || strided) all.v_offset.emplace(channels());
    fill_scales(all.k_scale), fill_scales(all.v_scale);
    for (auto* t : {&all.k_offset, &all.v_offset})
      if (*t) fill_offsets(**t);
    all.upload();
    return all;
  }

  static TensorView half(TensorView view, std::int64_t which) {
    view.data = static_cast<char*>(view.data) + which * view.strides[0] * size_of(view.dtype);
    --view.ndim;
    for (int i = 0; i < view.ndim; ++i) view.sizes[i] = view.sizes[i + 1], view.strides[i] = view.strides[i + 1];
    return view;
  }
};

TEST_P(CudaCache, AppendGivesTheBytesOfTheCpu) {
  const auto& [c, formats] = GetParam();
  for (Form form : forms_of(formats.element)) {
    Tensor key = make_rows(c, formats.real), value = make_rows(c, formats.real), caches = make_caches(c, formats.element);
    Tensor slots = make_slots(c);
    Parameters parameters = make_parameters(c, form);
    fill_reals(key), fill_reals(value);
    for (Tensor* t : {&key, &value, &caches, &slots}) t->upload();
    const auto problem = [&](const auto& at) {
      return CacheAppend{at(key),
                         at(value),
                         half(at(caches), 0),
                         half(at(caches), 1),
                         at(slots),
                         formats.element,
                         at(parameters.k_scale),
                         at(parameters.v_scale),
                         optional_at(at, parameters.k_offset),
                         optional_at(at, parameters.v_offset)};
    };
    cuda::run(problem(kOnDevice));
    cpu::run(problem(kOnHost));
    SCOPED_TRACE(static_cast<int>(form));
    expect_same(caches, "cache");
  }
}

TEST_P(CudaCache, SlotsBeyondTheCacheAreSkipped) {
  const auto& [c, formats] = GetParam();
  Tensor key = make_rows(c, formats.real), value = make_rows(c, formats.real), caches = make_caches(c, formats.element);
  Tensor scale(DType::Float32, {1}, {1}, 0);
  fill_reals(key), fill_reals(value), fill_scales(scale);
  for (std::int64_t beyond : {c.blocks * c.block_size, c.blocks * c.block_size + (std::int64_t{1} << 32), INT64_MAX}) {
    const auto before = random;
    Tensor slots = make_slots(c, beyond);
    for (Tensor* t : {&key, &value, &caches, &slots, &scale}) t->upload();
    cuda::run(CacheAppend{key.on_device(), value.on_device(), half(caches.on_device(), 0), half(caches.on_device(), 1),
                          slots.on_device(), formats.element, scale.on_device(), scale.on_device()});
    random = before;
    Tensor valid = make_slots(c);
    cpu::run(CacheAppend{key.on_host(), value.on_host(), half(caches.on_host(), 0), half(caches.on_host(), 1), valid.on_host(),
                         formats.element, scale.on_host(), scale.on_host()});
    expect_same(caches, "cache");
  }
}

TEST_P(CudaCache, DynamicAppendGivesTheBytesOfTheCpu) {
  const auto& [c, formats] = GetParam();
  if (!core::is_quantized(formats.element)) return;  // it quantizes
  for (Form form : {Form::Heads, Form::ScalesAndOffsets, Form::OffsetsOfKey, Form::Strided}) {
    Tensor key = make_rows(c, formats.real), value = make_rows(c, formats.real), caches = make_caches(c, formats.element);
    Tensor slots = make_slots(c);
    Tensor scales(DType::Float32, {2, c.blocks, c.block_size, c.heads},
                  {c.blocks * c.block_size * c.heads, c.block_size * c.heads, 1, c.block_size}, 1);
    Parameters parameters = make_parameters(c, form);
    fill_reals(key), fill_reals(value);
    for (Tensor* t : {&key, &value, &caches, &slots, &scales}) t->upload();
    const auto problem = [&](const auto& at) {
      return CacheAppendDynamic{at(key),
                                at(value),
                                half(at(caches), 0),
                                half(at(caches), 1),
                                half(at(scales), 0),
                                half(at(scales), 1),
                                at(slots),
                                formats.element,
                                optional_at(at, parameters.k_offset),
                                optional_at(at, parameters.v_offset)};
    };
    cuda::run(problem(kOnDevice));
    cpu::run(problem(kOnHost));
    SCOPED_TRACE(static_cast<int>(form));
    expect_same(scales, "scales");
    expect_same(caches, "cache");
  }
}

// Without a norm, whose sum has no fixed order. Modes 3 and 4 have three positions for a token.
TEST_P(CudaCache, RopeGivesTheBytesOfTheCpu) {
  const auto& [c, formats] = GetParam();
  const std::int64_t positions = 23, groups = 2;
  for (int mode : {0, 1, 2, 3, 4}) {
    const std::int64_t axes = mode < 3 ? 1 : 3;
    const std::int64_t rotary_dim = c.head_size % 16 ? c.head_size / 2 * 2 : c.head_size / 2;
    if (mode > 0 && rotary_dim < 2) continue;
    for (Form form : forms_of(formats.element)) {
      Tensor key = make_rows(c, formats.real), value = make_rows(c, formats.real), caches = make_caches(c, formats.element);
      Case of_query = c;
      of_query.heads = groups * c.heads;
      Tensor query = make_rows(of_query, formats.real);
      Tensor out = make_rows(of_query, query_out_dtype(formats));
      Tensor slots = make_slots(c), table(DType::Float32, {positions, rotary_dim}, {rotary_dim + c.gap, 1}, c.skip);
      Tensor where =
          axes == 1 ? Tensor(DType::Int32, {c.tokens}, {1}, 0) : Tensor(DType::Int32, {axes, c.tokens}, {c.tokens, 1}, 0);
      auto* position = reinterpret_cast<std::int32_t*>(where.bytes().data());
      for (std::int64_t t = 0; t < axes * c.tokens; ++t) position[t] = static_cast<std::int32_t>(random() % positions);
      Tensor q_scale(DType::Float32, {c.heads}, {1}, 0);
      Parameters parameters = make_parameters(c, form);
      fill_reals(key), fill_reals(value), fill_reals(query), fill_reals(table), fill_scales(q_scale);
      for (Tensor* t : {&key, &value, &query, &out, &caches, &slots, &table, &where, &q_scale}) t->upload();
      const auto problem = [&](const auto& at) {
        RopeAppend p{.query = at(query),
                     .key = at(key),
                     .value = at(value),
                     .query_out = at(out),
                     .key_cache = half(at(caches), 0),
                     .value_cache = half(at(caches), 1),
                     .slot_mapping = at(slots),
                     .kv_cache_dtype = formats.element,
                     .q_scale = at(q_scale),
                     .k_scale = at(parameters.k_scale),
                     .v_scale = at(parameters.v_scale)};
        if (mode > 0) p.positions = at(where), p.cos_sin_cache = at(table), p.is_neox = mode % 2 == 1;
        if (axes == 3) {
          const std::int64_t count = rotary_dim / 2, part = count / 3;
          p.mrope_section = {count - 2 * part, part, part}, p.mrope_interleaved = mode == 4;
        }
        p.k_offset = optional_at(at, parameters.k_offset), p.v_offset = optional_at(at, parameters.v_offset);
        return p;
      };
      cuda::run(problem(kOnDevice));
      cpu::run(problem(kOnHost));
      SCOPED_TRACE(static_cast<int>(form));
      expect_same(out, "query_out");
      expect_same(caches, "cache");
    }
  }
}

// Positions and slots at random, with norms: whatever they say, nothing else is touched.
TEST_P(CudaCache, RopeSurvivesNonsense) {
  const auto& [c, formats] = GetParam();
  if (c.head_size < 2) return;
  Tensor key = make_rows(c, formats.real), value = make_rows(c, formats.real), caches = make_caches(c, formats.element);
  Tensor out = make_rows(c, query_out_dtype(formats));
  Tensor slots(DType::Int64, {c.tokens}, {1}, 0), where(DType::Int64, {3, c.tokens}, {c.tokens, 1}, 0),
      scale(DType::Float32, {1}, {1}, 0);
  Tensor table(DType::Float32, {5, 2}, {2, 1}, 0), weight(DType::Float32, {c.head_size}, {1}, 0);
  fill_reals(key), fill_reals(value), fill_reals(table), fill_reals(weight), fill_scales(scale);
  for (Tensor* t : {&slots, &where}) {
    auto* values = reinterpret_cast<std::int64_t*>(t->bytes().data());
    for (std::int64_t i = 0; i < t->on_host().numel(); ++i)  // far too large, or negative
      values[i] =
          random() % 2 == 0 ? (static_cast<std::int64_t>(random()) + 1) << 16 : -1 - static_cast<std::int64_t>(random());
  }
  for (Tensor* t : {&key, &value, &out, &caches, &slots, &table, &where, &scale, &weight}) t->upload();
  RopeAppend p{key.on_device(),
               key.on_device(),
               value.on_device(),
               out.on_device(),
               half(caches.on_device(), 0),
               half(caches.on_device(), 1),
               slots.on_device(),
               formats.element,
               scale.on_device(),
               scale.on_device(),
               scale.on_device()};
  p.positions = where.on_device(), p.cos_sin_cache = table.on_device(), p.mrope_section = {1, 0, 0};
  p.q_norm_weight = p.k_norm_weight = weight.on_device();
  cuda::run(p);
  p.positions->ndim = 1, p.positions->sizes[0] = c.tokens, p.positions->strides[0] = 1, p.mrope_section.reset();
  cuda::run(p);
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  expect_same(out, "query_out");
  expect_same(caches, "cache");
}

// Sequences of uneven lengths, some empty; `wrong` writes nonsense into the entries of the table that are not needed.
TEST_P(CudaCache, GatherGivesTheBytesOfTheCpu) {
  const auto& [c, formats] = GetParam();
  if (c.blocks == 0) return;  // nothing to gather from
  for (Form form : forms_of(formats.element))
    for (bool of_slots : {false, true}) {
      Tensor key = make_rows(c, formats.real), value = make_rows(c, formats.real), caches = make_caches(c, formats.element);
      const std::int64_t sequences = 11, max_blocks = c.blocks + 1;
      Tensor table(DType::Int32, {sequences, max_blocks}, {max_blocks + 3, 1}, 0), sums(DType::Int32, {sequences + 1}, {1}, 0),
          starts(DType::Int32, {sequences}, {1}, 0);
      Parameters parameters = make_parameters(c, form, of_slots);
      fill_reals(caches);
      auto* table_data = reinterpret_cast<std::int32_t*>(table.bytes().data());
      auto* sum = reinterpret_cast<std::int32_t*>(sums.bytes().data());
      auto* start = reinterpret_cast<std::int32_t*>(starts.bytes().data());
      sum[0] = 0;
      for (std::int64_t s = 0; s < sequences; ++s) {
        start[s] = static_cast<std::int32_t>(random() % c.block_size);
        const std::int64_t room = std::min(c.tokens - sum[s], (c.blocks - 1) * c.block_size);
        const std::int64_t length = s % 3 == 1 || room <= 0 ? 0 : random() % (std::min<std::int64_t>(room, 9) + 1);
        sum[s + 1] = sum[s] + static_cast<std::int32_t>(length);
        for (std::int64_t b = 0; b < max_blocks; ++b)
          table_data[s * (max_blocks + 3) + b] = b * c.block_size < start[s] + length ? random() % c.blocks : 0x7fffffff - b;
      }
      for (Tensor* t : {&key, &value, &caches, &table, &sums, &starts}) t->upload();
      const auto problem = [&](const auto& at) {
        return CacheGather{half(at(caches), 0),
                           half(at(caches), 1),
                           at(key),
                           at(value),
                           at(table),
                           at(sums),
                           formats.element,
                           at(parameters.k_scale),
                           at(parameters.v_scale),
                           at(starts),
                           optional_at(at, parameters.k_offset),
                           optional_at(at, parameters.v_offset)};
      };
      cuda::run(problem(kOnDevice));
      cpu::run(problem(kOnHost));
      SCOPED_TRACE(static_cast<int>(form));
      expect_same(key, "key");
      expect_same(value, "value");
    }
}

// Indices at random: whatever they say, rows come from the cache or stay.
TEST_P(CudaCache, GatherSurvivesNonsense) {
  const auto& [c, formats] = GetParam();
  Tensor key = make_rows(c, formats.real), value = make_rows(c, formats.real), caches = make_caches(c, formats.element);
  const std::int64_t sequences = 70, max_blocks = 3;
  Tensor table(DType::Int32, {sequences, max_blocks}, {max_blocks, 1}, 0), sums(DType::Int32, {sequences + 1}, {1}, 0),
      starts(DType::Int32, {sequences}, {1}, 0), scale(DType::Float32, {1}, {1}, 0);
  fill_reals(caches), fill_scales(scale);
  for (int round = 0; round < 3; ++round) {
    for (Tensor* t : {&table, &sums, &starts}) {
      auto* values = reinterpret_cast<std::int32_t*>(t->bytes().data());
      for (std::size_t i = 0; i < t->bytes().size() / 4; ++i)
        values[i] = static_cast<std::int32_t>(random() % 2 ? random() : random() % 40);
    }
    for (Tensor* t : {&key, &value, &caches, &table, &sums, &starts, &scale}) t->upload();
    cuda::run(CacheGather{half(caches.on_device(), 0), half(caches.on_device(), 1), key.on_device(), value.on_device(),
                          table.on_device(), sums.on_device(), formats.element, scale.on_device(), scale.on_device(),
                          starts.on_device()});
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    expect_same(caches, "cache");
  }
}

std::vector<Param> params() {
  constexpr Formats kFormats[] = {
      {DType::Float32, DType::E4M3},      {DType::Float16, DType::E4M3},     {DType::BFloat16, DType::E4M3},
      {DType::Float32, DType::E5M2},      {DType::Float16, DType::E5M2},     {DType::BFloat16, DType::E5M2},
      {DType::Float32, DType::Int8},      {DType::Float16, DType::Int8},     {DType::BFloat16, DType::Int8},
      {DType::BFloat16, DType::BFloat16}, {DType::Float32, DType::BFloat16}, {DType::Float16, DType::Float32},
      {DType::BFloat16, DType::Float16},  {DType::Float32, DType::Float32},  {DType::Float32, DType::Float16},
      {DType::Float16, DType::BFloat16},  {DType::BFloat16, DType::Float32}, {DType::Float16, DType::Float16}};
  std::vector<Param> all;
  for (const Case& c : kCases)
    for (const Formats& f : kFormats) all.push_back({c, f});
  return all;
}

std::string case_name(const testing::TestParamInfo<Param>& info) {
  const Formats& f = info.param.formats;
  return std::string(info.param.c.name) + "_" + name(f.real) + "_" + name(f.element);
}

INSTANTIATE_TEST_SUITE_P(Cases, CudaCache, testing::ValuesIn(params()), case_name);

// K and V with heads of two sizes, of two types, and already quantized.
TEST_F(Cuda, KAndVThatDifferGiveTheBytesOfTheCpu) {
  struct Side {
    std::int64_t head_size;
    DType row, element;
  };
  const struct {
    Side k, v;
  } problems[] = {
      {{192, DType::BFloat16, DType::E4M3}, {128, DType::BFloat16, DType::E4M3}},
      {{20, DType::Float16, DType::E4M3}, {577, DType::Float16, DType::Int8}},
      {{64, DType::Float32, DType::BFloat16}, {64, DType::Float32, DType::E5M2}},
      {{80, DType::E4M3, DType::E4M3}, {80, DType::BFloat16, DType::E4M3}},
      {{33, DType::E5M2, DType::E5M2}, {7, DType::E5M2, DType::E5M2}},
      {{64, DType::Int8, DType::Int8}, {0, DType::BFloat16, DType::Int8}},
  };
  constexpr std::int64_t kTokens = 37, kHeads = 3, kBlocks = 6, kBlockSize = 7;
  for (const auto& p : problems)
    for (std::int64_t skip : {0, 1}) {
      SCOPED_TRACE(std::string(name(p.k.row)) + " and " + name(p.v.row) + ", skip " + std::to_string(skip));
      const auto rows = [&](const Side& s, DType dtype) {
        return Tensor(dtype, {kTokens, kHeads, s.head_size}, {kHeads * s.head_size, s.head_size, 1}, skip);
      };
      const auto cache = [&](const Side& s) {
        const std::int64_t token = kHeads * s.head_size;
        return Tensor(s.element, {kBlocks, kBlockSize, kHeads, s.head_size}, {kBlockSize * token, token, s.head_size, 1}, skip);
      };
      Tensor key = rows(p.k, p.k.row), value = rows(p.v, p.v.row), key_cache = cache(p.k), value_cache = cache(p.v);
      Tensor slots(DType::Int32, {kTokens}, {1}, 0), scale(DType::Float32, {kHeads}, {1}, 0);
      auto* numbers = reinterpret_cast<std::int32_t*>(slots.bytes().data());
      for (std::int64_t t = 0; t < kTokens; ++t) numbers[t] = t % 6 == 5 ? -1 : static_cast<std::int32_t>(t * 5 % 42);
      fill_reals(key), fill_reals(value), fill_scales(scale);
      for (Tensor* t : {&key, &value, &key_cache, &value_cache, &slots, &scale}) t->upload();
      const auto append = [&](const auto& at) {
        return CacheAppend{.key = at(key),
                           .value = at(value),
                           .key_cache = at(key_cache),
                           .value_cache = at(value_cache),
                           .slot_mapping = at(slots),
                           .k_scale = at(scale),
                           .v_scale = at(scale),
                           .v_cache_dtype = p.v.element};
      };
      cuda::run(append(kOnDevice));
      cpu::run(append(kOnHost));
      expect_same(key_cache, "key_cache"), expect_same(value_cache, "value_cache");

      Tensor table(DType::Int32, {2, 3}, {3, 1}, 0), sums(DType::Int32, {3}, {1}, 0);
      const std::int32_t blocks[] = {5, 0, 3, 1, 4, 2}, lengths[] = {0, 20, 37};
      std::memcpy(table.bytes().data(), blocks, sizeof blocks), std::memcpy(sums.bytes().data(), lengths, sizeof lengths);
      Tensor keys = rows(p.k, DType::BFloat16), values = rows(p.v, DType::BFloat16);
      for (Tensor* t : {&table, &sums, &keys, &values}) t->upload();
      const auto gather = [&](const auto& at) {
        return CacheGather{.key_cache = at(key_cache),
                           .value_cache = at(value_cache),
                           .key = at(keys),
                           .value = at(values),
                           .block_table = at(table),
                           .cu_seq_lens = at(sums),
                           .k_scale = at(scale),
                           .v_scale = at(scale),
                           .v_cache_dtype = p.v.element};
      };
      cuda::run(gather(kOnDevice));
      cpu::run(gather(kOnHost));
      expect_same(keys, "key"), expect_same(values, "value");
    }
}

// Some kernels have a thread for each element to write: here there is none.
TEST_F(Cuda, RopeOfNoQueryHeadsAndNoSlotsDoesNothing) {
  constexpr std::int64_t kTokens = 5, kHeads = 2, kHeadSize = 64;
  for (DType real : {DType::BFloat16, DType::Float32})
    for (bool with_norm : {false, true}) {
      Tensor query(real, {kTokens, 0, kHeadSize}, {0, kHeadSize, 1}, 0);
      Tensor out(DType::E4M3, {kTokens, 0, kHeadSize}, {0, kHeadSize, 1}, 0);
      Tensor rows(real, {kTokens, kHeads, kHeadSize}, {kHeads * kHeadSize, kHeadSize, 1}, 0);
      Tensor key_cache(DType::E4M3, {0, 16, kHeads, kHeadSize}, {16 * kHeads * kHeadSize, kHeads * kHeadSize, kHeadSize, 1}, 0);
      Tensor value_cache(DType::E4M3, {0, 16, kHeads, kHeadSize}, {16 * kHeads * kHeadSize, kHeads * kHeadSize, kHeadSize, 1},
                         0);
      Tensor slots(DType::Int64, {kTokens}, {1}, 0), positions(DType::Int32, {kTokens}, {1}, 0);
      Tensor scale(DType::Float32, {1}, {1}, 0), table(DType::Float32, {9, kHeadSize}, {kHeadSize, 1}, 0);
      Tensor weight(real, {kHeadSize}, {1}, 0);
      fill_reals(rows), fill_reals(table), fill_reals(weight), fill_scales(scale);
      const std::int64_t numbers[kTokens] = {-1, 0, 7, INT64_MAX, INT64_MIN};
      std::memcpy(slots.bytes().data(), numbers, sizeof numbers);
      std::memset(positions.bytes().data(), 0, positions.bytes().size());
      for (Tensor* t : {&query, &out, &rows, &key_cache, &value_cache, &slots, &positions, &scale, &table, &weight})
        t->upload();
      RopeAppend problem{.query = query.on_device(),
                         .key = rows.on_device(),
                         .value = rows.on_device(),
                         .query_out = out.on_device(),
                         .key_cache = key_cache.on_device(),
                         .value_cache = value_cache.on_device(),
                         .slot_mapping = slots.on_device(),
                         .q_scale = scale.on_device(),
                         .k_scale = scale.on_device(),
                         .v_scale = scale.on_device(),
                         .positions = positions.on_device(),
                         .cos_sin_cache = table.on_device()};
      if (with_norm) problem.k_norm_weight = weight.on_device();
      EXPECT_EQ(error_of([&] { cuda::run(problem); }), "") << name(real);
      EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
      for (Tensor* t : {&out, &key_cache, &value_cache}) expect_same(*t, "what is written");
    }
}

}  // namespace
}  // namespace fp8kv
