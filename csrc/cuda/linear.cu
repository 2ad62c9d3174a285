#include "linear.cuh"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAMacros.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <iterator>
#include <mutex>

#include "hopper.cuh"

// Compiled for sm_90a alone; elsewhere the kernels are empty and linear_is_built says so of a
// library that has nothing else. A cluster is an error for older architectures.
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define MEGALORA_CLUSTER_OF_TWO
#pragma nv_diag_suppress 177  // what only the kernels use
#else
#define MEGALORA_CLUSTER_OF_TWO __cluster_dims__(2, 1, 1)
#endif

// One kernel for both directions. A cluster of two blocks works on items, one after another:
//
//   result    a [256, 256] tile of y (dx), 128 rows a block: the sum over i (o), and last over r,
//             with s (ds) and lora_B (lora_A), as one more step of the same sum
//   thin      64 columns of 256 rows of s (ds), read from x (dy) once
//   gradient  256 columns of dA or dB, 128 a block, the sum over all tokens, 64 ranks of them
//
// Thin and gradient items wait for memory, result items for the tensor cores, so that items of both
// kinds on different multiprocessors hide each other. Result tiles come in whole rounds over the
// clusters; the others go first to the clusters whose last round is empty. In each block one
// thread copies boxes to a ring of stages in shared memory and two groups of four warps multiply.
namespace megalora::cuda {
namespace {

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

struct Stage {
  unsigned char a[2 * kBoxBytes];
  unsigned char b[4 * kBoxBytes];
};

struct Shared {
  Stage stage[kStages];
  unsigned char result[kGroups][2 * kBoxBytes];
  uint64_t full[kStages], empty[kStages];
};

// Who does which thin and gradient items: those of cluster c begin at entry c and end before the
// next's.
struct Plan {
  uint16_t thin[kMostClusters + 1];
  uint16_t gradient[kMostClusters + 1];
};

struct Gradients {
  Gradient d_a, d_b;
  int items_a, items_b;    // of clusters
  int blocks_a, blocks_b;  // of 256 columns, for each 64 ranks
  int i, o, rank, period, num_segments, segment[8];
};

struct Call {
  CUtensorMap wide, weight, thin, low_rank, projector, result;
  CUtensorMap other_wide, other_thin;  // x and s in backward
  int rows, columns, depth, r;         // of the result, of the sum, of thin
  int row_tiles, column_tiles, thin_chunks;
  bool has_low_rank;
  float thin_scale;
  bf16* thin_out;
  int* words;  // done thin items of each 128 rows, then of all
  Gradients gradients;
  Plan plan;
};

enum class Kind { result, thin, gradient };

struct Item {
  Kind kind;
  int row, column;  // tile of a result; 256 rows and chunk of thin; number of a gradient
};

// The items of this cluster in their order: thin ones, which others wait for, one result tile, the
// gradients, whose ds is there by then, and the rest of the results.
class Items {
 public:
  __device__ __forceinline__ Items(const Call& call, int cluster, int clusters)
      : call_(call),
        clusters_(clusters),
        thin_(call.plan.thin[cluster]),
        thin_end_(call.plan.thin[cluster + 1]),
        gradient_(call.plan.gradient[cluster]),
        gradient_end_(call.plan.gradient[cluster + 1]),
        result_(cluster),
        results_(call.row_tiles * call.column_tiles) {}

  __device__ __forceinline__ bool next(Item& item) {
    if (thin_ < thin_end_) {
      item = {Kind::thin, thin_ / call_.thin_chunks, thin_ % call_.thin_chunks};
      ++thin_;
      return true;
    }
    if (gradient_ < gradient_end_ && (begun_ || result_ >= results_)) {
      item = {Kind::gradient, gradient_++, 0};
      return true;
    }
    if (result_ >= results_) {
      return false;
    }
    const int in_raster = kRasterRows * call_.column_tiles;
    const int first = result_ / in_raster * kRasterRows;
    const int inside = result_ % in_raster;
    const int rows = min(call_.row_tiles - first, kRasterRows);
    item = {Kind::result, first + inside % rows, inside / rows};
    result_ += clusters_;
    begun_ = true;
    return true;
  }

