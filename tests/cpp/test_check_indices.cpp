// Lengths, starts and blocks of attention in host memory. Those of the other problems are tested with the ops that read them.
#include "core/check_indices.h"

#include <gtest/gtest.h>

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "problems.h"

namespace fp8kv::core {
namespace {

using namespace testing_support;

using Ints = std::vector<std::int32_t>;

// 3 sequences over 10 blocks of 16 positions, 4 blocks each at most: 2 queries of 40 tokens, none of 5, 3 of 64.
struct Sequences {
  Ints table = {3, 0, 9, -1, 5, -1, 99, -1, 1, 2, 4, 6};
  Ints seq_lens = {40, 5, 64};
  std::optional<Ints> cu_query_lens = Ints{0, 2, 2, 5};
  std::optional<Ints> seq_starts;
  std::int64_t sliding_window = 0;
  std::int64_t rows[3] = {5, 5, 5};  // of query, out and lse
  std::int64_t step = 1;             // between the elements of every tensor

  // Elements in every `step`-th place.
  static std::vector<std::int32_t> spread(const Ints& values, std::int64_t step) {
    std::vector<std::int32_t> memory(values.size() * step, -77);
    for (std::size_t i = 0; i < values.size(); ++i) memory[i * step] = values[i];
    return memory;
  }

