#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "hopper.cuh"
#include "linear.cuh"

// What linear_kernel has to do, and in which order. A cluster of two blocks works on items, one
// after another:
//
//   result    a [256, 256] tile of y (dx), 128 rows a block: the sum over i (o), and last over r
//             with s (ds) and lora_B (lora_A) as one more step of the same sum
//   thin      64 columns of 256 rows of s (ds), read from x (dy) once
//   gradient  columns of dA or dB, 64 ranks of them: the sum over all tokens of 128, half of the
//             tokens a block, or over those of an expert of 256, half of the columns a block
//
// Thin and gradient items wait for memory, result items for the tensor cores, so that items of both
// kinds on different multiprocessors hide each other.
namespace megalora::cuda {

using namespace hopper;
using bf16 = __nv_bfloat16;

constexpr int kBlockRows = 128, kRows = 2 * kBlockRows, kColumns = 256, kDepth = 64;
constexpr int kTokens = 128;  // that a step of a gradient sums over
constexpr int kStages = 4, kGroups = 2;
constexpr int kLinearThreads = 128 * (1 + kGroups);
constexpr int kBoxBytes = 64 * 128;  // 64 rows of 64 elements
constexpr int kStoreColumns = 128;   // that a group of warps hands to a store at once
constexpr int kRasterRows = 8;       // rows of result tiles that share columns of W while in L2
constexpr int kMostClusters = 72;
constexpr int kMostAhead = 32;  // experts whose thin items come before the results of one
constexpr int kTickets = 3;     // items that a cluster has drawn and not every warp has begun

struct Stage {
  unsigned char a[2 * kBoxBytes];
  unsigned char b[4 * kBoxBytes];
};

struct Shared {
  Stage stage[kStages];
  unsigned char result[kGroups][2 * kBoxBytes];
  uint64_t full[kStages], empty[kStages];
  uint64_t drawn[kTickets], read[kTickets];
  uint64_t room, sums;  // of the other block's half of a gradient
  int ticket[kTickets];
  bool is_last;                                   // of the clusters
  int first_tile[kMostExperts + 1];               // of 256 rows, of each expert
  int first_item[kMostExperts + kMostAhead + 1];  // of each expert's part of the items
};

// Who does which thin and gradient items: those of cluster c begin at entry c and end before the
// next's.
struct Plan {
  uint16_t thin[kMostClusters + 1];
  uint16_t gradient[kMostClusters + 1];
};

struct Gradients {
  Gradient d_a, d_b;
  int items_a, items_b;    // of clusters, for each expert
  int blocks_a, blocks_b;  // of an item's columns, for each 64 ranks
  int i, o, rank, period, num_segments, segment[8];
};

struct Call {
  CUtensorMap wide, weight, thin, low_rank, projector, result;
  CUtensorMap other_wide, other_thin;  // x and s in backward
  int rows, columns, depth, r;         // of the result, of the sum, of thin
  int ranks;                           // columns of thin that are not padding
  int row_tiles, column_tiles, thin_chunks;
  float thin_scale;
  bf16 *thin_out, *result_out;
  int* words;  // done thin items of each 128 rows, then of each expert, then blocks that are done
  Gradients gradients;
  Plan plan;  // dense
  // Experts: rows are sorted by expert, ends are the inclusive sums of their numbers. Thin items
  // come `ahead` experts before the results that wait for them.
  const CUtensorMap* weights;
  const int64_t* ends;
  int experts, most_tiles, ahead, projector_rows, low_rank_rows;  // of one expert
};

// Words that count thin items; then those for the clusters that are done and the items drawn.
__host__ __device__ __forceinline__ int count_of_words(const Call& call) {
  return 2 * call.most_tiles + call.experts;
}

enum class Kind { result, thin, gradient };

__device__ __forceinline__ int steps_of(int size, int step = kDepth) {
  return (size + step - 1) / step;
}

// What a block has to do: its rows [row, row_end) and the first of its columns; of a gradient the
// rows are what it sums over, some of them behind the last where it has half of them.
struct Item {
  Kind kind;
  bool is_narrow;  // the blocks have the same 128 rows of a result, not the same columns
  bool is_a;       // dA, not dB
  int expert, row, row_end, column;
  int rank;  // first of its 64 columns of thin
  int word;  // that counts the done thin items of these rows
};

// The columns of a gradient item. Dense ones are small, so that clusters end together.
constexpr int kDenseGradientColumns = 128, kExpertGradientColumns = 256;

// Fills in what a gradient item is, `number` of those of an expert, but for its rows.
__device__ __forceinline__ void set_gradient(Item& item, const Gradients& g, int number,
                                             int columns) {
  item.kind = Kind::gradient;
  item.is_a = number >= g.items_b;
  const int inside = item.is_a ? number - g.items_b : number;
  const int blocks = item.is_a ? g.blocks_a : g.blocks_b;
  item.column = inside % blocks * columns;
  item.rank = inside / blocks * 64;
}

// The items of this cluster in their order. Result tiles come in rounds, one for each cluster, down
// the rows in rasters. Thin items come in the round that first needs them, whose results then find
// the same rows in L2: all of them first would ask memory for the whole input at once and take
// twice as long. Gradients come between the results: of dB early, of dA once every ds is there.
class DenseItems {
 public:
  __device__ __forceinline__ DenseItems(const Call& call, const Shared&, int block)
      : call_(call),
        block_(block),
        clusters_(static_cast<int>(gridDim.x) / 2),
        cluster_(static_cast<int>(blockIdx.x) / 2),
        in_raster_(kRasterRows * call.column_tiles) {
    thin_ = call.plan.thin[cluster_];
    gradient_ = call.plan.gradient[cluster_];
    result_ = cluster_;
  }

