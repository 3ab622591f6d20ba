// Launch plans of the CUDA kernels: which kernel, how many threads, and what each of them does. Pure functions of a layout, the
// alignment of the views and the size of the device, so that they are tested without a GPU. A plan is made once for a launch;
// the .cu files map it to an instantiation.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>

#include "core/attention_layout.h"
#include "core/chunks.h"
#include "core/rope_layout.h"

namespace fp8kv::core {

// Elements a thread handles at a time: one 8-byte access to FP8, one or two of 16 bytes to wider types.
inline constexpr int kVecSize = 8;

// The three ways through memory. Every operation has a kernel of the first kind, which takes anything.
enum class KernelPath : std::uint8_t {
  Scalar,      // one element per thread, or one head per warp; all indices computed
  Vectorized,  // stride 1 and one scale along a row: a vector of 8 elements per thread
  PerColumn,   // stride 1 along a row, with scales that change along it: a thread owns 8 columns and loops over rows
};

constexpr const char* name(KernelPath path) {
  switch (path) {
    case KernelPath::Vectorized: return "vectorized";
    case KernelPath::PerColumn: return "per column";
    case KernelPath::Scalar: break;
  }
  return "scalar";
}

// Sizes of a device that plans depend on.
struct DeviceLimits {
  int multiprocessors = 0;
  int shared_memory = 0;  // bytes per multiprocessor
  bool has_clusters = false;
  bool has_dependent_launch = false;
};

// Blocks of 256 threads that cover `count` items in a grid-stride loop.
constexpr std::int64_t grid_stride_blocks(std::int64_t count, int multiprocessors) {
  return std::min<std::int64_t>(ceil_div(count, 256), std::int64_t{multiprocessors} * 8);
}

// --- Elementwise: quantize with given scales, dequantize ---------------------

// The kernels of csrc/cuda/quantize/elementwise.cuh.
enum class ElementwiseKernel : std::uint8_t {
  Scalar,
  Contiguous,    // input and result are one contiguous range each, of a GroupGrid
  RowsOfBlocks,  // the same by batches of rows that share scales
  AcrossGroups,  // the same in units of kUnitSize elements, in which a group may end
  Vectorized,    // rows of one scale
  VectorizedUnaligned,
  PerChannelOfOneRow,  // contiguous, with a scale for each column
  PerChannel,
  PerChannelMerged,  // rows of odd length
  PerColumn,         // other rows that share scales that change along them
  PerColumnUnaligned,
};

// A contiguous tensor as rows of groups of columns, the last of which may be smaller: element i lies in row i / row, in column
// i % row, and its scale at (its row) / row_block * row_scale + (its column) / group * group_scale.
struct GroupGrid {
  std::int64_t row = 0;  // elements
  std::int64_t group = 0;
  std::int64_t row_block = 1;
  std::int64_t row_scale = 0;  // below 2^32, as group_scale
  std::int64_t group_scale = 0;
};

// Which part of a GroupGrid decides: none, as there is one group; one row; or all of it.
enum class Groups : std::uint8_t { One, Row, Grid };

// Neighboring elements that a thread takes of such a tensor: one access of 16 bytes to FP8.
inline constexpr int kUnitSize = 16;

inline constexpr int kRowsOfBlocks = 4;   // per thread of that kernel
inline constexpr int kOneRowColumns = 2;  // per thread of PerChannelOfOneRow

struct ElementwisePlan {
  ElementwiseKernel kernel = ElementwiseKernel::Scalar;
  KernelPath path = KernelPath::Scalar;
  bool aligned = false;   // every vector is one aligned access to input and result; otherwise edges are handled inside
  int threads = 256;      // per block
  std::int64_t work = 0;  // threads that have something to do; vectors where a thread takes several
  std::int64_t blocks = 0;
  int outer_dims = 0;             // dimensions that the kernel finds by their index; it knows the rest
  std::int64_t vecs_per_row = 1;  // Vectorized, PerColumn
  int vecs_per_thread = 1;        // Contiguous: 1 or 2
  std::int64_t row_size = 0;      // elements; of merged rows where there are any
  GroupGrid grid{};               // Contiguous, RowsOfBlocks, AcrossGroups
  Groups groups = Groups::Grid;   // Contiguous

