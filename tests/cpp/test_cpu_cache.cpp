// The paged KV cache on the CPU, one instruction set after the other, against the scalar rules of fp8.h applied element by
// element. Places in a cache are found here from slots and block tables, not from a CacheLayout.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <functional>
#include <optional>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "cpu_support.h"
#include "fp8kv/fp8.h"
#include "fp8kv/kv_cache.h"
#include "fp8kv/runtime.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fp8kv {
namespace {

using namespace testing_support;

INSTANTIATE_TEST_SUITE_P(, CpuIsa, testing::ValuesIn(cpu::available()), isa_name);

// --- K and V --------------------------------

// K and V as two slices of one allocation. `order` names its dimensions from the outermost to the innermost: those of `letters`
// and 2, that of K and V, which has one slice more at either end. '.' leaves a gap, ':' takes every second place.
class Pair {
 public:
  Pair(DType dtype, std::string_view order, std::string_view letters, const Sizes& sizes, std::int64_t skip)
      : dtype_(dtype),
        sizes_(sizes),
        skip_(skip),
        slice_(stride(order, letters, '2')),
        storage_(dtype, {skip + stride(order, letters, '\0') + 3}) {
    for (char letter : letters) strides_.push_back(stride(order, letters, letter));
  }

  DType dtype() const { return dtype_; }
  Tensor& storage() { return storage_; }

  // The number within the storage of an element of K (0) or V (1).
  std::int64_t index(int kv, const Sizes& at) const {
    std::int64_t index = skip_ + (kv + 1) * slice_;
    for (std::size_t d = 0; d < at.size(); ++d) index += at[d] * strides_[d];
    return index;
  }

  TensorView view(int kv) {
    TensorView v{.data = storage_.at(index(kv, {})), .dtype = dtype_, .ndim = static_cast<int>(sizes_.size())};
    std::copy(sizes_.begin(), sizes_.end(), v.sizes);
    std::copy(strides_.begin(), strides_.end(), v.strides);
    return v;
  }
  TensorView key() { return view(0); }
  TensorView value() { return view(1); }

 private:
  // The number of elements within one step of a dimension; of no dimension: within all.
  std::int64_t stride(std::string_view order, std::string_view letters, char dimension) const {
    std::int64_t stride = 1;
    for (auto at = order.rbegin(); at != order.rend() && *at != dimension; ++at) {
      if (*at == '.') {
        stride += 3;
      } else {
        stride *= *at == ':' ? 2 : *at == '2' ? 4 : std::max<std::int64_t>(1, sizes_[letters.find(*at)]);
      }
    }
    return stride;
  }

  DType dtype_;
  Sizes sizes_, strides_;
  std::int64_t skip_, slice_;
  Tensor storage_;
};

struct Case {
  const char* name;
  std::int64_t heads, head_size;
  const char* cache = "2nshd";
  const char* rows = "2thd";  // of key and value
  const char* scales = "2nsh";
  std::int64_t tokens = 19, blocks = 6, block_size = 5;

  std::int64_t slots() const { return blocks * block_size; }
  Pair make_rows(DType real, std::int64_t extra = 2) const {
    return {real, rows, "thd", {tokens + extra, heads, head_size}, 3};
  }
  Pair make_cache(DType element) const { return {element, cache, "nshd", {blocks, block_size, heads, head_size}, 5}; }
  Pair make_scale_cache() const { return {DType::Float32, scales, "nsh", {blocks, block_size, heads}, 1}; }
};

void PrintTo(const Case& c, std::ostream* os) { *os << c.name; }

const Case kCases[] = {
    {.name = "nhd", .heads = 8, .head_size = 128},
    {.name = "hnd", .heads = 8, .head_size = 128, .cache = "2nhsd"},
    {.name = "blocks_of_both", .heads = 4, .head_size = 64, .cache = "n2shd", .rows = "t2hd"},
    {.name = "blocks_of_both_hnd", .heads = 4, .head_size = 64, .cache = "n2hsd", .rows = "t2hd", .scales = "2nhs"},
    {.name = "slots_of_both", .heads = 4, .head_size = 80, .cache = "ns2hd", .rows = "t.2hd"},
    {.name = "halves_of_heads", .heads = 3, .head_size = 96, .cache = "nsh2d", .rows = "th2d", .scales = "nsh2"},
    {.name = "interleaved", .heads = 2, .head_size = 20, .cache = "nshd2", .rows = "thd2", .scales = "n2sh"},
    {.name = "head_size_1", .heads = 5, .head_size = 1},
    {.name = "head_size_1_hnd", .heads = 5, .head_size = 1, .cache = "2nhsd", .rows = "2htd"},
    {.name = "head_size_20", .heads = 3, .head_size = 20, .cache = "2nhsd"},
    {.name = "head_size_64", .heads = 1, .head_size = 64},
    {.name = "head_size_112", .heads = 3, .head_size = 112, .cache = "2nhsd", .rows = "2th.d"},
    {.name = "head_size_120", .heads = 2, .head_size = 120, .cache = "2ns.hd", .rows = "2t.hd"},
    {.name = "head_size_256", .heads = 2, .head_size = 256, .cache = "n2hsd"},
    {.name = "head_size_576", .heads = 1, .head_size = 576, .cache = "2nshd", .rows = "t2hd"},
    {.name = "head_size_577", .heads = 2, .head_size = 577, .cache = "2nsh.d"},
    {.name = "sparse_cache", .heads = 3, .head_size = 80, .cache = "2nshd:", .scales = "2nsh:"},
    {.name = "sparse_rows", .heads = 3, .head_size = 80, .rows = "2thd:"},
    {.name = "sparse_long", .heads = 1, .head_size = 1100, .cache = "2nshd:", .rows = "2thd:"},
    {.name = "dims_outside_slots", .heads = 3, .head_size = 20, .cache = "2nhds", .rows = "2hdt", .scales = "h2sn"},
    {.name = "all_reversed", .heads = 3, .head_size = 20, .cache = "dhsn2", .rows = "dht2", .scales = "hsn2"},
    {.name = "heads_first", .heads = 3, .head_size = 64, .cache = "h2nsd", .rows = "h2td", .scales = "h.2ns"},
    {.name = "many_heads", .heads = 70, .head_size = 20, .scales = "2nhs"},
    {.name = "more_channels_than_a_batch", .heads = 70, .head_size = 80, .cache = "2nhsd", .tokens = 3},
    {.name = "longer_than_a_batch", .heads = 2, .head_size = 4200, .cache = "2nhsd", .tokens = 3, .blocks = 2},
    {.name = "longer_than_a_batch_sparse", .heads = 2, .head_size = 4200, .cache = "2nshd:", .tokens = 3, .blocks = 2},
    {.name = "one_slot", .heads = 2, .head_size = 64, .tokens = 7, .blocks = 1, .block_size = 1},
    {.name = "no_tokens", .heads = 2, .head_size = 64, .tokens = 0},
    {.name = "no_heads", .heads = 0, .head_size = 64},
    {.name = "no_head_size", .heads = 2, .head_size = 0},
    {.name = "no_blocks", .heads = 2, .head_size = 64, .blocks = 0},
    {.name = "no_block_size", .heads = 2, .head_size = 64, .block_size = 0},
};

using CaseParam = std::tuple<cpu::Isa, Case>;

class CpuCache : public Forced<testing::TestWithParam<CaseParam>> {
 protected:
  void SetUp() override {
    Forced::SetUp();
    cpu::force(std::get<0>(GetParam()));
  }
};

INSTANTIATE_TEST_SUITE_P(, CpuCache, testing::Combine(testing::ValuesIn(cpu::available()), testing::ValuesIn(kCases)),
                         [](const testing::TestParamInfo<CaseParam>& info) {
                           return std::string(cpu::name(std::get<0>(info.param))) + "_" + std::get<1>(info.param).name;
                         });

// --- The reference --------------------------------

using Slots = std::vector<std::int64_t>;

template <class T>
Tensor make_indices(DType dtype, const std::vector<std::int64_t>& values, Memory memory = Memory::Sparse) {
  Tensor t(dtype, {static_cast<std::int64_t>(values.size())}, memory, 1);
  for (std::int64_t i = 0; i < t.numel(); ++i) t.set(i, static_cast<T>(values[i]));
  return t;
}
Tensor int64s(const std::vector<std::int64_t>& values) { return make_indices<std::int64_t>(DType::Int64, values); }
Tensor int32s(const std::vector<std::int64_t>& values) { return make_indices<std::int32_t>(DType::Int32, values); }

// Any slots, many of them more than once; some are negative.
Slots random_slots(std::int64_t tokens, std::int64_t slots, unsigned seed) {
  std::mt19937 random(seed);
  Slots found;
  for (std::int64_t t = 0; t < tokens; ++t)
    found.push_back(slots == 0 || random() % 6 == 0 ? -1 - static_cast<std::int64_t>(random() % 100) : random() % slots);
  return found;
}

// Scales of K or V, [1, 1], [heads, 1] or [heads, head_size], in storage that is not contiguous.
Tensor make_scales(std::int64_t heads, unsigned seed, std::int64_t columns = 1) {
  Tensor scale(DType::Float32, {heads, columns}, columns == 1 ? Memory::Padded : Memory::Reversed, 1);
  fill_scales(scale, seed);
  return scale;
}

float scale_at(Tensor& scale, std::int64_t head, std::int64_t dim) {
  const Sizes& sizes = scale.sizes();
  return scale.get<float>((sizes[0] == 1 ? 0 : head) * sizes[1] + (sizes[1] == 1 ? 0 : dim));
}

// Which scales there are, and whether there are offsets.
struct Form {
  const char* name;
  enum { PerTensor, PerHead, PerChannel, PerSlot } scales;
  bool offsets;
};
constexpr Form kForms[] = {{"per tensor", Form::PerTensor, false},
                           {"per head", Form::PerHead, false},
                           {"per head with offsets", Form::PerHead, true},
                           {"per channel", Form::PerChannel, false},
                           {"per channel with offsets", Form::PerChannel, true},
                           {"per slot", Form::PerSlot, false},
                           {"per slot with offsets", Form::PerSlot, true}};

// Scales and offsets of K and V, in any form but PerSlot.
struct Parameters {
  Tensor scales[2], offsets[2];
  bool has_offsets;

