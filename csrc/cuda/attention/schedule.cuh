// How blocks of threads share the work of attention. Lengths are known on the device only, so every block finds its share
// there.
//
// A tile is 16 neighboring positions of a sequence. An item is what a block does at a time: the tiles of one sequence and KV
// head, for some of its queries. Items are counted in units, in the order of the sequences:
//   parts == 0: a unit is a tile of an item. The blocks divide all units equally, of which an item has some more for what it
//               costs to begin with it; each KV head has as many blocks, if that leaves few of them idle. Where all sequences
//               are alike, the same number of blocks divide each item, or each block has whole items, at the same time as its
//               neighbors those next to them.
//   parts > 0:  a unit is one of so many nearly equal parts of the tiles of an item, one for each block. Where there are fewer
//               tiles than are worth so many blocks, the first parts have them.
// Ends of shares are rounded up to as many tiles as a block takes at once.
// The first warp of a block finds its items, one after the other, and leaves them in shared memory. Of an item that falls to
// several blocks, each leaves a partial result in the workspace. The last one to do so merges them, or another kernel
// (plan.merges > 0).
#pragma once

#include <climits>

#include "core/attention_memory.h"
#include "core/plan.h"
#include "device/fastdiv.cuh"

namespace fp8kv::cuda::attention {

using core::AttentionLayout;
using core::AttentionPlan;
using core::kTile;
using device::FastDiv;

inline constexpr unsigned kAllLanes = 0xffffffffu;

// Of a cache, in bytes; the plan sees to it that they and their products with offsets fit.
struct CacheStrides {
  int block, offset, head;

  explicit CacheStrides(const core::PagedView& view)
      : block(static_cast<int>(view.block)), offset(static_cast<int>(view.offset)), head(static_cast<int>(view.head)) {}
};

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
  int start;           // positions before it are not seen

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
    const int end = first_position + query + 1;
    const bool all = l.sliding_window == 0 || l.sliding_window >= end;
    return all ? start : max(start, end - static_cast<int>(l.sliding_window));
  }
};

// What a block does at a time: a sequence, a KV head, some queries, a range of tiles.
struct Item {
  Sequence sequence;
  int index;  // of the sequence
  int kv_head;
  int first_column;  // of those of the sequence and a KV head
  int num_columns;
  Positions tiles;
  int slot;                                           // of the workspace, or one of these
  static constexpr int kWhole = -1, kInCluster = -2;  // the block has all tiles; its cluster has them
  int first_slot;                                     // that of the first part of the item
  int parts;                                          // of the item
  bool nothing;                                       // the block has done all its work
};

// Partial results in the workspace. A slot has, for each column of an item, head_size weighted sums of V, and after all of
// these, for each column, a maximum, a sum, a base, and a word of what tells the merging kernel of the item.
class Slots {
 public:
  // Of an item whose first part is in the slot.
  struct Header {
    int parts;  // 0: there is no such item
    int first_row, first_column, num_columns, kv_head;
  };

  __device__ Slots(const AttentionLayout& layout, const AttentionPlan& plan, void* workspace)
      : counters_(static_cast<unsigned long long*>(workspace)),
        data_(static_cast<std::byte*>(workspace) + core::slot_counters_size(plan.slots)),
        columns_(plan.columns),
        head_size_(static_cast<int>(layout.head_size)),
        slot_size_(static_cast<unsigned>(4 * columns_ * (head_size_ + 4))),
        step_(plan.parts == 0 ? 2 : 1) {}

  // The slot of a part of an item: the first one is in the second slot of its block, or the only one, and the others are in the
  // first slots of the blocks behind it.
  __device__ int slot_of(int first_slot, int part) const { return first_slot + max(part * step_ - (step_ - 1), 0); }

