// What every view must be, in every argument of every problem: checks before any rule of an operation. And which written views
// overlap themselves, against brute force.
#include <gtest/gtest.h>

#include <chrono>
#include <functional>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "problems.h"

namespace fp8kv {
namespace {

using namespace testing_support;

enum class Use { Read, Written };

// A tensor argument of a problem.
struct Target {
  std::string op;
  std::string name;
  Use use;
  TensorView sound;
  std::function<void(const TensorView&)> validate_with;  // the sound problem with another view here

  std::string refused(const std::string& words) const { return "fp8kv::" + op + ": " + name + " must " + words; }
};

void PrintTo(const Target& t, std::ostream* os) { *os << t.op << ", " << t.name; }

const TensorView& view_of(const TensorView& view) { return view; }
const TensorView& view_of(const std::optional<TensorView>& view) { return *view; }

template <class Problem>
class Targets {
 public:
  Targets(std::vector<Target>& all, const char* op, const Problem& problem) : all_(all), op_(op), problem_(problem) {}

  template <class View>
  Targets& add(const char* name, View Problem::* member, Use use = Use::Read) {
    const auto validate_with = [problem = problem_, member](const TensorView& view) {
      Problem changed = problem;
      changed.*member = view;
      validate(changed);
    };
    all_.push_back({op_, name, use, view_of(problem_.*member), validate_with});
    return *this;
  }