  __device__ __forceinline__ bool next(Item& item) {
    const bool has_result = result_ < call_.row_tiles * call_.column_tiles;
    item.is_narrow = false;
    item.expert = 0;
    item.row = 0;
    item.row_end = call_.rows;
    if (thin_ < call_.plan.thin[cluster_ + 1] && (!has_result || is_round_of_thin())) {
      item.kind = Kind::thin;
      set_rows(item, thin_ / call_.thin_chunks);
      item.rank = thin_++ % call_.thin_chunks * 64;
      return true;
    }
    if (gradient_ < call_.plan.gradient[cluster_ + 1] && (!has_result || is_turn_of_gradient())) {
      set_gradient(item, call_.gradients, gradient_++, kDenseGradientColumns);
      const int half = steps_of(call_.rows, 2 * kTokens) * kTokens;
      item.row = block_ * half;
      item.row_end = item.row + half;
      return true;
    }
    if (!has_result) {
      return false;
    }
    const int first = result_ / in_raster_ * kRasterRows;
    const int inside = result_ % in_raster_;
    const int rows = min(call_.row_tiles - first, kRasterRows);
    item.kind = Kind::result;
    set_rows(item, first + inside % rows);
    item.column = inside / rows * kColumns;
    result_ += clusters_;
    return true;
  }

 private:
  __device__ __forceinline__ void set_rows(Item& item, int tile) const {
    item.row = tile * kRows + block_ * kBlockRows;
    item.word = tile * 2 + block_;
  }

  // Whether some cluster's result of this round needs it.
  __device__ __forceinline__ bool is_round_of_thin() const {
    const int last_of_round = (result_ / clusters_ + 1) * clusters_ - 1;
    return thin_ / call_.thin_chunks / kRasterRows <= last_of_round / in_raster_;
  }

  // Not in all clusters at once; of dA after the round of the last thin items.
  __device__ __forceinline__ bool is_turn_of_gradient() const {
    const bool is_a = gradient_ >= call_.gradients.items_b;
    const int last_raster = (call_.row_tiles - 1) / kRasterRows * in_raster_;
    const int first = is_a ? last_raster / clusters_ : 0;
    return result_ / clusters_ > first + cluster_ % (is_a ? 2 : 4);
  }

  const Call& call_;
  const int block_, clusters_, cluster_, in_raster_;
  int thin_, gradient_, result_;
};

__device__ __forceinline__ int first_row(const Call& call, int expert) {
  return expert == 0 ? 0 : static_cast<int>(call.ends[expert - 1]);
}

// Items of experts, whose sizes differ, are drawn by the clusters in their order, expert by expert:
// the thin ones of an expert that comes later, then results and gradients. The last tile of an
// expert is narrow where it has no more than 128 rows.
class ExpertItems {
 public:
  __device__ __forceinline__ ExpertItems(const Call& call, const Shared& shared, int block)
      : call_(call), shared_(shared), block_(block) {}

  // By all threads of the block, once.
  static __device__ __forceinline__ void prepare(const Call& call, Shared& shared) {
    int* const sums = reinterpret_cast<int*>(shared.result);  // of each warp, nothing else yet
    const int entry = static_cast<int>(threadIdx.x);
    const int rows = rows_of(call, entry), before = rows_of(call, entry - call.ahead);
    const bool has_results = entry >= call.ahead && entry < call.experts + call.ahead;
    const int tiles = sum_up_to(steps_of(rows, kRows), sums);
    const int items = sum_up_to(
        steps_of(rows, kRows) * call.thin_chunks +
            (has_results
                 ? results_of(call, before) + call.gradients.items_a + call.gradients.items_b
                 : 0),
        sums);
    if (entry < call.experts) {
      shared.first_tile[entry + 1] = tiles;
    }
    if (entry < call.experts + call.ahead) {
      shared.first_item[entry + 1] = items;
    }
    if (entry == 0) {
      shared.first_tile[0] = shared.first_item[0] = 0;
    }
  }