  __device__ float* sums(int slot, int column) const { return at(slot) + column * head_size_; }
  __device__ float* softmax(int slot, int column) const { return at(slot) + columns_ * head_size_ + column * 4; }
  // What another slot has in the place of `p`: that of the next part of an item, and of those that follow it by `parts`.
  __device__ const float* next(const float* p) const { return moved(p, slot_size_); }
  __device__ const float* later(const float* p, int parts) const {
    return moved(p, std::int64_t{parts} * static_cast<int>(step_ * slot_size_));
  }

  __device__ void store(int slot, const Header& header) const {
    store_word(slot, 0, header.parts);
    store_word(slot, 1, header.first_row);
    store_word(slot, 2, header.first_column);
    store_word(slot, 3, header.num_columns);
    store_word(slot, 4, header.kv_head);
  }
  __device__ void store_no_item(int slot) const { store_word(slot, 0, 0); }
  __device__ Header header(int slot) const {
    return {word(slot, 0), word(slot, 1), word(slot, 2), word(slot, 3), word(slot, 4)};
  }

  // Counts a part of an item, by one thread, after the block's barrier behind its stores; true: it is the last one, and all
  // parts can be read. A workspace may hold anything at first: a counter has a mark in its upper bits, and what has none counts
  // as 0. The last part leaves 0.
  __device__ bool arrives_last(int first_slot, int parts) const {
    constexpr unsigned long long kNone = 0xa7c3'5e91'd26b'0000;
    static_assert((kNone & core::kMaxParts) == 0);
    const auto is_counter = [&](unsigned long long x) { return x - kNone < static_cast<unsigned>(parts); };
    unsigned long long* counter = counters_ + first_slot;
    unsigned long long before = add_one(counter);
    while (!is_counter(before)) {
      const unsigned long long found = exchange_if(counter, before + 1, kNone + 1);
      if (found == before + 1)
        before = kNone;
      else
        before = is_counter(found) ? add_one(counter) : found - 1;
    }
    const bool last = before == kNone + parts - 1;
    if (last) *counter = kNone;
    return last;
  }

 private:
  // Atomic, behind everything that the block did before, and before what it does next.
  __device__ static unsigned long long add_one(unsigned long long* counter) {
    unsigned long long before;
    asm volatile("atom.acq_rel.gpu.global.add.u64 %0, [%1], 1;" : "=l"(before) : "l"(counter) : "memory");
    return before;
  }
  __device__ static unsigned long long exchange_if(unsigned long long* counter, unsigned long long expected,
                                                   unsigned long long desired) {
    unsigned long long before;
    asm volatile("atom.acq_rel.gpu.global.cas.b64 %0, [%1], %2, %3;"
                 : "=l"(before)
                 : "l"(counter), "l"(expected), "l"(desired)
                 : "memory");
    return before;
  }

  __device__ static const float* moved(const float* p, std::int64_t bytes) {
    return reinterpret_cast<const float*>(reinterpret_cast<const std::byte*>(p) + bytes);
  }
  __device__ float* at(int slot) const {
    return reinterpret_cast<float*>(data_ + std::uint64_t{static_cast<unsigned>(slot)} * slot_size_);
  }
  __device__ void store_word(int slot, int i, int word) const { softmax(slot, i)[3] = __int_as_float(word); }
  __device__ int word(int slot, int i) const { return __float_as_int(__ldcg(softmax(slot, i) + 3)); }

  unsigned long long* counters_;  // of items, in the place of their first slots
  std::byte* data_;
  int columns_;  // at least 8
  int head_size_;
  unsigned slot_size_;  // bytes
  int step_;
};

// The smallest and the largest of numbers.
struct Range {
  unsigned least = 0xffffffffu, most = 0;

  __device__ void add(unsigned x) { least = min(least, x), most = max(most, x); }
  // Of all lanes.
  __device__ bool is_one_value() const { return __reduce_min_sync(kAllLanes, least) == __reduce_max_sync(kAllLanes, most); }
};