 private:
  const Call& call_;
  int clusters_, thin_, thin_end_, gradient_, gradient_end_, result_, results_;
  bool begun_ = false;
};

// What a gradient item sums: wideᵀ thin over all tokens.
struct GradientItem {
  bool is_a;
  int column;  // first of this block's 128
  int rank;    // first column of thin of its 64

  __device__ __forceinline__ GradientItem(const Gradients& g, int number, int block) {
    is_a = number < g.items_a;
    const int inside = is_a ? number : number - g.items_a;
    const int blocks = is_a ? g.blocks_a : g.blocks_b;
    column = inside % blocks * 256 + block * 128;
    rank = inside / blocks * 64;
  }
};

__device__ __forceinline__ int steps_of(int size, int step = kDepth) {
  return (size + step - 1) / step;
}

// A position in the ring of stages.
struct Ring {
  int stage = 0;
  uint32_t phase = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// The thread that starts all copies of a block.
template <bool BACKWARD>
class Loader {
 public:
  __device__ __forceinline__ Loader(Shared& shared, const Call& call, int block)
      : shared_(shared), call_(call), block_(block) {}

  __device__ __forceinline__ void load(const Item& item) {
    if (item.kind == Kind::thin) {
      load_thin(item.row * kRows + block_ * kBlockRows, item.column * 64);
    } else if (item.kind == Kind::gradient) {
      load_gradient(GradientItem(call_.gradients, item.row, block_));
    } else {
      load_result(item);
    }
  }

 private:
  __device__ __forceinline__ uint32_t begin(uint32_t bytes) {
    wait_for(shared_address(&shared_.empty[ring_.stage]), ring_.phase ^ 1);
    const uint32_t full = shared_address(&shared_.full[ring_.stage]);
    expect_bytes(full, bytes);
    return full;
  }

  __device__ __forceinline__ uint32_t a() { return shared_address(shared_.stage[ring_.stage].a); }
  __device__ __forceinline__ uint32_t b() { return shared_address(shared_.stage[ring_.stage].b); }

  __device__ __forceinline__ void load_thin(int row, int column) {
    const int steps = steps_of(call_.depth, 2 * kDepth);
    for (int step = 0; step < steps; ++step) {
      const uint32_t full = begin(6 * kBoxBytes);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int depth = (2 * step + half) * kDepth;
        load_box(half == 0 ? a() : b(), call_.wide, depth, row, full);
        load_box(b() + (2 + half) * kBoxBytes, call_.projector, BACKWARD ? column : depth,
                 BACKWARD ? depth : column, full);
      }
      ring_.advance();
    }
  }

  __device__ __forceinline__ void load_gradient(const GradientItem& item) {
    if (item.is_a) {
      wait_until_at_least(call_.words + 2 * call_.row_tiles,
                          2 * call_.row_tiles * call_.thin_chunks);
      fence_for_copies();
    }
    const CUtensorMap& wide = item.is_a ? call_.other_wide : call_.wide;
    const CUtensorMap& thin = item.is_a ? call_.thin : call_.other_thin;
    const int steps = steps_of(call_.rows, kTokens);
    for (int step = 0; step < steps; ++step) {
      const uint32_t full = begin(6 * kBoxBytes);
      load_box(a(), thin, item.rank, step * kTokens, full);
      load_box(b(), wide, item.column, step * kTokens, full);
      load_box(b() + 2 * kBoxBytes, wide, item.column + 64, step * kTokens, full);
      ring_.advance();
    }
  }

