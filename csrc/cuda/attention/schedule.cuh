// How blocks of threads share the work of attention. Lengths are known on the device only, so every block finds its share there.
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

// The units of all sequences, and the sequence that a unit belongs to. All threads of a warp call everything together.
class Schedule {
 public:
  __device__ Schedule(const AttentionLayout& layout, const AttentionPlan& plan)
      : layout_(layout), plan_(plan), per_lane_((layout.num_seqs + 31) / 32) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    lane_units_ = units_of_range(lane * per_lane_, (lane + 1) * per_lane_);
    lane_sum_ = inclusive_sum(lane_units_);
    total_ = __shfl_sync(kAllLanes, lane_sum_, 31);
  }

  __device__ std::int64_t total() const { return total_; }

  // Items of this sequence, and units of one of them.
  __device__ std::int64_t num_items(const Sequence& s) const {
    const std::int64_t columns = s.num_queries * layout_.heads_per_kv_head();
    return plan_.head_groups * ((columns + plan_.columns - 1) / plan_.columns);
  }
  __device__ std::int64_t units_per_item(const Sequence& s) const {
    if (plan_.parts > 0) return plan_.parts;
    const Positions tiles = s.seen_by_any(layout_, 0, s.num_queries).tiles();
    return max(tiles.end - tiles.begin, 1);  // where nothing is seen, zeros are written
  }

  // Makes the sequence of a unit below total() the current one.
  __device__ void seek(std::int64_t unit) {
    // The lane whose sequences hold it, then the same among these.
    std::int64_t per_lane = per_lane_, first = 0, count = layout_.num_seqs, sum = lane_sum_, units = lane_units_;
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
    set(static_cast<int>(first));
  }

  // The current sequence moves on until it is that of the unit.
  __device__ void advance(std::int64_t unit) {
    while (unit >= before_ + units_) {
      before_ += units_;
      set(index_ + 1);
    }
  }

  __device__ int index() const { return index_; }
  __device__ const Sequence& sequence() const { return sequence_; }
  __device__ std::int64_t first_unit() const { return before_; }  // of the current sequence

 private:
  __device__ void set(int index) {
    index_ = index;
    sequence_ = Sequence::load(layout_, index);
    units_ = num_items(sequence_) * units_per_item(sequence_);
  }

  __device__ std::int64_t units_of_range(std::int64_t first, std::int64_t last) const {
    std::int64_t units = 0;
    for (std::int64_t s = first; s < min(last, layout_.num_seqs); ++s) {
      const Sequence sequence = Sequence::load(layout_, s);
      units += num_items(sequence) * units_per_item(sequence);
    }
    return units;
  }

  __device__ static std::int64_t inclusive_sum(std::int64_t value) {
    for (int distance = 1; distance < 32; distance *= 2) {
      const std::int64_t other = __shfl_up_sync(kAllLanes, value, distance);
      if (static_cast<int>(threadIdx.x % 32) >= distance) value += other;
    }
    return value;
  }

  const AttentionLayout& layout_;
  const AttentionPlan& plan_;
  std::int64_t per_lane_, lane_units_, lane_sum_, total_;
  std::int64_t before_ = 0, units_ = 0;
  int index_ = 0;
  Sequence sequence_{};
};

// parts == 0: the units of a block. Blocks beyond the last that is worth starting have none.
struct Share {
  std::int64_t total;
  std::int64_t blocks;

  __device__ Share(const AttentionPlan& plan, std::int64_t total_units)
      : total(total_units), blocks(min(plan.blocks, (total_units + plan.least_units - 1) / plan.least_units)) {}

  __device__ std::int64_t begin(std::int64_t block) const { return total * block / blocks; }
  // The block that has this unit: the last whose first unit is not above it.
  __device__ std::int64_t block_of(std::int64_t unit) const { return ((unit + 1) * blocks - 1) / total; }
};

// A block has at most two items that it doesn't finish alone: the one it begins with and the one it ends with.
__device__ __forceinline__ std::int64_t slot_of_share(std::int64_t block, bool begins_item) { return 2 * block + begins_item; }

}  // namespace fp8kv::cuda::attention