// Where a block is in its work, and how all blocks share it. Units count in 31 bits: the plan sees to that.
struct Cursor {
  unsigned unit, end;   // of the block
  unsigned first_unit;  // of the sequence
  int index;            // of the sequence
  unsigned units;       // parts == 0: of every block, or of every block of an item; the first `longer` ones have one more
  unsigned longer;
  unsigned step;            // from a whole item to the next one; 0: the share is contiguous
  unsigned of_sequence;     // units of every sequence, if there is a step
  unsigned blocks_of_item;  // 0: shares end anywhere
  unsigned overhead;        // units of an item before those of its tiles
  // The blocks that share the same units, of all KV heads or of one of them: the number of them before these, that of this
  // block among them, and the last one's.
  unsigned blocks_before, block, last_block;
  unsigned first_head, heads;
};

// Divisors that the host knows; at least 1.
struct Divisors {
  FastDiv group;  // query heads of a KV head
  FastDiv parts;  // plan.parts
  FastDiv items;  // of one sequence with such parts, at most
  FastDiv heads;  // of K and V

  Divisors(const AttentionLayout& layout, const AttentionPlan& plan)
      : group(layout.heads_per_kv_head()),
        parts(plan.parts > 0 ? plan.parts : 1),
        items(plan.parts > 0 && layout.num_seqs == 1 ? plan.blocks / plan.parts : 1),
        heads(layout.num_kv_heads) {}
};

// All threads of a warp call everything together.
class Schedule {
 public:
  __device__ Schedule(const AttentionLayout& layout, const AttentionPlan& plan, const Divisors& divisors, void* workspace)
      : l_(layout),
        plan_(plan),
        group_(divisors.group),
        parts_(divisors.parts),
        items_(divisors.items),
        heads_(divisors.heads),
        slots_(layout, plan, workspace),
        lane_(static_cast<int>(threadIdx.x % 32)) {}

  // The share of this block, and a sequence at or before the one that it begins with; or the only item of this block: true.
  __device__ bool begin(Cursor& cursor, Item& item) const {
    if (l_.num_seqs == 1 && plan_.parts > 0) {
      const Item found = only_item();
      if (lane_ == 0) cursor = Cursor{}, item = found;
      return true;
    }
    const int count = static_cast<int>(l_.num_seqs), per_lane = (count + 31) / 32;
    const int first = min(lane_ * per_lane, count), last = min(first + per_lane, count);
    unsigned units = 0, items = 0;
    Range of_items, of_sequences;
    for (int s = first; s < last; ++s) {
      const Sequence sequence = Sequence::load(l_, s);
      const unsigned of_item = units_of_item(tiles_of(sequence));
      const unsigned of_head = column_blocks_of(sequence);
      items += of_head;
      units += of_head * of_item;
      of_items.add(of_item);
      of_sequences.add(of_head * of_item);
    }
    const bool alike = of_items.is_one_value() && of_sequences.is_one_value();
    Cursor c{.block = blockIdx.x, .last_block = static_cast<unsigned>(plan_.blocks) - 1, .heads = heads_.divisor};
    if (plan_.parts == 0 && !alike) {
      c.overhead = static_cast<unsigned>(plan_.item_overhead);
      divide_heads(c);
    }
    units = (units + items * c.overhead) * c.heads;
    items *= c.heads;
    const unsigned sum = inclusive_sum(units);
    share_out(__shfl_sync(kAllLanes, sum, 31), alike ? __reduce_add_sync(kAllLanes, items) : 0, c);
    const int found = __ffs(__ballot_sync(kAllLanes, sum > c.unit)) - 1;
    c.first_unit = __shfl_sync(kAllLanes, sum - units, max(found, 0));
    c.index = found * per_lane;
    if (found < 0) c.end = c.unit;  // nothing to do
    if (lane_ == 0) cursor = c;
    __syncwarp();
    return false;
  }

