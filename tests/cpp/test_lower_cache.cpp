// Validation of the problems of the paged cache: every sentence, and the CacheLayout that backends work from. Nothing here
// reads or writes an element, so addresses are made up.
#include <gtest/gtest.h>

#include <optional>
#include <random>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "core/cache_layout.h"
#include "problems.h"

namespace fp8kv::core {
namespace {

using namespace testing_support;

const Sizes kHnd = {16 * 4 * 64, 64, 16 * 64, 1};

const std::string kAppend = "fp8kv::reshape_and_cache_flash: ";
const std::string kDynamic = "fp8kv::reshape_and_cache_flash_dynamic: ";
const std::string kGather = "fp8kv::gather_and_dequant_cache: ";

TEST(CacheErrors, NoneWithoutAMistake) {
  EXPECT_EQ(sentence(append_problem()), "");
  EXPECT_EQ(sentence(append_dynamic_problem()), "");
  EXPECT_EQ(sentence(gather_problem()), "");
}

// --- Sentences about key, value and the caches --------------------------------

TEST(CacheErrors, DtypeOfKeyAndValue) {
  CacheAppend p = append_problem();
  p.key.dtype = DType::Float64;
  EXPECT_EQ(sentence(p), kAppend + "key must be float32, float16 or bfloat16, got float64");
  p = append_problem();
  p.value.dtype = DType::Float16;
  EXPECT_EQ(sentence(p), kAppend + "value must be bfloat16 as key is, got float16");
}

struct Format {
  std::optional<DType> wanted;  // kv_cache_dtype
  DType cache;
  DType element;         // Other: refused
  const char* expected;  // the sentence without the op
};

const Format kFormats[] = {
    {{}, DType::E4M3, DType::E4M3, ""},
    {{}, DType::E5M2, DType::E5M2, ""},
    {{}, DType::Float32, DType::Float32, ""},
    {{}, DType::Float16, DType::Float16, ""},
    {{}, DType::BFloat16, DType::BFloat16, ""},
    {DType::E4M3, DType::E4M3, DType::E4M3, ""},
    {DType::E4M3, DType::UInt8, DType::E4M3, ""},
    {DType::E5M2, DType::E5M2, DType::E5M2, ""},
    {DType::E5M2, DType::UInt8, DType::E5M2, ""},
    {DType::Float32, DType::Float32, DType::Float32, ""},
    {DType::Float16, DType::Float16, DType::Float16, ""},
    {DType::BFloat16, DType::BFloat16, DType::BFloat16, ""},
    {{},
     DType::UInt8,
     DType::Other,
     "key_cache must be float32, float16, bfloat16, float8_e4m3fn, float8_e5m2 or int8, as kv_cache_dtype is not given, got "
     "uint8"},
    {{}, DType::Int8, DType::Int8, ""},
    {DType::Int8, DType::Int8, DType::Int8, ""},
    {DType::Int8, DType::UInt8, DType::Other, "key_cache must be int8 as kv_cache_dtype is \"int8\", got uint8"},
    {DType::Int8, DType::E4M3, DType::Other, "key_cache must be int8 as kv_cache_dtype is \"int8\", got float8_e4m3fn"},
    {DType::Int16, DType::E4M3, DType::Other,
     "kv_cache_dtype must be float32, float16, bfloat16, float8_e4m3fn, float8_e5m2 or int8, got int16"},
    {DType::UInt8, DType::UInt8, DType::Other,
     "kv_cache_dtype must be float32, float16, bfloat16, float8_e4m3fn, float8_e5m2 or int8, got uint8"},
    {DType::E4M3, DType::E5M2, DType::Other,
     "key_cache must be float8_e4m3fn or uint8 as kv_cache_dtype is \"fp8\", got float8_e5m2"},
    {DType::E4M3, DType::Int8, DType::Other, "key_cache must be float8_e4m3fn or uint8 as kv_cache_dtype is \"fp8\", got int8"},
    {DType::E5M2, DType::E4M3, DType::Other,
     "key_cache must be float8_e5m2 or uint8 as kv_cache_dtype is \"fp8_e5m2\", got float8_e4m3fn"},
    {DType::E4M3, DType::BFloat16, DType::Other,
     "key_cache must be float8_e4m3fn or uint8 as kv_cache_dtype is \"fp8\", got bfloat16"},
    {DType::Float16, DType::BFloat16, DType::Other, "key_cache must be float16 as kv_cache_dtype is \"float16\", got bfloat16"},
    {DType::BFloat16, DType::UInt8, DType::Other, "key_cache must be bfloat16 as kv_cache_dtype is \"bfloat16\", got uint8"},
    {DType::Float32, DType::Float64, DType::Other, "key_cache must be float32 as kv_cache_dtype is \"float32\", got float64"},
};

TEST(CacheErrors, FormatAndDtypeOfTheCacheMustSayTheSame) {
  for (const Format& f : kFormats) {
    SCOPED_TRACE(std::string(f.wanted ? name(*f.wanted) : "absent") + " " + name(f.cache));
    CacheAppend p = append_problem();
    p.kv_cache_dtype = f.wanted;
    p.key_cache.dtype = p.value_cache.dtype = f.cache;
    EXPECT_EQ(sentence(p), *f.expected ? kAppend + f.expected : "");
    if (f.element == DType::Other) continue;
    EXPECT_EQ(lower(p).front().cache_dtype, f.element);
  }
}

TEST(CacheErrors, ADynamicAppendMustQuantize) {
  for (DType real : {DType::BFloat16, DType::Float32, DType::Int16}) {
    CacheAppendDynamic p = append_dynamic_problem();
    p.kv_cache_dtype = real;
    EXPECT_EQ(sentence(p), kDynamic + "kv_cache_dtype must be float8_e4m3fn, float8_e5m2 or int8, got " + name(real));
    p.kv_cache_dtype.reset();
    p.key_cache.dtype = p.value_cache.dtype = real;
    EXPECT_EQ(
        sentence(p),
        kDynamic + "key_cache must be float8_e4m3fn, float8_e5m2 or int8, as kv_cache_dtype is not given, got " + name(real));
  }
}

TEST(CacheErrors, CachesOfTwoDtypes) {
  CacheAppend p = append_problem();
  p.value_cache.dtype = DType::UInt8;
  EXPECT_EQ(sentence(p),
            kAppend + "value_cache must be float8_e4m3fn as key_cache is, as v_cache_dtype is not given, got uint8");
  p.v_cache_dtype = DType::E5M2;
  EXPECT_EQ(sentence(p), "");
  p.value_cache.dtype = DType::Int8;
  EXPECT_EQ(sentence(p), kAppend + "value_cache must be float8_e5m2 or uint8 as v_cache_dtype is \"fp8_e5m2\", got int8");
  p.v_cache_dtype = DType::Int16;
  EXPECT_EQ(sentence(p),
            kAppend + "v_cache_dtype must be float32, float16, bfloat16, float8_e4m3fn, float8_e5m2 or int8, got int16");
  CacheAppendDynamic d = append_dynamic_problem();
  d.value_cache.dtype = DType::BFloat16, d.v_cache_dtype = DType::BFloat16;
  EXPECT_EQ(sentence(d), kDynamic + "v_cache_dtype must be float8_e4m3fn, float8_e5m2 or int8, got bfloat16");
  CacheGather g = gather_problem();
  g.value_cache.dtype = DType::BFloat16, g.v_cache_dtype = DType::BFloat16;
  EXPECT_EQ(sentence(g), "");
}

TEST(CacheErrors, QuantizedRows) {
  CacheAppend p = append_problem();
  const std::string real = "float32, float16 or bfloat16";
  for (DType stored : {DType::E4M3, DType::UInt8}) {
    p.key.dtype = stored;
    EXPECT_EQ(sentence(p), "");
    p.value.dtype = DType::E4M3;
    EXPECT_EQ(sentence(p), "");
    p.value.dtype = DType::Float32;
    EXPECT_EQ(sentence(p), "") << "only rows that are both unquantized must have one type";
  }
  for (DType other : {DType::E5M2, DType::Int8, DType::E4M3Fnuz}) {
    p.key.dtype = other;
    EXPECT_EQ(sentence(p), kAppend + "key must be " + real + ", or float8_e4m3fn to be stored as it is, got " + name(other));
  }
  p.key_cache.dtype = p.value_cache.dtype = DType::Int8, p.key.dtype = DType::Int8;
  EXPECT_EQ(sentence(p), "");
  p.key.dtype = DType::UInt8;
  EXPECT_EQ(sentence(p), kAppend + "key must be " + real + ", or int8 to be stored as it is, got uint8");
  p.key_cache.dtype = p.value_cache.dtype = DType::Float16, p.key.dtype = DType::E4M3;
  EXPECT_EQ(sentence(p), kAppend + "key must be " + real + ", got float8_e4m3fn");
  CacheAppendDynamic d = append_dynamic_problem();
  d.key.dtype = DType::E4M3;
  EXPECT_EQ(sentence(d), kDynamic + "key must be " + real + ", got float8_e4m3fn");
  CacheGather g = gather_problem();
  g.value.dtype = DType::E4M3;
  EXPECT_EQ(sentence(g), kGather + "value must be bfloat16 as key is, got float8_e4m3fn");
  p = append_problem(), p.value.dtype = DType::E5M2;
  EXPECT_EQ(sentence(p), kAppend + "value must be bfloat16 as key is, or float8_e4m3fn to be stored as it is, got float8_e5m2");
}

TEST(CacheErrors, Devices) {
  const std::string expected = " must be on the device of key, cpu, got cuda:0";
  CacheAppend a = append_problem();
  a.value.device = kCuda;
  EXPECT_EQ(sentence(a), kAppend + "value" + expected);
  a = append_problem(), a.key_cache.device = kCuda;
  EXPECT_EQ(sentence(a), kAppend + "key_cache" + expected);
  a = append_problem(), a.value_cache.device = kCuda;
  EXPECT_EQ(sentence(a), kAppend + "value_cache" + expected);
  a = append_problem(), a.slot_mapping.device = kCuda;
  EXPECT_EQ(sentence(a), kAppend + "slot_mapping" + expected);
  a = append_problem(), a.v_scale.device = kCuda;
  EXPECT_EQ(sentence(a), kAppend + "v_scale" + expected);
  CacheAppendDynamic d = append_dynamic_problem();
  d.v_scale_cache.device = kCuda;
  EXPECT_EQ(sentence(d), kDynamic + "v_scale_cache" + expected);
  CacheGather g = gather_problem();
  g.block_table.device = kCuda;
  EXPECT_EQ(sentence(g), kGather + "block_table" + expected);
  g = gather_problem(), g.cu_seq_lens.device = kCuda;
  EXPECT_EQ(sentence(g), kGather + "cu_seq_lens" + expected);
  g = gather_problem(), g.seq_starts->device = kCuda;
  EXPECT_EQ(sentence(g), kGather + "seq_starts" + expected);
}

TEST(CacheErrors, ShapesOfTheCaches) {
  CacheAppend p = append_problem();
  p.key_cache = key_cache({10, 16, 256});
  EXPECT_EQ(
      sentence(p),
      kAppend + "key_cache must have the shape [num_blocks, block_size, num_kv_heads, head_size], got shape [10, 16, 256]");
  p = append_problem(), p.value_cache = value_cache({10, 4, 16, 64});
  EXPECT_EQ(sentence(p), kAppend +
                             "value_cache must have num_blocks=10, block_size=16 and num_kv_heads=4 as key_cache has, "
                             "got shape [10, 4, 16, 64]");
  p.value_cache = value_cache({10, 16, 256});
  EXPECT_EQ(
      sentence(p),
      kAppend + "value_cache must have the shape [num_blocks, block_size, num_kv_heads, head_size], got shape [10, 16, 256]");
}

TEST(CacheErrors, ShapesOfKeyAndValue) {
  CacheAppend p = append_problem();
  p.key = key({5, 256});
  EXPECT_EQ(sentence(p), kAppend + "key must have the shape [num_tokens, num_kv_heads, head_size], got shape [5, 256]");
  p = append_problem(), p.value = value({5, 4, 64, 1});
  EXPECT_EQ(sentence(p), kAppend + "value must have the shape [num_tokens, num_kv_heads, head_size], got shape [5, 4, 64, 1]");
  p = append_problem(), p.key = key({5, 8, 64});
  EXPECT_EQ(sentence(p), kAppend + "key must have num_kv_heads=4 and head_size=64 as key_cache has, got shape [5, 8, 64]");
  p = append_problem(), p.value = value({5, 4, 128});
  EXPECT_EQ(sentence(p), kAppend + "value must have num_kv_heads=4 and head_size=64 as value_cache has, got shape [5, 4, 128]");
}

// Of 4 heads of 64 for K and of `size` for V.
template <class Problem>
Problem with_value_size(Problem p, std::int64_t size) {
  p.value = value({5, 4, size});
  p.value_cache = value_cache({10, 16, 4, size});
  return p;
}

TEST(CacheErrors, HeadsOfTwoSizes) {
  for (std::int64_t size : {48, 1, 0, 200}) {
    SCOPED_TRACE(size);
    EXPECT_EQ(sentence(with_value_size(append_problem(), size)), "");
    EXPECT_EQ(sentence(with_value_size(append_dynamic_problem(), size)), "");
    EXPECT_EQ(sentence(with_value_size(gather_problem(), size)), "");
  }
  CacheAppend p = with_value_size(append_problem(), 48);
  p.k_scale = k_scale({4, 64}), p.v_scale = v_scale({4, 48});
  p.v_offset = view_at(kValueOffset, DType::Float32, {4, 48});
  EXPECT_EQ(sentence(p), "");
  p.v_scale = v_scale({4, 64});
  EXPECT_EQ(sentence(p), kAppend +
                             "v_scale must have 1 or num_kv_heads=4 elements, or the shape [num_kv_heads, head_size=48], "
                             "got shape [4, 64]");
  p.v_scale = v_scale({1}), p.v_offset = view_at(kValueOffset, DType::Float32, {4, 64});
  EXPECT_EQ(sentence(p), kAppend + "v_offset must have the shape [num_kv_heads=4, head_size=48], got shape [4, 64]");
  p = with_value_size(append_problem(), 48), p.value = value({5, 4, 64});
  EXPECT_EQ(sentence(p), kAppend + "value must have num_kv_heads=4 and head_size=48 as value_cache has, got shape [5, 4, 64]");
}

TEST(CacheErrors, WithoutVItsScalesMayBeThoseOfK) {
  CacheAppendDynamic p = with_value_size(append_dynamic_problem(), 0);
  p.v_scale_cache = p.k_scale_cache;
  EXPECT_EQ(sentence(p), "");
  p = with_value_size(append_dynamic_problem(), 1), p.v_scale_cache = p.k_scale_cache;
  EXPECT_EQ(sentence(p), kDynamic + "k_scale_cache must not overlap v_scale_cache, got views that share memory");
}

TEST(CacheErrors, HeadsOfTwoSizesInOneTensor) {
  // K and V beside each other in heads of `pitch` elements.
  const auto problem = [](std::int64_t size, std::int64_t pitch, std::int64_t begin) {
    CacheAppend p = with_value_size(append_problem(), size);
    p.key_cache = key_cache({10, 16, 4, 64}, {64 * pitch, 4 * pitch, pitch, 1});
    p.value_cache = view_at(kKeyCache + begin, DType::E4M3, {10, 16, 4, size}, {64 * pitch, 4 * pitch, pitch, 1});
    return p;
  };
  EXPECT_EQ(sentence(problem(48, 112, 64)), "");
  EXPECT_EQ(sentence(problem(1, 65, 64)), "");
  EXPECT_EQ(sentence(problem(40, 112, 72)), "");
  const std::string shared = kAppend + "key_cache must not overlap value_cache, got views that share memory";
  EXPECT_EQ(sentence(problem(48, 112, 63)), shared);
  EXPECT_EQ(sentence(problem(49, 112, 64)), shared);
  EXPECT_EQ(sentence(problem(64, 112, 0)), shared);
}

// --- Sentences about slots and scales --------------------------------

TEST(CacheErrors, Slots) {
  CacheAppend a = append_problem();
  a.slot_mapping.dtype = DType::Int16;
  EXPECT_EQ(sentence(a), kAppend + "slot_mapping must be int32 or int64, got int16");
  a.slot_mapping.dtype = DType::Int32;
  EXPECT_EQ(sentence(a), "");
  a.slot_mapping = view_at(kSlots, DType::Int64, {5, 1});
  EXPECT_EQ(sentence(a), kAppend + "slot_mapping must have the shape [num_tokens], got shape [5, 1]");
  CacheAppendDynamic d = append_dynamic_problem();
  d.slot_mapping.dtype = DType::Float32;
  EXPECT_EQ(sentence(d), kDynamic + "slot_mapping must be int32 or int64, got float32");
}

TEST(CacheErrors, FewerRowsThanSlots) {
  CacheAppend p = append_problem();
  p.key = key({4, 4, 64});
  EXPECT_EQ(sentence(p), kAppend + "key must have at least 5 rows, one for each element of slot_mapping, got shape [4, 4, 64]");
  p = append_problem(), p.value = value({0, 4, 64});
  EXPECT_EQ(sentence(p),
            kAppend + "value must have at least 5 rows, one for each element of slot_mapping, got shape [0, 4, 64]");
}

const std::string kOneOrHeads = " must have 1 or num_kv_heads=4 elements, or the shape [num_kv_heads, head_size=64], ";

TEST(CacheErrors, Scales) {
  CacheAppend p = append_problem();
  p.k_scale.dtype = DType::BFloat16;
  EXPECT_EQ(sentence(p), kAppend + "k_scale must be float32, got bfloat16");
  p = append_problem(), p.v_scale.dtype = DType::Float64;
  EXPECT_EQ(sentence(p), kAppend + "v_scale must be float32, got float64");
  p = append_problem(), p.k_scale = k_scale({3});
  EXPECT_EQ(sentence(p), kAppend + "k_scale" + kOneOrHeads + "got shape [3]");
  p = append_problem(), p.v_scale = v_scale({0});
  EXPECT_EQ(sentence(p), kAppend + "v_scale" + kOneOrHeads + "got shape [0]");
  p = append_problem(), p.k_scale = k_scale({10, 16, 4});
  EXPECT_EQ(sentence(p), kAppend + "k_scale" + kOneOrHeads + "got shape [10, 16, 4]");
  p = append_problem(), p.k_scale = k_scale({2, 2}, {5, 1});
  EXPECT_EQ(sentence(p), kAppend + "k_scale must be evenly strided, got several strides in shape [2, 2]");
  p = append_problem(), p.v_scale = v_scale({2, 2}, {1, 2});
  EXPECT_EQ(sentence(p), kAppend + "v_scale must be evenly strided, got several strides in shape [2, 2]");
}

TEST(CacheErrors, ScalesAreCheckedForPlainCopiesToo) {
  CacheAppend p = append_problem();
  p.key_cache.dtype = p.value_cache.dtype = DType::BFloat16;
  p.k_scale = k_scale({3});
  EXPECT_EQ(sentence(p), kAppend + "k_scale" + kOneOrHeads + "got shape [3]");
}

TEST(CacheErrors, ScalesOfAGather) {
  const std::string expected =
      " must have 1 or num_kv_heads=4 elements, or the shape [num_kv_heads, head_size=64] or [num_blocks=10, block_size=16, "
      "num_kv_heads], got shape ";
  CacheGather p = gather_problem();
  p.k_scale = k_scale({10, 16, 1});
  EXPECT_EQ(sentence(p), kGather + "k_scale" + expected + "[10, 16, 1]");
  p = gather_problem(), p.v_scale = v_scale({10, 4, 16});
  EXPECT_EQ(sentence(p), kGather + "v_scale" + expected + "[10, 4, 16]");
  p = gather_problem(), p.v_scale = v_scale({10, 16, 4});
  EXPECT_EQ(sentence(p), "");
  p.v_scale.dtype = DType::Float16;
  EXPECT_EQ(sentence(p), kGather + "v_scale must be float32, got float16");
}

TEST(CacheErrors, ScalesPerChannel) {
  CacheAppend p = append_problem();
  p.k_scale = k_scale({4, 64}), p.v_scale = v_scale({4, 64}, {3, 17});
  EXPECT_EQ(sentence(p), "");
  p.k_scale.dtype = DType::Float16;
  EXPECT_EQ(sentence(p), kAppend + "k_scale must be float32, got float16");
  for (const Sizes& sizes : {Sizes{64, 4}, Sizes{4, 32}, Sizes{256}, Sizes{1, 4, 64}, Sizes{4, 64, 1}, Sizes{1, 64}}) {
    p.k_scale = k_scale(sizes);
    EXPECT_EQ(sentence(p), kAppend + "k_scale" + kOneOrHeads + "got shape " + shape_string(p.k_scale));
  }
}

template <class Problem>
void expect_sentences_about_offsets(const Problem& sound, const std::string& op) {
  Problem p = sound;
  p.k_offset = view_at(kKeyOffset, DType::Float32, {4, 64}),
  p.v_offset = view_at(kValueOffset, DType::Float32, {4, 64}, {1, 9});
  EXPECT_EQ(sentence(p), "");
  for (const Sizes& sizes : {Sizes{64, 4}, Sizes{4}, Sizes{1}, Sizes{0}, Sizes{1, 4, 64}}) {
    Problem q = p;
    q.v_offset = view_at(kValueOffset, DType::Float32, sizes);
    EXPECT_EQ(sentence(q),
              op + "v_offset must have the shape [num_kv_heads=4, head_size=64], got shape " + shape_string(*q.v_offset));
  }
  Problem q = p;
  q.k_offset->dtype = DType::BFloat16;
  EXPECT_EQ(sentence(q), op + "k_offset must be float32, got bfloat16");
  q = p, q.k_offset->device = kCuda;
  EXPECT_EQ(sentence(q), op + "k_offset must be on the device of key, cpu, got cuda:0");
  q = p, q.k_offset->data = nullptr;
  EXPECT_EQ(sentence(q), op + "k_offset must point to memory, got a null pointer of shape [4, 64]");
}

TEST(CacheErrors, Offsets) {
  expect_sentences_about_offsets(append_problem(), kAppend);
  expect_sentences_about_offsets(append_dynamic_problem(), kDynamic);
  expect_sentences_about_offsets(gather_problem(), kGather);
}

TEST(CacheErrors, OffsetsOfPlainCopies) {
  CacheAppend a = append_problem();
  a.key_cache.dtype = a.value_cache.dtype = DType::BFloat16;
  a.v_offset = view_at(kValueOffset, DType::Float32, {4, 64});
  EXPECT_EQ(sentence(a), kAppend + "v_offset must be None as value_cache is not quantized, got shape [4, 64]");
}

// All views of a problem to CUDA.
void move(CacheAppend& p) {
  for (TensorView* v : {&p.key, &p.value, &p.key_cache, &p.value_cache, &p.slot_mapping, &p.k_scale, &p.v_scale})
    v->device = kCuda;
}
void move(CacheAppendDynamic& p) {
  for (TensorView* v : {&p.key, &p.value, &p.key_cache, &p.value_cache, &p.slot_mapping, &p.k_scale_cache, &p.v_scale_cache})
    v->device = kCuda;
}
void move(CacheGather& p) {
  for (TensorView* v :
       {&p.key, &p.value, &p.key_cache, &p.value_cache, &p.block_table, &p.cu_seq_lens, &p.k_scale, &p.v_scale, &*p.seq_starts})
    v->device = kCuda;
}

template <class Problem>
Problem on_cuda(Problem p) {
  move(p);
  return p;
}

TensorView offset_on_cuda() {
  TensorView view = view_at(kKeyOffset, DType::Float32, {4, 64});
  view.device = kCuda;
  return view;
}

TEST(CacheErrors, Int8AndChannelsAreForCudaToo) {
  const auto make_int8 = [](auto& p) { p.key_cache.dtype = p.value_cache.dtype = DType::Int8; };
  CacheAppend a = on_cuda(append_problem());
  a.k_scale.ndim = 2, a.k_scale.sizes[0] = 4, a.k_scale.sizes[1] = 64, a.k_scale.strides[0] = 64, a.k_scale.strides[1] = 1;
  a.v_offset = offset_on_cuda();
  EXPECT_EQ(sentence(a), "");
  make_int8(a);
  EXPECT_EQ(sentence(a), "");
  CacheAppendDynamic d = on_cuda(append_dynamic_problem());
  d.k_offset = offset_on_cuda();
  make_int8(d);
  EXPECT_EQ(sentence(d), "");
  CacheGather g = on_cuda(gather_problem());
  g.k_offset = offset_on_cuda();
  make_int8(g);
  EXPECT_EQ(sentence(g), "");
  g.k_offset->device = {};
  EXPECT_EQ(sentence(g), kGather + "k_offset must be on the device of key, cuda:0, got cpu");
}

TEST(CacheErrors, ScaleCaches) {
  CacheAppendDynamic p = append_dynamic_problem();
  const std::string expected = " must have the shape [num_blocks=10, block_size=16, num_kv_heads=4], got shape ";
  p.k_scale_cache = k_scale({1});
  EXPECT_EQ(sentence(p), kDynamic + "k_scale_cache" + expected + "[1]");
  p = append_dynamic_problem(), p.v_scale_cache = v_scale({10, 4, 16});
  EXPECT_EQ(sentence(p), kDynamic + "v_scale_cache" + expected + "[10, 4, 16]");
  p = append_dynamic_problem(), p.v_scale_cache.dtype = DType::Float16;
  EXPECT_EQ(sentence(p), kDynamic + "v_scale_cache must be float32, got float16");
}

// --- Sentences about gathers --------------------------------

TEST(CacheErrors, RowsOfKeyAndValueDiffer) {
  CacheGather p = gather_problem();
  p.value = value({6, 4, 64});
  EXPECT_EQ(sentence(p), kGather + "value must have as many rows as key, 5, got shape [6, 4, 64]");
}

TEST(CacheErrors, BlockTable) {
  CacheGather p = gather_problem();
  p.block_table.dtype = DType::Int64;
  EXPECT_EQ(sentence(p), kGather + "block_table must be int32, got int64");
  p.block_table = view_at(kTable, DType::Int32, {3});
  EXPECT_EQ(sentence(p), kGather + "block_table must have the shape [num_seqs, max_blocks], got shape [3]");
}

TEST(CacheErrors, Sums) {
  CacheGather p = gather_problem();
  p.cu_seq_lens.dtype = DType::Int64;
  EXPECT_EQ(sentence(p), kGather + "cu_seq_lens must be int32, got int64");
  p.cu_seq_lens = view_at(kSums, DType::Int32, {1, 4});
  EXPECT_EQ(sentence(p), kGather + "cu_seq_lens must have the shape [num_seqs + 1], got shape [1, 4]");
  p.cu_seq_lens = view_at(kSums, DType::Int32, {3});
  EXPECT_EQ(sentence(p),
            kGather + "cu_seq_lens must have num_seqs + 1 = 4 elements, as block_table has num_seqs rows, got shape [3]");
}

TEST(CacheErrors, Starts) {
  CacheGather p = gather_problem();
  p.seq_starts->dtype = DType::Int64;
  EXPECT_EQ(sentence(p), kGather + "seq_starts must be int32, got int64");
  p.seq_starts = view_at(kStarts, DType::Int32, {3, 1});
  EXPECT_EQ(sentence(p), kGather + "seq_starts must have the shape [num_seqs], got shape [3, 1]");
  p.seq_starts = view_at(kStarts, DType::Int32, {4});
  EXPECT_EQ(sentence(p), kGather + "seq_starts must have num_seqs=3 elements, as block_table has rows, got shape [4]");
  p.seq_starts.reset();
  EXPECT_EQ(sentence(p), "");
}

// --- Overlap --------------------------------

TEST(CacheOverlap, ReadTensorsMayBeExpanded) {
  CacheAppend a = append_problem();
  a.key = key({5, 4, 64}, {0, 0, 1});
  a.slot_mapping = view_at(kSlots, DType::Int64, {5}, {0});
  a.k_scale = k_scale({4}, {0});
  EXPECT_EQ(sentence(a), "");
  CacheGather g = gather_problem();
  g.key_cache = key_cache(kCacheSizes, {0, 0, 64, 1});
  g.block_table = view_at(kTable, DType::Int32, {3, 7}, {0, 1});
  EXPECT_EQ(sentence(g), "");
}

TEST(CacheOverlap, EveryWrittenTensorWithEveryOther) {
  const auto expected = [](const std::string& start, const char* a, const char* b) {
    return start + a + " must not overlap " + b + ", got views that share memory";
  };
  CacheAppend a = append_problem();
  a.value_cache.data = a.key_cache.data;
  EXPECT_EQ(sentence(a), expected(kAppend, "key_cache", "value_cache"));
  const std::pair<const char*, TensorView CacheAppend::*> kRead[] = {{"key", &CacheAppend::key},
                                                                     {"value", &CacheAppend::value},
                                                                     {"slot_mapping", &CacheAppend::slot_mapping},
                                                                     {"k_scale", &CacheAppend::k_scale},
                                                                     {"v_scale", &CacheAppend::v_scale}};
  for (const auto& [name, member] : kRead) {
    a = append_problem(), (a.*member).data = a.key_cache.data;
    EXPECT_EQ(sentence(a), expected(kAppend, "key_cache", name));
    a = append_problem(), (a.*member).data = a.value_cache.data;
    EXPECT_EQ(sentence(a), expected(kAppend, "value_cache", name));
  }
  CacheAppendDynamic d = append_dynamic_problem();
  d.v_scale_cache.data = d.k_scale_cache.data;
  EXPECT_EQ(sentence(d), expected(kDynamic, "k_scale_cache", "v_scale_cache"));
  d = append_dynamic_problem(), d.k_scale_cache.data = d.value_cache.data;
  EXPECT_EQ(sentence(d), expected(kDynamic, "value_cache", "k_scale_cache"));
  d = append_dynamic_problem(), d.slot_mapping.data = d.v_scale_cache.data;
  EXPECT_EQ(sentence(d), expected(kDynamic, "v_scale_cache", "slot_mapping"));
  CacheGather g = gather_problem();
  g.value.data = g.key.data;
  EXPECT_EQ(sentence(g), expected(kGather, "key", "value"));
  const std::pair<const char*, TensorView CacheGather::*> kReadByGather[] = {
      {"key_cache", &CacheGather::key_cache},     {"value_cache", &CacheGather::value_cache},
      {"k_scale", &CacheGather::k_scale},         {"v_scale", &CacheGather::v_scale},
      {"block_table", &CacheGather::block_table}, {"cu_seq_lens", &CacheGather::cu_seq_lens}};
  for (const auto& [name, member] : kReadByGather) {
    g = gather_problem(), (g.*member).data = g.value.data;
    EXPECT_EQ(sentence(g), expected(kGather, "value", name));
  }
  g = gather_problem(), g.seq_starts->data = g.key.data;
  EXPECT_EQ(sentence(g), expected(kGather, "key", "seq_starts"));
  const auto offset_at = [](const TensorView& view) {
    return view_at(reinterpret_cast<std::uintptr_t>(view.data), DType::Float32, {4, 64});
  };
  a = append_problem(), a.k_offset = offset_at(a.value_cache);
  EXPECT_EQ(sentence(a), expected(kAppend, "value_cache", "k_offset"));
  d = append_dynamic_problem(), d.v_offset = offset_at(d.k_scale_cache);
  EXPECT_EQ(sentence(d), expected(kDynamic, "k_scale_cache", "v_offset"));
  g = gather_problem(), g.v_offset = offset_at(g.key);
  EXPECT_EQ(sentence(g), expected(kGather, "key", "v_offset"));
}

TEST(CacheOverlap, WhatIsOnlyReadMayOverlap) {
  CacheAppend a = append_problem();
  a.value.data = a.key.data, a.v_scale.data = a.k_scale.data;
  EXPECT_EQ(sentence(a), "");
  CacheGather g = gather_problem();
  g.value_cache.data = g.key_cache.data, g.v_scale.data = g.k_scale.data, g.seq_starts->data = g.cu_seq_lens.data;
  EXPECT_EQ(sentence(g), "");
}

// K and V caches at the byte offsets 0 and `offset`.
std::string sentence_of_caches(const Sizes& sizes, const Sizes& k_strides, const Sizes& v_strides, std::int64_t offset) {
  CacheAppend p = append_problem(sizes);
  p.key_cache = key_cache(sizes, k_strides);
  p.value_cache = view_at(kKeyCache + offset, DType::E4M3, sizes, v_strides);
  return sentence(p);
}

bool apart(const Sizes& k_strides, const Sizes& v_strides, std::int64_t offset, const Sizes& sizes = {3, 5, 2, 8}) {
  const std::string text = sentence_of_caches(sizes, k_strides, v_strides, offset);
  EXPECT_TRUE(text.empty() || text == kAppend + "key_cache must not overlap value_cache, got views that share memory") << text;
  return text.empty();
}
bool apart(const Sizes& strides, std::int64_t offset) { return apart(strides, strides, offset); }

TEST(CacheOverlap, SlicesOfOneTensor) {
  EXPECT_TRUE(apart({80, 16, 8, 1}, 240)) << "[2, blocks, slots, heads, size]";
  EXPECT_TRUE(apart({160, 16, 8, 1}, 80)) << "[blocks, 2, slots, heads, size]";
  EXPECT_TRUE(apart({160, 32, 8, 1}, 16)) << "[blocks, slots, 2, heads, size]";
  EXPECT_TRUE(apart({160, 32, 16, 1}, 8)) << "[blocks, slots, heads, 2 * size]";
  EXPECT_TRUE(apart({160, 32, 16, 2}, 1)) << "[blocks, slots, heads, size, 2]";
  EXPECT_TRUE(apart({160, 8, 40, 1}, 80)) << "[blocks, 2, heads, slots, size]";
  EXPECT_TRUE(apart({160, 8, 80, 1}, 40)) << "[blocks, heads, 2, slots, size]";
  EXPECT_TRUE(apart({1, 3, 240, 15}, 480)) << "[2, heads, size, slots, blocks]";
  EXPECT_TRUE(apart({1, 3, 240, 30}, 15)) << "[heads, size, 2, slots, blocks]";
}

TEST(CacheOverlap, SlicesInReverse) {
  for (const auto& [strides, offset] : std::vector<std::pair<Sizes, std::int64_t>>{
           {{80, 16, 8, 1}, 240}, {{160, 16, 8, 1}, 80}, {{160, 32, 8, 1}, 16}, {{160, 32, 16, 1}, 8}, {{160, 32, 16, 2}, 1}})
    EXPECT_TRUE(apart(strides, -offset)) << offset;
}

TEST(CacheOverlap, SlicesShiftedByOneElementMeet) {
  for (const auto& [strides, offset] : std::vector<std::pair<Sizes, std::int64_t>>{
           {{80, 16, 8, 1}, 240}, {{160, 16, 8, 1}, 80}, {{160, 32, 8, 1}, 16}, {{160, 32, 16, 1}, 8}, {{160, 32, 16, 2}, 1}}) {
    EXPECT_FALSE(apart(strides, offset - 1)) << offset;
    EXPECT_FALSE(apart(strides, 1 - offset)) << offset;
  }
  // The other way they run into the next slice of K.
  EXPECT_FALSE(apart({160, 16, 8, 1}, 81));
  EXPECT_FALSE(apart({160, 32, 8, 1}, 17));
  EXPECT_FALSE(apart({160, 32, 16, 1}, 9));
  EXPECT_FALSE(apart({160, 32, 16, 2}, 2));
}

TEST(CacheOverlap, SlicesWithGapsMayBeShiftedWithinThem) {
  // 10 bytes for 8 elements of K, as many for V.
  for (std::int64_t offset = -14; offset <= 14; ++offset)
    EXPECT_EQ(apart({200, 40, 20, 1}, offset), offset >= 8 ? offset <= 12 : offset <= -8 && offset >= -12) << offset;
}

TEST(CacheOverlap, DifferentPitchesAreRefusedUnlessTheRangesAreApart) {
  EXPECT_FALSE(apart({160, 32, 16, 1}, {160, 16, 8, 1}, 8));
  EXPECT_FALSE(apart({160, 32, 16, 1}, {320, 64, 32, 1}, 8));
  EXPECT_TRUE(apart({160, 32, 16, 1}, {320, 64, 32, 1}, 160 * 3));
  EXPECT_TRUE(apart({160, 32, 16, 1}, {80, 16, 8, 1}, -240));
}

TEST(CacheOverlap, EmptyCachesNeverOverlap) {
  EXPECT_TRUE(apart({80, 16, 8, 1}, {80, 16, 8, 1}, 0, {0, 5, 2, 8}));
  EXPECT_TRUE(apart({80, 16, 8, 1}, {80, 16, 8, 1}, 0, {3, 5, 2, 0}));
  EXPECT_FALSE(apart({80, 16, 8, 1}, {80, 16, 8, 1}, 0, {1, 1, 1, 1}));
}

TEST(CacheOverlap, DimensionsOfOneElementDoNotCount) {
  EXPECT_TRUE(apart({7, 2, 99, 1}, {1000, 2, 3, 5}, 1, {1, 8, 1, 1}));
  EXPECT_FALSE(apart({7, 2, 99, 1}, {1000, 2, 3, 5}, 2, {1, 8, 1, 1}));
}

// Whatever is accepted shares no byte, by looking at every byte.
TEST(CacheOverlap, AcceptedViewsShareNoByte) {
  std::mt19937 random(1);
  const auto any = [&](std::int64_t below) { return static_cast<std::int64_t>(random() % below); };
  const auto bytes = [](const Sizes& sizes, const Sizes& strides, std::int64_t offset) {
    std::set<std::int64_t> found;
    for (std::int64_t a = 0; a < sizes[0]; ++a)
      for (std::int64_t b = 0; b < sizes[1]; ++b)
        for (std::int64_t c = 0; c < sizes[2]; ++c)
          for (std::int64_t d = 0; d < sizes[3]; ++d)
            found.insert(offset + a * strides[0] + b * strides[1] + c * strides[2] + d * strides[3]);
    return found;
  };
  int accepted = 0;
  for (int i = 0; i < 20000; ++i) {
    const Sizes sizes = {1 + any(3), 1 + any(3), 1 + any(3), 1 + any(4)};
    Sizes k = {1 + any(60), 1 + any(30), 1 + any(12), 1 + any(4)}, v = k;
    if (any(3) == 0) v[any(4)] = 1 + any(60);
    std::shuffle(k.begin(), k.end(), random);
    if (any(3) != 0) v = k;
    const std::int64_t offset = any(81) - 40;
    if (!sentence_of_caches(sizes, k, v, offset).empty()) continue;
    ++accepted;
    const std::set<std::int64_t> of_k = bytes(sizes, k, 0);
    for (std::int64_t byte : bytes(sizes, v, offset)) ASSERT_EQ(of_k.count(byte), 0u) << "case " << i;
  }
  EXPECT_GT(accepted, 1000);
}

// --- Layouts --------------------------------

std::string text(const KVViews& kv) {
  std::ostringstream all;
  all << kv.rows.token << "," << kv.rows.head << "," << kv.rows.dim << " " << kv.cache.block << "," << kv.cache.offset << ","
      << kv.cache.head << "," << kv.cache.dim << " " << kv.scales.block << "," << kv.scales.offset << "," << kv.scales.head;
  return all.str();
}

// Sizes; then for K: strides of the rows, the cache and the scales.
std::string text(const CacheLayout& layout) {
  std::ostringstream all;
  all << layout.num_tokens << "x" << layout.num_heads << "x" << layout.head_size << " in " << layout.num_blocks << "x"
      << layout.block_size << ": " << text(layout.k);
  return all.str();
}

template <class Problem>
std::string layout_text(const Problem& problem) {
  return text(lower(problem).front());
}

TEST(CacheLayout, HeadsThatShareAScaleAreOne) {
  EXPECT_EQ(layout_text(append_problem()), "5x1x256 in 10x16: 256,64,1 4096,256,64,1 0,0,0");
  EXPECT_EQ(layout_text(gather_problem()), "5x1x256 in 10x16: 256,64,1 4096,256,64,1 0,0,0");
}

TEST(CacheLayout, HeadsWithScalesOfTheirOwnAreNot) {
  CacheAppend p = append_problem();
  p.v_scale = v_scale({4});
  EXPECT_EQ(layout_text(p), "5x4x64 in 10x16: 256,64,1 4096,256,64,1 0,0,0");
  EXPECT_EQ(text(lower(p).front().v), "256,64,1 4096,256,64,1 0,0,1");
}

TEST(CacheLayout, HeadsWithScalesPerChannelAreOneWhereTheseAreContiguousToo) {
  const auto text_with = [](const Sizes& strides) {
    CacheAppend p = append_problem();
    p.k_scale = k_scale({4, 64}, strides);
    const PagedScales scales = lower(p).front().k.scales;
    EXPECT_EQ(scales.head, strides[0]);
    EXPECT_EQ(scales.dim, strides[1]);
    EXPECT_FALSE(scales.per_token());
    return layout_text(p);
  };
  EXPECT_EQ(text_with({64, 1}), "5x1x256 in 10x16: 256,64,1 4096,256,64,1 0,0,64");
  EXPECT_EQ(text_with({128, 2}), "5x1x256 in 10x16: 256,64,1 4096,256,64,1 0,0,128");
  EXPECT_EQ(text_with({65, 1}), "5x4x64 in 10x16: 256,64,1 4096,256,64,1 0,0,65");
  EXPECT_EQ(text_with({1, 4}), "5x4x64 in 10x16: 256,64,1 4096,256,64,1 0,0,1");
  EXPECT_EQ(text_with({0, 1}), "5x4x64 in 10x16: 256,64,1 4096,256,64,1 0,0,0");
}

TEST(CacheLayout, AScalePerChannelIsOnePerHeadWhereItIsTheSameForAll) {
  CacheGather p = gather_problem();
  p.v_scale = v_scale({4, 64}, {3, 0});
  EXPECT_EQ(lower(p).front().v.scales.head, 3);
  EXPECT_EQ(lower(p).front().v.scales.dim, 0);
  p.key_cache.dtype = p.value_cache.dtype = DType::Float16;
  p.v_scale = v_scale({4, 64});
  EXPECT_EQ(lower(p).front().v.scales.dim, 0) << "a plain copy";
}

TEST(CacheLayout, Offsets) {
  CacheAppend p = append_problem();
  EXPECT_EQ(lower(p).front().k.offsets.data, nullptr);
  p.v_offset = view_at(kValueOffset, DType::Float32, {4, 64});
  EXPECT_EQ(layout_text(p), "5x1x256 in 10x16: 256,64,1 4096,256,64,1 0,0,0");
  EXPECT_EQ(lower(p).front().k.offsets.data, nullptr);
  EXPECT_EQ(lower(p).front().v.offsets.data, p.v_offset->data);
  p.v_offset->strides[0] = 100, p.v_offset->strides[1] = 2;
  EXPECT_EQ(layout_text(p), "5x4x64 in 10x16: 256,64,1 4096,256,64,1 0,0,0");
  EXPECT_EQ(lower(p).front().v.offsets.head, 100);
  EXPECT_EQ(lower(p).front().v.offsets.dim, 2);
  CacheAppendDynamic d = append_dynamic_problem();
  d.k_offset = view_at(kKeyOffset, DType::Float32, {4, 64});
  EXPECT_EQ(lower(d).front().k.offsets.data, d.k_offset->data);
  EXPECT_EQ(lower(d).front().v.offsets.data, nullptr);
}

TEST(CacheLayout, DynamicScalesKeepTheHeads) {
  EXPECT_EQ(layout_text(append_dynamic_problem()), "5x4x64 in 10x16: 256,64,1 4096,256,64,1 64,4,1");
}

TEST(CacheLayout, ScaleCachesKeepTheHeadsOfAGather) {
  CacheGather p = gather_problem();
  p.k_scale = k_scale({10, 16, 4}, {64, 1, 16});
  EXPECT_EQ(layout_text(p), "5x4x64 in 10x16: 256,64,1 4096,256,64,1 64,1,16");
  EXPECT_EQ(text(lower(p).front().v), "256,64,1 4096,256,64,1 0,0,0");
}

TEST(CacheLayout, PlainCopiesDoNotNeedTheScales) {
  CacheAppend p = append_problem();
  p.key_cache.dtype = p.value_cache.dtype = DType::BFloat16;
  p.k_scale = k_scale({4});
  EXPECT_EQ(layout_text(p), "5x1x256 in 10x16: 256,64,1 4096,256,64,1 0,0,1");
}

TEST(CacheLayout, HeadsThatAreApartInAnyViewAreNotOne) {
  CacheAppend p = append_problem();
  p.key_cache = key_cache(kCacheSizes, kHnd);
  EXPECT_EQ(layout_text(p), "5x4x64 in 10x16: 256,64,1 4096,64,1024,1 0,0,0");
  p = append_problem(), p.value_cache = value_cache(kCacheSizes, kHnd);
  EXPECT_EQ(layout_text(p), "5x4x64 in 10x16: 256,64,1 4096,256,64,1 0,0,0");
  EXPECT_EQ(text(lower(p).front().v), "256,64,1 4096,64,1024,1 0,0,0");
  p = append_problem(), p.key = key({5, 4, 64}, {320, 80, 1});
  EXPECT_EQ(layout_text(p), "5x4x64 in 10x16: 320,80,1 4096,256,64,1 0,0,0");
  p = append_problem(), p.value = value({5, 4, 64}, {320, 80, 1});
  EXPECT_EQ(layout_text(p), "5x4x64 in 10x16: 256,64,1 4096,256,64,1 0,0,0");
}

TEST(CacheLayout, StridedElementsCanBeOneRowToo) {
  CacheAppend p = append_problem();
  p.key = key({5, 4, 64}, {512, 128, 2});
  EXPECT_EQ(layout_text(p), "5x1x256 in 10x16: 512,128,2 4096,256,64,1 0,0,0");
}

TEST(CacheLayout, SlicesOfAFusedTensorKeepTheirPitch) {
  CacheAppend p = append_problem();
  p.key = key({5, 4, 64}, {1536, 64, 1});
  p.key_cache = key_cache(kCacheSizes, {8192, 256, 64, 1});
  p.value_cache = view_at(kKeyCache + 4096, DType::E4M3, kCacheSizes, {8192, 256, 64, 1});
  EXPECT_EQ(layout_text(p), "5x1x256 in 10x16: 1536,64,1 8192,256,64,1 0,0,0");
}

TEST(CacheLayout, ScalesOfOneOrOfEachHeadInAnyShape) {
  const auto step = [](const Sizes& sizes, const Sizes& strides = {}) {
    CacheAppend p = append_problem();
    p.k_scale = k_scale(sizes, strides);
    return lower(p).front().k.scales.head;
  };
  EXPECT_EQ(step({}), 0);
  EXPECT_EQ(step({1, 1}, {7, 9}), 0);
  EXPECT_EQ(step({4}), 1);
  EXPECT_EQ(step({4}, {3}), 3);
  EXPECT_EQ(step({4}, {0}), 0);
  EXPECT_EQ(step({4, 1, 1}, {5, 7, 7}), 5);
  EXPECT_EQ(step({1, 4}, {99, 1}), 1);
  EXPECT_EQ(step({2, 2}), 1);
  EXPECT_EQ(step({2, 1, 2}, {6, 1, 3}), 3);
}

TEST(CacheLayout, TheStepOfAnExpandedScaleLetsHeadsBeOne) {
  CacheAppend p = append_problem();
  p.k_scale = k_scale({4}, {0});
  EXPECT_EQ(layout_text(p), "5x1x256 in 10x16: 256,64,1 4096,256,64,1 0,0,0");
}

TEST(CacheLayout, AScaleOfOneElementIsPerTensorEvenInACacheOfOneSlot) {
  CacheGather p = gather_problem();
  p.key_cache = key_cache({1, 1, 1, 64}), p.value_cache = value_cache({1, 1, 1, 64});
  p.key = key({5, 1, 64}), p.value = value({5, 1, 64});
  p.k_scale = k_scale({1, 1, 1}, {3, 3, 3});
  EXPECT_EQ(layout_text(p), "5x1x64 in 1x1: 64,64,1 64,64,64,1 0,0,0");
}

TEST(CacheLayout, TokensAreCountedBySlotsAndByRowsOfAGather) {
  CacheAppend a = append_problem();
  a.key = key({9, 4, 64}), a.value = value({7, 4, 64});
  EXPECT_EQ(lower(a).front().num_tokens, 5);
  EXPECT_EQ(lower(gather_problem()).front().num_tokens, 5);
}

TEST(CacheLayout, TypesAndAddresses) {
  CacheAppend p = append_problem();
  p.kv_cache_dtype = DType::E5M2, p.key_cache.dtype = p.value_cache.dtype = DType::UInt8;
  const CacheLayout layout = lower(p).front();
  EXPECT_EQ(layout.row_dtype, DType::BFloat16);
  EXPECT_EQ(layout.cache_dtype, DType::E5M2);
  EXPECT_EQ(layout.k.rows.data, p.key.data);
  EXPECT_EQ(layout.v.rows.data, p.value.data);
  EXPECT_EQ(layout.k.cache.data, p.key_cache.data);
  EXPECT_EQ(layout.v.cache.data, p.value_cache.data);
  EXPECT_EQ(layout.k.scales.data, p.k_scale.data);
  EXPECT_EQ(layout.v.scales.data, p.v_scale.data);
}

TEST(CacheLayout, OneLayoutWhereKAndVAreAlike) {
  for (const CacheLayouts& layouts : {lower(append_problem()), lower(append_dynamic_problem()), lower(gather_problem())}) {
    EXPECT_EQ(layouts.count, 1);
    EXPECT_EQ(layouts.front().sides, 2);
    EXPECT_EQ(layouts.front().k.cache.data, reinterpret_cast<void*>(kKeyCache));
    EXPECT_EQ(layouts.front().side(1).cache.data, reinterpret_cast<void*>(kValueCache));
  }
}

// K, then V, each with its own sizes and merged by itself.
TEST(CacheLayout, TwoLayoutsOfOneSideForTwoHeadSizes) {
  CacheAppend p = with_value_size(append_problem(), 48);
  p.v_scale = v_scale({4}), p.v_offset = view_at(kValueOffset, DType::Float32, {4, 48});
  const CacheLayouts layouts = lower(p);
  ASSERT_EQ(layouts.count, 2);
  for (const CacheLayout& layout : layouts) EXPECT_EQ(layout.sides, 1);
  EXPECT_EQ(text(layouts.parts[0]), "5x1x256 in 10x16: 256,64,1 4096,256,64,1 0,0,0");
  EXPECT_EQ(text(layouts.parts[1]), "5x4x48 in 10x16: 192,48,1 3072,192,48,1 0,0,1");
  EXPECT_EQ(layouts.parts[1].k.offsets.data, p.v_offset->data);
  EXPECT_FALSE(layouts.empty());
}

TEST(CacheLayout, ASideWithoutElementsIsEmpty) {
  const CacheLayouts layouts = lower(with_value_size(append_problem(), 0));
  ASSERT_EQ(layouts.count, 2);
  EXPECT_FALSE(layouts.parts[0].empty());
  EXPECT_TRUE(layouts.parts[1].empty());
  EXPECT_FALSE(layouts.empty());
  EXPECT_TRUE(lower(append_problem({10, 16, 4, 0})).empty());
}

TEST(CacheLayout, TwoLayoutsForTwoTypes) {
  CacheAppend p = append_problem();
  p.value_cache.dtype = DType::BFloat16, p.v_cache_dtype = DType::BFloat16;
  p.k_scale = k_scale({4, 64}), p.v_scale = v_scale({4, 64});
  p.k_offset = view_at(kKeyOffset, DType::Float32, {4, 64});
  const CacheLayouts layouts = lower(p);
  ASSERT_EQ(layouts.count, 2);
  EXPECT_EQ(layouts.parts[0].cache_dtype, DType::E4M3);
  EXPECT_TRUE(layouts.parts[0].has_channels());
  EXPECT_EQ(layouts.parts[1].cache_dtype, DType::BFloat16);
  EXPECT_FALSE(layouts.parts[1].has_channels()) << "a plain copy";
  p.v_offset = view_at(kValueOffset, DType::Float32, {4, 64});
  EXPECT_EQ(sentence(p), kAppend + "v_offset must be None as value_cache is not quantized, got shape [4, 64]");
}

TEST(CacheLayout, QuantizedRowsUseNoScales) {
  CacheAppend p = append_problem();
  p.key.dtype = DType::UInt8;
  p.k_scale = k_scale({4, 64}), p.v_scale = v_scale({4, 64});
  p.k_offset = view_at(kKeyOffset, DType::Float32, {4, 64});
  const CacheLayouts layouts = lower(p);
  ASSERT_EQ(layouts.count, 2);
  EXPECT_EQ(layouts.parts[0].row_dtype, DType::E4M3);
  EXPECT_FALSE(layouts.parts[0].has_channels());
  EXPECT_TRUE(layouts.parts[1].has_channels());
  EXPECT_EQ(layouts.parts[1].row_dtype, DType::BFloat16);
}

TEST(CacheLayout, EmptyProblems) {
  EXPECT_FALSE(lower(append_problem()).front().empty());
  EXPECT_TRUE(lower(append_problem(kCacheSizes, 0)).front().empty());
  EXPECT_TRUE(lower(append_problem({10, 16, 0, 64})).front().empty());
  EXPECT_TRUE(lower(append_problem({10, 16, 4, 0})).front().empty());
  const CacheLayout no_blocks = lower(append_problem({0, 16, 4, 64})).front();
  EXPECT_FALSE(no_blocks.empty()) << "there are tokens, whose slots may be negative";
  EXPECT_EQ(no_blocks.num_slots(), 0);
}

TEST(CacheLayout, HugeCachesDoNotOverflow) {
  const Sizes sizes = {std::int64_t{1} << 30, 16, 8, 128};
  CacheAppend p = append_problem(sizes);
  p.key_cache.data = reinterpret_cast<void*>(std::uintptr_t{1} << 45);
  p.value_cache.data = reinterpret_cast<void*>(std::uintptr_t{1} << 46);
  const CacheLayout layout = lower(p).front();
  EXPECT_EQ(layout.num_slots(), std::int64_t{1} << 34);
  EXPECT_EQ(text(layout), "5x1x1024 in 1073741824x16: 1024,128,1 16384,1024,128,1 0,0,0");
}

}  // namespace
}  // namespace fp8kv::core