  // PerColumn, aligned: the dimension before the row, if it shares its scales, so that a thread can loop over it.
  std::int64_t rows = 1;
  int rows_per_thread = 1;       // PerChannel: 1 or 4; PerChannelMerged: 1, 2 or 4; PerColumn: 1 or 2; also of RowsOfBlocks
  std::int64_t rows_merged = 1;  // contiguous rows of odd length that are taken as one aligned row
  std::int64_t row_in = 0;       // strides from one (merged) row to the next
  std::int64_t row_out = 0;
  bool vector_scales = false;  // 8 scales are one aligned access
};

// Whether groups of a contiguous problem end inside vectors, and units of the whole tensor are the way to take it: then it is
// not divided by for_each_uniform_part.
FP8KV_API bool goes_across_groups(const Chunk& chunk, const TensorView& input, const TensorView& result);

// The grid of a contiguous layout; none where it is not one, or strides of scales are too large.
std::optional<GroupGrid> grid_of(const Layout& layout);

// The chunk must have elements, at most kMaxChunk of them.
FP8KV_API ElementwisePlan plan_elementwise(const Chunk& chunk, const TensorView& input, const TensorView& result,
                                           const TensorView& scale, int multiprocessors);

// --- Largest magnitudes of groups of any form --------------------------------

// The kernels of csrc/cuda/quantize/group_amax.cu. Where a path is not Scalar, a thread takes 8 neighboring elements and
// reduces over a span of indices of one dimension, which does not cross a block of that dimension's scales. If the row itself
// is reduced, it is seen as rows of kAmaxRowSize elements.
struct AmaxPlan {
  KernelPath path = KernelPath::Scalar;
  bool aligned = false;
  int threads = 256;  // per block
  std::int64_t blocks = 0;
  Layout outer;                 // the layout without the reduced dimension
  Layout::Dim reduced;          // `block`: indices that share a scale
  std::int64_t limit = 0;       // elements from the first index of the reduced dimension on that exist
  std::int64_t span = 1;        // indices that a thread reduces over
  std::int64_t num_spans = 1;   // over all of the reduced dimension
  std::int64_t outer_rows = 1;  // rows of `outer`
  std::int64_t vecs_per_row = 1;
  std::int64_t work = 0;  // Vectorized: threads that have something to do