  // The next item of this block.
  __device__ void next(Cursor& cursor, Item& item) const {
    Cursor c = cursor;
    Item found{};
    found.nothing = c.unit >= c.end;
    if (!found.nothing) advance(c, found);
    __syncwarp();
    if (lane_ == 0) cursor = c, item = found;
  }

 private:
  __device__ unsigned column_blocks_of(const Sequence& s) const {
    const unsigned columns = static_cast<unsigned>(s.num_queries) * group_.divisor, most = static_cast<unsigned>(plan_.columns);
    return (columns + most - 1) >> __popc(most - 1);  // a power of two
  }
  __device__ Positions tiles_of(const Sequence& s) const { return s.seen_by_any(l_, 0, s.num_queries).tiles(); }
  // Where nothing is seen, zeros are written.
  __device__ unsigned units_of_item(const Positions& tiles) const {
    return plan_.parts > 0 ? static_cast<unsigned>(plan_.parts) : max(tiles.end - tiles.begin, 1);
  }

  // Of so many tiles as are worth a block, one for each warp. Items are divided between them.
  __device__ unsigned rounds_of(unsigned tiles) const {
    const auto least = static_cast<unsigned>(plan_.least_units);
    return (tiles + least - 1) >> __popc(least - 1);
  }
  __device__ unsigned tiles_before(unsigned round, unsigned tiles) const {
    return min(round * static_cast<unsigned>(plan_.least_units), tiles);
  }