  // One step of a result's sum; each block loads half of the weights for both.
  __device__ __forceinline__ void load_step(const CUtensorMap& left, const CUtensorMap& right,
                                            int row, int column, int depth) {
    const uint32_t full = begin(6 * kBoxBytes);
    load_box(a(), left, depth, row, full);
    const uint32_t to = b() + block_ * 2 * kBoxBytes;
    column += block_ * 128;
    if (BACKWARD) {
      load_box_to_both(to, right, column, depth, full);
      load_box_to_both(to + kBoxBytes, right, column + 64, depth, full);
    } else {
      load_box_to_both(to, right, depth, column, full);
    }
    ring_.advance();
  }

  __device__ __forceinline__ void load_result(const Item& item) {
    const int row = item.row * kRows + block_ * kBlockRows, column = item.column * kColumns;
    const int steps = steps_of(call_.depth);
    for (int step = 0; step < steps; ++step) {
      load_step(call_.wide, call_.weight, row, column, step * kDepth);
    }
    if (!call_.has_low_rank) {
      return;
    }
    wait_until_at_least(call_.words + item.row * 2 + block_, call_.thin_chunks);
    fence_for_copies();
    const int last_steps = steps_of(call_.r);
    for (int step = 0; step < last_steps; ++step) {
      load_step(call_.thin, call_.low_rank, row, column, step * kDepth);
    }
  }

  Shared& shared_;
  const Call& call_;
  const int block_;
  Ring ring_;
};

__device__ __forceinline__ uint32_t packed(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}

// A group of four warps that multiplies; it has 64 rows of a tile, or half the columns of a
// gradient. LAST_DEPTH: of a step with s, all of kDepth or what r needs of it.
template <bool BACKWARD, int LAST_DEPTH>
class Multiplier {
 public:
  __device__ __forceinline__ Multiplier(Shared& shared, const Call& call, int block, int group)
      : shared_(shared),
        call_(call),
        block_(block),
        group_(group),
        thread_(static_cast<int>(threadIdx.x) % 128) {}

  __device__ __forceinline__ void multiply_item(const Item& item) {
    if (item.kind == Kind::thin) {
      thin(item.row * kRows + block_ * kBlockRows, item.column * 64);
    } else if (item.kind == Kind::gradient) {
      gradient(GradientItem(call_.gradients, item.row, block_));
    } else {
      result(item);
    }
  }

 private:
  __device__ __forceinline__ uint32_t a() { return shared_address(shared_.stage[ring_.stage].a); }
  __device__ __forceinline__ uint32_t b() { return shared_address(shared_.stage[ring_.stage].b); }

  __device__ __forceinline__ void wait() {
    wait_for(shared_address(&shared_.full[ring_.stage]), ring_.phase);
  }

  // Gives a stage back to both blocks, which load for each other.
  __device__ __forceinline__ void release(int stage) {
    if (thread_ < 2) {
      arrive_at(shared_address(&shared_.empty[stage]), thread_);
    }
  }

  // Calls step on each stage of a sum. PENDING: steps whose products may be under way while the
  // next begins, which keeps the tensor cores busy; none where memory is slower and wants the
  // stages.
  template <int PENDING, class Step>
  __device__ __forceinline__ void for_each_step(int steps, Step step) {
    for (int number = 0; number < steps; ++number) {
      wait();
      begin_products();
      step(number > 0);
      commit_products();
      wait_for_products<PENDING>();
      if (PENDING == 0) {
        release(ring_.stage);
      } else if (held_ >= 0) {
        release(held_);
      }
      held_ = PENDING == 0 ? -1 : ring_.stage;
      ring_.advance();
    }
  }

  __device__ __forceinline__ void finish() {
    wait_for_products<0>();
    if (held_ >= 0) {
      release(held_);
    }
    held_ = -1;
  }