  Parameters(const Case& c, const Form& form, unsigned seed)
      : scales{make(c, form, seed), make(c, form, seed + 1)},
        offsets{Tensor(DType::Float32, {c.heads, c.head_size}, Memory::Sparse, 1),
                Tensor(DType::Float32, {c.heads, c.head_size}, Memory::Reversed)},
        has_offsets(form.offsets) {
    for (Tensor& t : offsets) fill(t, ++seed);  // every now and then infinite or NaN
  }
  static Tensor make(const Case& c, const Form& form, unsigned seed) {
    const bool one = form.scales == Form::PerTensor || form.scales == Form::PerSlot;
    return make_scales(one ? 1 : c.heads, seed, form.scales == Form::PerChannel ? c.head_size : 1);
  }

  std::optional<TensorView> offset(int kv) { return has_offsets ? std::optional(offsets[kv].view()) : std::nullopt; }
  std::optional<float> offset_at(int kv, std::int64_t head, std::int64_t dim) {
    return has_offsets ? std::optional(scale_at(offsets[kv], head, dim)) : std::nullopt;
  }
};

// One element from a storage of floating-point numbers to any other, by the rules.
void convert(Tensor& to, std::int64_t to_index, Tensor& from, std::int64_t from_index, float scale,
             std::optional<float> offset = {}) {
  if (core::is_quantized(from.dtype())) {
    const float product = from.get_real(from_index) * scale;
    return to.set_real(to_index, offset ? product + *offset : product);
  }
  const float x = from.get_real(from_index), difference = offset ? x - *offset : x;
  if (core::is_quantized(to.dtype())) return to.quantize(to_index, difference, scale);
  if (to.dtype() != from.dtype()) return to.set_real(to_index, x);
  std::memcpy(to.at(to_index), from.at(from_index), size_of(to.dtype()));
}

void reference_append(const Case& c, Pair& rows, Pair& cache, const Slots& slots, Tensor (&scales)[2],
                      Parameters* offsets = nullptr) {
  for (int kv = 0; kv < 2; ++kv)
    for (std::size_t t = 0; t < slots.size(); ++t)
      for (std::int64_t h = 0; h < c.heads && slots[t] >= 0; ++h)
        for (std::int64_t d = 0; d < c.head_size; ++d) {
          const std::int64_t token = static_cast<std::int64_t>(t), block = slots[t] / c.block_size;
          convert(cache.storage(), cache.index(kv, {block, slots[t] % c.block_size, h, d}), rows.storage(),
                  rows.index(kv, {token, h, d}), scale_at(scales[kv], h, d),
                  offsets ? offsets->offset_at(kv, h, d) : std::nullopt);
        }
}

void reference_append_dynamic(const Case& c, Pair& rows, Pair& cache, Pair& scales, const Slots& slots,
                              Parameters* offsets = nullptr) {
  if (c.head_size == 0) return;
  for (int kv = 0; kv < 2; ++kv)
    for (std::size_t t = 0; t < slots.size(); ++t)
      for (std::int64_t h = 0; h < c.heads && slots[t] >= 0; ++h) {
        const std::int64_t token = static_cast<std::int64_t>(t);
        const std::int64_t block = slots[t] / c.block_size, offset = slots[t] % c.block_size;
        float amax = 0.0f;
        for (std::int64_t d = 0; d < c.head_size; ++d) {
          float x = rows.storage().get_real(rows.index(kv, {token, h, d}));
          if (offsets) x -= offsets->offset_at(kv, h, d).value_or(0.0f);
          if (is_finite(x)) amax = std::max(amax, x < 0 ? -x : x);
        }
        const float scale = dynamic_scale_of(cache.dtype(), amax, kInf);
        scales.storage().set(scales.index(kv, {block, offset, h}), scale);
        for (std::int64_t d = 0; d < c.head_size; ++d)
          convert(cache.storage(), cache.index(kv, {block, offset, h, d}), rows.storage(), rows.index(kv, {token, h, d}), scale,
                  offsets ? offsets->offset_at(kv, h, d) : std::nullopt);
      }
}

// Sequences over any blocks, some of them in several, some empty.
struct Sequences {
  std::vector<std::int64_t> sums{0}, starts;
  std::int64_t max_blocks;
  Tensor table;

