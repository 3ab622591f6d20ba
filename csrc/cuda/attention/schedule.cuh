// How blocks of threads share the work of attention. Lengths are known on the device only, so every block finds its share
// there.
//
// A tile is 16 neighboring positions of a sequence. An item is what a block does at a time: the tiles of one sequence, for some
// of its KV heads and some of its queries. Items are counted in units, in the order of the sequences:
//   parts == 0: a unit is a tile of an item. The blocks divide all units equally, however long each sequence is; an item that
//               falls to several blocks is merged from their partial results.
//   parts > 0:  a unit is one of so many equal parts of the tiles of an item, and a block takes one after the other.
#pragma once

#include "core/attention_memory.h"
#include "core/plan.h"

namespace fp8kv::cuda::attention {

using core::AttentionLayout;
using core::AttentionPlan;
using core::kTile;

inline constexpr unsigned kAllLanes = 0xffffffffu;

// Positions [begin, end); rows and tiles likewise.
struct Positions {
  int begin;
  int end;

  __device__ bool empty() const { return begin >= end; }
  __device__ Positions tiles() const { return {begin / kTile, empty() ? begin / kTile : (end - 1) / kTile + 1}; }
};

__device__ __forceinline__ int index_at(const core::View1D& view, std::int64_t i) {
  return __ldg(static_cast<const int*>(view.data) + i * view.stride);
}

// A sequence as the index tensors say it, within the bounds of the other tensors whatever they hold.
struct Sequence {
  int first_row;
  int num_queries;
  int first_position;  // of its first query; may be negative
  int start;

  __device__ static Sequence load(const AttentionLayout& l, std::int64_t s) {
    Sequence sequence{.first_row = static_cast<int>(s), .num_queries = 1, .first_position = 0, .start = 0};
    if (l.cu_query_lens.data) {
      const auto rows = static_cast<int>(l.num_rows);
      sequence.first_row = min(max(index_at(l.cu_query_lens, s), 0), rows);
      sequence.num_queries = min(max(index_at(l.cu_query_lens, s + 1), sequence.first_row), rows) - sequence.first_row;
    }
    sequence.first_position = max(index_at(l.seq_lens, s), 0) - sequence.num_queries;
    if (l.seq_starts.data) sequence.start = max(index_at(l.seq_starts, s), 0);
    return sequence;
  }

  // What a query sees. Positions beyond the block table are not seen.
  __device__ Positions seen_by(const AttentionLayout& l, int query) const {
    const int end = min(first_position + query + 1, static_cast<int>(l.capacity));
    const int begin = min(first_seen_by(l, query), max(end, 0));
    return {begin, max(begin, end)};
  }

  // From the first to the last position that any of the queries [first, last) sees.
  __device__ Positions seen_by_any(const AttentionLayout& l, int first, int last) const {
    if (first >= last) return {0, 0};
    const Positions latest = seen_by(l, last - 1);
    return {min(first_seen_by(l, first), latest.begin), latest.end};
  }

 private:
  // Later queries see no earlier positions.
  __device__ int first_seen_by(const AttentionLayout& l, int query) const {
    if (l.sliding_window == 0) return start;
    return static_cast<int>(max(std::int64_t{start}, std::int64_t{first_position} + query + 1 - l.sliding_window));
  }
};

// The units of all sequences, and the sequence that a unit belongs to. All threads of a warp call everything together. Units
// count in 32 bits: the plan sees to that.
class Schedule {
 public:
  __device__ Schedule(const AttentionLayout& layout, const AttentionPlan& plan)
      : layout_(layout), plan_(plan), per_lane_((static_cast<int>(layout.num_seqs) + 31) / 32) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    lane_units_ = units_of_range(lane * per_lane_, (lane + 1) * per_lane_);
    lane_sum_ = inclusive_sum(lane_units_);
    total_ = __shfl_sync(kAllLanes, lane_sum_, 31);
  }

  __device__ unsigned total() const { return total_; }