 private:
  std::vector<Target>& all_;
  const char* op_;
  Problem problem_;
};

std::vector<Target> all_targets() {
  std::vector<Target> all;
  const GroupShape shape{1, 8};
  DynamicQuantize dynamic = dynamic_problem({4, 16}, {4, 2}, shape);
  dynamic.scale_ub = view_at(kBound, DType::Float32, {1});
  Targets(all, "static_scaled_fp8_quant", static_problem({4, 16}, {4, 2}, shape))
      .add("result", &StaticQuantize::result, Use::Written)
      .add("input", &StaticQuantize::input)
      .add("scale", &StaticQuantize::scale);
  Targets(all, "dynamic_scaled_fp8_quant", dynamic)
      .add("result", &DynamicQuantize::result, Use::Written)
      .add("input", &DynamicQuantize::input)
      .add("scale", &DynamicQuantize::scale, Use::Written)
      .add("scale_ub", &DynamicQuantize::scale_ub);
  Targets(all, "scaled_fp8_dequant", dequantize_problem({4, 16}, {4, 2}, shape))
      .add("result", &Dequantize::result, Use::Written)
      .add("input", &Dequantize::input)
      .add("scale", &Dequantize::scale);
  Targets(all, "group_amax", amax_problem({4, 16}, {4, 2}, shape))
      .add("amax", &GroupAmax::amax, Use::Written)
      .add("input", &GroupAmax::input);
  Targets(all, "reshape_and_cache_flash", append_problem())
      .add("key", &CacheAppend::key)
      .add("value", &CacheAppend::value)
      .add("key_cache", &CacheAppend::key_cache, Use::Written)
      .add("value_cache", &CacheAppend::value_cache, Use::Written)
      .add("slot_mapping", &CacheAppend::slot_mapping)
      .add("k_scale", &CacheAppend::k_scale)
      .add("v_scale", &CacheAppend::v_scale);
  Targets(all, "reshape_and_cache_flash_dynamic", append_dynamic_problem())
      .add("key", &CacheAppendDynamic::key)
      .add("value", &CacheAppendDynamic::value)
      .add("key_cache", &CacheAppendDynamic::key_cache, Use::Written)
      .add("value_cache", &CacheAppendDynamic::value_cache, Use::Written)
      .add("k_scale_cache", &CacheAppendDynamic::k_scale_cache, Use::Written)
      .add("v_scale_cache", &CacheAppendDynamic::v_scale_cache, Use::Written)
      .add("slot_mapping", &CacheAppendDynamic::slot_mapping);
  Targets(all, "gather_and_dequant_cache", gather_problem())
      .add("key_cache", &CacheGather::key_cache)
      .add("value_cache", &CacheGather::value_cache)
      .add("key", &CacheGather::key, Use::Written)
      .add("value", &CacheGather::value, Use::Written)
      .add("block_table", &CacheGather::block_table)
      .add("cu_seq_lens", &CacheGather::cu_seq_lens)
      .add("k_scale", &CacheGather::k_scale)
      .add("v_scale", &CacheGather::v_scale)
      .add("seq_starts", &CacheGather::seq_starts);
  Targets(all, "rope_quant_and_cache", rope_problem())
      .add("query", &RopeAppend::query)
      .add("key", &RopeAppend::key)
      .add("value", &RopeAppend::value)
      .add("query_out", &RopeAppend::query_out, Use::Written)
      .add("key_cache", &RopeAppend::key_cache, Use::Written)
      .add("value_cache", &RopeAppend::value_cache, Use::Written)
      .add("slot_mapping", &RopeAppend::slot_mapping)
      .add("q_scale", &RopeAppend::q_scale)
      .add("k_scale", &RopeAppend::k_scale)
      .add("v_scale", &RopeAppend::v_scale)
      .add("positions", &RopeAppend::positions)
      .add("cos_sin_cache", &RopeAppend::cos_sin_cache)
      .add("q_norm_weight", &RopeAppend::q_norm_weight)
      .add("k_norm_weight", &RopeAppend::k_norm_weight);
  Targets(all, "paged_attention", attention_problem())
      .add("query", &PagedAttention::query)
      .add("key_cache", &PagedAttention::key_cache)
      .add("value_cache", &PagedAttention::value_cache)
      .add("out", &PagedAttention::out, Use::Written)
      .add("block_table", &PagedAttention::block_table)
      .add("seq_lens", &PagedAttention::seq_lens)
      .add("k_scale", &PagedAttention::k_scale)
      .add("v_scale", &PagedAttention::v_scale)
      .add("cu_query_lens", &PagedAttention::cu_query_lens)
      .add("q_scale", &PagedAttention::q_scale)
      .add("seq_starts", &PagedAttention::seq_starts)
      .add("sinks", &PagedAttention::sinks)
      .add("k_offset", &PagedAttention::k_offset)
      .add("v_offset", &PagedAttention::v_offset)
      .add("lse", &PagedAttention::lse, Use::Written)
      .add("workspace", &PagedAttention::workspace, Use::Written);
  return all;
}

// "[2, 3]", found here.
std::string list(const std::int64_t* numbers, int count) {
  std::string text = "[";
  for (int i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(numbers[i]);
  return text + "]";
}

std::string shape_and_strides(const TensorView& view) {
  return "shape " + list(view.sizes, view.ndim) + " with strides " + list(view.strides, view.ndim);
}

class EveryArgument : public testing::TestWithParam<Target> {
 protected:
  // The sentence about a changed copy of the sound view.
  template <class Change>
  std::string sentence_after(const Change& change) const {
    TensorView view = GetParam().sound;
    change(view);
    return error_of([&] { GetParam().validate_with(view); });
  }
};

INSTANTIATE_TEST_SUITE_P(, EveryArgument, testing::ValuesIn(all_targets()),
                         [](const auto& info) { return info.param.op + "_" + info.param.name; });

TEST_P(EveryArgument, IsSound) {
  EXPECT_EQ(sentence_after([](TensorView&) {}), "");
}

TEST_P(EveryArgument, MayNotBeForgotten) {
  // One that must be FP8 is refused for the float32 that an empty view claims to be.
  const Target& t = GetParam();
  const bool fp8_first = t.sound.dtype == DType::E4M3 && t.op.ends_with("quant");
  EXPECT_EQ(sentence_after([](TensorView& view) { view = {}; }),
            t.refused(fp8_first ? "be float8_e4m3fn, float8_e5m2 or int8, got float32"
                                : "point to memory, got a null pointer of shape []"));
}

TEST_P(EveryArgument, MayNotBeANullPointerToElements) {
  const Target& t = GetParam();
  EXPECT_EQ(sentence_after([](TensorView& view) { view.data = nullptr; }),
            t.refused("point to memory, got a null pointer of shape " + list(t.sound.sizes, t.sound.ndim)));
  EXPECT_EQ(sentence_after([](TensorView& view) { view.data = nullptr, view.ndim = 0; }),
            t.refused("point to memory, got a null pointer of shape []"));
}

TEST_P(EveryArgument, MayNotHaveANegativeSize) {
  const Target& t = GetParam();
  for (int d = 0; d < t.sound.ndim; ++d)
    for (std::int64_t size : {std::int64_t{-1}, INT64_MIN})
      EXPECT_EQ(sentence_after([&](TensorView& view) { view.sizes[d] = size; }),
                t.refused("have sizes of at least 0, got " + std::to_string(size) + " in dimension " + std::to_string(d)));
}

TEST_P(EveryArgument, MayNotHaveANegativeStride) {
  const Target& t = GetParam();
  for (int d = 0; d < t.sound.ndim; ++d)
    for (std::int64_t stride : {std::int64_t{-1}, INT64_MIN})
      EXPECT_EQ(sentence_after([&](TensorView& view) { view.strides[d] = stride; }),
                t.refused("have strides of at least 0, got " + std::to_string(stride) + " in dimension " + std::to_string(d)));
}

TEST_P(EveryArgument, MayNotSpanMoreBytesThan64BitsCount) {
  constexpr std::int64_t kHuge = std::int64_t{1} << 62;
  const Target& t = GetParam();
  const auto expect_refused = [&](const auto& change) {
    TensorView view = t.sound;
    change(view);
    EXPECT_EQ(error_of([&] { t.validate_with(view); }),
              t.refused("span fewer than 2^63 bytes, got " + shape_and_strides(view)));
  };
  expect_refused([](TensorView& view) { view.sizes[0] = kHuge, view.strides[0] = 4; });  // the last offset
  expect_refused([](TensorView& view) { view.sizes[0] = 3, view.strides[0] = kHuge; });
  expect_refused([](TensorView& view) {  // the bytes before it
    view.sizes[0] = view.sizes[1] = 2, view.strides[0] = view.strides[1] = kHuge, view.ndim = 2;
  });
  expect_refused([](TensorView& view) {  // the number of elements
    view.sizes[0] = view.sizes[1] = kHuge, view.strides[0] = view.strides[1] = 0, view.ndim = 2;
  });
}

TEST_P(EveryArgument, MayNotHaveMoreThanEightDimensions) {
  const Target& t = GetParam();
  for (int ndim : {9, 100, -1})
    EXPECT_EQ(sentence_after([=](TensorView& view) { view.ndim = ndim; }),
              t.refused("have at most 8 dimensions, got " + std::to_string(ndim)));
}

TEST_P(EveryArgument, MustBeAlignedToItsElements) {
  const Target& t = GetParam();
  const int size = size_of(t.sound.dtype);
  for (int rest = 1; rest < size; ++rest)
    EXPECT_EQ(sentence_after([=](TensorView& view) { view.data = static_cast<char*>(view.data) + rest; }),
              t.refused("be aligned to its elements of " + std::to_string(size) + " bytes, got an address with remainder " +
                        std::to_string(rest)));
  if (size > 1) return;
  EXPECT_EQ(sentence_after([](TensorView& view) { view.data = static_cast<char*>(view.data) + 1; }), "")
      << "bytes lie anywhere";
}

TEST_P(EveryArgument, MayOverlapItselfOnlyIfItIsRead) {
  const Target& t = GetParam();
  for (std::int64_t stride : {0, 1}) {
    TensorView view = t.sound;
    for (int d = 0; d < view.ndim; ++d) view.strides[d] = stride;
    const std::string reason =
        stride == 0 ? "stride 0 in dimension 0 of size " + std::to_string(view.sizes[0]) : shape_and_strides(view);
    const std::string expected = t.refused("not overlap itself, as it is written, got " + reason);
    EXPECT_EQ(error_of([&] { t.validate_with(view); }), t.use == Use::Written ? expected : "") << "stride " << stride;
  }
}

// --- Empty views --------------------------------

template <class Problem>
void expect_sound_without_memory(Problem problem, std::initializer_list<TensorView Problem::*> empty) {
  for (TensorView Problem::* member : empty) {
    ASSERT_EQ((problem.*member).numel(), 0);
    (problem.*member).data = nullptr;
  }
  EXPECT_EQ(sentence(problem), "");
}

TEST(EmptyViews, MayBeNullPointers) {
  const GroupShape per_token{1, -1};
  expect_sound_without_memory(static_problem({0, 8}, {0}, per_token),
                              {&StaticQuantize::result, &StaticQuantize::input, &StaticQuantize::scale});
  expect_sound_without_memory(dynamic_problem({0, 8}, {0}, per_token),
                              {&DynamicQuantize::result, &DynamicQuantize::input, &DynamicQuantize::scale});
  expect_sound_without_memory(dequantize_problem({0, 8}, {0}, per_token),
                              {&Dequantize::result, &Dequantize::input, &Dequantize::scale});
  expect_sound_without_memory(amax_problem({0, 8}, {0}, per_token), {&GroupAmax::amax, &GroupAmax::input});
  expect_sound_without_memory(
      append_problem({0, 16, 4, 64}, 0),
      {&CacheAppend::key, &CacheAppend::value, &CacheAppend::key_cache, &CacheAppend::value_cache, &CacheAppend::slot_mapping});
  PagedAttention attention = plain_attention_problem();
  attention.query.sizes[0] = attention.out.sizes[0] = attention.block_table.sizes[0] = attention.seq_lens.sizes[0] = 0;
  expect_sound_without_memory(
      attention, {&PagedAttention::query, &PagedAttention::out, &PagedAttention::block_table, &PagedAttention::seq_lens});
}

// --- Written views that overlap themselves --------------------------------

// Whether two indices are one element, by looking at all of them.
bool meets_itself(const Sizes& sizes, const Sizes& strides) {
  std::set<std::int64_t> seen;
  std::int64_t count = 1;
  for (std::int64_t size : sizes) count *= size;
  for (std::int64_t i = 0; i < count; ++i) {
    std::int64_t offset = 0, rest = i;
    for (std::size_t d = 0; d < sizes.size(); ++d) {
      offset += rest % sizes[d] * strides[d];
      rest /= sizes[d];
    }
    if (!seen.insert(offset).second) return true;
  }
  return false;
}

std::string sentence_of_result(const Sizes& sizes, const Sizes& strides) {
  StaticQuantize problem = static_problem(sizes, {1});
  problem.input = input(sizes, Sizes(sizes.size(), 0));
  problem.result = view_at(kBound, DType::E4M3, sizes, strides);  // after all others, as far as it may reach
  return sentence(problem);
}

void expect_as_brute_force(const Sizes& sizes, const Sizes& strides) {
  const std::string found = sentence_of_result(sizes, strides);
  ASSERT_EQ(!found.empty(), meets_itself(sizes, strides))
      << "shape " << list(sizes.data(), static_cast<int>(sizes.size())) << " with strides "
      << list(strides.data(), static_cast<int>(strides.size())) << ": " << found;
}

struct Strided {
  Sizes sizes, strides;
  const char* why;
};

TEST(SelfOverlap, ViewsThatInterleaveOrLieApartAreAccepted) {
  const Strided kAccepted[] = {
      {{2, 3}, {3, 2}, "0 2 4 and 3 5 7"},
      {{2, 3}, {1, 2}, "even and odd"},
      {{3, 4}, {4, 3}, "coprime strides"},
      {{4, 8}, {1, 4}, "transposed"},
      {{2, 3, 4}, {1, 8, 2}, "permuted"},
      {{4, 8}, {20, 2}, "padded rows, every second element"},
      {{1, 8}, {0, 1}, "a dimension of one element"},
      {{1, 1, 1}, {0, 0, 0}, "one element"},
      {{0, 8}, {0, 0}, "no element"},
      {{}, {}, "a scalar"},
  };
  for (const auto& [sizes, strides, why] : kAccepted) {
    EXPECT_FALSE(meets_itself(sizes, strides)) << why;
    EXPECT_EQ(sentence_of_result(sizes, strides), "") << why;
  }
}

TEST(SelfOverlap, ViewsWithTwoIndicesOfOneElementAreRefused) {
  const Strided kRefused[] = {
      {{4, 8}, {1, 1}, "rows that begin one element apart"}, {{3, 4}, {4, 2}, "[0, 2] is [1, 0]"},
      {{4, 8}, {7, 1}, "rows that share their ends"},        {{3, 4}, {3, 2}, "[2, 0] is [0, 3]"},
      {{2, 2, 2}, {3, 2, 1}, "[1, 0, 0] is [0, 1, 1]"},      {{2, 1, 2}, {5, 1, 5}, "one stride twice"},
  };
  for (const auto& [sizes, strides, why] : kRefused) {
    EXPECT_TRUE(meets_itself(sizes, strides)) << why;
    const int ndim = static_cast<int>(sizes.size());
    EXPECT_EQ(sentence_of_result(sizes, strides),
              "fp8kv::static_scaled_fp8_quant: result must not overlap itself, as it is written, got shape " +
                  list(sizes.data(), ndim) + " with strides " + list(strides.data(), ndim))
        << why;
  }
}

TEST(SelfOverlap, AgreesWithBruteForceInAllOfThreeSmallDimensions) {
  for (int i = 0; i < 64; ++i)
    for (int j = 0; j < 729; ++j)
      ASSERT_NO_FATAL_FAILURE(expect_as_brute_force({1 + i % 4, 1 + i / 4 % 4, 1 + i / 16}, {j % 9, j / 9 % 9, j / 81}));
}

TEST(SelfOverlap, AgreesWithBruteForceInSomeOfFourDimensions) {
  std::mt19937 random(1);
  const auto any = [&](std::int64_t first, std::int64_t last) {
    return first + static_cast<std::int64_t>(random() % (last - first + 1));
  };
  int accepted = 0;
  constexpr int kCases = 40000;
  for (int i = 0; i < kCases; ++i) {
    const Sizes sizes = {any(1, 5), any(1, 5), any(1, 5), any(1, 5)};
    const Sizes strides = {any(0, 60), any(1, 40), any(1, 20), any(1, 8)};
    ASSERT_NO_FATAL_FAILURE(expect_as_brute_force(sizes, strides));
    accepted += sentence_of_result(sizes, strides).empty();
  }
  EXPECT_GT(accepted, kCases / 20);
  EXPECT_LT(accepted, kCases / 2);
}

TEST(SelfOverlap, HugeViewsAreDecidedQuickly) {
  constexpr std::int64_t kHuge = std::int64_t{1} << 40;
  struct Row {
    Sizes sizes, strides;
    bool refused;
  };
  const Row kRows[] = {
      {{1 << 20, 1 << 20, 1 << 20}, {kHuge, 1 << 20, 1}, false},
      {{1 << 20, kHuge}, {1, 1 << 20}, false},
      {{2, kHuge}, {3, 2}, false},
      {{kHuge, 3}, {6, 4}, false},
      {{kHuge, kHuge}, {1, 1}, true},
      {{1 << 20, 1 << 20}, {(1 << 20) - 1, 1}, true},
      {{kHuge, 1 << 20}, {1 << 20, (1 << 20) - 1}, true},
      // Differences of many kinds cancel, or nearly so.
      {Sizes(8, 1000), {1001, 1003, 1007, 1009, 1013, 1019, 1021, 1031}, true},
      {Sizes(8, 100), {1 << 7, 1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14}, true},
  };
  const auto begin = std::chrono::steady_clock::now();
  for (const auto& [sizes, strides, refused] : kRows)
    EXPECT_EQ(!sentence_of_result(sizes, strides).empty(), refused) << list(strides.data(), static_cast<int>(strides.size()));
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(1));
}

}  // namespace
}  // namespace fp8kv