  Sequences(const Case& c, unsigned seed) : max_blocks(4), table(DType::Int32, {4, 4}, Memory::Padded, 2) {
    std::mt19937 random(seed);
    for (std::int64_t i = 0; i < table.numel(); ++i)
      table.set(i, static_cast<std::int32_t>(c.blocks > 0 ? random() % c.blocks : 77));
    const bool empty = c.tokens == 0 || c.slots() == 0;
    const std::int64_t positions = max_blocks * c.block_size;
    const std::int64_t lengths[] = {c.tokens / 3, 0, c.tokens - c.tokens / 3 - c.tokens / 2, c.tokens / 2};
    for (std::int64_t length : lengths) {
      length = empty ? 0 : std::min(length, positions);
      sums.push_back(sums.back() + length);
      starts.push_back(empty ? 0 : static_cast<std::int64_t>(random() % (positions - length + 1)));
    }
  }
};

// scale(kv, block, offset, head, dim)
using ScaleOf = std::function<float(int, std::int64_t, std::int64_t, std::int64_t, std::int64_t)>;
void reference_gather(const Case& c, Pair& cache, Pair& rows, Sequences& sequences, bool from_start, const ScaleOf& scale,
                      Parameters* offsets = nullptr) {
  for (int kv = 0; kv < 2; ++kv)
    for (std::size_t s = 0; s + 1 < sequences.sums.size(); ++s)
      for (std::int64_t row = sequences.sums[s]; row < sequences.sums[s + 1]; ++row) {
        const std::int64_t position = row - sequences.sums[s] + (from_start ? 0 : sequences.starts[s]);
        const std::int64_t entry = static_cast<std::int64_t>(s) * sequences.max_blocks + position / c.block_size;
        const std::int64_t block = sequences.table.get<std::int32_t>(entry), offset = position % c.block_size;
        for (std::int64_t h = 0; h < c.heads; ++h)
          for (std::int64_t d = 0; d < c.head_size; ++d)
            convert(rows.storage(), rows.index(kv, {row, h, d}), cache.storage(), cache.index(kv, {block, offset, h, d}),
                    scale(kv, block, offset, h, d), offsets ? offsets->offset_at(kv, h, d) : std::nullopt);
      }
}

// As the caller may pass it: FP8 bytes as bytes.
TensorView as_bytes(TensorView view) {
  view.dtype = DType::UInt8;
  return view;
}

// --- Every layout --------------------------------

TEST_P(CpuCache, Append) {
  const Case& c = std::get<1>(GetParam());
  const Slots slots = random_slots(c.tokens, c.slots(), 1);
  for (DType real : kReals)
    for (DType fp8 : kQuantized)
      for (const Form& form : kForms) {
        if (form.scales == Form::PerSlot || (form.offsets && fp8 == DType::E5M2)) continue;
        SCOPED_TRACE(pair_name(real, fp8) + ", scales " + form.name);
        Pair rows = c.make_rows(real), cache = c.make_cache(fp8);
        fill(rows.storage(), 2);
        Parameters p(c, form, 3);
        Tensor mapping = int64s(slots);
        Pair expected = cache;
        reference_append(c, rows, expected, slots, p.scales, &p);
        const bool bytes = core::is_fp8(fp8);
        cpu::run(CacheAppend{rows.key(), rows.value(), bytes ? as_bytes(cache.key()) : cache.key(),
                             bytes ? as_bytes(cache.value()) : cache.value(), mapping.view(), fp8, p.scales[0].view(),
                             p.scales[1].view(), p.offset(0), p.offset(1)});
        EXPECT_EQ(difference(cache.storage(), expected.storage()), "");
      }
}

TEST_P(CpuCache, AppendDynamic) {
  const Case& c = std::get<1>(GetParam());
  const Slots slots = random_slots(c.tokens, c.slots(), 5);
  for (DType real : kReals)
    for (DType fp8 : kQuantized)
      for (const Form& form : kForms) {
        if (form.scales != Form::PerSlot) continue;
        SCOPED_TRACE(pair_name(real, fp8) + ", scales " + form.name);
        Pair rows = c.make_rows(real), cache = c.make_cache(fp8), scales = c.make_scale_cache();
        fill(rows.storage(), 6);
        Parameters p(c, form, 38);
        Tensor mapping = int32s(slots);
        Pair expected = cache, expected_scales = scales;
        reference_append_dynamic(c, rows, expected, expected_scales, slots, &p);
        cpu::run(CacheAppendDynamic{rows.key(), rows.value(), cache.key(), cache.value(), scales.key(), scales.value(),
                                    mapping.view(), fp8, p.offset(0), p.offset(1)});
        EXPECT_EQ(difference(scales.storage(), expected_scales.storage()), "") << "scales";
        EXPECT_EQ(difference(cache.storage(), expected.storage()), "");
      }
}

TEST_P(CpuCache, Gather) {
  const Case& c = std::get<1>(GetParam());
  Sequences sequences(c, 7);
  Tensor sums = int32s(sequences.sums), starts = int32s(sequences.starts);
  for (DType real : kReals)
    for (DType fp8 : kQuantized) {
      Pair rows = c.make_rows(real), cache = c.make_cache(fp8), slot_scales = c.make_scale_cache();
      fill(cache.storage(), 8);
      fill_scales(slot_scales.storage(), 9);
      for (const Form& form : kForms) {
        if (form.offsets && fp8 == DType::E5M2) continue;
        SCOPED_TRACE(pair_name(fp8, real) + ", scales " + form.name);
        Parameters p(c, form, 10);
        const bool from_start = form.scales == Form::PerTensor, by_slot = form.scales == Form::PerSlot;
        Pair expected = rows;
        const auto scale_of = [&](int kv, std::int64_t block, std::int64_t offset, std::int64_t h, std::int64_t d) {
          return by_slot ? slot_scales.storage().get<float>(slot_scales.index(kv, {block, offset, h}))
                         : scale_at(p.scales[kv], h, d);
        };
        reference_gather(c, cache, expected, sequences, from_start, scale_of, &p);
        cpu::run(CacheGather{cache.key(), cache.value(), rows.key(), rows.value(), sequences.table.view(), sums.view(), fp8,
                             by_slot ? slot_scales.key() : p.scales[0].view(),
                             by_slot ? slot_scales.value() : p.scales[1].view(),
                             from_start ? std::nullopt : std::optional(starts.view()), p.offset(0), p.offset(1)});
        EXPECT_EQ(difference(rows.storage(), expected.storage()), "");
        rows = c.make_rows(real);
      }
    }
}

TEST_P(CpuCache, PlainCopies) {
  const Case& c = std::get<1>(GetParam());
  const Slots slots = random_slots(c.tokens, c.slots(), 12);
  Sequences sequences(c, 13);
  Tensor mapping = int64s(slots), sums = int32s(sequences.sums), starts = int32s(sequences.starts);
  for (DType real : kReals)
    for (DType element : kReals) {
      SCOPED_TRACE(pair_name(real, element));
      Pair rows = c.make_rows(real), cache = c.make_cache(element);
      fill(rows.storage(), 14);
      Tensor scales[] = {make_scales(c.heads, 15), make_scales(1, 16)};
      Pair expected = cache;
      reference_append(c, rows, expected, slots, scales);
      cpu::run(CacheAppend{rows.key(), rows.value(), cache.key(), cache.value(), mapping.view(), element, scales[0].view(),
                           scales[1].view()});
      EXPECT_EQ(difference(cache.storage(), expected.storage()), "") << "append";

      fill(cache.storage(), 17);
      rows = c.make_rows(real);
      Pair expected_rows = rows;
      reference_gather(c, cache, expected_rows, sequences, false, [](auto...) { return kNaN; });
      cpu::run(CacheGather{cache.key(),
                           cache.value(),
                           rows.key(),
                           rows.value(),
                           sequences.table.view(),
                           sums.view(),
                           {},
                           scales[0].view(),
                           scales[1].view(),
                           starts.view()});
      EXPECT_EQ(difference(rows.storage(), expected_rows.storage()), "") << "gather";
    }
}

// --- Threads --------------------------------

INSTANTIATE_TEST_SUITE_P(, CpuThreads, testing::Combine(testing::ValuesIn(cpu::available()), testing::ValuesIn(kSpreads)),
                         spread_name);

// Large enough to be divided, with every slot written by many tokens.
const Case kLarge[] = {
    {.name = "nhd", .heads = 8, .head_size = 72, .tokens = 300},
    {.name = "hnd", .heads = 8, .head_size = 72, .cache = "2nhsd", .tokens = 300},
    {.name = "one_head", .heads = 1, .head_size = 520, .tokens = 300},
    {.name = "sparse", .heads = 5, .head_size = 72, .cache = "nshd2", .rows = "2thd:", .tokens = 300},
    {.name = "many_heads", .heads = 150, .head_size = 72, .tokens = 60},
};

TEST_P(CpuThreads, OfSeveralTokensWithOneSlotTheLastStays) {
  const cpu::ParallelFor& spread = std::get<1>(GetParam()).parallel_for;
  for (const Case& c : kLarge) {
    const Slots slots = random_slots(c.tokens, c.slots(), 18);
    Tensor mapping = int64s(slots);
    for (const Form& form : {kForms[0], kForms[1], kForms[4]}) {
      SCOPED_TRACE(std::string(c.name) + ", scales " + form.name);
      Parameters p(c, form, 20);
      Pair rows = c.make_rows(DType::BFloat16), cache = c.make_cache(DType::E4M3), scale_cache = c.make_scale_cache();
      fill(rows.storage(), 19);
      Pair expected = cache, expected_scales = scale_cache;
      reference_append(c, rows, expected, slots, p.scales, &p);
      cpu::run(CacheAppend{rows.key(),
                           rows.value(),
                           cache.key(),
                           cache.value(),
                           mapping.view(),
                           {},
                           p.scales[0].view(),
                           p.scales[1].view(),
                           p.offset(0),
                           p.offset(1)},
               spread);
      EXPECT_EQ(difference(cache.storage(), expected.storage()), "");

      reference_append_dynamic(c, rows, expected, expected_scales, slots, &p);
      cpu::run(CacheAppendDynamic{rows.key(),
                                  rows.value(),
                                  cache.key(),
                                  cache.value(),
                                  scale_cache.key(),
                                  scale_cache.value(),
                                  mapping.view(),
                                  {},
                                  p.offset(0),
                                  p.offset(1)},
               spread);
      EXPECT_EQ(difference(scale_cache.storage(), expected_scales.storage()), "") << "dynamic scales";
      EXPECT_EQ(difference(cache.storage(), expected.storage()), "") << "dynamic";

      Pair plain = c.make_cache(DType::BFloat16), expected_plain = plain;
      reference_append(c, rows, expected_plain, slots, p.scales);
      cpu::run(
          CacheAppend{
              rows.key(), rows.value(), plain.key(), plain.value(), mapping.view(), {}, p.scales[0].view(), p.scales[1].view()},
          spread);
      EXPECT_EQ(difference(plain.storage(), expected_plain.storage()), "") << "plain";
    }
  }
}

// A cache of which every slot begins at a multiple of 64 bytes, as the caches of engines do.
Pair make_aligned_cache(const Case& c) {
  for (std::int64_t skip = 0;; ++skip) {
    Pair cache(DType::E4M3, c.cache, "nshd", {c.blocks, c.block_size, c.heads, c.head_size}, skip);
    if (reinterpret_cast<std::uintptr_t>(cache.key().data) % 64 == 0) return cache;
  }
}

// So many elements that they are written past the processor's caches, unless a tile holds a NaN.
TEST_P(CpuThreads, AppendsLargerThanTheCachesOfACore) {
  const cpu::ParallelFor& spread = std::get<1>(GetParam()).parallel_for;
  for (const char* order : {"2nshd", "2nhsd"}) {
    SCOPED_TRACE(order);
    const Case c{.name = "", .heads = 8, .head_size = 128, .cache = order, .tokens = 600, .blocks = 20, .block_size = 16};
    const Slots slots = random_slots(c.tokens, c.slots(), 30);
    Tensor mapping = int64s(slots);
    Pair rows = c.make_rows(DType::BFloat16), cache = make_aligned_cache(c), scale_cache = c.make_scale_cache();
    fill(rows.storage(), 31);
    Tensor scales[] = {make_scales(c.heads, 32), make_scales(c.heads, 33)};
    Pair expected = cache, expected_scales = scale_cache;
    reference_append(c, rows, expected, slots, scales);
    cpu::run(
        CacheAppend{
            rows.key(), rows.value(), cache.key(), cache.value(), mapping.view(), {}, scales[0].view(), scales[1].view()},
        spread);
    EXPECT_EQ(difference(cache.storage(), expected.storage()), "");

    reference_append_dynamic(c, rows, expected, expected_scales, slots);
    cpu::run(
        CacheAppendDynamic{
            rows.key(), rows.value(), cache.key(), cache.value(), scale_cache.key(), scale_cache.value(), mapping.view(), {}},
        spread);
    EXPECT_EQ(difference(scale_cache.storage(), expected_scales.storage()), "") << "dynamic scales";
    EXPECT_EQ(difference(cache.storage(), expected.storage()), "") << "dynamic";
  }
}

TEST_P(CpuThreads, GatheredRangesGiveTheSameBytesAsTheWhole) {
  const cpu::ParallelFor& spread = std::get<1>(GetParam()).parallel_for;
  for (Case c : kLarge) {
    SCOPED_TRACE(c.name);
    c.block_size = 150;  // for sequences of hundreds
    Sequences sequences(c, 22);
    Tensor sums = int32s(sequences.sums), starts = int32s(sequences.starts);
    Pair rows = c.make_rows(DType::BFloat16), cache = c.make_cache(DType::E5M2), scales = c.make_scale_cache();
    fill(cache.storage(), 23);
    fill_scales(scales.storage(), 24);
    Pair expected = rows;
    reference_gather(c, cache, expected, sequences, false,
                     [&](int kv, std::int64_t block, std::int64_t offset, std::int64_t h, std::int64_t) {
                       return scales.storage().get<float>(scales.index(kv, {block, offset, h}));
                     });
    cpu::run(CacheGather{cache.key(),
                         cache.value(),
                         rows.key(),
                         rows.value(),
                         sequences.table.view(),
                         sums.view(),
                         {},
                         scales.key(),
                         scales.value(),
                         starts.view()},
             spread);
    EXPECT_EQ(difference(rows.storage(), expected.storage()), "");
  }
}

TEST(CpuCacheThreads, OneLongHeadIsDivided) {
  const Case c{.name = "", .heads = 1, .head_size = 512, .tokens = 600};
  Pair rows = c.make_rows(DType::Float16), cache = c.make_cache(DType::E4M3);
  Tensor mapping = int64s(Slots(600, 3)), scale = make_scales(1, 25);
  std::int64_t count = 0;
  cpu::run(CacheAppend{rows.key(), rows.value(), cache.key(), cache.value(), mapping.view(), {}, scale.view(), scale.view()},
           [&](std::int64_t items, std::int64_t, const auto& body) { count = items, body(0, items); });
  EXPECT_EQ(count, 2 * 512 / 64);
}

// --- Numbers --------------------------------

// --- K and V that differ --------------------------------

struct Side {
  std::int64_t head_size;
  DType row, element;
};
struct UnlikeSides {
  Side k, v;
};
const UnlikeSides kUnlikeSides[] = {
    {{192, DType::BFloat16, DType::E4M3}, {128, DType::BFloat16, DType::E4M3}},
    {{20, DType::Float16, DType::E4M3}, {577, DType::Float16, DType::Int8}},
    {{64, DType::Float32, DType::BFloat16}, {64, DType::Float32, DType::E5M2}},
    {{80, DType::E4M3, DType::E4M3}, {80, DType::BFloat16, DType::E4M3}},
    {{33, DType::E5M2, DType::E5M2}, {7, DType::E5M2, DType::E5M2}},
    {{64, DType::BFloat16, DType::E4M3}, {0, DType::BFloat16, DType::E4M3}},
};

TEST_P(CpuIsa, AppendsKAndVThatDiffer) {
  for (const UnlikeSides& sides : kUnlikeSides)
    for (const char* order : {"2nshd", "n2hsd", "nsh2d", "2nshd:"}) {
      SCOPED_TRACE(pair_name(sides.k.row, sides.k.element) + ", " + pair_name(sides.v.row, sides.v.element) + ", " + order);
      std::vector<Pair> rows, caches, expected;
      Tensor scales[2] = {make_scales(3, 4), make_scales(3, 5)};
      const Slots slots = random_slots(19, 30, 6);
      for (int kv = 0; kv < 2; ++kv) {
        const Side& side = kv == 0 ? sides.k : sides.v;
        const Case c{.name = "", .heads = 3, .head_size = side.head_size, .cache = order};
        rows.push_back(c.make_rows(side.row)), caches.push_back(c.make_cache(side.element));
        fill(rows[kv].storage(), 7 + kv);
        Pair& result = expected.emplace_back(caches[kv]);
        for (std::size_t t = 0; t < slots.size(); ++t)
          for (std::int64_t i = 0; i < c.heads * c.head_size && slots[t] >= 0; ++i) {
            const std::int64_t h = i / c.head_size, d = i % c.head_size;
            const std::int64_t to = result.index(kv, {slots[t] / c.block_size, slots[t] % c.block_size, h, d}),
                               from = rows[kv].index(kv, {static_cast<std::int64_t>(t), h, d});
            if (side.row == side.element)
              std::memcpy(result.storage().at(to), rows[kv].storage().at(from), size_of(side.row));
            else
              convert(result.storage(), to, rows[kv].storage(), from, scale_at(scales[kv], h, 0));
          }
      }
      Tensor mapping = int64s(slots);
      cpu::run(CacheAppend{.key = rows[0].key(),
                           .value = rows[1].value(),
                           .key_cache = caches[0].key(),
                           .value_cache = caches[1].value(),
                           .slot_mapping = mapping.view(),
                           .k_scale = scales[0].view(),
                           .v_scale = scales[1].view(),
                           .v_cache_dtype = sides.v.element});
      for (int kv = 0; kv < 2; ++kv) EXPECT_EQ(caches[kv].storage().storage(), expected[kv].storage().storage());
    }
}

TEST_P(CpuIsa, AppendsEveryPatternWithHostileScales) {
  const std::vector<float> hostile = hostile_scales();
  const auto heads = static_cast<std::int64_t>(hostile.size());
  const Case c{.name = "", .heads = heads, .head_size = 128, .tokens = 512, .blocks = 32, .block_size = 16};
  Slots slots;
  for (std::int64_t t = 0; t < c.tokens; ++t) slots.push_back((t * 5 + 3) % c.slots());  // each once
  Tensor mapping = int64s(slots);
  Tensor scales[] = {make_scales(heads, 0), make_scales(heads, 0)};
  for (std::int64_t h = 0; h < heads; ++h) scales[0].set(h, hostile[h]), scales[1].set(h, hostile[heads - 1 - h]);
  Tensor patterns = every_pattern(DType::BFloat16, 26);
  Pair rows = c.make_rows(DType::BFloat16);
  for (int kv = 0; kv < 2; ++kv)
    for (std::int64_t t = 0; t < c.tokens; ++t)
      for (std::int64_t h = 0; h < heads; ++h)
        std::memcpy(rows.storage().at(rows.index(kv, {t, h, 0})), patterns.at(t * c.head_size), c.head_size * 2);
  for (DType fp8 : kQuantized) {
    SCOPED_TRACE(name(fp8));
    Pair cache = c.make_cache(fp8);
    Pair expected = cache;
    reference_append(c, rows, expected, slots, scales);
    cpu::run(CacheAppend{rows.key(), rows.value(), cache.key(), cache.value(), mapping.view(), fp8, scales[0].view(),
                         scales[1].view()});
    EXPECT_EQ(difference(cache.storage(), expected.storage()), "");
  }
}

TEST_P(CpuIsa, HeadsWithoutFiniteElementsGetTheSmallestScale) {
  for (float value : {0.0f, kNaN, kInf, -kInf}) {
    const Case c{.name = "", .heads = 2, .head_size = 40, .tokens = 1, .blocks = 1, .block_size = 1};
    Pair rows = c.make_rows(DType::Float32), cache = c.make_cache(DType::E5M2), scales = c.make_scale_cache();
    for (std::int64_t i = 0; i < rows.storage().numel(); ++i) rows.storage().set(i, value);
    Tensor mapping = int32s({0});
    cpu::run(CacheAppendDynamic{
        rows.key(), rows.value(), cache.key(), cache.value(), scales.key(), scales.value(), mapping.view(), {}});
    const std::uint8_t byte = is_nan(value) ? 0x7F : value == 0.0f ? 0x00 : value > 0 ? 0x7B : 0xFB;
    for (int kv = 0; kv < 2; ++kv)
      for (std::int64_t h = 0; h < c.heads; ++h) {
        EXPECT_EQ(scales.storage().get<float>(scales.index(kv, {0, 0, h})), kMinScale<E5M2>) << value;
        for (std::int64_t d = 0; d < c.head_size; ++d)
          ASSERT_EQ(cache.storage().get<std::uint8_t>(cache.index(kv, {0, 0, h, d})), byte) << value;
      }
  }
}

TEST(CpuCachePlain, NanKeepsItsBitsInItsTypeAndBecomesTheQuietOneInAnother) {
  const Case c{.name = "", .heads = 1, .head_size = 2, .tokens = 1, .blocks = 1, .block_size = 1};
  struct Row {
    DType type;
    std::uint32_t nans[2], quiet;
  };
  const Row kRows[] = {{DType::Float32, {0xffc12345, 0x7f800001}, 0x7fc00000},
                       {DType::Float16, {0xfe01, 0x7c01}, 0x7e00},
                       {DType::BFloat16, {0xffc1, 0x7f81}, 0x7fc0}};
  Tensor mapping = int32s({0}), scale = make_scales(1, 27);
  for (const Row& from : kRows)
    for (const Row& to : kRows) {
      Pair rows = c.make_rows(from.type), cache = c.make_cache(to.type);
      for (std::int64_t d = 0; d < 2; ++d)
        std::memcpy(rows.storage().at(rows.index(0, {0, 0, d})), &from.nans[d], size_of(from.type));
      cpu::run(
          CacheAppend{rows.key(), rows.value(), cache.key(), cache.value(), mapping.view(), {}, scale.view(), scale.view()});
      for (std::int64_t d = 0; d < 2; ++d) {
        std::uint32_t found = 0;
        std::memcpy(&found, cache.storage().at(cache.index(0, {0, 0, 0, d})), size_of(to.type));
        EXPECT_EQ(found, from.type == to.type ? from.nans[d] : to.quiet) << pair_name(from.type, to.type);
      }
    }
}

#if defined(__x86_64__)
TEST_P(CpuIsa, IgnoresFlushToZeroAndRoundingOfTheThread) {
  constexpr unsigned kFlushToZero = 0x8000, kDenormalsAreZero = 0x0040, kTowardsZero = 0x6000;
  const Case c{.name = "", .heads = 3, .head_size = 64};
  const Slots slots = random_slots(c.tokens, c.slots(), 28);
  Sequences sequences(c, 29);
  Tensor mapping = int64s(slots), sums = int32s(sequences.sums);
  Tensor scales[] = {make_scales(3, 0), make_scales(1, 0)};
  for (std::int64_t h = 0; h < 3; ++h) scales[0].set(h, float_of(h % 2 ? 0x00012345u : 0x01000001u));
  scales[1].set(0, float_of(0x00000003u));
  Pair rows = c.make_rows(DType::Float32);
  std::mt19937 random(30);
  for (std::int64_t i = 0; i < rows.storage().numel(); ++i) rows.storage().set(i, random() & 0x80ffffffu);  // subnormals
  Pair cache = c.make_cache(DType::E4M3), dynamic = c.make_cache(DType::E5M2), found = c.make_scale_cache();
  Pair back = c.make_rows(DType::Float32), half = c.make_cache(DType::BFloat16);
  Pair expected = cache, expected_dynamic = dynamic, expected_found = found, expected_back = back, expected_half = half;
  reference_append(c, rows, expected, slots, scales);
  reference_append_dynamic(c, rows, expected_dynamic, expected_found, slots);
  reference_append(c, rows, expected_half, slots, scales);
  reference_gather(
      c, expected, expected_back, sequences, true,
      [&](int kv, std::int64_t, std::int64_t, std::int64_t h, std::int64_t d) { return scale_at(scales[kv], h, d); });
  unsigned after = 0;
  {
    const Mxcsr set(kFlushToZero | kDenormalsAreZero | kTowardsZero);
    cpu::run(CacheAppend{
        rows.key(), rows.value(), cache.key(), cache.value(), mapping.view(), {}, scales[0].view(), scales[1].view()});
    cpu::run(CacheAppendDynamic{
        rows.key(), rows.value(), dynamic.key(), dynamic.value(), found.key(), found.value(), mapping.view(), {}});
    cpu::run(CacheAppend{
        rows.key(), rows.value(), half.key(), half.value(), mapping.view(), {}, scales[0].view(), scales[1].view()});
    cpu::run(CacheGather{cache.key(),
                         cache.value(),
                         back.key(),
                         back.value(),
                         sequences.table.view(),
                         sums.view(),
                         {},
                         scales[0].view(),
                         scales[1].view()});
    after = _mm_getcsr();
  }
  EXPECT_EQ(after & 0xffc0u, (kFlushToZero | kDenormalsAreZero | kTowardsZero | 0x1f80u)) << "not restored";
  EXPECT_EQ(difference(cache.storage(), expected.storage()), "");
  EXPECT_EQ(difference(found.storage(), expected_found.storage()), "");
  EXPECT_EQ(difference(dynamic.storage(), expected_dynamic.storage()), "");
  EXPECT_EQ(difference(half.storage(), expected_half.storage()), "");
  EXPECT_EQ(difference(back.storage(), expected_back.storage()), "");
}
#endif

// --- Slots and sizes --------------------------------

TEST(CpuCacheSlots, NegativeOnesOfAnySizeAreSkipped) {
  const Case c{.name = "", .heads = 1, .head_size = 4, .tokens = 5};
  const Slots slots = {INT64_MIN, -(std::int64_t{1} << 32), -(std::int64_t{1} << 32) + 2, -1, 2};
  Pair rows = c.make_rows(DType::Float32), cache = c.make_cache(DType::Float32);
  fill(rows.storage(), 31);
  Tensor scales[] = {make_scales(1, 32), make_scales(1, 33)}, mapping = int64s(slots);
  Pair expected = cache;
  reference_append(c, rows, expected, slots, scales);
  cpu::run(CacheAppend{
      rows.key(), rows.value(), cache.key(), cache.value(), mapping.view(), {}, scales[0].view(), scales[1].view()});
  EXPECT_EQ(difference(cache.storage(), expected.storage()), "");
}

#if defined(__linux__)
// Memory that is there only where it is touched.
class Reserved {
 public:
  explicit Reserved(std::size_t bytes)
      : data_(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)),
        bytes_(bytes) {}
  ~Reserved() {
    if (*this) munmap(data_, bytes_);
  }
  Reserved(const Reserved&) = delete;
  Reserved& operator=(const Reserved&) = delete;
  explicit operator bool() const { return data_ != MAP_FAILED; }
  std::uint8_t* data() const { return static_cast<std::uint8_t*>(data_); }