  std::string check() const {
    const std::vector<std::int32_t> blocks = spread(table, step), lens = spread(seq_lens, step),
                                    sums = spread(cu_query_lens.value_or(Ints{}), step),
                                    starts = spread(seq_starts.value_or(Ints{}), step);
    const auto num_seqs = static_cast<std::int64_t>(seq_lens.size());
    const auto list = [this](const std::vector<std::int32_t>& memory) {
      TensorView view = contiguous(memory.data(), DType::Int32, {static_cast<std::int64_t>(memory.size()) / step});
      view.strides[0] = step;
      return view;
    };
    PagedAttention p = attention_problem();
    p.block_table = contiguous(blocks.data(), DType::Int32, {num_seqs, static_cast<std::int64_t>(table.size()) / num_seqs});
    p.block_table.strides[0] *= step, p.block_table.strides[1] = step;
    p.seq_lens = list(lens);
    p.cu_query_lens = cu_query_lens ? std::optional(list(sums)) : std::nullopt;
    p.seq_starts = seq_starts ? std::optional(list(starts)) : std::nullopt;
    p.sliding_window = sliding_window;
    p.query.sizes[0] = rows[0], p.out.sizes[0] = rows[1], p.lse->sizes[0] = rows[2];
    return error_of([&] { check_attention(p, lower(p)); });
  }
};

struct Case {
  const char* name;
  std::function<void(Sequences&)> change;
  const char* expected;  // the sentence without the op; "": it is none
};

void PrintTo(const Case& c, std::ostream* os) { *os << c.name; }

const char* const kBlocks = "block_table must have blocks from 0 to num_blocks - 1 = 9, got ";

const Case kCases[] = {
    {"sound", [](auto&) {}, ""},
    // Queries.
    {"sums_begin_late", [](auto& s) { s.cu_query_lens = Ints{1, 2, 2, 5}; }, "cu_query_lens must begin with 0, got 1"},
    {"sums_fall", [](auto& s) { s.cu_query_lens = Ints{0, 3, 2, 5}; }, "cu_query_lens must be non-decreasing, got 2 after 3"},
    {"sums_below_0", [](auto& s) { s.cu_query_lens = Ints{0, -2, 2, 5}; },
     "cu_query_lens must be non-decreasing, got -2 after 0"},
    {"rows_of_query", [](auto& s) { s.rows[0] = 4; },
     "query must have at least cu_query_lens[-1]=5 rows, got shape [4, 8, 64]"},
    {"rows_of_out", [](auto& s) { s.rows[1] = 3; }, "out must have at least cu_query_lens[-1]=5 rows, got shape [3, 8, 64]"},
    {"rows_of_lse", [](auto& s) { s.rows[2] = 0; }, "lse must have at least cu_query_lens[-1]=5 rows, got shape [0, 8]"},
    {"more_rows", [](auto& s) { s.rows[0] = 6, s.rows[1] = 7, s.rows[2] = 8; }, ""},
    {"no_queries", [](auto& s) { s.cu_query_lens = Ints{0, 0, 0, 0}, s.table = Ints(12, -1); }, ""},
    {"more_queries_than_tokens", [](auto& s) { s.seq_lens = {1, 0, 2}; }, ""},
    // Lengths and starts.
    {"negative_length", [](auto& s) { s.seq_lens[1] = -1; }, "seq_lens must be at least 0, got -1 in sequence 1"},
    {"smallest_length", [](auto& s) { s.seq_lens[0] = INT32_MIN; },
     "seq_lens must be at least 0, got -2147483648 in sequence 0"},
    {"length_beyond_the_table", [](auto& s) { s.seq_lens[2] = 65; },
     "block_table must have blocks for all positions, max_blocks * block_size = 64, got a last position of 64 in sequence 2"},
    {"length_beyond_the_table_without_queries", [](auto& s) { s.seq_lens[1] = INT32_MAX; },
     "block_table must have blocks for all positions, max_blocks * block_size = 64, got a last position of 2147483646 in "
     "sequence 1"},
    {"negative_start", [](auto& s) { s.seq_starts = Ints{0, 0, -3}; }, "seq_starts must be at least 0, got -3 in sequence 2"},
    {"no_tokens", [](auto& s) { s.seq_lens = {0, 0, 0}, s.table = Ints(12, -1); }, ""},
    // Blocks that are needed.
    {"a_negative_block", [](auto& s) { s.table[0] = -1; }, "-1 at 0 in sequence 0"},
    {"a_block_beyond_the_cache", [](auto& s) { s.table[11] = 10; }, "10 at 3 in sequence 2"},
    {"the_last_position_alone", [](auto& s) { s.seq_lens[0] = 49; }, "-1 at 3 in sequence 0"},
    {"up_to_a_block", [](auto& s) { s.seq_lens[0] = 48; }, ""},
    {"one_query_each", [](auto& s) { s.cu_query_lens.reset(); }, ""},
    {"one_query_each_of_the_second_too", [](auto& s) { s.cu_query_lens.reset(), s.seq_lens[1] = 17; }, "-1 at 1 in sequence 1"},
    // Blocks before the starts.
    {"a_start_after_a_block", [](auto& s) { s.table[0] = -1, s.seq_starts = Ints{16, 0, 0}; }, ""},
    {"a_start_at_the_end_of_a_block", [](auto& s) { s.table[0] = -1, s.seq_starts = Ints{15, 0, 0}; }, "-1 at 0 in sequence 0"},
    {"a_start_at_the_length", [](auto& s) { s.table = Ints(12, -1), s.seq_starts = Ints{40, 5, 64}; }, ""},
    {"a_start_beyond_everything", [](auto& s) { s.table = Ints(12, -1), s.seq_starts = Ints(3, INT32_MAX); }, ""},
    // Blocks before the window. The first of the 3 queries of the last sequence is at position 61.
    {"a_window_in_the_last_block", [](auto& s) { s.table[8] = s.table[9] = s.table[10] = -1, s.sliding_window = 14; }, ""},
    {"a_window_that_reaches_the_block_before",
     [](auto& s) { s.table[8] = s.table[9] = s.table[10] = -1, s.sliding_window = 15; }, "-1 at 2 in sequence 2"},
    {"a_window_of_the_first_query",
     [](auto& s) { s.table[10] = -1, s.sliding_window = 16, s.cu_query_lens = Ints{0, 2, 2, 3}; }, ""},
    {"a_window_and_a_start",
     [](auto& s) { s.table[8] = s.table[9] = s.table[10] = -1, s.sliding_window = 30, s.seq_starts = Ints{0, 0, 48}; }, ""},
    {"a_window_of_more_queries_than_tokens",
     [](auto& s) { s.cu_query_lens = Ints{0, 5, 5, 5}, s.seq_lens[0] = 3, s.sliding_window = 1; }, ""},
    {"a_window_of_more_queries_than_tokens_in_a_bad_block",
     [](auto& s) { s.cu_query_lens = Ints{0, 5, 5, 5}, s.seq_lens[0] = 3, s.sliding_window = 1, s.table[0] = 10; },
     "10 at 0 in sequence 0"},
    {"a_window_beyond_everything", [](auto& s) { s.sliding_window = INT64_MAX; }, ""},
    {"a_window_beyond_everything_with_a_bad_block", [](auto& s) { s.sliding_window = INT64_MAX, s.table[0] = -5; },
     "-5 at 0 in sequence 0"},
};

class CheckAttention : public testing::TestWithParam<Case> {};

INSTANTIATE_TEST_SUITE_P(, CheckAttention, testing::ValuesIn(kCases),
                         [](const auto& info) { return std::string(info.param.name); });

TEST_P(CheckAttention, Sentence) {
  const Case& c = GetParam();
  std::string expected = c.expected;
  if (!expected.empty() && expected.find(" must ") == std::string::npos) expected = kBlocks + expected;
  if (!expected.empty()) expected = "fp8kv::paged_attention: " + expected;
  for (std::int64_t step : {1, 3}) {
    Sequences sequences;
    c.change(sequences);
    sequences.step = step;
    EXPECT_EQ(sequences.check(), expected) << "step " << step;
  }
}

TEST(CheckAttentionBlocks, OfNoPositionsHoldNothing) {
  const Ints table = {0}, lens = {1};
  PagedAttention p = plain_attention_problem();
  p.key_cache = key_cache({10, 0, 4, 64}), p.value_cache = value_cache({10, 0, 4, 64});
  p.query.sizes[0] = p.out.sizes[0] = 1;
  p.block_table = contiguous(table.data(), DType::Int32, {1, 1});
  p.seq_lens = contiguous(lens.data(), DType::Int32, {1});
  EXPECT_EQ(error_of([&] { check_attention(p, lower(p)); }),
            "fp8kv::paged_attention: block_table must have blocks for all positions, max_blocks * block_size = 0, got a last "
            "position of 0 in sequence 0");
}

}  // namespace
}  // namespace fp8kv::core