  __device__ __forceinline__ bool next(Item& item) {
    const int entries = call_.experts + call_.ahead, number = ticket();
    if (number >= shared_.first_item[entries]) {
      return false;
    }
    int low = 0, high = entries;  // the last entry that begins at or before the number
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (shared_.first_item[middle] <= number ? low : high) = middle;
    }
    int inside = number - shared_.first_item[low];
    item.is_narrow = false;
    const int thins =
        low < call_.experts
            ? (shared_.first_tile[low + 1] - shared_.first_tile[low]) * call_.thin_chunks
            : 0;
    if (inside < thins) {
      item.kind = Kind::thin;
      set_expert(item, low);
      set_rows(item, inside / call_.thin_chunks, block_);
      item.rank = inside % call_.thin_chunks * 64;
      return true;
    }
    inside -= thins;
    set_expert(item, low - call_.ahead);
    const int results = results_of(call_, item.row_end - item.row);
    if (inside < results) {
      set_result(item, inside);
    } else {
      set_gradient(item, call_.gradients, inside - results, kExpertGradientColumns);
      item.column += block_ * kExpertGradientColumns / 2;
    }
    return true;
  }

  // Draws the numbers of items for both blocks until there are no more. By one thread of a cluster
  // that does nothing else: each takes a round trip to memory.
  static __device__ __forceinline__ void draw(const Call& call, const Shared& shared) {
    const int count = shared.first_item[call.experts + call.ahead];
    uint32_t phase = 1;
    int slot = 0, number;
    do {
      wait_for(shared_address(&shared.read[slot]), phase);
      number = atomicAdd(call.words + count_of_words(call) + 1, 1);
      for (int block = 0; block < 2; ++block) {
        send_to(shared_address(&shared.ticket[slot]), number, shared_address(&shared.drawn[slot]),
                block);
      }
      if (++slot == kTickets) {
        slot = 0;
        phase ^= 1;
      }
    } while (number < count);
  }

 private:
  // The next ticket, which every warp that works reads once.
  __device__ __forceinline__ int ticket() {
    const bool loads = threadIdx.x < 128;
    if (loads) {
      expect_bytes(shared_address(&shared_.drawn[slot_]), sizeof(int));
    }
    wait_for(shared_address(&shared_.drawn[slot_]), phase_);
    const int number = *static_cast<volatile const int*>(&shared_.ticket[slot_]);
    if (!loads) {
      __syncwarp();
    }
    if (threadIdx.x % 32 == 0) {
      arrive_at(shared_address(&shared_.read[slot_]), 0);
    }
    if (++slot_ == kTickets) {
      slot_ = 0;
      phase_ ^= 1;
    }
    return number;
  }

  static __device__ __forceinline__ int rows_of(const Call& call, int expert) {
    return expert < 0 || expert >= call.experts
               ? 0
               : static_cast<int>(call.ends[expert]) - first_row(call, expert);
  }

  static __device__ __forceinline__ bool ends_narrow(int rows) {
    return rows % kRows > 0 && rows % kRows <= kBlockRows;
  }

  static __device__ __forceinline__ int results_of(const Call& call, int rows) {
    const int wide = steps_of(rows, kRows) - ends_narrow(rows);
    return wide * call.column_tiles + (ends_narrow(rows) ? (call.column_tiles + 1) / 2 : 0);
  }

  // The sum of value over the threads up to this one.
  static __device__ __forceinline__ int sum_up_to(int value, int* sums) {
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other = __shfl_up_sync(0xFFFFFFFFu, value, distance);
      value += lane >= distance ? other : 0;
    }
    __syncthreads();
    if (lane == 31) {
      sums[warp] = value;
    }
    __syncthreads();
    for (int w = 0; w < warp; ++w) {
      value += sums[w];
    }
    return value;
  }

  __device__ __forceinline__ void set_expert(Item& item, int expert) const {
    item.expert = expert;
    item.row = first_row(call_, expert);
    item.row_end = static_cast<int>(call_.ends[expert]);
  }

  __device__ __forceinline__ void set_rows(Item& item, int tile, int block) const {
    item.row += tile * kRows + block * kBlockRows;
    item.word = (shared_.first_tile[item.expert] + tile) * 2 + block;
  }

  // Row tiles vary fastest: neighbours share the columns of the expert's weight.
  __device__ __forceinline__ void set_result(Item& item, int inside) const {
    const int rows = item.row_end - item.row;
    const int wide = steps_of(rows, kRows) - ends_narrow(rows);
    item.kind = Kind::result;
    if (inside < wide * call_.column_tiles) {
      set_rows(item, inside % wide, block_);
      item.column = inside / wide * kColumns;
    } else {
      item.is_narrow = true;
      set_rows(item, wide, 0);
      item.column = ((inside - wide * call_.column_tiles) * 2 + block_) * kColumns;
    }
  }

  const Call& call_;
  const Shared& shared_;
  const int block_;
  int slot_ = 0;
  uint32_t phase_ = 0;
};

}  // namespace megalora::cuda