 private:
  void* data_;
  std::size_t bytes_;
};

TEST(CpuCacheSlots, OffsetsBeyond32BitsAreReached) {
  constexpr std::int64_t kBlocks = 40, kBlock = std::int64_t{1} << 28, kSlots = kBlock / 2;
  const Reserved memory(kBlocks * kBlock);
  if (!memory) GTEST_SKIP() << "no address space";
  // Blocks of K, then V, with 2^27 slots of 1 byte each: slots and offsets both exceed 2^32.
  const std::int64_t slots[] = {(std::int64_t{1} << 32) + 5, 5, kBlocks * kSlots - 1};
  const float key[] = {1.0f, 2.0f, 3.0f}, value[] = {-1.0f, -2.0f, -3.0f}, scale = 1.0f;
  TensorView key_cache{
      .data = memory.data(), .dtype = DType::E4M3, .ndim = 4, .sizes = {kBlocks, kSlots, 1, 1}, .strides = {kBlock, 1, 1, 1}};
  TensorView value_cache = key_cache;
  value_cache.data = memory.data() + kSlots;
  const TensorView scales = contiguous(&scale, DType::Float32, {1});
  cpu::run(CacheAppend{contiguous(key, DType::Float32, {3, 1, 1}),
                       contiguous(value, DType::Float32, {3, 1, 1}),
                       key_cache,
                       value_cache,
                       contiguous(slots, DType::Int64, {3}),
                       {},
                       scales,
                       scales});
  for (int t = 0; t < 3; ++t) {
    const std::uint8_t* at = memory.data() + slots[t] / kSlots * kBlock + slots[t] % kSlots;
    EXPECT_EQ(at[0], encode<E4M3>(key[t]).bits) << t;
    EXPECT_EQ(at[kSlots], encode<E4M3>(value[t]).bits) << t;
  }

  const std::int32_t table[] = {32, 0, 39}, sums[] = {0, 1, 2, 3}, starts[] = {5, 5, kSlots - 1};
  float key_back[3], value_back[3];
  cpu::run(CacheGather{key_cache,
                       value_cache,
                       contiguous(key_back, DType::Float32, {3, 1, 1}),
                       contiguous(value_back, DType::Float32, {3, 1, 1}),
                       contiguous(table, DType::Int32, {3, 1}),
                       contiguous(sums, DType::Int32, {4}),
                       {},
                       scales,
                       scales,
                       contiguous(starts, DType::Int32, {3})});
  for (int t = 0; t < 3; ++t) {
    EXPECT_EQ(key_back[t], key[t]);
    EXPECT_EQ(value_back[t], value[t]);
  }
}
#endif