  // Makes the sequence of a unit below total() the current one.
  __device__ void seek(unsigned unit) {
    // The lane whose sequences hold it, then the same among these.
    int per_lane = per_lane_, first = 0, count = static_cast<int>(layout_.num_seqs);
    unsigned sum = lane_sum_, units = lane_units_;
    const int lane = static_cast<int>(threadIdx.x % 32);
    before_ = 0;
    while (true) {
      const int found = __ffs(__ballot_sync(kAllLanes, before_ + sum > unit)) - 1;
      before_ += __shfl_sync(kAllLanes, sum - units, found);
      first += found * per_lane;
      count = min(per_lane, count - found * per_lane);
      if (per_lane == 1) break;
      per_lane = (count + 31) / 32;
      units = units_of_range(first + min(lane * per_lane, count), first + min((lane + 1) * per_lane, count));
      sum = inclusive_sum(units);
    }
    set(first);
  }

  // The current sequence moves on until it is that of the unit.
  __device__ void advance(unsigned unit) {
    while (unit - before_ >= num_items_ * units_per_item_) {
      before_ += num_items_ * units_per_item_;
      set(index_ + 1);
    }
  }

  // Of the current sequence.
  __device__ int index() const { return index_; }
  __device__ const Sequence& sequence() const { return sequence_; }
  __device__ unsigned first_unit() const { return before_; }
  __device__ unsigned num_items() const { return num_items_; }
  __device__ unsigned units_per_item() const { return units_per_item_; }

 private:
  __device__ void set(int index) {
    index_ = index;
    sequence_ = Sequence::load(layout_, index);
    num_items_ = items_of(sequence_);
    units_per_item_ = units_of_item(sequence_);
  }

  __device__ unsigned items_of(const Sequence& s) const {
    const auto columns = static_cast<unsigned>(s.num_queries * layout_.heads_per_kv_head());
    return static_cast<unsigned>(plan_.head_groups) * ((columns + plan_.columns - 1) / plan_.columns);
  }
  __device__ unsigned units_of_item(const Sequence& s) const {
    if (plan_.parts > 0) return static_cast<unsigned>(plan_.parts);
    const Positions tiles = s.seen_by_any(layout_, 0, s.num_queries).tiles();
    return max(tiles.end - tiles.begin, 1);  // where nothing is seen, zeros are written
  }

  __device__ unsigned units_of_range(int first, int last) const {
    unsigned units = 0;
    for (int s = first; s < min(last, static_cast<int>(layout_.num_seqs)); ++s) {
      const Sequence sequence = Sequence::load(layout_, s);
      units += items_of(sequence) * units_of_item(sequence);
    }
    return units;
  }

  __device__ static unsigned inclusive_sum(unsigned value) {
    for (int distance = 1; distance < 32; distance *= 2) {
      const unsigned other = __shfl_up_sync(kAllLanes, value, distance);
      if (static_cast<int>(threadIdx.x % 32) >= distance) value += other;
    }
    return value;
  }

  const AttentionLayout& layout_;
  const AttentionPlan& plan_;
  int per_lane_, index_ = 0;
  unsigned lane_units_, lane_sum_, total_;
  unsigned before_ = 0, num_items_ = 0, units_per_item_ = 0;
  Sequence sequence_{};
};

// parts == 0: the units of each block; the first `longer` blocks have one more. Blocks beyond those that are worth starting
// have none.
struct Share {
  unsigned blocks, units, longer;

  __device__ Share(const AttentionPlan& plan, unsigned total)
      : blocks(min(static_cast<unsigned>(plan.blocks), (total - 1) / static_cast<unsigned>(plan.least_units) + 1)),
        units(total / blocks),
        longer(total - units * blocks) {}

  __device__ unsigned begin(unsigned block) const { return block * units + min(block, longer); }
  __device__ unsigned block_of(unsigned unit) const {
    const unsigned in_longer = longer * (units + 1);
    return unit < in_longer ? unit / (units + 1) : longer + (unit - in_longer) / units;
  }
};

// A block has at most two items that it doesn't finish alone: the one it begins with and the one it ends with.
__device__ __forceinline__ int slot_of_share(unsigned block, bool begins_item) {
  return static_cast<int>(2 * block + begins_item);
}

}  // namespace fp8kv::cuda::attention