  __device__ __forceinline__ void thin(int row, int column) {
    float (&sums)[128] = sums_;
    for_each_step<0>(steps_of(call_.depth, 2 * kDepth), [&](bool adds) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t left = (half == 0 ? a() : b()) + group_ * kBoxBytes;
        const uint32_t right = b() + (2 + half) * kBoxBytes;
#pragma unroll
        for (int k = 0; k < kDepth; k += 16) {
          multiply<64, false, BACKWARD>(sums, matrix(left + k * 2, 16, 1024),
                                        matrix(right + (BACKWARD ? k * 128 : k * 2), 16, 1024),
                                        adds || half + k > 0);
        }
      }
    });
    finish();
    const int first = row + group_ * 64 + thread_ / 32 * 16 + thread_ % 32 / 4;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const int at = column + n * 8 + thread_ % 4 * 2;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int token = first + half * 8;
        if (at < call_.r && token < call_.rows) {
          *reinterpret_cast<uint32_t*>(call_.thin_out + static_cast<int64_t>(token) * call_.r +
                                       at) = packed(sums[n * 4 + half * 2] * call_.thin_scale,
                                                    sums[n * 4 + half * 2 + 1] * call_.thin_scale);
        }
      }
    }
    fence_for_copies();
    __threadfence();
    synchronize_threads<3, 128 * kGroups>();
    if (group_ == 0 && thread_ == 0) {
      add_and_publish(call_.words + row / kBlockRows);
      add_and_publish(call_.words + 2 * call_.row_tiles);
    }
  }

  __device__ __forceinline__ void gradient(const GradientItem& item) {
    for_each_step<0>(steps_of(call_.rows, kTokens), [&](bool adds) {
#pragma unroll
      for (int k = 0; k < kTokens; k += 16) {
        multiply<64, true, true>(sums_, matrix(a() + k * 128, 16, 1024),
                                 matrix(b() + group_ * 2 * kBoxBytes + k * 128, 16, 1024),
                                 adds || k > 0);
      }
    });
    finish();
    const int first = item.column + group_ * 64 + thread_ % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int rank = item.rank + thread_ / 32 * 16 + thread_ % 32 / 4 + half * 8;
      if (rank < call_.r) {
        item.is_a ? store_a_row(rank, first, half) : store_b_column(rank, first, half);
      }
    }
  }

  // Row `rank` of dA: this thread's pairs of columns, 8 apart.
  __device__ __forceinline__ void store_a_row(int rank, int first, int half) {
    const Gradients& g = call_.gradients;
    const int64_t row = static_cast<int64_t>(rank) * g.i;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const int column = first + n * 8;
      if (column < g.i) {
        store(g.d_a, row + column, sums_[n * 4 + half * 2]);
        store(g.d_a, row + column + 1, sums_[n * 4 + half * 2 + 1]);
      }
    }
  }

  // Column `rank` of dB, likewise, where the rows of dB belong to the projection of that rank.
  __device__ __forceinline__ void store_b_column(int rank, int first, int half) {
    const Gradients& g = call_.gradients;
    const int projection = rank / g.rank, own = rank - projection * g.rank;
    int begin = 0;
    for (int p = 0; p < projection; ++p) {
      begin += g.segment[p];
    }
    int inside = first % g.period;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const int row = first + n * 8;
      if (row < g.o && inside >= begin && inside < begin + g.segment[projection]) {
        const int64_t at = static_cast<int64_t>(row) * g.rank + own;
        store(g.d_b, at, sums_[n * 4 + half * 2]);
        store(g.d_b, at + g.rank, sums_[n * 4 + half * 2 + 1]);
      }
      for (inside += 8; inside >= g.period;) {
        inside -= g.period;
      }
    }
  }

  static __device__ __forceinline__ void store(const Gradient& gradient, int64_t at, float sum) {
    if (gradient.is_fp32) {
      float* const to = static_cast<float*>(gradient.to) + at;
      *to = gradient.accumulates ? *to + sum : sum;
    } else {
      bf16* const to = static_cast<bf16*>(gradient.to) + at;
      *to = __float2bfloat16_rn(gradient.accumulates ? __bfloat162float(*to) + sum : sum);
    }
  }

  __device__ __forceinline__ void result(const Item& item) {
    const int row = item.row * kRows + block_ * kBlockRows, column = item.column * kColumns;
    for_each_step<1>(steps_of(call_.depth), [&](bool adds) { add_step<kDepth>(adds); });
    if (call_.has_low_rank) {
      for_each_step<1>(steps_of(call_.r), [&](bool) { add_step<LAST_DEPTH>(true); });
    }
    finish();
#pragma unroll
    for (int part = 0; part < kColumns / kStoreColumns; ++part) {
      store_result(&sums_[part * kStoreColumns / 2], row + group_ * 64,
                   column + part * kStoreColumns);
    }
  }

  template <int DEPTH>
  __device__ __forceinline__ void add_step(bool adds) {
#pragma unroll
    for (int k = 0; k < DEPTH; k += 16) {
      multiply<256, false, BACKWARD>(
          sums_, matrix(a() + group_ * kBoxBytes + k * 2, 16, 1024),
          matrix(b() + (BACKWARD ? k * 128 : k * 2), BACKWARD ? kBoxBytes : 16, 1024),
          adds || k > 0);
    }
  }

  // Stores 64 rows of kStoreColumns by way of shared memory, in the order that the boxes have
  // there.
  __device__ __forceinline__ void store_result(const float* sums, int row, int column) {
    const uint32_t to = shared_address(shared_.result[group_]);
    if (thread_ == 0) {
      wait_for_reads_of_stores();
    }
    synchronize_threads(1 + group_, 128);
    const int lane = thread_ % 32;
    const int own_row = thread_ / 32 * 16 + lane % 16;
#pragma unroll
    for (int n = 0; n < kStoreColumns / 8; n += 2) {
      const int chunk = (n % 8 + lane / 16) ^ (own_row % 8);
      const float* const v = sums + n * 4;
      asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                       to + n / 8 * kBoxBytes + own_row * 128 + chunk * 16),
                   "r"(packed(v[0], v[1])), "r"(packed(v[2], v[3])), "r"(packed(v[4], v[5])),
                   "r"(packed(v[6], v[7]))
                   : "memory");
    }
    fence_shared_for_copies();
    synchronize_threads(1 + group_, 128);
    if (thread_ == 0) {
#pragma unroll
      for (int box = 0; box < kStoreColumns / 64; ++box) {
        store_box(call_.result, column + box * 64, row, to + box * kBoxBytes);
      }
      commit_stores();
    }
  }

 public:
  __device__ __forceinline__ void wait_for_all_stores() {
    if (thread_ == 0) {
      wait_for_stores();
    }
  }

 private:
  Shared& shared_;
  const Call& call_;
  const int block_, group_, thread_;
  float sums_[128];
  Ring ring_;
  int held_ = -1;
};