// --- Formats --------------------------------

// As a C++ caller writes it, without kv_cache_dtype: the caches say what they are.
class CpuCacheFormats : public testing::Test {
 protected:
  CacheAppend append(DType dtype) {
    return {.key = contiguous(kKey, DType::Float32, {1, 1, 2}),
            .value = contiguous(kValue, DType::Float32, {1, 1, 2}),
            .key_cache = contiguous(key_cache, dtype, {1, 1, 1, 2}),
            .value_cache = contiguous(value_cache, dtype, {1, 1, 1, 2}),
            .slot_mapping = contiguous(&kSlot, DType::Int64, {1}),
            .k_scale = contiguous(&kHalf, DType::Float32, {1}),
            .v_scale = contiguous(&kHalf, DType::Float32, {1})};
  }

  static constexpr float kKey[] = {1.0f, -0.5f}, kValue[] = {448.0f, 0.0f}, kHalf = 0.5f;
  static constexpr std::int64_t kSlot = 0;
  std::uint16_t key_cache[2] = {0xA5A5, 0xA5A5}, value_cache[2] = {0xA5A5, 0xA5A5};
};

TEST_F(CpuCacheFormats, AnFp8CacheIsQuantized) {
  cpu::run(append(DType::E4M3));
  EXPECT_EQ(key_cache[0], 0x40 | 0xB8 << 8) << "2 and -1";
  EXPECT_EQ(value_cache[0], 0x7E) << "the largest and 0";
  EXPECT_EQ(key_cache[1], 0xA5A5);
  cpu::run(append(DType::E5M2));
  EXPECT_EQ(key_cache[0], 0x40 | 0xBC << 8) << "2 and -1";
}

