#pragma once

// The CUDA of csrc/cuda on a CPU: the kernels compile as C++ and run one block after another, each
// thread of a block as a fiber that gives way at barriers. The warp instructions follow the tables
// of the PTX ISA, not the kernels' comments, so that a wrong fragment layout, a missing barrier or
// a wrong index shows without a GPU. Nothing here tells speed.

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static
#define __align__(bytes) __attribute__((aligned(bytes)))

struct CUstream_st;
using cudaStream_t = CUstream_st*;

struct dim3 {
  unsigned x, y, z;
  dim3(int64_t x = 1, int64_t y = 1, int64_t z = 1)
      : x(static_cast<unsigned>(x)), y(static_cast<unsigned>(y)), z(static_cast<unsigned>(z)) {}
};

namespace megalora::cuda {

constexpr int kThreads = 128;
constexpr int kWarp = 32;
constexpr size_t kStackBytes = 64 * 1024;

using std::max;
using std::min;

struct Barrier {
  int arrived = 0;
  int generation = 0;
};

struct PendingCopy {
  void* to;
  int size;
  unsigned char bytes[16];
};

// What a lane shows to the other lanes of its warp.
struct Lane {
  const void* address;
  uint32_t a[4], b[2];
  int value;
  float real;
};

struct Block {
  // Where to go on: a ucontext_t is where a fiber begins, for it asks the kernel at each change.
  jmp_buf scheduler, place[kThreads];
  ucontext_t beginning[kThreads];
  std::unique_ptr<char[]> stack[kThreads];
  bool begun[kThreads], finished[kThreads];
  Barrier block_barrier, warp_barrier[kThreads / kWarp];
  Lane lanes[kThreads];
  std::vector<std::vector<PendingCopy>> groups[kThreads];  // committed copies, oldest first
  std::vector<PendingCopy> open_group[kThreads];
  std::vector<PendingCopy> stored[kThreads];  // what other lanes of the warp do not see yet
  int current = 0;
  bool progressed = false;
  std::function<void()> body;
};

inline Block block;

constexpr int kSharedBytes = 227 * 1024;  // of an H100
alignas(16) inline unsigned char shared_bytes[kSharedBytes];

template <class Shared>
Shared& shared_memory() {
  return *reinterpret_cast<Shared*>(shared_bytes);
}

}  // namespace megalora::cuda

inline dim3 threadIdx, blockIdx;

namespace megalora::cuda {

inline void give_way() {
  if (_setjmp(block.place[block.current]) == 0) {
    _longjmp(block.scheduler, 1);
  }
}

inline void wait_at(Barrier& barrier, int expected) {
  const int generation = barrier.generation;
  block.progressed = true;
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  while (barrier.generation == generation) {
    give_way();
  }
}

inline void wait_for_warp() { wait_at(block.warp_barrier[threadIdx.x / kWarp], kWarp); }
inline Lane& own_lane() { return block.lanes[threadIdx.x]; }
inline Lane& lane_of_warp(int lane) { return block.lanes[threadIdx.x / kWarp * kWarp + lane]; }

inline void check_alignment(const void* address, int bytes = 16) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) {
    std::fprintf(stderr, "emulator: address %p is not a multiple of %d\n", address, bytes);
    std::abort();
  }
}

// The source is read now, shared memory is written at the wait: whoever reads without waiting sees
// old data.
template <int BYTES>
void copy_async(void* shared, const void* global) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16);
  check_alignment(shared, BYTES);
  check_alignment(global, BYTES);
  PendingCopy copy{shared, BYTES, {}};
  std::memcpy(copy.bytes, global, BYTES);
  block.open_group[threadIdx.x].push_back(copy);
}

inline void load_vector(void* to, const void* global) {
  check_alignment(global);
  std::memcpy(to, global, 16);
}

inline void store_vector(void* global, const void* from) {
  check_alignment(global);
  std::memcpy(global, from, 16);
}

inline void commit_copies() {
  block.groups[threadIdx.x].push_back(std::move(block.open_group[threadIdx.x]));
  block.open_group[threadIdx.x].clear();
}

template <int PENDING>
void wait_copies() {
  auto& groups = block.groups[threadIdx.x];
  while (groups.size() > PENDING) {
    for (const PendingCopy& copy : groups.front()) {
      std::memcpy(copy.to, copy.bytes, copy.size);
    }
    groups.erase(groups.begin());
  }
}

// ldmatrix (PTX ISA): thread t holds elements 2 (t % 4) and 2 (t % 4) + 1 of row t / 4 of each
// matrix, of its transpose with .trans; lane 8 i + j gives the address of row j of matrix i.
template <bool TRANSPOSED, int MATRICES>
void load_matrices(uint32_t (&to)[MATRICES], const void* row) {
  check_alignment(row);
  own_lane().address = row;
  wait_for_warp();
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int i = 0; i < MATRICES; ++i) {
    uint16_t pair[2];
    for (int k = 0; k < 2; ++k) {
      const int first = lane / 4;
      const int second = lane % 4 * 2 + k;
      const int matrix_row = TRANSPOSED ? second : first;
      const int matrix_column = TRANSPOSED ? first : second;
      pair[k] =
          static_cast<const uint16_t*>(lane_of_warp(8 * i + matrix_row).address)[matrix_column];
    }
    std::memcpy(&to[i], pair, sizeof(pair));
  }
  wait_for_warp();
}

template <class T>
float half_of(uint32_t registers, int half) {
  T pair[2];
  std::memcpy(pair, &registers, sizeof(pair));
  return static_cast<float>(pair[half]);
}