// The last cluster zeroes the words for the next launch.
__device__ __forceinline__ void leave_words_zero(const Call& call, int clusters) {
  const int count = 2 * call.row_tiles + 1;
  if (atomicAdd(call.words + count, 1) == clusters - 1) {
    for (int word = 0; word <= count; ++word) {
      call.words[word] = 0;
    }
  }
}

template <bool BACKWARD, int LAST_DEPTH>
__global__ MEGALORA_CLUSTER_OF_TWO
__launch_bounds__(kLinearThreads, 1) void linear_kernel(const __grid_constant__ Call call) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) unsigned char bytes[];
  Shared& shared = *reinterpret_cast<Shared*>(bytes);
  const int block = static_cast<int>(rank_in_cluster());
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      initialize_barrier(shared_address(&shared.full[stage]), 1);
      initialize_barrier(shared_address(&shared.empty[stage]), 2 * kGroups);
    }
    publish_barriers();
  }
  synchronize_cluster();
  Items items(call, static_cast<int>(blockIdx.x) / 2, static_cast<int>(gridDim.x) / 2);
  Item item;
  const int group = static_cast<int>(threadIdx.x) / 128;
  if (group == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == 0) {
      Loader<BACKWARD> loader(shared, call, block);
      while (items.next(item)) {
        loader.load(item);
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    Multiplier<BACKWARD, LAST_DEPTH> multiplier(shared, call, block, group - 1);
    while (items.next(item)) {
      multiplier.multiply_item(item);
    }
    multiplier.wait_for_all_stores();
  }
  synchronize_cluster();
  if (block == 0 && threadIdx.x == 0) {
    leave_words_zero(call, static_cast<int>(gridDim.x) / 2);
  }
#endif
}

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                            const cuuint64_t*, const cuuint32_t*, const cuuint32_t*,
                            CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                            CUtensorMapFloatOOBfill);