TEST_F(CpuCacheFormats, AnInt8CacheIsQuantized) {
  cpu::run(append(DType::Int8));
  EXPECT_EQ(key_cache[0], 0x02 | 0xFF << 8) << "2 and -1";
  EXPECT_EQ(value_cache[0], 0x7F) << "127 and 0";
}

TEST_F(CpuCacheFormats, ACacheOf16BitsIsAPlainCopy) {
  cpu::run(append(DType::BFloat16));
  EXPECT_EQ(key_cache[0], 0x3F80);
  EXPECT_EQ(key_cache[1], 0xBF00);
  cpu::run(append(DType::Float16));
  EXPECT_EQ(key_cache[0], 0x3C00);
  EXPECT_EQ(key_cache[1], 0xB800);
}

TEST_F(CpuCacheFormats, ACacheOfBytesNeedsItsFormat) {
  EXPECT_EQ(error_of([&] { cpu::run(append(DType::UInt8)); }),
            "fp8kv::reshape_and_cache_flash: key_cache must be float32, float16, bfloat16, float8_e4m3fn, float8_e5m2 or int8, "
            "as kv_cache_dtype is not given, got uint8");
  EXPECT_EQ(key_cache[0], 0xA5A5);
  CacheAppend problem = append(DType::UInt8);
  problem.kv_cache_dtype = DType::E4M3;
  cpu::run(problem);
  EXPECT_EQ(key_cache[0], 0x40 | 0xB8 << 8);
}

