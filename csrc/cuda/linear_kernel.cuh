#pragma once

#include <type_traits>

#include "linear_items.cuh"

// The kernel that works on the items of linear_items.cuh. In each block one thread copies boxes to
// a ring of stages in shared memory, and two groups of four warps multiply what is there. Compiled
// for sm_90a alone; elsewhere the kernels are empty and linear_is_built says so of a library that
// has nothing else. A cluster is an error for older architectures.
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define MEGALORA_CLUSTER_OF_TWO
#pragma nv_diag_suppress 177  // what only the kernels use
#else
#define MEGALORA_CLUSTER_OF_TWO __cluster_dims__(2, 1, 1)
#endif

namespace megalora::cuda {

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
template <bool BACKWARD, bool EXPERTS>
class Loader {
 public:
  __device__ __forceinline__ Loader(Shared& shared, const Call& call, int block)
      : shared_(shared), call_(call), block_(block) {}

  __device__ __forceinline__ void load(const Item& item) {
    if (item.kind == Kind::thin) {
      load_thin(item);
    } else if (item.kind == Kind::gradient) {
      load_gradient(item);
    } else {
      load_result(item);
    }
  }

 private:
  __device__ __forceinline__ uint32_t begin() {
    wait_for(shared_address(&shared_.empty[ring_.stage]), ring_.phase ^ 1);
    const uint32_t full = shared_address(&shared_.full[ring_.stage]);
    expect_bytes(full, sizeof(Stage));
    return full;
  }

  __device__ __forceinline__ uint32_t a() { return shared_address(shared_.stage[ring_.stage].a); }
  __device__ __forceinline__ uint32_t b() { return shared_address(shared_.stage[ring_.stage].b); }

  __device__ __forceinline__ void load_thin(const Item& item) {
    const int steps = steps_of(call_.depth, 2 * kDepth);
    const int own = item.expert * call_.projector_rows;
    for (int step = 0; step < steps; ++step) {
      const uint32_t full = begin();
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        load_box(half == 0 ? a() : b(), call_.wide, (2 * step + half) * kDepth, item.row, full);
      }
      // Both blocks need the same of it: each loads one half for both.
      const int depth = (2 * step + block_) * kDepth;
      load_box_to_both(b() + (2 + block_) * kBoxBytes, call_.projector,
                       BACKWARD ? item.rank : depth, own + (BACKWARD ? depth : item.rank), full);
      ring_.advance();
    }
  }

  __device__ __forceinline__ void load_gradient(const Item& item) {
    if (item.is_a) {
      const int tiles = EXPERTS ? steps_of(item.row_end - item.row, kRows) : call_.row_tiles;
      wait_until_at_least(call_.words + 2 * call_.most_tiles + item.expert,
                          2 * tiles * call_.thin_chunks);
      fence_for_copies();
    }
    const CUtensorMap& wide = item.is_a ? call_.other_wide : call_.wide;
    const CUtensorMap& thin = item.is_a ? call_.thin : call_.other_thin;
    for (int row = item.row; row < item.row_end; row += kTokens) {
      const uint32_t full = begin();
      load_box(a(), thin, item.rank, row, full);
      load_box(b(), wide, item.column, row, full);
      load_box(b() + 2 * kBoxBytes, wide, item.column + 64, row, full);
      ring_.advance();
    }
  }

  __device__ __forceinline__ void load_result(const Item& item) {
    const CUtensorMap& weight = EXPERTS ? call_.weights[item.expert] : call_.weight;
    const int steps = steps_of(call_.depth);
    for (int step = 0; step < steps; ++step) {
      load_step(item, call_.wide, weight, step * kDepth, 0);
    }
    wait_until_at_least(call_.words + item.word, call_.thin_chunks);
    fence_for_copies();
    const int last_steps = steps_of(call_.r);
    for (int step = 0; step < last_steps; ++step) {
      load_step(item, call_.thin, call_.low_rank, step * kDepth, item.expert * call_.low_rank_rows);
    }
  }