  std::int64_t spans_per_block() const { return ceil_div(reduced.block, span); }
  std::int64_t warps_per_row() const { return ceil_div(vecs_per_row, 32); }  // PerColumn: what a warp takes
};

inline constexpr std::int64_t kAmaxRowSize = 2048;

// The chunk must have elements, at most kMaxChunk / 8 of them.
FP8KV_API AmaxPlan plan_amax(const Chunk& chunk, const TensorView& input, int multiprocessors);

// --- Dynamic quantization ----------------------------------------------------

// How the largest magnitude of each group is found (csrc/cuda/quantize/dynamic.cuh).
enum class DynamicPath : std::uint8_t {
  AcrossGroups,  // short groups of a GroupGrid that end inside vectors: in units of the whole tensor
  PerGroup,      // every row is a group: it stays in the registers of a few threads between maximum and division
  Redundant,     // one group of one row, of a few blocks' size: every block finds the maximum of all of it
  Cluster,       // one group of one row that fits the registers of one thread block cluster
  Cooperative,   // one group of one row: a cooperative kernel keeps what it can on the chip
  TwoPasses,     // anything: atomic maxima into the scales, then the elementwise kernel
};

constexpr const char* name(DynamicPath path) {
  switch (path) {
    case DynamicPath::AcrossGroups: return "across groups";
    case DynamicPath::PerGroup: return "per group";
    case DynamicPath::Redundant: return "redundant";
    case DynamicPath::Cluster: return "cluster";
    case DynamicPath::Cooperative: return "cooperative";
    case DynamicPath::TwoPasses: break;
  }
  return "two passes";
}

struct DynamicPlan {
  DynamicPath path = DynamicPath::TwoPasses;
  bool aligned = false;
  bool contiguous = false;  // PerGroup: input, result and scales are one contiguous range each, from aligned addresses on
  bool units = false;       // PerGroup, aligned and contiguous: a lane has a unit
  int threads = 256;        // per block
  std::int64_t blocks = 0;
  int lanes_per_group = 0;        // PerGroup: a power of two up to 32; 0 for a block. Misaligned, they take single elements
  int vecs_per_thread = 1;        // PerGroup, Redundant, Cluster: kept in registers; 0: the row is read twice
  GroupGrid grid{};               // AcrossGroups
  int tile_units = 1;             // AcrossGroups: per thread: 1, or kManyTileUnits
  int shared_vecs = 0;            // Cooperative: kept in shared memory, per thread
  std::int64_t vecs_per_row = 1;  // what covers a row of any alignment
};

inline constexpr int kElementsPerLane = 8;  // of misaligned groups that share a warp
inline constexpr int kTileThreads = 128;    // of AcrossGroups
inline constexpr int kManyTileUnits = 3;
inline constexpr int kLongestTileGroup = 256;
inline constexpr int kRedundantThreads = 1024;
inline constexpr int kRedundantVecs = 512;  // a block quantizes
inline constexpr int kCooperativeThreads = 512;
inline constexpr int kCooperativeBlocks = 2;  // per multiprocessor

// Vectors of a type that the registers of a thread hold between two passes: 32 registers.
constexpr int vecs_in_registers(DType real) { return 16 / size_of(real); }

// The most vectors per thread that the shared memory of a cooperative kernel holds.
FP8KV_API int max_shared_vecs(DType real, const DeviceLimits& limits);

// Whether all parts of the layout (for_each_uniform_part) have a path other than TwoPasses.
FP8KV_API bool fits_one_pass(const Layout& layout);

// `max_cluster`: thread blocks of 1024 threads in the largest cluster, 0 where there are none.
FP8KV_API DynamicPlan plan_dynamic(const Chunk& chunk, const TensorView& input, const TensorView& result,
                                   const DeviceLimits& limits, int max_cluster);

// --- The paged cache ---------------------------------------------------------

struct CachePlan {
  KernelPath path = KernelPath::Scalar;  // PerColumn: where channels have scales or offsets of their own
  bool aligned = false;                  // every vector is one aligned access to rows and cache; PerColumn: always
  int threads = 256;                     // per block
  std::int64_t vecs_per_head = 1;        // not Scalar
  int tokens_per_thread = 1;             // aligned: of an append 1, 2 or 4; PerColumn, of a gather: 1 or 2
  int vecs_per_thread = 1;               // aligned, of a gather: 1 or 2 of K and of V; with dynamic scales: 2 or 4
  std::int64_t tokens = 0;               // of one launch
  // With dynamic scales, neighboring threads hold a head in registers.
  int threads_per_head = 1;  // a power of two up to 32
  int heads_per_thread = 1;  // 1, or 2 that are neighbors
};

FP8KV_API CachePlan plan_append(const CacheLayout& layout);
FP8KV_API CachePlan plan_append_dynamic(const CacheLayout& layout);
FP8KV_API CachePlan plan_gather(const CacheLayout& layout);

struct RopeAppendPlan {
  KernelPath path = KernelPath::Scalar;  // one warp per head; or Vectorized: every access aligned
  int threads = 256;                     // per block; Vectorized, with one head per thread: per token of a block
  int threads_per_head = 32;             // Vectorized with a norm: a power of two
  int vecs_per_thread = 1;               // Vectorized, of each of its heads: 1 or 2
  // Vectorized. They divide the heads; more than one of Q or of K only with two vectors.
  int query_heads_per_thread = 1;
  int kv_heads_per_thread = 1;
  std::int64_t tokens = 0;  // of one launch
};

// With several heads of Q or of K per thread.
inline constexpr int kManyHeadsThreads = 128;
inline constexpr int kMaxSharedHeads = 256;  // of Q, and of K

FP8KV_API RopeAppendPlan plan_rope_append(const RopeLayout& layout);

// --- Attention ---------------------------------------------------------------

// The kernels of csrc/cuda/attention.
enum class AttentionKernel : std::uint8_t {
  Generic,  // anything: one block per query row and head
  Tiled,    // on the tensor cores, for FP8 and INT8 caches of the usual head sizes and block sizes
  Grouped,  // on the tensor cores, for FP8 and INT8 caches where K and V have two head sizes or dtypes
};

// Elements of a head of K and one of V that the generic kernel has shared memory for.
inline constexpr std::int64_t kMaxGenericHeadSizes = 48 * 1024 / sizeof(float) - 64;

// `column_warps` warps of a block of threads multiply the same tiles of K and V with columns of their own: query heads of the
// KV head times query tokens, 8 to a column tile. The others take other tiles. How the work is divided between blocks:
// csrc/cuda/attention/schedule.cuh.
//
// Plans of one short sequence have clusters of `parts` blocks that share an item and merge it in their shared memory.
struct AttentionPlan {
  AttentionKernel kernel = AttentionKernel::Generic;
  int warps = 4;                    // per block
  int column_tiles = 1;             // per warp: 1, 2 or 4
  int column_warps = 1;             // 1, 2 or 4
  int columns = 8;                  // per block
  int shared_memory = 0;            // bytes per block
  std::int64_t blocks = 0;          // that are launched
  std::int64_t parts = 0;           // that the tiles of an item are divided into; 0: the blocks share all tiles equally
  std::int64_t least_units = 1;     // tiles that are worth a block; a power of two
  int item_overhead = 0;            // parts == 0: what an item costs in addition to its tiles, in tiles
  std::int64_t slots = 0;           // partial results in the workspace; 0: no item is divided
  int cluster = 1;                  // blocks that are a cluster: 1, or `parts`
  std::int64_t merges = 0;          // items at most that another kernel merges; 0: none, as the blocks do it
  int merge_sharers = 1;            // warps that merge the parts of a column: 1, 2, 4, 8 or 16
  std::int64_t workspace_size = 0;  // bytes
};

// Clusters of the tiled kernel that a device runs at once: of 2^i blocks with j + 1 column tiles per warp. All 0: none.
struct AttentionClusters {
  static constexpr int kMaxColumnTiles = 2;
  static constexpr int kMaxLog2Blocks = 3;
  int active[kMaxColumnTiles][kMaxLog2Blocks + 1] = {};
};

// The layout must not be empty.
FP8KV_API AttentionPlan plan_attention(const AttentionLayout& layout, const DeviceLimits& limits,
                                       const AttentionClusters& clusters = {});

// --- Alignment: whether vectors of kVecSize elements are one access each ----------

// An address from which vectors can be accessed: aligned to 8 bytes for FP8, 16 for wider types.
inline bool base_aligned(const void* data, DType dtype) {
  return reinterpret_cast<std::uintptr_t>(data) % std::min(16, kVecSize * size_of(dtype)) == 0;
}

// The address of the element `offset` of a view.
inline const void* address_of(const TensorView& view, std::int64_t offset) {
  return static_cast<const char*>(view.data) + offset * size_of(view.dtype);
}

inline bool base_aligned(const TensorView& view, std::int64_t offset) {
  return base_aligned(address_of(view, offset), view.dtype);
}

inline bool vecs_aligned(const Chunk& chunk, const TensorView& input, const TensorView& result) {
  const Layout& layout = chunk.layout;
  for (int d = 0; d + 1 < layout.ndim; ++d)
    if (layout.dims[d].in % kVecSize != 0 || layout.dims[d].out % kVecSize != 0) return false;
  return layout.inner().size % kVecSize == 0 && base_aligned(input, chunk.in) && base_aligned(result, chunk.out);
}

// Whether units are accesses of 16 bytes, if rows are contiguous and of whole units.
inline bool units_aligned(const Chunk& chunk, const TensorView& input, const TensorView& result) {
  const auto aligned = [](const TensorView& view, std::int64_t offset) {
    return reinterpret_cast<std::uintptr_t>(address_of(view, offset)) % 16 == 0;
  };
  return aligned(input, chunk.in) && aligned(result, chunk.out);
}

// Whether half a vector of scales or offsets per channel is one aligned access.
inline bool channels_aligned(const CacheLayout& layout) {
  const auto aligned = [&](const float* data, std::int64_t head, std::int64_t dim) {
    return dim == 1 && reinterpret_cast<std::uintptr_t>(data) % 16 == 0 && (head % 4 == 0 || layout.num_heads == 1);
  };
  for (const KVViews* kv : {&layout.k, &layout.v}) {
    if (kv->scales.dim != 0 && !aligned(kv->scales.data, kv->scales.head, kv->scales.dim)) return false;
    if (kv->offsets.data && !aligned(kv->offsets.data, kv->offsets.head, kv->offsets.dim)) return false;
  }
  return true;
}

// Where vectors begin at aligned addresses of the result, a row may begin up to 7 elements into its first one.
inline std::int64_t vecs_covering(std::int64_t row, bool aligned) {
  return ceil_div(aligned ? row : row + kVecSize - 1, kVecSize);
}

// The input and the result are one contiguous range each.
inline bool contiguous(const Layout& layout) {
  for (int d = 0; d + 1 < layout.ndim; ++d) {
    const Layout::Dim &dim = layout.dims[d], &next = layout.dims[d + 1];
    if (dim.in != next.in * next.size || dim.out != next.out * next.size) return false;
  }
  return true;
}

}  // namespace fp8kv::core
