// Validation of the attention step: every sentence that the cache alone does not have, and the RopeLayout that backends work
// from.
#include <gtest/gtest.h>

#include <array>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "core/rope_layout.h"
#include "problems.h"

namespace fp8kv::core {
namespace {

using namespace testing_support;

const std::string kRope = "fp8kv::rope_quant_and_cache: ";

TensorView query(const Sizes& sizes, DType dtype = DType::BFloat16) { return view_at(kQuery, dtype, sizes); }
TensorView query_out(const Sizes& sizes, DType dtype = DType::E4M3) { return view_at(kQueryOut, dtype, sizes); }
TensorView q_scale(const Sizes& sizes, const Sizes& strides = {}) {
  return view_at(kQueryScale, DType::Float32, sizes, strides);
}
TensorView cos_sin(const Sizes& sizes, const Sizes& strides = {}) { return view_at(kCosSin, DType::Float32, sizes, strides); }
TensorView positions(const Sizes& sizes) { return view_at(kPositions, DType::Int64, sizes); }
TensorView offset(std::uintptr_t address, const Sizes& sizes) { return view_at(address, DType::Float32, sizes); }
TensorView weight(const Sizes& sizes, DType dtype = DType::BFloat16) { return view_at(kKeyWeight, dtype, sizes); }

void set_sections(RopeAppend& p, const std::array<std::int64_t, 3>& lengths) {
  p.positions = positions({3, 5}), p.mrope_section = lengths;
}

void set_caches(RopeAppend& p, DType dtype) { p.key_cache.dtype = p.value_cache.dtype = dtype; }

struct Mistake {
  const char* name;
  std::function<void(RopeAppend&)> make;
  const char* expected;  // the sentence without the op; "": it is none
};

void PrintTo(const Mistake& m, std::ostream* os) { *os << m.name; }

const Mistake kMistakes[] = {
    {"none", [](auto&) {}, ""},
    // What it has in common with the other problems of the cache.
    {"value_dtype", [](auto& p) { p.value.dtype = DType::Float16; }, "value must be bfloat16 as key is, got float16"},
    {"format", [](auto& p) { p.kv_cache_dtype = DType::E5M2; },
     "key_cache must be float8_e5m2 or uint8 as kv_cache_dtype is \"fp8_e5m2\", got float8_e4m3fn"},
    {"key_rows", [](auto& p) { p.key = key({4, 4, 64}); },
     "key must have at least 5 rows, one for each element of slot_mapping, got shape [4, 4, 64]"},
    {"k_scales", [](auto& p) { p.k_scale = k_scale({8}); },
     "k_scale must have 1 or num_kv_heads=4 elements, or the shape [num_kv_heads, head_size=64], got shape [8]"},
    {"channel_scales", [](auto& p) { p.v_scale = v_scale({4, 64}, {1, 5}); }, ""},
    {"offsets", [](auto& p) { p.k_offset = offset(kKeyOffset, {4, 64}), p.v_offset = offset(kValueOffset, {4, 64}); }, ""},
    {"offset_shape", [](auto& p) { p.v_offset = offset(kValueOffset, {64, 4}); },
     "v_offset must have the shape [num_kv_heads=4, head_size=64], got shape [64, 4]"},
    {"offset_dtype", [](auto& p) { p.k_offset = offset(kKeyOffset, {4, 64}), p.k_offset->dtype = DType::Float16; },
     "k_offset must be float32, got float16"},
    {"offset_of_plain_caches",
     [](auto& p) {
       set_caches(p, DType::BFloat16), p.query_out.dtype = DType::BFloat16, p.k_offset = offset(kKeyOffset, {4, 64});
     },
     "k_offset must be None as the caches are not quantized, got shape [4, 64]"},
    {"int8_caches", [](auto& p) { set_caches(p, DType::Int8), p.query_out.dtype = DType::BFloat16; }, ""},
    {"int8_queries", [](auto& p) { set_caches(p, DType::Int8), p.query_out.dtype = DType::Int8; },
     "query_out must be float32, float16 or bfloat16 as the caches are not FP8, got int8"},
    // Query.
    {"query_dtype", [](auto& p) { p.query.dtype = DType::Float16; }, "query must be bfloat16 as key is, got float16"},
    {"query_device", [](auto& p) { p.query.device = kCuda; }, "query must be on the device of key, cpu, got cuda:0"},
    {"query_dims", [](auto& p) { p.query = query({5, 512}); },
     "query must have the shape [num_tokens, num_heads, head_size], got shape [5, 512]"},
    {"query_head_size", [](auto& p) { p.query = query({5, 8, 32}); },
     "query must have num_heads=8 and head_size=64, got shape [5, 8, 32]"},
    {"query_rows", [](auto& p) { p.query = query({4, 8, 64}); },
     "query must have at least 5 rows, one for each element of slot_mapping, got shape [4, 8, 64]"},
    {"query_heads", [](auto& p) { p.query = query({5, 6, 64}), p.query_out = query_out({5, 6, 64}); },
     "query must have a number of heads that is a multiple of num_kv_heads=4, got num_heads=6"},
    {"fewer_query_heads", [](auto& p) { p.query = query({5, 2, 64}), p.query_out = query_out({5, 2, 64}); },
     "query must have a number of heads that is a multiple of num_kv_heads=4, got num_heads=2"},
    {"no_query_heads", [](auto& p) { p.query = query({5, 0, 64}), p.query_out = query_out({5, 0, 64}); }, ""},
    {"more_rows_of_query", [](auto& p) { p.query = query({9, 8, 64}), p.query_out = query_out({7, 8, 64}); }, ""},
    // What Q becomes.
    {"out_heads", [](auto& p) { p.query_out = query_out({5, 4, 64}); },
     "query_out must have num_heads=8 and head_size=64, got shape [5, 4, 64]"},
    {"out_rows", [](auto& p) { p.query_out = query_out({3, 8, 64}); },
     "query_out must have at least 5 rows, one for each element of slot_mapping, got shape [3, 8, 64]"},
    {"out_device", [](auto& p) { p.query_out.device = kCuda; }, "query_out must be on the device of key, cpu, got cuda:0"},
    {"out_of_another_fp8", [](auto& p) { p.query_out.dtype = DType::E5M2; },
     "query_out must be float8_e4m3fn or uint8 as the caches are, or float32, float16 or bfloat16, got float8_e5m2"},
    {"out_as_bytes", [](auto& p) { p.query_out.dtype = DType::UInt8; }, ""},
    {"out_not_quantized", [](auto& p) { p.query_out.dtype = DType::Float16; }, ""},
    {"out_with_plain_caches", [](auto& p) { set_caches(p, DType::BFloat16); },
     "query_out must be float32, float16 or bfloat16 as the caches are not FP8, got float8_e4m3fn"},
    {"all_plain", [](auto& p) { set_caches(p, DType::BFloat16), p.query_out.dtype = DType::BFloat16; }, ""},
    {"q_scale_dtype", [](auto& p) { p.q_scale.dtype = DType::Float16; }, "q_scale must be float32, got float16"},
    {"q_scale_count", [](auto& p) { p.q_scale = q_scale({2}); },
     "q_scale must have 1, num_kv_heads=4 or num_heads=8 elements, got shape [2]"},
    {"q_scale_strides", [](auto& p) { p.q_scale = q_scale({2, 2}, {5, 1}); },
     "q_scale must be evenly strided, got several strides in shape [2, 2]"},
    {"q_scale_of_kv_heads", [](auto& p) { p.q_scale = q_scale({4}); }, ""},
    {"q_scale_of_heads", [](auto& p) { p.q_scale = q_scale({8}); }, ""},
    // RoPE.
    {"positions_alone", [](auto& p) { p.cos_sin_cache.reset(); }, "cos_sin_cache must be given with positions, got None"},
    {"table_alone", [](auto& p) { p.positions.reset(); }, "positions must be given with cos_sin_cache, got None"},
    {"no_rope", [](auto& p) { p.positions.reset(), p.cos_sin_cache.reset(); }, ""},
    {"positions_dtype", [](auto& p) { p.positions->dtype = DType::Int16; }, "positions must be int32 or int64, got int16"},
    {"positions_int32", [](auto& p) { p.positions->dtype = DType::Int32; }, ""},
    {"positions_dims", [](auto& p) { p.positions = positions({5, 1}); },
     "positions must have the shape [num_tokens], got shape [5, 1]"},
    {"positions_count", [](auto& p) { p.positions = positions({4}); },
     "positions must have at least 5 elements, as slot_mapping has, got shape [4]"},
    {"more_positions", [](auto& p) { p.positions = positions({6}); }, ""},
    {"table_dtype", [](auto& p) { p.cos_sin_cache->dtype = DType::Float16; },
     "cos_sin_cache must be float32 or bfloat16 as query is, got float16"},
    {"table_of_the_type_of_query", [](auto& p) { p.cos_sin_cache->dtype = DType::BFloat16; }, ""},
    {"table_device", [](auto& p) { p.cos_sin_cache->device = kCuda; },
     "cos_sin_cache must be on the device of query, cpu, got cuda:0"},
    {"table_dims", [](auto& p) { p.cos_sin_cache = cos_sin({100, 2, 16}); },
     "cos_sin_cache must have the shape [max_position, rotary_dim], got shape [100, 2, 16]"},
    {"odd_rotary_dim", [](auto& p) { p.cos_sin_cache = cos_sin({100, 31}); },
     "cos_sin_cache must have an even rotary_dim from 2 to head_size=64, got shape [100, 31]"},
    {"no_rotary_dim", [](auto& p) { p.cos_sin_cache = cos_sin({100, 0}); },
     "cos_sin_cache must have an even rotary_dim from 2 to head_size=64, got shape [100, 0]"},
    {"rotary_dim_beyond_a_head", [](auto& p) { p.cos_sin_cache = cos_sin({100, 66}); },
     "cos_sin_cache must have an even rotary_dim from 2 to head_size=64, got shape [100, 66]"},
    {"all_of_a_head", [](auto& p) { p.cos_sin_cache = cos_sin({100, 64}); }, ""},
    // Multimodal RoPE.
    {"sections", [](auto& p) { set_sections(p, {4, 6, 6}); }, ""},
    {"interleaved_sections", [](auto& p) { set_sections(p, {6, 5, 5}), p.mrope_interleaved = true; }, ""},
    {"empty_sections", [](auto& p) { set_sections(p, {16, 0, 0}); }, ""},
    {"norm_after_rope", [](auto& p) { p.norm_after_rope = true; }, ""},
    {"sections_without_positions", [](auto& p) { set_sections(p, {4, 6, 6}), p.positions.reset(), p.cos_sin_cache.reset(); },
     "mrope_section must be None without positions, got [4, 6, 6]"},
    {"sections_of_one_position", [](auto& p) { p.mrope_section = {4, 6, 6}; },
     "positions must have the shape [3, num_tokens] with mrope_section, got shape [5]"},
    {"four_rows_of_positions", [](auto& p) { set_sections(p, {4, 6, 6}), p.positions = positions({4, 5}); },
     "positions must have the shape [3, num_tokens] with mrope_section, got shape [4, 5]"},
    {"three_rows_without_sections", [](auto& p) { p.positions = positions({3, 5}); },
     "mrope_section must be given with positions of shape [3, num_tokens], got None"},
    {"columns_of_positions", [](auto& p) { set_sections(p, {4, 6, 6}), p.positions = positions({3, 4}); },
     "positions must have at least 5 columns, as slot_mapping has, got shape [3, 4]"},
    {"more_columns_of_positions", [](auto& p) { set_sections(p, {4, 6, 6}), p.positions = positions({3, 9}); }, ""},
    {"sum_of_sections", [](auto& p) { set_sections(p, {4, 6, 7}); },
     "mrope_section must be lengths of at least 0 with the sum rotary_dim / 2 = 16, got [4, 6, 7]"},
    {"negative_section", [](auto& p) { set_sections(p, {-1, 11, 6}); },
     "mrope_section must be lengths of at least 0 with the sum rotary_dim / 2 = 16, got [-1, 11, 6]"},
    {"huge_sections", [](auto& p) { set_sections(p, {INT64_MAX, INT64_MAX, 18}); },  // 16, if the sum wrapped around
     "mrope_section must be lengths of at least 0 with the sum rotary_dim / 2 = 16, got [9223372036854775807, "
     "9223372036854775807, 18]"},
    // Norms.
    {"weight_dtype", [](auto& p) { p.q_norm_weight->dtype = DType::Float16; },
     "q_norm_weight must be float32 or bfloat16 as query is, got float16"},
    {"weight_in_float32", [](auto& p) { p.k_norm_weight = weight({64}, DType::Float32); }, ""},
    {"weight_device", [](auto& p) { p.q_norm_weight->device = kCuda; },
     "q_norm_weight must be on the device of query, cpu, got cuda:0"},
    {"weight_dims", [](auto& p) { p.k_norm_weight = weight({1, 64}); },
     "k_norm_weight must have the shape [head_size], got shape [1, 64]"},
    {"weight_count", [](auto& p) { p.k_norm_weight = weight({32}); },
     "k_norm_weight must have head_size=64 elements, got shape [32]"},
    {"one_norm", [](auto& p) { p.q_norm_weight.reset(); }, ""},
};

class RopeErrors : public testing::TestWithParam<Mistake> {};

INSTANTIATE_TEST_SUITE_P(, RopeErrors, testing::ValuesIn(kMistakes),
                         [](const auto& info) { return std::string(info.param.name); });

TEST_P(RopeErrors, Sentence) {
  const Mistake& mistake = GetParam();
  RopeAppend p = rope_problem();
  mistake.make(p);
  EXPECT_EQ(sentence(p), *mistake.expected ? kRope + mistake.expected : "");
}

TEST(RopeOverlap, EveryWrittenTensorWithEveryOther) {
  using Member = TensorView RopeAppend::*;
  using Optional = std::optional<TensorView> RopeAppend::*;
  const auto expect = [](const RopeAppend& p, const std::string& written, const std::string& other) {
    EXPECT_EQ(sentence(p), kRope + written + " must not overlap " + other + ", got views that share memory");
  };
  const std::pair<const char*, Member> kWritten[] = {
      {"query_out", &RopeAppend::query_out}, {"key_cache", &RopeAppend::key_cache}, {"value_cache", &RopeAppend::value_cache}};
  const std::pair<const char*, Member> kRead[] = {
      {"query", &RopeAppend::query},     {"key", &RopeAppend::key},
      {"value", &RopeAppend::value},     {"slot_mapping", &RopeAppend::slot_mapping},
      {"q_scale", &RopeAppend::q_scale}, {"k_scale", &RopeAppend::k_scale},
      {"v_scale", &RopeAppend::v_scale}};
  const std::pair<const char*, Optional> kOptional[] = {
      {"positions", &RopeAppend::positions},         {"cos_sin_cache", &RopeAppend::cos_sin_cache},
      {"q_norm_weight", &RopeAppend::q_norm_weight}, {"k_norm_weight", &RopeAppend::k_norm_weight},
      {"k_offset", &RopeAppend::k_offset},           {"v_offset", &RopeAppend::v_offset}};
  for (std::size_t i = 0; i < std::size(kWritten); ++i) {
    const auto& [name, written] = kWritten[i];
    const auto over_it = [&, member = written](const auto& change) {
      RopeAppend p = rope_problem();
      p.k_offset = offset(kKeyOffset, {4, 64}), p.v_offset = offset(kValueOffset, {4, 64});
      change(p, (p.*member).data);
      return p;
    };
    for (std::size_t j = i + 1; j < std::size(kWritten); ++j)
      expect(over_it([&](RopeAppend& p, void* data) { (p.*kWritten[j].second).data = data; }), name, kWritten[j].first);
    for (const auto& read : kRead)
      expect(over_it([&](RopeAppend& p, void* data) { (p.*read.second).data = data; }), name, read.first);
    for (const auto& optional : kOptional)
      expect(over_it([&](RopeAppend& p, void* data) { (p.*optional.second)->data = data; }), name, optional.first);
  }
}

// --- Layouts --------------------------------

TEST(RopeLayout, HeadsAreNeverMerged) {
  const RopeLayout layout = lower(rope_problem());
  EXPECT_EQ(layout.cache.num_tokens, 5);
  EXPECT_EQ(layout.cache.num_heads, 4);
  EXPECT_EQ(layout.cache.head_size, 64);
  EXPECT_EQ(layout.num_heads, 8);
}

TEST(RopeLayout, ScalesPerChannelAndOffsets) {
  RopeAppend p = rope_problem();
  p.k_scale = k_scale({4, 64}), p.v_offset = offset(kValueOffset, {4, 64});
  const CacheLayout cache = lower(p).cache;
  EXPECT_EQ(cache.num_heads, 4) << "not merged";
  EXPECT_EQ(cache.k.scales.head, 64);
  EXPECT_EQ(cache.k.scales.dim, 1);
  EXPECT_EQ(cache.v.scales.dim, 0);
  EXPECT_EQ(cache.k.offsets.data, nullptr);
  EXPECT_EQ(cache.v.offsets.data, p.v_offset->data);
  EXPECT_EQ(cache.v.offsets.head, 64);
  EXPECT_EQ(cache.v.offsets.dim, 1);
}

TEST(RopeLayout, QueryKeepsItsStrides) {
  RopeAppend p = rope_problem();
  p.query = view_at(kQuery, DType::BFloat16, {5, 8, 64}, {1536, 64, 1});
  p.query_out = view_at(kQueryOut, DType::E4M3, {5, 8, 64}, {1, 320, 5});
  const RopeLayout layout = lower(p);
  EXPECT_EQ(layout.query.data, p.query.data);
  EXPECT_EQ(layout.query.token, 1536);
  EXPECT_EQ(layout.query.head, 64);
  EXPECT_EQ(layout.query.dim, 1);
  EXPECT_EQ(layout.query_out.data, p.query_out.data);
  EXPECT_EQ(layout.query_out.token, 1);
  EXPECT_EQ(layout.query_out.head, 320);
  EXPECT_EQ(layout.query_out.dim, 5);
}

TEST(RopeLayout, TheTypeOfQueryOut) {
  const auto element = [](DType cache, std::optional<DType> wanted, DType out) {
    RopeAppend p = rope_problem();
    set_caches(p, cache);
    p.kv_cache_dtype = wanted;
    p.query_out.dtype = out;
    return lower(p).query_out_dtype;
  };
  EXPECT_EQ(element(DType::E4M3, {}, DType::E4M3), DType::E4M3);
  EXPECT_EQ(element(DType::E5M2, {}, DType::UInt8), DType::E5M2);
  EXPECT_EQ(element(DType::UInt8, DType::E5M2, DType::UInt8), DType::E5M2);
  EXPECT_EQ(element(DType::E4M3, {}, DType::BFloat16), DType::BFloat16);
  EXPECT_EQ(element(DType::Float16, {}, DType::Float32), DType::Float32);
}

TEST(RopeLayout, ScalesOfQueryAreSharedByNeighboringHeads) {
  struct Row {
    TensorView scale;
    std::int64_t stride, heads_per_scale;
  };
  const Row kRows[] = {{q_scale({}), 0, 8},  {q_scale({1, 1}, {7, 9}), 0, 8},
                       {q_scale({4}), 1, 2}, {q_scale({4, 1}, {3, 1}), 3, 2},
                       {q_scale({8}), 1, 1}, {q_scale({8}, {0}), 0, 1}};
  for (const Row& row : kRows) {
    RopeAppend p = rope_problem();
    p.q_scale = row.scale;
    const RopeLayout layout = lower(p);
    EXPECT_EQ(layout.q_scale, p.q_scale.data);
    EXPECT_EQ(layout.q_scale_stride, row.stride) << shape_string(row.scale);
    EXPECT_EQ(layout.heads_per_scale, row.heads_per_scale) << shape_string(row.scale);
  }
}

TEST(RopeLayout, CosinesAndSines) {
  RopeAppend p = rope_problem();
  p.cos_sin_cache = cos_sin({100, 32}, {80, 2});
  p.is_neox = false;
  const RopeLayout layout = lower(p);
  EXPECT_EQ(layout.rotary_dim, 32);
  EXPECT_EQ(layout.max_position, 100);
  EXPECT_EQ(layout.cos_sin.data, p.cos_sin_cache->data);
  EXPECT_EQ(layout.cos_sin.dtype, DType::Float32);
  EXPECT_EQ(layout.cos_sin.stride, 2);
  EXPECT_EQ(layout.cos_sin_row, 80);
  EXPECT_FALSE(layout.is_neox);
}

// Which of the three positions each of 16 frequencies takes.
std::string axes(const std::array<std::int64_t, 3>& lengths, bool interleaved) {
  RopeAppend p = rope_problem();
  set_sections(p, lengths), p.mrope_interleaved = interleaved;
  const Sections sections = lower(p).sections;
  EXPECT_EQ(sections.axes, 3);
  std::string text;
  for (std::int64_t i = 0; i < 16; ++i) text += "thw"[sections.axis_of(i)];
  return text;
}

TEST(RopeLayout, FrequenciesOfSections) {
  EXPECT_EQ(axes({4, 6, 6}, false), "tttthhhhhhwwwwww");
  EXPECT_EQ(axes({0, 16, 0}, false), "hhhhhhhhhhhhhhhh");
  EXPECT_EQ(axes({8, 0, 8}, false), "ttttttttwwwwwwww");
  EXPECT_EQ(axes({6, 5, 5}, true), "thwthwthwthwthwt");
  EXPECT_EQ(axes({8, 4, 4}, true), "thwthwthwthwtttt");
  EXPECT_EQ(axes({11, 2, 3}, true), "thwthwttwttttttt");
  EXPECT_EQ(axes({16, 0, 0}, true), "tttttttttttttttt");
  EXPECT_EQ(lower(rope_problem()).sections.axes, 1);
}

TEST(RopeLayout, NormsOfQAndK) {
  RopeAppend p = rope_problem();
  p.k_norm_weight = view_at(kKeyWeight, DType::Float32, {64}, {3});
  p.norm_eps = 0.25f;
  const RopeLayout layout = lower(p);
  EXPECT_EQ(layout.norm_weights[0].data, p.q_norm_weight->data);
  EXPECT_EQ(layout.norm_weights[0].dtype, DType::BFloat16);
  EXPECT_EQ(layout.norm_weights[0].stride, 1);
  EXPECT_EQ(layout.norm_weights[1].data, p.k_norm_weight->data);
  EXPECT_EQ(layout.norm_weights[1].dtype, DType::Float32);
  EXPECT_EQ(layout.norm_weights[1].stride, 3);
  EXPECT_EQ(layout.norm_eps, 0.25f);
  EXPECT_FALSE(layout.norm_after_rope);
  p.norm_after_rope = true;
  EXPECT_TRUE(lower(p).norm_after_rope);
}

TEST(RopeLayout, WhatIsTransformed) {
  RopeAppend p = rope_problem();
  EXPECT_TRUE(lower(p).transforms(0));
  EXPECT_TRUE(lower(p).transforms(1));
  p.positions.reset(), p.cos_sin_cache.reset(), p.k_norm_weight.reset();
  EXPECT_EQ(lower(p).rotary_dim, 0);
  EXPECT_TRUE(lower(p).transforms(0)) << "a norm alone";
  EXPECT_FALSE(lower(p).transforms(1));
}

TEST(RopeLayout, EmptyProblems) {
  EXPECT_FALSE(lower(rope_problem()).empty());
  RopeAppend p = rope_problem();
  p.slot_mapping = view_at(kSlots, DType::Int64, {0});
  EXPECT_TRUE(lower(p).empty()) << "no tokens";
  p = rope_problem();
  p.query = query({5, 0, 64}), p.query_out = query_out({5, 0, 64});
  EXPECT_FALSE(lower(p).empty()) << "K and V are left";
}

}  // namespace
}  // namespace fp8kv::core