  // One step of a result's sum. Blocks with the same columns load half of `right` each, for both.
  // own: the expert's first row of `right`.
  __device__ __forceinline__ void load_step(const Item& item, const CUtensorMap& left,
                                            const CUtensorMap& right, int depth, int own) {
    const uint32_t full = begin();
    load_box(a(), left, depth, item.row, full);
    if (EXPERTS && item.is_narrow) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int column = item.column + half * 128;
        const uint32_t to = b() + half * 2 * kBoxBytes;
        if (BACKWARD) {
          load_box(to, right, column, own + depth, full);
          load_box(to + kBoxBytes, right, column + 64, own + depth, full);
        } else {
          load_box(to, right, depth, own + column, full);
        }
      }
    } else {
      const int column = item.column + block_ * 128;
      const uint32_t to = b() + block_ * 2 * kBoxBytes;
      if (BACKWARD) {
        load_box_to_both(to, right, column, own + depth, full);
        load_box_to_both(to + kBoxBytes, right, column + 64, own + depth, full);
      } else {
        load_box_to_both(to, right, depth, own + column, full);
      }
    }
    ring_.advance();
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
template <bool BACKWARD, bool EXPERTS, int LAST_DEPTH>
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
      thin(item);
    } else if (item.kind == Kind::gradient) {
      gradient(item);
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

  __device__ __forceinline__ void thin(const Item& item) {
    for_each_step<0>(steps_of(call_.depth, 2 * kDepth), [&](bool adds) {
      begin_products();
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t left = (half == 0 ? a() : b()) + group_ * kBoxBytes;
        const uint32_t right = b() + (2 + half) * kBoxBytes;
#pragma unroll
        for (int k = 0; k < kDepth; k += 16) {
          multiply<64, false, BACKWARD>(sums_, matrix(left + k * 2, 16, 1024),
                                        matrix(right + (BACKWARD ? k * 128 : k * 2), 16, 1024),
                                        adds || half + k > 0);
        }
      }
    });
    finish();
    const int first = item.row + group_ * 64 + thread_ / 32 * 16 + thread_ % 32 / 4;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const int at = item.rank + n * 8 + thread_ % 4 * 2;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int token = first + half * 8;
        if (at < call_.r && token < item.row_end) {
          *reinterpret_cast<uint32_t*>(call_.thin_out + static_cast<int64_t>(token) * call_.r +
                                       at) =
              packed(at < call_.ranks ? sums_[n * 4 + half * 2] * call_.thin_scale : 0.0f,
                     at + 1 < call_.ranks ? sums_[n * 4 + half * 2 + 1] * call_.thin_scale : 0.0f);
        }
      }
    }
    fence_for_copies();
    __threadfence();
    synchronize_threads<3, 128 * kGroups>();
    if (group_ == 0 && thread_ == 0) {
      add_and_publish(call_.words + item.word);
      add_and_publish(call_.words + 2 * call_.most_tiles + item.expert);
    }
  }

  __device__ __forceinline__ void gradient(const Item& item) {
    if (!EXPERTS) {
      offer_room();
    }
    int row = item.row;
    for_each_step<0>(steps_of(item.row_end - item.row, kTokens), [&](bool adds) {
      if (EXPERTS && item.row_end - row < kTokens) {
        clear_rows_from(item.row_end - row);
      }
      row += kTokens;
      begin_products();
#pragma unroll
      for (int k = 0; k < kTokens; k += 16) {
        multiply<64, true, true>(sums_, matrix(a() + k * 128, 16, 1024),
                                 matrix(b() + group_ * 2 * kBoxBytes + k * 128, 16, 1024),
                                 adds || k > 0);
      }
    });
    finish();
    if (EXPERTS || adds_other_half()) {
      store_gradient(item);
    }
  }

  // Where each block has summed half of the tokens, the group with the block's own number gets what
  // the same group of the other block has, whose sums are of the same columns.
  __device__ __forceinline__ void offer_room() {
    if (group_ != block_) {
      return;
    }
    if (thread_ == 0) {
      wait_for_reads_of_stores();
    }
    synchronize_threads(1 + group_, 128);
    if (thread_ == 0) {
      expect_bytes(shared_address(&shared_.sums), sizeof(shared_.result[0]));
      arrive_at(shared_address(&shared_.room), block_ ^ 1);
    }
  }

  // Returns whether this group has the whole sums.
  __device__ __forceinline__ bool adds_other_half() {
    const uint32_t at = shared_address(shared_.result[group_]) + thread_ * 16;
    const uint32_t phase = exchange_phase_;
    exchange_phase_ ^= 1;
    if (group_ != block_) {
      wait_for(shared_address(&shared_.room), phase);
#pragma unroll
      for (int i = 0; i < 32; i += 4) {
        send_to(at + i * 512, &sums_[i], shared_address(&shared_.sums), block_ ^ 1);
      }
      return false;
    }
    wait_for(shared_address(&shared_.sums), phase);
#pragma unroll
    for (int i = 0; i < 32; i += 4) {
      float v[4];
      asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                   : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3])
                   : "r"(at + i * 512)
                   : "memory");
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        sums_[i + k] += v[k];
      }
    }
    return true;
  }

  __device__ __forceinline__ void store_gradient(const Item& item) {
    const Gradients& g = call_.gradients;
    const int first = item.column + group_ * 64 + thread_ % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int rank = item.rank + thread_ / 32 * 16 + thread_ % 32 / 4 + half * 8;
      if (rank < g.num_segments * g.rank) {
        item.is_a ? store_a_row(item, rank, first, half) : store_b_column(item, rank, first, half);
      }
    }
  }

  // Zeroes rows of other experts in a stage of a gradient.
  __device__ __forceinline__ void clear_rows_from(int row) {
    const uint32_t stage = a();
    for (int chunk = group_ * 128 + thread_; chunk < (kTokens - row) * 8; chunk += 128 * kGroups) {
#pragma unroll
      for (int box = 0; box < 3; ++box) {
        asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(stage + box * 2 * kBoxBytes +
                                                                      row * 128 + chunk * 16),
                     "r"(0)
                     : "memory");
      }
    }
    fence_shared_for_copies();
    synchronize_threads<3, 128 * kGroups>();
  }

  // Nothing was summed for an expert without tokens.
  __device__ __forceinline__ float sum_of(const Item& item, int i) const {
    return EXPERTS && item.row == item.row_end ? 0.0f : sums_[i];
  }

  // Row `rank` of dA: this thread's pairs of columns, 8 apart.
  __device__ __forceinline__ void store_a_row(const Item& item, int rank, int first, int half) {
    const Gradients& g = call_.gradients;
    const int64_t row = (static_cast<int64_t>(item.expert) * g.num_segments * g.rank + rank) * g.i;
    int64_t to[8];
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const int column = first + n * 8;
      to[n] = column < g.i ? row + column : -1;
    }
    store_pairs(item, g.d_a, half, to, 1);
  }

  // Column `rank` of dB, likewise, where the rows of dB belong to the projection of that rank.
  __device__ __forceinline__ void store_b_column(const Item& item, int rank, int first, int half) {
    const Gradients& g = call_.gradients;
    const int projection = rank / g.rank, own = rank - projection * g.rank;
    int begin = 0;
    for (int p = 0; p < projection; ++p) {
      begin += g.segment[p];
    }
    int inside = first % g.period;
    int64_t to[8];
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const int row = first + n * 8;
      const bool owns = row < g.o && inside >= begin && inside < begin + g.segment[projection];
      to[n] = owns ? (static_cast<int64_t>(item.expert) * g.o + row) * g.rank + own : -1;
      for (inside += 8; inside >= g.period;) {
        inside -= g.period;
      }
    }
    store_pairs(item, g.d_b, half, to, g.rank);
  }

  // Writes or adds the sums of one rank: pair n at to[n] and `apart` behind it, where it has a
  // place. All that is added to is read before anything is written: one wait for memory, not 16.
  __device__ __forceinline__ void store_pairs(const Item& item, const Gradient& gradient, int half,
                                              const int64_t (&to)[8], int64_t apart) {
    float before[16] = {};
    if (gradient.accumulates) {
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        if (to[n] >= 0) {
          before[2 * n] = read(gradient, to[n]);
          before[2 * n + 1] = read(gradient, to[n] + apart);
        }
      }
    }
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      if (to[n] >= 0) {
        const int i = n * 4 + half * 2;
        write(gradient, to[n], before[2 * n] + sum_of(item, i));
        write(gradient, to[n] + apart, before[2 * n + 1] + sum_of(item, i + 1));
      }
    }
  }

  static __device__ __forceinline__ float read(const Gradient& gradient, int64_t at) {
    return gradient.is_fp32 ? static_cast<const float*>(gradient.to)[at]
                            : __bfloat162float(static_cast<const bf16*>(gradient.to)[at]);
  }

  static __device__ __forceinline__ void write(const Gradient& gradient, int64_t at, float sum) {
    if (gradient.is_fp32) {
      static_cast<float*>(gradient.to)[at] = sum;
    } else {
      static_cast<bf16*>(gradient.to)[at] = __float2bfloat16_rn(sum);
    }
  }

  __device__ __forceinline__ void result(const Item& item) {
    for_each_step<1>(steps_of(call_.depth), [&](bool adds) { add_step<kDepth>(adds); });
    for_each_step<1>(steps_of(call_.r), [&](bool) { add_step<LAST_DEPTH>(true); });
    finish();
#pragma unroll
    for (int part = 0; part < kColumns / kStoreColumns; ++part) {
      store_result(&sums_[part * kStoreColumns / 2], item.row + group_ * 64, item.row_end,
                   item.column + part * kStoreColumns);
    }
  }

  template <int DEPTH>
  __device__ __forceinline__ void add_step(bool adds) {
    begin_products();
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
  __device__ __forceinline__ void store_result(const float* sums, int row, int row_end,
                                               int column) {
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
    if (EXPERTS && row_end - row < 64) {
      store_rows(to, row, row_end - row, column);
    } else if (thread_ == 0) {
#pragma unroll
      for (int box = 0; box < kStoreColumns / 64; ++box) {
        store_box(call_.result, column + box * 64, row, to + box * kBoxBytes);
      }
      commit_stores();
    }
  }

  // Rows that others must not be written with, so not by whole boxes.
  __device__ __forceinline__ void store_rows(uint32_t from, int row, int rows, int column) {
    for (int chunk = thread_; chunk < rows * kStoreColumns / 8; chunk += 128) {
      const int own_row = chunk / (kStoreColumns / 8), n = chunk % (kStoreColumns / 8);
      if (column + n * 8 < call_.columns) {
        uint4 v;
        asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                     : "r"(from + n / 8 * kBoxBytes + own_row * 128 + (n % 8 ^ own_row % 8) * 16)
                     : "memory");
        *reinterpret_cast<uint4*>(call_.result_out +
                                  static_cast<int64_t>(row + own_row) * call_.columns + column +
                                  n * 8) = v;
      }
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
  uint32_t exchange_phase_ = 0;
  int held_ = -1;
};

// The last cluster zeroes the words for the next launch.
__device__ __forceinline__ void leave_words_zero(const Call& call, Shared& shared) {
  const int count = count_of_words(call), clusters = static_cast<int>(gridDim.x) / 2;
  if (threadIdx.x == 0) {
    shared.is_last = atomicAdd(call.words + count, 1) == clusters - 1;
  }
  __syncthreads();
  if (shared.is_last) {
    for (int word = static_cast<int>(threadIdx.x); word < count + 2; word += kLinearThreads) {
      call.words[word] = 0;
    }
  }
}

template <bool BACKWARD, bool EXPERTS, int LAST_DEPTH>
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
    for (int ticket = 0; ticket < kTickets; ++ticket) {
      initialize_barrier(shared_address(&shared.drawn[ticket]), 1);
      initialize_barrier(shared_address(&shared.read[ticket]), 2 * (1 + 4 * kGroups));
    }
    initialize_barrier(shared_address(&shared.room), 1);
    initialize_barrier(shared_address(&shared.sums), 1);
    publish_barriers();
  }
  if (EXPERTS) {
    ExpertItems::prepare(call, shared);
  }
  synchronize_cluster();
  std::conditional_t<EXPERTS, ExpertItems, DenseItems> items(call, shared, block);
  Item item;
  const int group = static_cast<int>(threadIdx.x) / 128;
  if (group == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == 0) {
      Loader<BACKWARD, EXPERTS> loader(shared, call, block);
      while (items.next(item)) {
        loader.load(item);
      }
    } else if (EXPERTS && threadIdx.x == 32 && block == 0) {
      ExpertItems::draw(call, shared);
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    Multiplier<BACKWARD, EXPERTS, LAST_DEPTH> multiplier(shared, call, block, group - 1);
    while (items.next(item)) {
      multiplier.multiply_item(item);
    }
    multiplier.wait_for_all_stores();
  }
  synchronize_cluster();
  if (block == 0) {
    leave_words_zero(call, shared);
  }
#endif
}

}  // namespace megalora::cuda