// --- Errors --------------------------------

const Case kSmall{.name = "", .heads = 2, .head_size = 8, .tokens = 4, .blocks = 3, .block_size = 5};

// One problem of each kind, and all that they might write.
class CpuCacheErrors : public testing::Test {
 protected:
  CpuCacheErrors() { fill(rows.storage(), 34), fill(cache.storage(), 35), fill_scales(scale_cache.storage(), 36); }

  CacheAppend append() {
    return {rows.key(), rows.value(), cache.key(), cache.value(), slots.view(), {}, scale.view(), scale.view()};
  }
  CacheAppendDynamic append_dynamic() {
    return {rows.key(), rows.value(), cache.key(), cache.value(), scale_cache.key(), scale_cache.value(), slots.view(), {}};
  }
  CacheGather gather() {
    return {cache.key(), cache.value(), rows.key(),   rows.value(), table.view(), sums.view(),
            {},          scale.view(),  scale.view(), starts.view()};
  }

  // The sentence of the error; nothing may be written before it.
  template <class Problem>
  std::string sentence(const Problem& problem) {
    const Tensor before[] = {rows.storage(), cache.storage(), scale_cache.storage()};
    const std::string text = error_of([&] { cpu::run(problem); });
    EXPECT_EQ(difference(rows.storage(), before[0]), "");
    EXPECT_EQ(difference(cache.storage(), before[1]), "");
    EXPECT_EQ(difference(scale_cache.storage(), before[2]), "");
    return text;
  }

  void set_table(const std::vector<std::int32_t>& blocks) {
    for (std::size_t i = 0; i < blocks.size(); ++i) table.set(static_cast<std::int64_t>(i), blocks[i]);
  }

  Pair rows = kSmall.make_rows(DType::BFloat16), cache = kSmall.make_cache(DType::E4M3),
       scale_cache = kSmall.make_scale_cache();
  Tensor scale = make_scales(1, 37), slots = int64s({0, 1, -1, 14});
  Tensor table{DType::Int32, {2, 2}, Memory::Padded}, sums = int32s({0, 2, 6}), starts = int32s({8, 3});
};