// mma.m16n8k16 (PTX ISA): a_i is at row groupID + 8 for i in {2, 3, 6, 7} else groupID, at column
// 2 threadID_in_group + (i & 1), + 8 for i >= 4; b_i is at row 2 threadID_in_group + (i & 1), + 8
// for i >= 2, column groupID; c_i is at row groupID, + 8 for i >= 2, column 2 threadID_in_group +
// (i & 1).
template <class T>
void tensor_core(T, float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  std::memcpy(own_lane().a, a, sizeof(a));
  std::memcpy(own_lane().b, b, sizeof(b));
  wait_for_warp();
  const int group = static_cast<int>(threadIdx.x) % kWarp / 4;
  const int in_group = static_cast<int>(threadIdx.x) % 4;
  for (int c = 0; c < 4; ++c) {
    const int row = group + (c >= 2 ? 8 : 0);
    const int column = 2 * in_group + (c & 1);
    for (int k = 0; k < 16; ++k) {
      const int a_index = (k & 1) + (row >= 8 ? 2 : 0) + (k >= 8 ? 4 : 0);
      const int b_index = (k & 1) + (k >= 8 ? 2 : 0);
      const Lane& a_lane = lane_of_warp(row % 8 * 4 + k % 8 / 2);
      const Lane& b_lane = lane_of_warp(column * 4 + k % 8 / 2);
      sums[c] += half_of<T>(a_lane.a[a_index / 2], a_index % 2) *
                 half_of<T>(b_lane.b[b_index / 2], b_index % 2);
    }
  }
  wait_for_warp();
}

inline int warp_sum(int value) {
  own_lane().value = value;
  wait_for_warp();
  int sum = 0;
  for (int lane = 0; lane < kWarp; ++lane) {
    sum += lane_of_warp(lane).value;
  }
  wait_for_warp();
  return sum;
}

inline float sum_of_groups(float value) {
  for (int lanes = 4; lanes < kWarp; lanes *= 2) {
    own_lane().real = value;
    wait_for_warp();
    value += lane_of_warp((static_cast<int>(threadIdx.x) % kWarp) ^ lanes).real;
    wait_for_warp();
  }
  return value;
}

inline void store_shared(void* shared, const void* from) {
  check_alignment(shared);
  PendingCopy copy{shared, 16, {}};
  std::memcpy(copy.bytes, from, 16);
  block.stored[threadIdx.x].push_back(copy);
}

// Whoever reads without it sees what was there before.
inline void sync_warp() {
  for (const PendingCopy& copy : block.stored[threadIdx.x]) {
    std::memcpy(copy.to, copy.bytes, copy.size);
  }
  block.stored[threadIdx.x].clear();
  wait_for_warp();
}
inline float exponential(float x) { return std::exp(x); }
inline float reciprocal(float x) { return 1.0f / x; }

inline void run_fiber() {
  block.body();
  block.finished[block.current] = true;
  block.progressed = true;
  _longjmp(block.scheduler, 1);
}

// Lets a thread run until it gives way or ends.
[[gnu::noinline]] inline void resume(int thread) {
  if (_setjmp(block.scheduler) != 0) {
    return;
  }
  if (block.begun[thread]) {
    _longjmp(block.place[thread], 1);
  }
  block.begun[thread] = true;
  setcontext(&block.beginning[thread]);
}

inline void resume_warp(int warp) {
  for (int thread = warp * kWarp; thread < (warp + 1) * kWarp; ++thread) {
    if (!block.finished[thread]) {
      block.current = thread;
      threadIdx = dim3(thread, 0, 0);
      resume(thread);
    }
  }
}

// Runs one block to its end; aborts where its threads wait for each other in vain. A warp goes as
// far as it can before the next one does, so that a missing barrier shows. Shared memory starts as
// NaNs.
inline void run_block(int used_shared_bytes) {
  std::memset(shared_bytes, 0xFF, used_shared_bytes);
  for (int thread = 0; thread < kThreads; ++thread) {
    if (!block.stack[thread]) {
      block.stack[thread].reset(new char[kStackBytes]);
    }
    getcontext(&block.beginning[thread]);
    block.beginning[thread].uc_stack.ss_sp = block.stack[thread].get();
    block.beginning[thread].uc_stack.ss_size = kStackBytes;
    block.beginning[thread].uc_link = nullptr;
    makecontext(&block.beginning[thread], run_fiber, 0);
    block.begun[thread] = block.finished[thread] = false;
    block.groups[thread].clear();
    block.open_group[thread].clear();
    block.stored[thread].clear();
  }
  for (int running = kThreads; running > 0;) {
    running = 0;
    bool progressed = false;
    for (int warp = 0; warp < kThreads / kWarp; ++warp) {
      do {
        block.progressed = false;
        resume_warp(warp);
        progressed = progressed || block.progressed;
      } while (block.progressed);
      running +=
          std::count(block.finished + warp * kWarp, block.finished + (warp + 1) * kWarp, false);
    }
    if (running > 0 && !progressed) {
      std::fprintf(stderr, "emulator: %d threads wait at barriers that the others do not reach\n",
                   running);
      std::abort();
    }
  }
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, int shared_bytes_used, cudaStream_t,
            Arguments... arguments) {
  if (shared_bytes_used > kSharedBytes) {
    std::fprintf(stderr, "emulator: %d bytes of shared memory\n", shared_bytes_used);
    std::abort();
  }
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, z);
        block.body = [&] { kernel(arguments...); };
        run_block(shared_bytes_used);
      }
    }
  }
}

}  // namespace megalora::cuda

inline void __syncthreads() {
  megalora::cuda::wait_at(megalora::cuda::block.block_barrier, megalora::cuda::kThreads);
}