// From the driver, which this library is not linked with.
Encode encoder() {
  static const Encode found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult status;
    C10_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                    cudaEnableDefault, &status));
    TORCH_CHECK(status == cudaDriverEntryPointSuccess,
                "the CUDA driver has no cuTensorMapEncodeTiled: it is older than CUDA 12");
    return reinterpret_cast<Encode>(function);
  }();
  return found;
}

// Boxes of box_rows x 64 of a contiguous bf16 [rows, columns]; zeros beyond its sides.
CUtensorMap boxes(const void* base, int64_t rows, int64_t columns, uint32_t box_rows) {
  CUtensorMap map;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t stride[1] = {static_cast<cuuint64_t>(columns) * 2};
  const cuuint32_t box[2] = {64, box_rows}, steps[2] = {1, 1};
  const CUresult status =
      encoder()(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(base), sizes, stride,
                box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  TORCH_CHECK(status == CUDA_SUCCESS, "cuTensorMapEncodeTiled returns ", static_cast<int>(status),
              " for a bfloat16 tensor [", rows, ", ", columns, "] at ", base);
  return map;
}

int tiles_of(int64_t size, int64_t tile) { return static_cast<int>((size + tile - 1) / tile); }

// Costs in steps of a result, measured on an H200: of a step of a thin item or a gradient, and of
// an item's beginning and end.
constexpr double kThinCost = 0.4, kGradientCost = 0.9, kItemCost = 2;

// Gives items to clusters: each to the one that has least to do, the longer ones first.
Plan make_plan(int clusters, int results, double result_cost, int thins, double thin_cost,
               int gradients, double gradient_cost) {
  double load[kMostClusters];
  int thin[kMostClusters] = {}, gradient[kMostClusters] = {};
  for (int c = 0; c < clusters; ++c) {
    load[c] = result_cost * ((results - c + clusters - 1) / clusters);
  }
  const auto give = [&](int count, double cost, int* to) {
    for (int item = 0; item < count; ++item) {
      const int least = static_cast<int>(std::min_element(load, load + clusters) - load);
      load[least] += cost;
      ++to[least];
    }
  };
  const bool thin_first = thin_cost > gradient_cost;
  if (thin_first) {
    give(thins, thin_cost, thin);
  }
  give(gradients, gradient_cost, gradient);
  if (!thin_first) {
    give(thins, thin_cost, thin);
  }
  Plan plan{};
  for (int c = 0; c < clusters; ++c) {
    plan.thin[c + 1] = static_cast<uint16_t>(plan.thin[c] + thin[c]);
    plan.gradient[c + 1] = static_cast<uint16_t>(plan.gradient[c] + gradient[c]);
  }
  return plan;
}

int most_clusters() {
  int processors = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount,
                                        c10::cuda::current_device()));
  return std::min(processors / 2, kMostClusters);
}

void set_sizes(Call& call, int64_t rows, int64_t columns, int64_t depth, int64_t r) {
  call.rows = static_cast<int>(rows);
  call.columns = static_cast<int>(columns);
  call.depth = static_cast<int>(depth);
  call.r = static_cast<int>(r);
  call.row_tiles = tiles_of(rows, kRows);
  call.column_tiles = tiles_of(columns, kColumns);
  call.thin_chunks = tiles_of(r, 64);
  call.has_low_rank = r > 0;
}

template <bool BACKWARD, int LAST_DEPTH>
void launch(const Call& call, int clusters, Stream stream) {
  const auto kernel = linear_kernel<BACKWARD, LAST_DEPTH>;
  static std::once_flag allowed[C10_COMPILE_TIME_MAX_GPUS];
  std::call_once(allowed[c10::cuda::current_device()], [&] {
    C10_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(sizeof(Shared))));
  });
  kernel<<<2 * clusters, kLinearThreads, sizeof(Shared), stream>>>(call);
}

