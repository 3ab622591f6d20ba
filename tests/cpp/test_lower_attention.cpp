// Validation of attention on the paged cache: every sentence, and the AttentionLayout that backends work from.
#include <gtest/gtest.h>

#include <functional>
#include <limits>
#include <optional>
#include <string>
#include <utility>

#include "core/attention_layout.h"
#include "problems.h"

namespace fp8kv::core {
namespace {

using namespace testing_support;

const std::string kAttention = "fp8kv::paged_attention: ";
constexpr float kInf = std::numeric_limits<float>::infinity(), kNaN = std::numeric_limits<float>::quiet_NaN();

TensorView query(const Sizes& sizes, DType dtype = DType::E4M3) { return view_at(kQuery, dtype, sizes); }
TensorView out(const Sizes& sizes, DType dtype = DType::BFloat16) { return view_at(kQueryOut, dtype, sizes); }
TensorView q_scale(const Sizes& sizes, const Sizes& strides = {}) {
  return view_at(kQueryScale, DType::Float32, sizes, strides);
}
TensorView indices(std::uintptr_t address, const Sizes& sizes, const Sizes& strides = {}) {
  return view_at(address, DType::Int32, sizes, strides);
}
TensorView reals(std::uintptr_t address, const Sizes& sizes, const Sizes& strides = {}) {
  return view_at(address, DType::Float32, sizes, strides);
}

void set_caches(PagedAttention& p, DType dtype) { p.key_cache.dtype = p.value_cache.dtype = dtype; }

// A bfloat16 query, which has no scale.
void set_real_query(PagedAttention& p) { p.query.dtype = DType::BFloat16, p.q_scale.reset(); }

// Caches of bfloat16 and a query to match.
void set_unquantized(PagedAttention& p) {
  set_caches(p, DType::BFloat16), set_real_query(p), p.k_offset.reset(), p.v_offset.reset();
}

// V with heads of another size.
void set_v_head_size(PagedAttention& p, std::int64_t size) {
  p.value_cache = value_cache({10, 16, 4, size}), p.out = out({5, 8, size});
  p.v_offset = reals(kValueOffset, {4, size});
}

// V in a format of its own.
void set_v_format(PagedAttention& p, DType dtype) { p.v_cache_dtype = p.value_cache.dtype = dtype; }

struct Mistake {
  const char* name;
  std::function<void(PagedAttention&)> make;
  const char* expected;  // the sentence without the op; "": it is none
};

void PrintTo(const Mistake& m, std::ostream* os) { *os << m.name; }

const char* const kScaleShapes =
    " must have 1 or num_kv_heads=4 elements, or the shape [num_kv_heads, head_size=64] or [num_blocks=10, block_size=16, "
    "num_kv_heads], got shape ";

const Mistake kMistakes[] = {
    {"none", [](auto&) {}, ""},
    {"nothing_optional", [](auto& p) { p = plain_attention_problem(); }, ""},
    // Query.
    {"query_of_another_fp8", [](auto& p) { p.query.dtype = DType::E5M2; },
     "query must be float8_e4m3fn or uint8 as the caches are, or float32, float16 or bfloat16, got float8_e5m2"},
    {"query_of_bytes", [](auto& p) { p.query.dtype = DType::UInt8; }, ""},
    {"query_of_integers", [](auto& p) { p.query.dtype = DType::Int32; },
     "query must be float8_e4m3fn or uint8 as the caches are, or float32, float16 or bfloat16, got int32"},
    {"query_in_bfloat16", set_real_query, ""},
    {"query_in_float32", [](auto& p) { set_real_query(p), p.query.dtype = DType::Float32; }, ""},
    {"query_in_fp8_with_plain_caches", [](auto& p) { set_caches(p, DType::BFloat16); },
     "query must be float32, float16 or bfloat16 as the caches are not FP8, got float8_e4m3fn"},
    {"query_of_bytes_with_plain_caches", [](auto& p) { set_caches(p, DType::Float16), p.query.dtype = DType::UInt8; },
     "query must be float32, float16 or bfloat16 as the caches are not FP8, got uint8"},
    {"query_dims", [](auto& p) { p.query = query({5, 512}); },
     "query must have the shape [num_tokens, num_heads, head_size], got shape [5, 512]"},
    {"query_head_size", [](auto& p) { p.query = query({5, 8, 32}); },
     "query must have num_heads=8 and head_size=64, got shape [5, 8, 32]"},
    {"query_heads", [](auto& p) { p.query = query({5, 6, 64}); },
     "query must have a number of heads that is a multiple of num_kv_heads=4, got num_heads=6"},
    {"query_heads_without_kv_heads",
     [](auto& p) { p.key_cache = key_cache({10, 16, 0, 64}), p.value_cache = value_cache({10, 16, 0, 64}); },
     "query must have a number of heads that is a multiple of num_kv_heads=0, got num_heads=8"},
    // Caches.
    {"cache_dtype", [](auto& p) { p.key_cache.dtype = DType::Int16; },
     "key_cache must be float32, float16, bfloat16, float8_e4m3fn, float8_e5m2 or int8, as kv_cache_dtype is not given, got "
     "int16"},
    {"int8_caches", [](auto& p) { set_caches(p, DType::Int8), set_real_query(p); }, ""},
    {"int8_queries", [](auto& p) { set_caches(p, DType::Int8), p.query.dtype = DType::Int8; },
     "query must be float32, float16 or bfloat16 as the caches are not FP8, got int8"},
    {"queries_of_bytes_with_int8_caches", [](auto& p) { set_caches(p, DType::Int8), p.query.dtype = DType::UInt8; },
     "query must be float32, float16 or bfloat16 as the caches are not FP8, got uint8"},
    {"cache_of_bytes_and_no_format", [](auto& p) { set_caches(p, DType::UInt8); },
     "key_cache must be float32, float16, bfloat16, float8_e4m3fn, float8_e5m2 or int8, as kv_cache_dtype is not given, got "
     "uint8"},
    {"cache_of_bytes", [](auto& p) { set_caches(p, DType::UInt8), p.kv_cache_dtype = DType::E4M3; }, ""},
    {"cache_format", [](auto& p) { p.kv_cache_dtype = DType::E5M2; },
     "key_cache must be float8_e5m2 or uint8 as kv_cache_dtype is \"fp8_e5m2\", got float8_e4m3fn"},
    {"caches_of_two_types", [](auto& p) { p.value_cache.dtype = DType::E5M2; },
     "value_cache must be float8_e4m3fn as key_cache is, got float8_e5m2"},
    {"bytes_beside_fp8", [](auto& p) { p.key_cache.dtype = DType::UInt8, p.kv_cache_dtype = DType::E4M3; },
     "value_cache must be uint8 as key_cache is, got float8_e4m3fn"},
    {"plain_caches", set_unquantized, ""},
    {"plain_caches_of_another_type_than_query", [](auto& p) { set_unquantized(p), p.query.dtype = DType::Float32; }, ""},
    {"cache_dims", [](auto& p) { p.key_cache = key_cache({160, 4, 64}); },
     "key_cache must have the shape [num_blocks, block_size, num_kv_heads, head_size], got shape [160, 4, 64]"},
    {"value_cache_dims", [](auto& p) { p.value_cache = value_cache({160, 4, 64}); },
     "value_cache must have the shape [num_blocks, block_size, num_kv_heads, v_head_size], got shape [160, 4, 64]"},
    {"value_cache_of_other_blocks", [](auto& p) { p.value_cache = value_cache({9, 16, 4, 64}); },
     "value_cache must have num_blocks=10, block_size=16 and num_kv_heads=4 as key_cache has, got shape [9, 16, 4, 64]"},
    {"value_cache_of_another_block_size", [](auto& p) { p.value_cache = value_cache({10, 8, 4, 64}); },
     "value_cache must have num_blocks=10, block_size=16 and num_kv_heads=4 as key_cache has, got shape [10, 8, 4, 64]"},
    {"value_cache_of_other_heads", [](auto& p) { p.value_cache = value_cache({10, 16, 2, 64}); },
     "value_cache must have num_blocks=10, block_size=16 and num_kv_heads=4 as key_cache has, got shape [10, 16, 2, 64]"},
    {"value_cache_without_elements", [](auto& p) { p.value_cache = value_cache({10, 16, 4, 0}); },
     "value_cache must have a head size of at least 1 as key_cache has, got shape [10, 16, 4, 0]"},
    {"value_cache_with_elements", [](auto& p) { p.key_cache = key_cache({10, 16, 4, 0}); },
     "value_cache must have a head size of 0 as key_cache has, got shape [10, 16, 4, 64]"},
    // Two head sizes.
    {"two_head_sizes", [](auto& p) { set_v_head_size(p, 48); }, ""},
    {"larger_heads_of_v", [](auto& p) { set_v_head_size(p, 96); }, ""},
    {"out_of_the_head_size_of_k", [](auto& p) { set_v_head_size(p, 48), p.out = out({5, 8, 64}); },
     "out must have num_heads=8 and v_head_size=48, got shape [5, 8, 64]"},
    {"out_of_other_heads_beside_two_head_sizes", [](auto& p) { set_v_head_size(p, 48), p.out = out({5, 4, 48}); },
     "out must have num_heads=8 and v_head_size=48, got shape [5, 4, 48]"},
    {"query_of_the_head_size_of_v", [](auto& p) { set_v_head_size(p, 48), p.query = query({5, 8, 48}); },
     "query must have num_heads=8 and head_size=64, got shape [5, 8, 48]"},
    {"v_scale_per_channel_of_k", [](auto& p) { set_v_head_size(p, 48), p.v_scale = v_scale({4, 64}); },
     "v_scale must have 1 or num_kv_heads=4 elements, or the shape [num_kv_heads, head_size=48] or [num_blocks=10, "
     "block_size=16, num_kv_heads], got shape [4, 64]"},
    {"k_scale_per_channel_of_v", [](auto& p) { set_v_head_size(p, 48), p.k_scale = k_scale({4, 48}); }, "k_scale of [4, 48]"},
    {"v_offset_of_k", [](auto& p) { set_v_head_size(p, 48), p.v_offset = reals(kValueOffset, {4, 64}); },
     "v_offset must have the shape [num_kv_heads=4, head_size=48], got shape [4, 64]"},
    {"k_offset_of_v", [](auto& p) { set_v_head_size(p, 48), p.k_offset = reals(kKeyOffset, {4, 48}); },
     "k_offset must have the shape [num_kv_heads=4, head_size=64], got shape [4, 48]"},
    // Two formats.
    {"e4m3_and_e5m2", [](auto& p) { set_v_format(p, DType::E5M2); }, ""},
    {"e4m3_and_bytes_of_e5m2", [](auto& p) { set_v_format(p, DType::E5M2), p.value_cache.dtype = DType::UInt8; }, ""},
    {"one_format_named_twice", [](auto& p) { p.kv_cache_dtype = p.v_cache_dtype = DType::E4M3; }, ""},
    {"e4m3_and_bytes_of_e4m3", [](auto& p) { set_v_format(p, DType::E4M3), p.value_cache.dtype = DType::UInt8; }, ""},
    {"int8_and_e4m3", [](auto& p) { set_real_query(p), p.key_cache.dtype = DType::Int8, p.v_cache_dtype = DType::E4M3; }, ""},
    {"plain_and_e4m3",
     [](auto& p) { set_real_query(p), p.key_cache.dtype = DType::BFloat16, p.v_cache_dtype = DType::E4M3, p.k_offset.reset(); },
     ""},
    {"e4m3_and_plain", [](auto& p) { set_v_format(p, DType::Float16), p.v_offset.reset(); }, ""},
    {"v_cache_format", [](auto& p) { p.v_cache_dtype = DType::E5M2; },
     "value_cache must be float8_e5m2 or uint8 as v_cache_dtype is \"fp8_e5m2\", got float8_e4m3fn"},
    {"v_cache_format_int8", [](auto& p) { p.v_cache_dtype = DType::Int8, p.value_cache.dtype = DType::UInt8; },
     "value_cache must be int8 as v_cache_dtype is \"int8\", got uint8"},
    {"v_cache_format_that_is_none", [](auto& p) { set_v_format(p, DType::UInt8); },
     "v_cache_dtype must be float32, float16, bfloat16, float8_e4m3fn, float8_e5m2 or int8, got uint8"},
    {"query_of_the_format_of_v", [](auto& p) { set_v_format(p, DType::E5M2), p.query.dtype = DType::E5M2; },
     "query must be float8_e4m3fn or uint8 as key_cache is, or float32, float16 or bfloat16, got float8_e5m2"},
    {"fp8_query_beside_int8_keys", [](auto& p) { p.key_cache.dtype = DType::Int8, p.v_cache_dtype = DType::E4M3; },
     "query must be float32, float16 or bfloat16 as key_cache is not FP8, got float8_e4m3fn"},
    {"k_offset_of_plain_keys",
     [](auto& p) { set_real_query(p), p.key_cache.dtype = DType::BFloat16, p.v_cache_dtype = DType::E4M3; },
     "k_offset must be None as key_cache is not quantized, got shape [4, 64]"},
    {"v_offset_of_plain_values", [](auto& p) { set_v_format(p, DType::Float16); },
     "v_offset must be None as value_cache is not quantized, got shape [4, 64]"},
    // Out.
    {"out_dtype", [](auto& p) { p.out.dtype = DType::E4M3; }, "out must be float32, float16 or bfloat16, got float8_e4m3fn"},
    {"out_of_any_real_type", [](auto& p) { p.out.dtype = DType::Float16; }, ""},
    {"out_dims", [](auto& p) { p.out = out({5, 512}); },
     "out must have the shape [num_tokens, num_heads, head_size], got shape [5, 512]"},
    {"out_heads", [](auto& p) { p.out = out({5, 4, 64}); }, "out must have num_heads=8 and head_size=64, got shape [5, 4, 64]"},
    {"out_head_size", [](auto& p) { p.out = out({5, 8, 65}); },
     "out must have num_heads=8 and head_size=64, got shape [5, 8, 65]"},
    {"rows_of_all_numbers", [](auto& p) { p.query = query({1, 8, 64}), p.out = out({7, 8, 64}), p.lse = reals(kLse, {2, 8}); },
     ""},
    // Sequences.
    {"table_dtype", [](auto& p) { p.block_table.dtype = DType::Int64; }, "block_table must be int32, got int64"},
    {"table_dims", [](auto& p) { p.block_table = indices(kTable, {21}); },
     "block_table must have the shape [num_seqs, max_blocks], got shape [21]"},
    {"lens_dtype", [](auto& p) { p.seq_lens.dtype = DType::Int64; }, "seq_lens must be int32, got int64"},
    {"lens_dims", [](auto& p) { p.seq_lens = indices(kSeqLens, {3, 1}); },
     "seq_lens must have the shape [num_seqs], got shape [3, 1]"},
    {"lens_count", [](auto& p) { p.seq_lens = indices(kSeqLens, {4}); },
     "seq_lens must have num_seqs=3 elements, as block_table has rows, got shape [4]"},
    {"sums_dtype", [](auto& p) { p.cu_query_lens->dtype = DType::Int64; }, "cu_query_lens must be int32, got int64"},
    {"sums_dims", [](auto& p) { p.cu_query_lens = indices(kSums, {1, 4}); },
     "cu_query_lens must have the shape [num_seqs + 1], got shape [1, 4]"},
    {"sums_count", [](auto& p) { p.cu_query_lens = indices(kSums, {3}); },
     "cu_query_lens must have num_seqs + 1 = 4 elements, as block_table has num_seqs rows, got shape [3]"},
    {"starts_dtype", [](auto& p) { p.seq_starts->dtype = DType::Int64; }, "seq_starts must be int32, got int64"},
    {"starts_dims", [](auto& p) { p.seq_starts = indices(kStarts, {}); },
     "seq_starts must have the shape [num_seqs], got shape []"},
    {"starts_count", [](auto& p) { p.seq_starts = indices(kStarts, {2}); },
     "seq_starts must have num_seqs=3 elements, as block_table has rows, got shape [2]"},
    // Without sums, sequence s has row s.
    {"query_rows", [](auto& p) { p.cu_query_lens.reset(), p.query = query({2, 8, 64}); },
     "query must have at least 3 rows, one for each sequence, got shape [2, 8, 64]"},
    {"out_rows", [](auto& p) { p.cu_query_lens.reset(), p.out = out({0, 8, 64}); },
     "out must have at least 3 rows, one for each sequence, got shape [0, 8, 64]"},
    {"lse_rows", [](auto& p) { p.cu_query_lens.reset(), p.lse = reals(kLse, {2, 8}); },
     "lse must have at least 3 rows, one for each sequence, got shape [2, 8]"},
    {"more_rows_than_sequences", [](auto& p) { p.cu_query_lens.reset(); }, ""},
    // Scales of K and V.
    {"k_scale_dtype", [](auto& p) { p.k_scale.dtype = DType::Float16; }, "k_scale must be float32, got float16"},
    {"v_scale_dtype", [](auto& p) { p.v_scale = view_at(kValueScale, DType::BFloat16, {4, 64}); },
     "v_scale must be float32, got bfloat16"},
    {"k_scale_count", [](auto& p) { p.k_scale = k_scale({8}); }, "k_scale of [8]"},
    {"v_scale_count", [](auto& p) { p.v_scale = v_scale({0}); }, "v_scale of [0]"},
    {"k_scale_per_channel_of_query_heads", [](auto& p) { p.k_scale = k_scale({8, 64}); }, "k_scale of [8, 64]"},
    {"k_scale_per_channel_of_another_size", [](auto& p) { p.k_scale = k_scale({4, 32}); }, "k_scale of [4, 32]"},
    {"v_scale_per_channel_in_one_list", [](auto& p) { p.v_scale = v_scale({256}); }, "v_scale of [256]"},
    {"v_scale_per_channel_with_a_dimension_more", [](auto& p) { p.v_scale = v_scale({1, 4, 64}); }, "v_scale of [1, 4, 64]"},
    {"k_scale_per_token_without_heads", [](auto& p) { p.k_scale = k_scale({10, 16, 1}); }, "k_scale of [10, 16, 1]"},
    {"v_scale_per_token_of_other_blocks", [](auto& p) { p.v_scale = v_scale({9, 16, 4}); }, "v_scale of [9, 16, 4]"},
    {"scale_strides", [](auto& p) { p.k_scale = k_scale({2, 2}, {5, 1}); },
     "k_scale must be evenly strided, got several strides in shape [2, 2]"},
    {"scales_per_head", [](auto& p) { p.k_scale = k_scale({4}), p.v_scale = v_scale({4, 1}); }, ""},
    {"scales_per_channel", [](auto& p) { p.k_scale = k_scale({4, 64}), p.v_scale = v_scale({4, 64}, {1, 9}); }, ""},
    {"scales_per_token", [](auto& p) { p.k_scale = k_scale({10, 16, 4}), p.v_scale = v_scale({10, 16, 4}, {64, 1, 16}); }, ""},
    {"scales_of_two_kinds", [](auto& p) { p.k_scale = k_scale({4, 64}), p.v_scale = v_scale({10, 16, 4}); }, ""},
    {"scales_of_plain_caches_are_checked", [](auto& p) { set_unquantized(p), p.k_scale = k_scale({8}); }, "k_scale of [8]"},
    // Scales of Q.
    {"q_scale_missing", [](auto& p) { p.q_scale.reset(); }, "q_scale must be given as query is float8_e4m3fn, got None"},
    {"q_scale_missing_for_bytes", [](auto& p) { p.query.dtype = DType::UInt8, p.q_scale.reset(); },
     "q_scale must be given as query is uint8, got None"},
    {"q_scale_of_a_real_query", [](auto& p) { p.query.dtype = DType::BFloat16; },
     "q_scale must be None as query is bfloat16, got shape [1]"},
    {"q_scale_dtype", [](auto& p) { p.q_scale->dtype = DType::Float16; }, "q_scale must be float32, got float16"},
    {"q_scale_count", [](auto& p) { p.q_scale = q_scale({2}); },
     "q_scale must have 1, num_kv_heads=4 or num_heads=8 elements, got shape [2]"},
    {"q_scale_strides", [](auto& p) { p.q_scale = q_scale({2, 2}, {5, 1}); },
     "q_scale must be evenly strided, got several strides in shape [2, 2]"},
    // Sinks.
    {"sinks_dtype", [](auto& p) { set_real_query(p), p.sinks->dtype = DType::Float16; },
     "sinks must be float32 or bfloat16 as query is, got float16"},
    {"sinks_of_the_type_of_query", [](auto& p) { set_real_query(p), p.sinks->dtype = DType::BFloat16; }, ""},
    {"sinks_in_fp8", [](auto& p) { p.sinks->dtype = DType::E4M3; }, "sinks must be float32, got float8_e4m3fn"},
    {"sinks_in_bfloat16_with_an_fp8_query", [](auto& p) { p.sinks->dtype = DType::BFloat16; },
     "sinks must be float32, got bfloat16"},
    {"sinks_dims", [](auto& p) { p.sinks = reals(kSinks, {8, 1}); }, "sinks must have the shape [num_heads], got shape [8, 1]"},
    {"sinks_count", [](auto& p) { p.sinks = reals(kSinks, {4}); }, "sinks must have num_heads=8 elements, got shape [4]"},
    // Offsets.
    {"k_offset_dtype", [](auto& p) { p.k_offset->dtype = DType::BFloat16; }, "k_offset must be float32, got bfloat16"},
    {"k_offset_shape", [](auto& p) { p.k_offset = reals(kKeyOffset, {4}); },
     "k_offset must have the shape [num_kv_heads=4, head_size=64], got shape [4]"},
    {"v_offset_shape", [](auto& p) { p.v_offset = reals(kValueOffset, {64, 4}); },
     "v_offset must have the shape [num_kv_heads=4, head_size=64], got shape [64, 4]"},
    {"k_offset_of_plain_caches", [](auto& p) { set_unquantized(p), p.k_offset = reals(kKeyOffset, {4, 64}); },
     "k_offset must be None as the caches are not quantized, got shape [4, 64]"},
    {"v_offset_of_plain_caches", [](auto& p) { set_unquantized(p), p.v_offset = reals(kValueOffset, {4, 64}); },
     "v_offset must be None as the caches are not quantized, got shape [4, 64]"},
    {"one_offset", [](auto& p) { p.k_offset.reset(); }, ""},
    // What else is written.
    {"lse_dtype", [](auto& p) { p.lse->dtype = DType::BFloat16; }, "lse must be float32, got bfloat16"},
    {"lse_dims", [](auto& p) { p.lse = reals(kLse, {40}); }, "lse must have the shape [num_tokens, num_heads], got shape [40]"},
    {"lse_heads", [](auto& p) { p.lse = reals(kLse, {8, 5}); }, "lse must have num_heads=8 columns, got shape [8, 5]"},
    {"workspace_dtype", [](auto& p) { p.workspace->dtype = DType::Float32; }, "workspace must be uint8, got float32"},
    {"workspace_strides", [](auto& p) { p.workspace = view_at(kWorkspace, DType::UInt8, {4, 1024}, {2048, 1}); },
     "workspace must be contiguous, got stride 2048 in dimension 0 of shape [4, 1024]"},
    {"workspace_of_every_second_byte", [](auto& p) { p.workspace = view_at(kWorkspace, DType::UInt8, {1024}, {2}); },
     "workspace must be contiguous, got stride 2 in dimension 0 of shape [1024]"},
    {"workspace_with_strides_that_do_not_count",
     [](auto& p) { p.workspace = view_at(kWorkspace, DType::UInt8, {1, 1024, 1}, {7, 1, 9}); }, ""},
    {"workspace_of_nothing", [](auto& p) { p.workspace = view_at(kWorkspace, DType::UInt8, {0, 8}, {1, 5}); }, ""},
    // Numbers.
    {"softmax_scale_nan", [](auto& p) { p.softmax_scale = -kNaN; }, "softmax_scale must be finite, got nan"},
    {"softmax_scale_infinite", [](auto& p) { p.softmax_scale = -kInf; }, "softmax_scale must be finite, got -inf"},
    {"softmax_scale_negative", [](auto& p) { p.softmax_scale = -0.5f; }, ""},
    {"softcap_nan", [](auto& p) { p.softcap = kNaN; }, "softcap must be finite and at least 0, got nan"},
    {"softcap_negative", [](auto& p) { p.softcap = -0.5f; }, "softcap must be finite and at least 0, got -0.5"},
    {"softcap_infinite", [](auto& p) { p.softcap = kInf; }, "softcap must be finite and at least 0, got inf"},
    {"softcap_negative_zero", [](auto& p) { p.softcap = -0.0f; }, ""},
    {"max_query_len", [](auto& p) { p.max_query_len = 0; }, "max_query_len must be at least 1, got 0"},
    {"max_query_len_without_sums", [](auto& p) { p.max_query_len = 0, p.cu_query_lens.reset(); },
     "max_query_len must be at least 1, got 0"},
    {"max_seq_len", [](auto& p) { p.max_seq_len = -1; }, "max_seq_len must be at least 0, got -1"},
    {"sliding_window", [](auto& p) { p.sliding_window = INT64_MIN; },
     "sliding_window must be at least 0, got -9223372036854775808"},
    {"num_splits", [](auto& p) { p.num_splits = -2; }, "num_splits must be at least 0, got -2"},
    {"largest_numbers", [](auto& p) { p.max_query_len = p.max_seq_len = p.sliding_window = p.num_splits = INT64_MAX; }, ""},
};

class AttentionErrors : public testing::TestWithParam<Mistake> {};

INSTANTIATE_TEST_SUITE_P(, AttentionErrors, testing::ValuesIn(kMistakes),
                         [](const auto& info) { return std::string(info.param.name); });

TEST_P(AttentionErrors, Sentence) {
  const Mistake& mistake = GetParam();
  PagedAttention p = attention_problem();
  mistake.make(p);
  std::string expected = mistake.expected;
  if (const std::size_t of = expected.find("_scale of ["); of == 1)
    expected = expected.substr(0, 7) + kScaleShapes + expected.substr(11);
  EXPECT_EQ(sentence(p), expected.empty() ? "" : kAttention + expected);
}

// --- Every tensor --------------------------------

struct Tensor {
  const char* name;
  std::function<TensorView&(PagedAttention&)> of;
};

const Tensor kWritten[] = {{"out", [](auto& p) -> auto& { return p.out; }},
                           {"lse", [](auto& p) -> auto& { return *p.lse; }},
                           {"workspace", [](auto& p) -> auto& { return *p.workspace; }}};
const Tensor kRead[] = {{"query", [](auto& p) -> auto& { return p.query; }},
                        {"key_cache", [](auto& p) -> auto& { return p.key_cache; }},
                        {"value_cache", [](auto& p) -> auto& { return p.value_cache; }},
                        {"block_table", [](auto& p) -> auto& { return p.block_table; }},
                        {"seq_lens", [](auto& p) -> auto& { return p.seq_lens; }},
                        {"k_scale", [](auto& p) -> auto& { return p.k_scale; }},
                        {"v_scale", [](auto& p) -> auto& { return p.v_scale; }},
                        {"cu_query_lens", [](auto& p) -> auto& { return *p.cu_query_lens; }},
                        {"q_scale", [](auto& p) -> auto& { return *p.q_scale; }},
                        {"seq_starts", [](auto& p) -> auto& { return *p.seq_starts; }},
                        {"sinks", [](auto& p) -> auto& { return *p.sinks; }},
                        {"k_offset", [](auto& p) -> auto& { return *p.k_offset; }},
                        {"v_offset", [](auto& p) -> auto& { return *p.v_offset; }}};

TEST(AttentionDevices, AllTensorsAreOnThatOfQuery) {
  const auto expect = [](const Tensor& tensor) {
    PagedAttention p = attention_problem();
    tensor.of(p).device = kCuda;
    EXPECT_EQ(sentence(p), kAttention + tensor.name + " must be on the device of query, cpu, got cuda:0");
  };
  for (const Tensor& tensor : kWritten) expect(tensor);
  for (const Tensor& tensor : kRead)
    if (std::string(tensor.name) != "query") expect(tensor);
}

TEST(AttentionDevices, AnyOne) {
  PagedAttention p = attention_problem();
  for (const Tensor& tensor : kWritten) tensor.of(p).device = kCuda;
  for (const Tensor& tensor : kRead) tensor.of(p).device = kCuda;
  EXPECT_EQ(sentence(p), "");
}

TEST(AttentionOverlap, EveryWrittenTensorWithEveryOther) {
  for (std::size_t i = 0; i < std::size(kWritten); ++i) {
    const auto expect = [&](const Tensor& other) {
      PagedAttention p = attention_problem();
      other.of(p).data = kWritten[i].of(p).data;
      EXPECT_EQ(sentence(p),
                kAttention + kWritten[i].name + " must not overlap " + other.name + ", got views that share memory");
    };
    for (std::size_t j = i + 1; j < std::size(kWritten); ++j) expect(kWritten[j]);
    for (const Tensor& read : kRead) expect(read);
  }
}

TEST(AttentionOverlap, WhatIsReadMayOverlap) {
  PagedAttention p = attention_problem();
  p.value_cache.data = p.key_cache.data;
  p.v_scale.data = p.k_scale.data;
  p.v_offset->data = p.k_offset->data;
  EXPECT_EQ(sentence(p), "");
}

TEST(AttentionOverlap, OutMayLieBetweenRowsOfQuery) {
  PagedAttention p = plain_attention_problem();
  p.query = view_at(kQuery, DType::BFloat16, {3, 8, 64}, {1024, 64, 1});
  p.out = view_at(kQuery + 2 * 512, DType::BFloat16, {3, 8, 64}, {1024, 64, 1});
  EXPECT_EQ(sentence(p), "");
  p.out = view_at(kQuery + 2 * 511, DType::BFloat16, {3, 8, 64}, {1024, 64, 1});
  EXPECT_EQ(sentence(p), kAttention + "out must not overlap query, got views that share memory");
}

// --- Layouts --------------------------------

TEST(AttentionLayout, Sizes) {
  const AttentionLayout layout = lower(attention_problem());
  EXPECT_EQ(layout.num_rows, 5);
  EXPECT_EQ(layout.num_seqs, 3);
  EXPECT_EQ(layout.num_heads, 8);
  EXPECT_EQ(layout.num_kv_heads, 4);
  EXPECT_EQ(layout.heads_per_kv_head(), 2);
  EXPECT_EQ(layout.head_size, 64);
  EXPECT_EQ(layout.num_blocks, 10);
  EXPECT_EQ(layout.block_size, 16);
  EXPECT_EQ(layout.max_blocks, 7);
  EXPECT_FALSE(layout.empty());
}

TEST(AttentionLayout, Types) {
  const auto types = [](DType query, DType cache, std::optional<DType> format, DType out) {
    PagedAttention p = plain_attention_problem();
    p.query.dtype = query, p.out.dtype = out, p.kv_cache_dtype = format;
    set_caches(p, cache);
    if (query == DType::UInt8 || query == DType::E4M3 || query == DType::E5M2) p.q_scale = q_scale({1});
    const AttentionLayout layout = lower(p);
    EXPECT_EQ(layout.out_dtype, out);
    return std::pair(layout.query_dtype, layout.cache_dtype);
  };
  using Pair = std::pair<DType, DType>;
  EXPECT_EQ(types(DType::BFloat16, DType::E4M3, {}, DType::BFloat16), Pair(DType::BFloat16, DType::E4M3));
  EXPECT_EQ(types(DType::Float32, DType::UInt8, DType::E5M2, DType::Float16), Pair(DType::Float32, DType::E5M2));
  EXPECT_EQ(types(DType::E5M2, DType::E5M2, {}, DType::Float32), Pair(DType::E5M2, DType::E5M2));
  EXPECT_EQ(types(DType::UInt8, DType::E4M3, {}, DType::Float32), Pair(DType::E4M3, DType::E4M3));
  EXPECT_EQ(types(DType::E5M2, DType::UInt8, DType::E5M2, DType::Float32), Pair(DType::E5M2, DType::E5M2));
  EXPECT_EQ(types(DType::Float16, DType::Float16, {}, DType::Float16), Pair(DType::Float16, DType::Float16));
  EXPECT_EQ(types(DType::Float16, DType::BFloat16, DType::BFloat16, DType::Float32), Pair(DType::Float16, DType::BFloat16));
}

TEST(AttentionLayout, TwoHeadSizes) {
  PagedAttention p = attention_problem();
  set_v_head_size(p, 48);
  p.v_scale = v_scale({4, 48});
  const AttentionLayout layout = lower(p);
  EXPECT_EQ(layout.head_size, 64);
  EXPECT_EQ(layout.v_head_size, 48);
  EXPECT_FALSE(layout.of_one_kind());
  EXPECT_EQ(layout.value_cache.offset, 4 * 48);
  EXPECT_EQ(layout.out.token, 8 * 48);
  EXPECT_EQ(layout.v_scale.head, 48);
  EXPECT_EQ(layout.v_scale.dim, 1);
  EXPECT_EQ(layout.v_offset.head, 48);
  EXPECT_TRUE(lower(attention_problem()).of_one_kind());
}

TEST(AttentionLayout, VMayBeAPartOfK) {
  PagedAttention p = plain_attention_problem();
  p.query = query({3, 8, 64}, DType::BFloat16), p.out = out({3, 8, 48});
  p.value_cache = view_at(kKeyCache, DType::E4M3, {10, 16, 4, 48}, {4096, 256, 64, 1});
  const AttentionLayout layout = lower(p);
  EXPECT_EQ(layout.value_cache.data, layout.key_cache.data);
  EXPECT_EQ(layout.value_cache.head, 64);
  EXPECT_EQ(layout.v_head_size, 48);
}

TEST(AttentionLayout, TwoFormats) {
  PagedAttention p = plain_attention_problem();
  p.k_scale = k_scale({4}), p.v_scale = v_scale({10, 16, 4});
  p.kv_cache_dtype = DType::E4M3, p.v_cache_dtype = DType::Int8, p.value_cache.dtype = DType::Int8;
  AttentionLayout layout = lower(p);
  EXPECT_EQ(layout.cache_dtype, DType::E4M3);
  EXPECT_EQ(layout.v_cache_dtype, DType::Int8);
  EXPECT_FALSE(layout.of_one_kind());
  EXPECT_EQ(layout.k_scale.head, 1);
  EXPECT_TRUE(layout.v_scale.per_token());
  p.v_cache_dtype = p.value_cache.dtype = DType::BFloat16;
  layout = lower(p);
  EXPECT_EQ(layout.k_scale.data, p.k_scale.data);
  EXPECT_EQ(layout.v_scale.data, nullptr) << "V is not quantized";
  p.key_cache.dtype = DType::Float16, p.kv_cache_dtype.reset(), p.v_cache_dtype = p.value_cache.dtype = DType::E5M2;
  layout = lower(p);
  EXPECT_EQ(layout.cache_dtype, DType::Float16);
  EXPECT_EQ(layout.k_scale.data, nullptr) << "K is not quantized";
  EXPECT_TRUE(layout.v_scale.per_token());
}

TEST(AttentionLayout, ViewsKeepTheirStrides) {
  PagedAttention p = attention_problem();
  p.query = view_at(kQuery, DType::E4M3, {5, 8, 64}, {1536, 64, 1});
  p.out = view_at(kQueryOut, DType::BFloat16, {5, 8, 64}, {1, 320, 5});
  p.key_cache = key_cache({10, 16, 4, 64}, {8192, 128, 2048, 1});
  p.value_cache = value_cache({10, 16, 4, 64}, {4096, 1, 1024, 16});
  p.lse = reals(kLse, {5, 8}, {1, 6});
  const AttentionLayout layout = lower(p);
  const auto expect_rows = [](const HeadsView& view, const TensorView& of) {
    EXPECT_EQ(view.data, of.data);
    EXPECT_EQ(view.token, of.strides[0]);
    EXPECT_EQ(view.head, of.strides[1]);
    EXPECT_EQ(view.dim, of.strides[2]);
  };
  const auto expect_cache = [](const PagedView& view, const TensorView& of) {
    EXPECT_EQ(view.data, of.data);
    EXPECT_EQ(view.block, of.strides[0]);
    EXPECT_EQ(view.offset, of.strides[1]);
    EXPECT_EQ(view.head, of.strides[2]);
    EXPECT_EQ(view.dim, of.strides[3]);
  };
  expect_rows(layout.query, p.query);
  expect_rows(layout.out, p.out);
  expect_cache(layout.key_cache, p.key_cache);
  expect_cache(layout.value_cache, p.value_cache);
  EXPECT_EQ(layout.lse.data, p.lse->data);
  EXPECT_EQ(layout.lse.token, 1);
  EXPECT_EQ(layout.lse.head, 6);
}

TEST(AttentionLayout, VectorsKeepTheirStrides) {
  PagedAttention p = attention_problem();
  set_real_query(p);
  p.block_table = indices(kTable, {3, 7}, {2, 9});
  p.seq_lens = indices(kSeqLens, {3}, {4});
  p.cu_query_lens = indices(kSums, {4}, {5});
  p.seq_starts = indices(kStarts, {3}, {0});
  p.sinks = view_at(kSinks, DType::BFloat16, {8}, {3});
  p.k_offset = reals(kKeyOffset, {4, 64}, {1, 4});
  p.v_offset = reals(kValueOffset, {4, 64}, {0, 0});
  const AttentionLayout layout = lower(p);
  const auto expect = [](const View1D& view, const TensorView& of, std::int64_t stride) {
    EXPECT_EQ(view.data, of.data);
    EXPECT_EQ(view.stride, stride);
    EXPECT_EQ(view.dtype, of.dtype);
  };
  expect(layout.block_table, p.block_table, 9);
  EXPECT_EQ(layout.block_table_row, 2);
  expect(layout.seq_lens, p.seq_lens, 4);
  expect(layout.cu_query_lens, *p.cu_query_lens, 5);
  expect(layout.seq_starts, *p.seq_starts, 0);
  expect(layout.sinks, *p.sinks, 3);
  EXPECT_EQ(layout.k_offset.data, p.k_offset->data);
  EXPECT_EQ(layout.k_offset.head, 1);
  EXPECT_EQ(layout.k_offset.dim, 4);
  EXPECT_EQ(layout.v_offset.data, p.v_offset->data);
  EXPECT_EQ(layout.v_offset.head, 0);
  EXPECT_EQ(layout.v_offset.dim, 0);
}

TEST(AttentionLayout, WhatIsAbsentHasNoAddress) {
  const AttentionLayout layout = lower(plain_attention_problem());
  EXPECT_EQ(layout.cu_query_lens.data, nullptr);
  EXPECT_EQ(layout.seq_starts.data, nullptr);
  EXPECT_EQ(layout.sinks.data, nullptr);
  EXPECT_EQ(layout.k_offset.data, nullptr);
  EXPECT_EQ(layout.v_offset.data, nullptr);
  EXPECT_EQ(layout.lse.data, nullptr);
  EXPECT_EQ(layout.q_scale, nullptr);
}

struct ScaleRow {
  const char* name;
  Sizes cache, sizes, strides;
  std::int64_t block, offset, head, dim;
};

void PrintTo(const ScaleRow& row, std::ostream* os) { *os << row.name; }

const ScaleRow kScaleRows[] = {
    {"per_tensor", {10, 16, 4, 64}, {1}, {1}, 0, 0, 0, 0},
    {"scalar", {10, 16, 4, 64}, {}, {}, 0, 0, 0, 0},
    {"per_tensor_in_three_dimensions", {10, 16, 4, 64}, {1, 1, 1}, {5, 6, 7}, 0, 0, 0, 0},
    {"per_head", {10, 16, 4, 64}, {4}, {1}, 0, 0, 1, 0},
    {"per_head_with_gaps", {10, 16, 4, 64}, {4}, {3}, 0, 0, 3, 0},
    {"per_head_in_a_column", {10, 16, 4, 64}, {4, 1}, {2, 9}, 0, 0, 2, 0},
    {"per_head_expanded", {10, 16, 4, 64}, {4}, {0}, 0, 0, 0, 0},
    {"per_channel", {10, 16, 4, 64}, {4, 64}, {64, 1}, 0, 0, 64, 1},
    {"per_channel_transposed", {10, 16, 4, 64}, {4, 64}, {1, 4}, 0, 0, 1, 4},
    {"per_channel_of_all_heads", {10, 16, 4, 64}, {4, 64}, {0, 1}, 0, 0, 0, 1},
    {"per_channel_of_one_head", {10, 16, 1, 64}, {1, 64}, {7, 2}, 0, 0, 0, 2},
    {"per_channel_of_one_element", {10, 16, 4, 1}, {4, 1}, {3, 8}, 0, 0, 3, 0},
    {"one_head_of_one_element", {10, 16, 1, 1}, {1, 1}, {3, 8}, 0, 0, 0, 0},
    {"per_channel_of_as_many_elements_as_heads", {10, 16, 8, 8}, {8, 8}, {8, 1}, 0, 0, 8, 1},
    {"per_token_and_head", {10, 16, 4, 64}, {10, 16, 4}, {64, 4, 1}, 64, 4, 1, 0},
    {"per_token_and_head_transposed", {10, 16, 4, 64}, {10, 16, 4}, {64, 1, 16}, 64, 1, 16, 0},
    {"per_token_of_one_head", {10, 16, 1, 64}, {10, 16, 1}, {16, 1, 5}, 16, 1, 0, 0},
    {"per_token_in_blocks_of_one", {10, 1, 4, 64}, {10, 1, 4}, {4, 9, 1}, 4, 0, 1, 0},
    {"one_token", {1, 1, 4, 64}, {1, 1, 4}, {7, 9, 1}, 0, 0, 1, 0},
};

class AttentionScales : public testing::TestWithParam<ScaleRow> {};

INSTANTIATE_TEST_SUITE_P(, AttentionScales, testing::ValuesIn(kScaleRows),
                         [](const auto& info) { return std::string(info.param.name); });

TEST_P(AttentionScales, Strides) {
  const ScaleRow& row = GetParam();
  PagedAttention p = plain_attention_problem();
  p.query = query({3, 8, row.cache[3]}, DType::BFloat16), p.out = out({3, 8, row.cache[3]});
  p.key_cache = key_cache(row.cache), p.value_cache = value_cache(row.cache);
  const auto expect = [&](const ChannelScales& scales, const void* data) {
    EXPECT_EQ(scales.data, data);
    EXPECT_EQ(scales.block, row.block);
    EXPECT_EQ(scales.offset, row.offset);
    EXPECT_EQ(scales.head, row.head);
    EXPECT_EQ(scales.dim, row.dim);
    EXPECT_EQ(scales.per_token(), row.block != 0 || row.offset != 0);
  };
  p.k_scale = view_at(kKeyScale, DType::Float32, row.sizes, row.strides);
  const AttentionLayout k = lower(p);
  expect(k.k_scale, p.k_scale.data);
  EXPECT_EQ(k.v_scale.data, p.v_scale.data);
  EXPECT_EQ(k.v_scale.head, 0) << "V has scales of its own";
  p.k_scale = k_scale({1});
  p.v_scale = view_at(kValueScale, DType::Float32, row.sizes, row.strides);
  expect(lower(p).v_scale, p.v_scale.data);
}

TEST(AttentionLayout, ScalesOfPlainCachesAreNotUsed) {
  PagedAttention p = plain_attention_problem();
  set_caches(p, DType::BFloat16);
  p.k_scale = k_scale({4, 64}), p.v_scale = v_scale({10, 16, 4});
  const AttentionLayout layout = lower(p);
  for (const ChannelScales* scales : {&layout.k_scale, &layout.v_scale}) {
    EXPECT_EQ(scales->data, nullptr);
    EXPECT_FALSE(scales->per_token());
    EXPECT_EQ(scales->head, 0);
    EXPECT_EQ(scales->dim, 0);
  }
}

TEST(AttentionLayout, ScalesOfQueryAreSharedByNeighboringHeads) {
  struct Row {
    TensorView scale;
    std::int64_t stride, heads_per_scale;
  };
  const Row kRows[] = {{q_scale({}), 0, 8},  {q_scale({1, 1}, {7, 9}), 0, 8},
                       {q_scale({4}), 1, 2}, {q_scale({4, 1}, {3, 1}), 3, 2},
                       {q_scale({8}), 1, 1}, {q_scale({8}, {0}), 0, 1}};
  for (const Row& row : kRows) {
    PagedAttention p = attention_problem();
    p.q_scale = row.scale;
    const AttentionLayout layout = lower(p);
    EXPECT_EQ(layout.q_scale, p.q_scale->data);
    EXPECT_EQ(layout.q_scale_stride, row.stride) << shape_string(row.scale);
    EXPECT_EQ(layout.heads_per_q_scale, row.heads_per_scale) << shape_string(row.scale);
  }
}

TEST(AttentionLayout, RowsAreTheFewestOfQueryOutAndLse) {
  const auto rows = [](std::int64_t query_rows, std::int64_t out_rows, std::int64_t lse_rows) {
    PagedAttention p = attention_problem();
    p.query = query({query_rows, 8, 64}), p.out = out({out_rows, 8, 64}), p.lse = reals(kLse, {lse_rows, 8});
    return lower(p).num_rows;
  };
  EXPECT_EQ(rows(5, 6, 7), 5);
  EXPECT_EQ(rows(6, 5, 7), 5);
  EXPECT_EQ(rows(6, 7, 5), 5);
  EXPECT_EQ(rows(6, 7, 0), 0);
}

TEST(AttentionLayout, Numbers) {
  PagedAttention p = attention_problem();
  p.softcap = 30.0f, p.sliding_window = 128, p.num_splits = 3;
  const AttentionLayout layout = lower(p);
  EXPECT_EQ(layout.softmax_scale, 0.125f);
  EXPECT_EQ(layout.softcap, 30.0f);
  EXPECT_EQ(layout.sliding_window, 128);
  EXPECT_EQ(layout.num_splits, 3);
}

TEST(AttentionLayout, MaxSeqLenIsWhatTheTableHoldsAtMost) {
  const auto max_seq_len = [](std::int64_t bound, const Sizes& table = {3, 7}, const Sizes& strides = {}) {
    PagedAttention p = attention_problem();
    p.block_table = indices(kTable, table, strides);
    p.max_seq_len = bound;
    return lower(p).max_seq_len;
  };
  EXPECT_EQ(max_seq_len(0), 7 * 16);
  EXPECT_EQ(max_seq_len(100), 100);
  EXPECT_EQ(max_seq_len(112), 112);
  EXPECT_EQ(max_seq_len(113), 112);
  EXPECT_EQ(max_seq_len(0, {3, 0}), 0);
  EXPECT_EQ(max_seq_len(5, {3, 0}), 0);
  constexpr std::int64_t kHuge = std::int64_t{1} << 60;
  EXPECT_EQ(max_seq_len(0, {3, kHuge}, {0, 0}), INT32_MAX) << "lengths are int32";
  EXPECT_EQ(max_seq_len(INT64_MAX, {3, kHuge}, {0, 0}), INT32_MAX);
}

TEST(AttentionLayout, MaxQueryLenIsTheNumberOfRowsAtMost) {
  const auto max_query_len = [](std::int64_t bound, std::int64_t rows, bool sums) {
    PagedAttention p = attention_problem();
    p.query = query({rows, 8, 64}), p.max_query_len = bound;
    if (!sums) p.cu_query_lens.reset();
    return lower(p).max_query_len;
  };
  EXPECT_EQ(max_query_len(2, 5, true), 2);
  EXPECT_EQ(max_query_len(5, 5, true), 5);
  EXPECT_EQ(max_query_len(6, 5, true), 5);
  EXPECT_EQ(max_query_len(6, 0, true), 1);
  EXPECT_EQ(max_query_len(6, 5, false), 1) << "one query per sequence";
}

TEST(AttentionLayout, WindowsFitInt32) {
  PagedAttention p = attention_problem();
  p.sliding_window = INT64_MAX;
  EXPECT_EQ(lower(p).sliding_window, INT32_MAX);
}

TEST(AttentionLayout, EmptyProblems) {
  PagedAttention p = attention_problem();
  p.query = query({0, 8, 64});
  EXPECT_TRUE(lower(p).empty()) << "no queries";
  p = plain_attention_problem();
  p.block_table = indices(kTable, {0, 7}), p.seq_lens = indices(kSeqLens, {0});
  EXPECT_TRUE(lower(p).empty()) << "no sequences";
  p = plain_attention_problem();
  p.query = query({3, 0, 64}, DType::BFloat16), p.out = out({3, 0, 64});
  EXPECT_TRUE(lower(p).empty()) << "no query heads";
  p.key_cache = key_cache({10, 16, 0, 64}), p.value_cache = value_cache({10, 16, 0, 64});
  EXPECT_TRUE(lower(p).empty()) << "no heads at all";
  EXPECT_EQ(lower(p).heads_per_kv_head(), 0);
  p = plain_attention_problem();
  p.query = query({3, 8, 0}, DType::BFloat16), p.out = out({3, 8, 0});
  p.key_cache = key_cache({10, 16, 4, 0}), p.value_cache = value_cache({10, 16, 4, 0});
  EXPECT_TRUE(lower(p).empty()) << "heads of no elements";
  p = plain_attention_problem();
  p.key_cache = key_cache({0, 16, 4, 64}), p.value_cache = value_cache({0, 16, 4, 64});
  EXPECT_FALSE(lower(p).empty()) << "no blocks: the result is 0";
}

}  // namespace
}  // namespace fp8kv::core