TEST_F(CpuCacheErrors, OtherDevices) {
  constexpr Device kCuda{Device::Type::CUDA, 1};
  CacheAppend a = append();
  for (TensorView* v : {&a.key, &a.value, &a.key_cache, &a.value_cache, &a.slot_mapping, &a.k_scale, &a.v_scale})
    v->device = kCuda;
  EXPECT_EQ(sentence(a), "fp8kv::reshape_and_cache_flash: key must be on the cpu, got cuda:1");
  CacheAppendDynamic d = append_dynamic();
  for (TensorView* v : {&d.key, &d.value, &d.key_cache, &d.value_cache, &d.slot_mapping, &d.k_scale_cache, &d.v_scale_cache})
    v->device = kCuda;
  EXPECT_EQ(sentence(d), "fp8kv::reshape_and_cache_flash_dynamic: key must be on the cpu, got cuda:1");
  CacheGather g = gather();
  for (TensorView* v :
       {&g.key, &g.value, &g.key_cache, &g.value_cache, &g.block_table, &g.cu_seq_lens, &g.k_scale, &g.v_scale, &*g.seq_starts})
    v->device = kCuda;
  EXPECT_EQ(sentence(g), "fp8kv::gather_and_dequant_cache: key_cache must be on the cpu, got cuda:1");
}

// Scales that are left out are null pointers, not scales of one element.
TEST_F(CpuCacheErrors, ForgottenScales) {
  const std::string words = "_scale must point to memory, got a null pointer of shape []";
  CacheAppend a = append();
  a.k_scale = {};
  EXPECT_EQ(sentence(a), "fp8kv::reshape_and_cache_flash: k" + words);
  a = append(), a.v_scale = {};
  EXPECT_EQ(sentence(a), "fp8kv::reshape_and_cache_flash: v" + words);
  CacheGather g = gather();
  g.k_scale = {};
  EXPECT_EQ(sentence(g), "fp8kv::gather_and_dequant_cache: k" + words);
  CacheAppendDynamic d = append_dynamic();
  d.v_scale_cache = {};
  EXPECT_EQ(sentence(d),
            "fp8kv::reshape_and_cache_flash_dynamic: v_scale_cache must point to memory, got a null pointer of shape []");
}

TEST_F(CpuCacheErrors, RefusedProblems) {
  CacheAppend a = append();
  a.kv_cache_dtype = DType::Int16;
  EXPECT_NE(sentence(a), "");
  CacheAppendDynamic d = append_dynamic();
  d.kv_cache_dtype = DType::BFloat16;
  EXPECT_NE(sentence(d), "");
  CacheGather g = gather();
  g.kv_cache_dtype = DType::E5M2;
  EXPECT_NE(sentence(g), "");
}

TEST_F(CpuCacheErrors, SlotsBeyondTheCache) {
  const std::string expected = ": slot_mapping must have slots below num_blocks * block_size = 15, got ";
  for (std::int64_t beyond : {std::int64_t{15}, std::int64_t{1} << 32, INT64_MAX}) {
    slots = int64s({0, 1, -1, beyond});
    EXPECT_EQ(sentence(append()), "fp8kv::reshape_and_cache_flash" + expected + std::to_string(beyond) + " for token 3");
    EXPECT_EQ(sentence(append_dynamic()),
              "fp8kv::reshape_and_cache_flash_dynamic" + expected + std::to_string(beyond) + " for token 3");
  }
  slots = int32s({0, 16, -1, 15});
  EXPECT_EQ(sentence(append()), "fp8kv::reshape_and_cache_flash" + expected + "16 for token 1");
}

TEST_F(CpuCacheErrors, SlotsOfNoElements) {
  const Case c{.name = "", .heads = 0, .head_size = 8, .tokens = 4, .blocks = 3, .block_size = 5};
  Pair no_rows = c.make_rows(DType::BFloat16), no_cache = c.make_cache(DType::E4M3);
  slots = int64s({15});
  EXPECT_EQ(
      sentence(CacheAppend{
          no_rows.key(), no_rows.value(), no_cache.key(), no_cache.value(), slots.view(), {}, scale.view(), scale.view()}),
      "fp8kv::reshape_and_cache_flash: slot_mapping must have slots below num_blocks * block_size = 15, got 15 for token 0");
}

const std::string kGather = "fp8kv::gather_and_dequant_cache: ";

TEST_F(CpuCacheErrors, Sums) {
  set_table({0, 1, 2, 0});
  sums = int32s({1, 2, 3});
  EXPECT_EQ(sentence(gather()), kGather + "cu_seq_lens must begin with 0, got 1");
  sums = int32s({0, 3, 2});
  EXPECT_EQ(sentence(gather()), kGather + "cu_seq_lens must be non-decreasing, got 2 after 3");
  sums = int32s({0, -1, 2});
  EXPECT_EQ(sentence(gather()), kGather + "cu_seq_lens must be non-decreasing, got -1 after 0");
  sums = int32s({0, 2, 7});
  EXPECT_EQ(sentence(gather()), kGather + "key must have at least cu_seq_lens[-1]=7 rows, got shape [6, 2, 8]");
}

TEST_F(CpuCacheErrors, SumsBeyondARowlessKey) {
  set_table({0, 1, 2, 0});
  CacheGather g = gather();
  g.key.sizes[0] = g.value.sizes[0] = 0;
  EXPECT_EQ(sentence(g), kGather + "key must have at least cu_seq_lens[-1]=6 rows, got shape [0, 2, 8]");
}

TEST_F(CpuCacheErrors, Starts) {
  set_table({0, 1, 2, 0});
  starts = int32s({0, -2});
  EXPECT_EQ(sentence(gather()), kGather + "seq_starts must be at least 0, got -2 in sequence 1");
  starts = int32s({9, 0});
  EXPECT_EQ(sentence(gather()), kGather +
                                    "block_table must have blocks for all positions, max_blocks * block_size = 10, got a "
                                    "last position of 10 in sequence 0");
  starts = int32s({0, INT32_MAX});
  EXPECT_EQ(sentence(gather()), kGather +
                                    "block_table must have blocks for all positions, max_blocks * block_size = 10, got a "
                                    "last position of 2147483650 in sequence 1");
}

TEST_F(CpuCacheErrors, StartsOfEmptySequencesAreNotLookedAt) {
  set_table({0, 1, -1, -1});
  sums = int32s({0, 2, 2});
  starts = int32s({8, -5});
  EXPECT_EQ(error_of([&] { cpu::run(gather()); }), "");
}

TEST_F(CpuCacheErrors, BlocksOutsideTheCache) {
  set_table({-1, 3, 2, 1});  // of the first row only the second entry is needed
  EXPECT_EQ(sentence(gather()),
            kGather + "block_table must have blocks from 0 to num_blocks - 1 = 2, got 3 at 1 in sequence 0");
  set_table({-1, 2, 1, -1});
  EXPECT_EQ(sentence(gather()),
            kGather + "block_table must have blocks from 0 to num_blocks - 1 = 2, got -1 at 1 in sequence 1");
  set_table({-1, 2, 1, 0});
  EXPECT_EQ(error_of([&] { cpu::run(gather()); }), "");
}

TEST_F(CpuCacheErrors, NoBlocksToGatherFrom) {
  set_table({0, 0, 0, 0});
  CacheGather g = gather();
  g.key_cache.sizes[1] = g.value_cache.sizes[1] = 0;
  EXPECT_EQ(sentence(g), kGather +
                             "block_table must have blocks for all positions, max_blocks * block_size = 0, got a last "
                             "position of 9 in sequence 0");
  g = gather();
  g.key_cache.sizes[0] = g.value_cache.sizes[0] = 0;
  EXPECT_EQ(sentence(g), kGather + "block_table must have blocks from 0 to num_blocks - 1 = -1, got 0 at 1 in sequence 0");
}

}  // namespace
}  // namespace fp8kv