template <bool BACKWARD>
void launch(Call& call, Stream stream) {
  const int results = call.row_tiles * call.column_tiles;
  const int thins = call.row_tiles * call.thin_chunks;
  const int gradients = call.gradients.items_a + call.gradients.items_b;
  const int clusters = std::min(most_clusters(), results + thins + gradients);
  const double steps = tiles_of(call.depth, kDepth);
  call.plan = make_plan(clusters, results, steps + tiles_of(call.r, kDepth) + kItemCost, thins,
                        kThinCost * steps + kItemCost, gradients,
                        kGradientCost * tiles_of(call.rows, kTokens) + kItemCost);
  if (call.r <= 16) {
    launch<BACKWARD, 16>(call, clusters, stream);
  } else if (call.r <= 32) {
    launch<BACKWARD, 32>(call, clusters, stream);
  } else {
    launch<BACKWARD, 64>(call, clusters, stream);
  }
}

}  // namespace

bool linear_is_built() {
  constexpr int kArchitectures[] = {__CUDA_ARCH_LIST__};
  return std::ranges::find(kArchitectures, 900) != std::end(kArchitectures);
}

int64_t linear_words(int64_t n) { return 2 * tiles_of(n, kRows) + 2; }

void linear_forward(const Forward& f, Stream stream) {
  Call call{};
  set_sizes(call, f.n, f.o, f.i, f.r);
  call.wide = boxes(f.x, f.n, f.i, kBlockRows);
  call.weight = boxes(f.weight, f.o, f.i, 128);
  call.result = boxes(f.y, f.n, f.o, 64);
  if (f.r > 0) {
    call.projector = boxes(f.lora_A, f.r, f.i, 64);
    call.thin = boxes(f.s, f.n, f.r, kBlockRows);
    call.low_rank = boxes(f.lora_B, f.o, f.r, 128);
  }
  call.thin_out = static_cast<bf16*>(f.s);
  call.thin_scale = f.scale;
  call.words = f.words;
  launch<false>(call, stream);
}

void linear_backward(const Backward& b, Stream stream) {
  Call call{};
  set_sizes(call, b.n, b.i, b.o, b.r);
  call.wide = boxes(b.dy, b.n, b.o, kBlockRows);
  call.weight = boxes(b.weight, b.o, b.i, 64);
  call.result = boxes(b.dx, b.n, b.i, 64);
  if (b.r > 0) {
    call.projector = boxes(b.lora_B, b.o, b.r, 64);
    call.thin = boxes(b.ds, b.n, b.r, kBlockRows);
    call.low_rank = boxes(b.lora_A, b.r, b.i, 64);
    call.other_wide = boxes(b.x, b.n, b.i, kTokens);
    call.other_thin = boxes(b.s, b.n, b.r, kTokens);
  }
  call.thin_out = static_cast<bf16*>(b.ds);
  call.thin_scale = b.scale;
  call.words = b.words;
  Gradients& g = call.gradients;
  g.d_a = b.d_a;
  g.d_b = b.d_b;
  g.blocks_a = tiles_of(b.i, 256);
  g.blocks_b = tiles_of(b.o, 256);
  g.items_a = b.d_a.to == nullptr ? 0 : g.blocks_a * call.thin_chunks;
  g.items_b = b.d_b.to == nullptr ? 0 : g.blocks_b * call.thin_chunks;
  g.i = static_cast<int>(b.i);
  g.o = static_cast<int>(b.o);
  g.rank = static_cast<int>(b.rank);
  g.period = static_cast<int>(b.period);
  g.num_segments = b.num_segments;
  for (int p = 0; p < b.num_segments; ++p) {
    g.segment[p] = static_cast<int>(b.segment[p]);
  }
  launch<true>(call, stream);
}

}  // namespace megalora::cuda