  __device__ unsigned inclusive_sum(unsigned value) const {
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const unsigned other = __shfl_up_sync(kAllLanes, value, distance);
      if (lane_ >= distance) value += other;
    }
    return value;
  }

  // The same number of blocks for each KV head, if no more than a few are idle: neighboring blocks read rows that are side by
  // side in memory at the same time.
  __device__ void divide_heads(Cursor& c) const {
    const unsigned blocks = static_cast<unsigned>(plan_.blocks), of_head = heads_.div(blocks);
    if (16 * of_head * heads_.divisor < 15 * blocks) return;
    c.heads = 1;
    c.last_block = of_head - 1;
    const auto [block, head] = heads_.divmod(blockIdx.x);
    if (block >= of_head) return;  // idle
    c.first_head = head;
    c.blocks_before = head * of_head;
    c.block = block;
  }

  // `items`: their number if all sequences are alike, else 0.
  __device__ void share_out(unsigned total, unsigned items, Cursor& c) const {
    const unsigned block = c.block;
    if (plan_.parts > 0) {
      c.unit = block;
      c.end = total;
      if (lane_ == 0 && plan_.merges > 0 && block >= total && block < plan_.slots)
        slots_.store_no_item(static_cast<int>(block));
      return;
    }
    if (lane_ == 0 && plan_.merges > 0) slots_.store_no_item(static_cast<int>(2 * (c.blocks_before + block) + 1));
    if (total == 0) return;
    // Blocks beyond those that are worth starting have nothing to do.
    const unsigned blocks = min(c.last_block + 1, rounds_of(total));
    const unsigned rounds = (items + blocks - 1) / blocks;
    if (items > 0 && items <= blocks) {
      // The same number of blocks for each item: none has to begin twice.
      const unsigned of_item = total / items, blocks_of_item = blocks / items, item = block / blocks_of_item;
      const unsigned part = block - item * blocks_of_item;
      c.blocks_of_item = blocks_of_item;
      c.units = of_item / blocks_of_item;
      c.longer = of_item - c.units * blocks_of_item;
      c.unit = min(item * of_item + part * c.units + min(part, c.longer), total);
      c.end = item < items ? c.unit + c.units + (part < c.longer) : c.unit;
    } else if (10 * items > 9 * rounds * blocks) {
      // Whole items, as no more than a tenth of the blocks are idle in the last round.
      const unsigned of_item = total / items;
      c.step = blocks * of_item;
      c.of_sequence = total / static_cast<unsigned>(l_.num_seqs);
      c.unit = min(block * of_item, total);
      c.end = block < blocks ? total : c.unit;
    } else {
      c.units = total / blocks;
      c.longer = total - c.units * blocks;
      c.unit = min(block * c.units + min(block, c.longer), total);
      c.end = block < blocks ? c.unit + c.units + (block < c.longer) : c.unit;
    }
  }

  __device__ void advance(Cursor& c, Item& item) const {
    Sequence sequence;
    Positions all;  // tiles
    unsigned column_blocks, units;
    if (c.step > 0) {
      c.index = static_cast<int>(c.unit / c.of_sequence);
      c.first_unit = c.index * c.of_sequence;
    }
    while (true) {
      if (c.index >= static_cast<int>(l_.num_seqs)) {
        item.nothing = true;
        return;
      }
      sequence = Sequence::load(l_, c.index);
      column_blocks = column_blocks_of(sequence);
      all = tiles_of(sequence);
      units = units_of_item(all) + c.overhead;
      const unsigned in_sequence = c.heads * column_blocks * units;
      if (c.unit - c.first_unit < in_sequence) break;
      c.first_unit += in_sequence;
      ++c.index;
    }
    const unsigned place = c.unit - c.first_unit, number = plan_.parts > 0 ? parts_.div(place) : place / units,
                   from = place - number * units;
    describe(item, sequence, c.index, number + c.first_head * column_blocks, column_blocks);
    // Units are those of all tiles of the sequence, of which the queries of an item may see only some.
    const unsigned tiles = max(all.end - all.begin, 0);
    unsigned first = 0, last = tiles;
    if (plan_.parts == 0) {
      const unsigned to = min(units, from + (c.end - c.unit)), begin = c.unit - from + c.overhead;
      c.unit += c.step > 0 ? c.step : to - from;
      if (to <= c.overhead) {
        item.nothing = true;  // the share ends before the first tile
        return;
      }
      // A block has at most two items that it doesn't finish alone: the one it begins with and the one it ends with.
      if (from > c.overhead || to < units) {
        const unsigned block = c.block, end = begin + (units - c.overhead);
        const unsigned first_block = c.blocks_of_item > 0 ? block - block % c.blocks_of_item : min(block_of(c, begin), block);
        const unsigned last_block = c.blocks_of_item > 0 ? first_block + c.blocks_of_item - 1 : block_of(c, end - 1);
        item.slot = static_cast<int>(2 * (c.blocks_before + block) + (from <= c.overhead));
        item.first_slot = static_cast<int>(2 * (c.blocks_before + first_block) + 1);
        item.parts = static_cast<int>(min(last_block, c.last_block) - first_block + 1);
        first = tiles_before(rounds_of(max(from, c.overhead) - c.overhead), tiles);
        last = tiles_before(rounds_of(to - c.overhead), tiles);
      }
    } else {
      take_part(item, from, c.unit - from, tiles, first, last);
      c.unit = c.unit + gridDim.x < c.unit ? c.end : c.unit + gridDim.x;
    }
    set_tiles(item, all, first, last, column_blocks);
  }

  // Where one sequence has fixed parts. Blocks alternate between its items, but those of a cluster have the same one: rows of
  // neighboring KV heads, which are side by side in memory, are read at the same time.
  __device__ Item only_item() const {
    const Sequence sequence = Sequence::load(l_, 0);
    unsigned number, part;
    if (plan_.cluster > 1)
      number = parts_.div(blockIdx.x), part = blockIdx.x - number * parts_.divisor;
    else
      part = items_.div(blockIdx.x), number = blockIdx.x - part * items_.divisor;
    const unsigned column_blocks = column_blocks_of(sequence), first_slot = number * parts_.divisor;
    Item item{};
    item.nothing = number >= static_cast<unsigned>(l_.num_kv_heads) * column_blocks;
    if (item.nothing) {
      if (lane_ == 0 && part == 0 && plan_.merges > 0) slots_.store_no_item(static_cast<int>(first_slot));
      return item;
    }
    const Positions all = tiles_of(sequence);
    describe(item, sequence, 0, number, column_blocks);
    unsigned first, last;
    take_part(item, part, first_slot, max(all.end - all.begin, 0), first, last);
    set_tiles(item, all, first, last, column_blocks);
    return item;
  }

  // The item `number` of a sequence, but for its tiles.
  __device__ void describe(Item& item, const Sequence& sequence, int index, unsigned number, unsigned column_blocks) const {
    const unsigned kv_head = column_blocks == 1 ? number : number / column_blocks;
    item.sequence = sequence;
    item.index = index;
    item.kv_head = static_cast<int>(kv_head);
    item.first_column = static_cast<int>(number - kv_head * column_blocks) * plan_.columns;
    item.num_columns = min(plan_.columns, sequence.num_queries * static_cast<int>(group_.divisor) - item.first_column);
    item.slot = Item::kWhole;
  }

  // Which of its tiles a part of an item has. Without slots the first part has everything.
  __device__ void take_part(Item& item, unsigned part, unsigned first_slot, unsigned tiles, unsigned& first,
                            unsigned& last) const {
    const auto most = static_cast<unsigned>(plan_.parts);
    const bool has_slots = most > 1 && first_slot + most <= plan_.slots;
    const unsigned rounds = rounds_of(tiles), parts = has_slots ? min(max(rounds, 1), most) : plan_.cluster > 1 ? most : 1;
    if (part >= parts) {
      item.num_columns = 0;
    } else if (parts > 1) {
      item.slot = has_slots ? static_cast<int>(first_slot + part) : Item::kInCluster;
      item.first_slot = static_cast<int>(first_slot);
      item.parts = static_cast<int>(parts);
    } else if (lane_ == 0 && has_slots && plan_.merges > 0) {
      slots_.store_no_item(static_cast<int>(first_slot));
    }
    const unsigned share = parts == most ? parts_.div(rounds) : rounds / parts, longer = rounds - share * parts;
    const unsigned round = share * part + min(part, longer);
    first = tiles_before(round, tiles);
    last = part < parts ? tiles_before(round + share + (part < longer), tiles) : first;
  }

  // Tiles [first, last) of those of the sequence, as far as the queries of the item see them.
  __device__ void set_tiles(Item& item, const Positions& all, unsigned first, unsigned last, unsigned column_blocks) const {
    if (lane_ == 0 && plan_.merges > 0 && item.slot >= 0 && item.slot == item.first_slot)
      slots_.store(item.slot, {.parts = item.parts,
                               .first_row = item.sequence.first_row,
                               .first_column = item.first_column,
                               .num_columns = item.num_columns,
                               .kv_head = item.kv_head});
    Positions seen = all;
    if (column_blocks > 1) {
      const auto first_query = static_cast<int>(group_.div(item.first_column)),
                 last_query = static_cast<int>(group_.div(item.first_column + max(item.num_columns, 1) - 1));
      seen = item.sequence.seen_by_any(l_, first_query, last_query + 1).tiles();
    }
    item.tiles = {max(all.begin + static_cast<int>(first), seen.begin), min(all.begin + static_cast<int>(last), seen.end)};
  }

  // parts == 0: the block that a unit falls to, where shares end anywhere.
  __device__ unsigned block_of(const Cursor& c, unsigned unit) const {
    const unsigned in_longer = c.longer * (c.units + 1);
    return unit < in_longer ? unit / (c.units + 1) : c.longer + (unit - in_longer) / c.units;
  }

  const AttentionLayout& l_;
  const AttentionPlan& plan_;
  const FastDiv& group_;
  const FastDiv& parts_;
  const FastDiv& items_;
  const FastDiv& heads_;
  Slots slots_;
  int lane_;
};

}  // namespace fp8kv::cuda::attention
