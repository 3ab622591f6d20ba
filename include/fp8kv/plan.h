// Launch plans of the CUDA kernels: pure functions of a Layout, the alignment of the views and the size of the device, so that
// they can be tested without a GPU.
#pragma once

#include <cstdint>

#include "fp8kv/kv_cache.h"
#include "fp8kv/quantize.h"

namespace fp8kv {

inline constexpr int kUnit = 8;  // elements a thread handles at a time: one 8-byte FP8 access

// How an elementwise operation (quantize with given scales, dequantize) walks its Layout.
enum class MapPath : std::uint8_t {
  Elements,  // anything: one element a thread, all indices computed
  Runs,      // stride 1 in the run, one scale a run: a unit of 8 elements a thread
  Columns,   // stride 1 in the run, the scale changes within it: a thread owns 8 columns and walks rows
};

constexpr const char* name(MapPath path) {
  return path == MapPath::Runs ? "runs" : path == MapPath::Columns ? "columns" : "elements";
}

struct MapPlan {
  MapPath path = MapPath::Elements;
  bool aligned = false;            // every unit is one aligned access on both sides; otherwise edges are handled inside
  bool gapless = false;            // the input and the result are one contiguous piece each
  int threads = 256;               // per block
  bool walks = false;              // Columns: the dimension before the run shares its scales, so a thread walks it
  int rows_per_thread = 1;         // Columns
  std::int64_t units_per_run = 1;  // Runs, Columns
  std::int64_t rows = 1;           // Columns: extent of the dimension walked
  std::int64_t rows_folded = 1;    // Columns: rows of odd length that lie one after the other, taken as one aligned row
  std::int64_t work = 0;           // threads that have something to do
  std::int64_t blocks = 0;
};

// `multiprocessors` of the device. The layout must have elements and be within kMaxPiece (split() sees to that).
FP8KV_API MapPlan plan_map(const Layout& layout, const TensorView& input, const TensorView& result, int multiprocessors);

// How an operation with scales of its own finds the largest magnitude of each group.
enum class AmaxPath : std::uint8_t {
  Groups,     // every run is a group: it stays in the registers of a few threads between the two passes
  Repeated,   // one group of one run, of a few blocks' size: every block finds the maximum of all of it
  Cluster,    // one group of one run that fits the registers of one thread block cluster
  Whole,      // one group of one run: a cooperative kernel keeps what it can on the chip between the two passes
  TwoPasses,  // anything: atomic maxima into the scales, then the elementwise kernel
};

constexpr const char* name(AmaxPath path) {
  switch (path) {
    case AmaxPath::Groups: return "groups";
    case AmaxPath::Repeated: return "repeated";
    case AmaxPath::Cluster: return "cluster";
    case AmaxPath::Whole: return "whole";
    case AmaxPath::TwoPasses: break;
  }
  return "two passes";
}

struct DynamicPlan {
  AmaxPath path = AmaxPath::TwoPasses;
  bool aligned = false;
  bool gapless = false;      // Groups: aligned; the input, the result and the scales are one contiguous piece each
  int threads = 256;         // per block
  int lanes_per_group = 0;   // Groups: a power of two up to 32; 0 for a block
  int units_per_thread = 1;  // Groups, Repeated, Cluster: kept in registers; 0: the run is read twice
  std::int64_t units_per_run = 1;
  std::int64_t blocks = 0;
};

// `max_cluster`: thread blocks of 1024 threads in the largest cluster of the device, 0 where it has none.
FP8KV_API DynamicPlan plan_dynamic(const Layout& layout, const TensorView& input, const TensorView& result, int multiprocessors,
                                   int max_cluster);

// How the operations on a paged cache walk tokens, heads and elements.
struct CachePlan {
  MapPath path = MapPath::Elements;  // or Runs
  bool aligned = false;              // Runs: every unit is one aligned access on both sides
  int threads = 256;                 // per block
  std::int64_t units_per_head = 1;   // Runs
  std::int64_t tokens = 0;           // of one launch
  // Scales of its own: neighbouring threads hold a head in registers.
  int threads_per_head = 1;  // a power of two up to 32
  int units_per_thread = 1;
};

FP8KV_API CachePlan plan_append(const CacheLayout& layout);
FP8KV_API CachePlan plan_append_dynamic(const CacheLayout& layout);
FP8KV_API CachePlan plan_gather(const CacheLayout& layout);

// How rope_quant_and_cache walks the heads of Q, K and V.
struct RopePlan {
  MapPath path = MapPath::Elements;  // a warp a head, or Runs: a unit a thread, every access aligned
  int threads = 256;                 // per block
  int threads_per_head = 32;         // Runs with a norm: a power of two
  int heads_per_thread = 1;          // Runs: 1 or 2
  std::int64_t tokens = 0;           // of one launch
};

FP8KV_API RopePlan plan_rope(const RopeLayout& layout);

// Kernels count units and elements of one launch in 32 bits; larger problems are launched in pieces.
inline constexpr std::int64_t kMaxPiece = std::int64_t{1} << 31;

}  // namespace fp8kv
