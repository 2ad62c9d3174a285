#pragma once

#include "../factor.h"
#include "../philox.h"
#include "device.cuh"

// What the three kernels share: tiles of tokens, of columns and of ranks in shared memory, and
// their product.
namespace megalora::cuda {

constexpr int kTileTokens = 64;
constexpr int kTileColumns = 64;

// Elements of T in a 16-byte copy; also the padding that keeps the rows of a tile off each other's
// banks.
template <class T>
constexpr int kVector = 16 / sizeof(T);

// Columns (project) or tokens (outer) that one pipeline stage holds: 128 bytes of a row.
template <class T>
constexpr int kDepth = 128 / sizeof(T);

// Pipeline stages, so many as keep a block below the 48 KiB of static shared memory.
template <int RANK_TILE>
constexpr int stages = RANK_TILE <= 16   ? 4
                       : RANK_TILE <= 32 ? 3
                                         : 2;

struct TokenTile {
  int64_t expert;
  int64_t begin;
  int64_t end;  // of the tokens that belong to the expert
  int64_t
      result_end;  // of the rows that this tile writes: beyond end where no expert owns the rest
};

__device__ __forceinline__ int64_t expert_end(const Factor& f, int64_t expert) {
  if (expert < 0) {
    return 0;
  }
  return f.offsets_are_int64 ? static_cast<const int64_t*>(f.offsets)[expert]
                             : static_cast<int64_t>(static_cast<const int32_t*>(f.offsets)[expert]);
}

// Number of slots of `size` tokens that the host launches without knowing the offsets.
inline int64_t token_slots(const Factor& f, int64_t size = kTileTokens) {
  return f.offsets == nullptr ? (f.tokens + size - 1) / size : f.tokens / size + f.experts;
}

// The tile of a slot. Expert e, whose first token is s, has the slots from s / size + e on: they
// suffice, because ceil((end - s) / n) <= end / n - s / n + 1. They increase with e, so the expert
// is the last of those that begin at or before the slot, which the lanes of a warp count together:
// their loads depend on nothing, where those of a binary search would wait for each other.
// Every thread of the block must call it.
__device__ __forceinline__ TokenTile token_tile(const Factor& f, int64_t slot,
                                                int64_t size = kTileTokens) {
  if (f.offsets == nullptr) {
    const int64_t begin = slot * size;
    const int64_t end = min(begin + size, f.tokens);
    return {0, begin, end, end};
  }
  int begun = 0;
  for (int64_t e = threadIdx.x % 32; e < f.experts; e += 32) {
    begun += expert_end(f, e - 1) / size + e <= slot ? 1 : 0;
  }
  const int64_t expert = warp_sum(begun) - 1;
  const int64_t first_token = expert_end(f, expert - 1);
  const int64_t begin = first_token + (slot - first_token / size - expert) * size;
  const int64_t owned = expert + 1 == f.experts ? f.tokens : expert_end(f, expert);
  return {expert, begin, min(begin + size, expert_end(f, expert)), min(begin + size, owned)};
}

struct ColumnTile {
  int64_t begin;
  int columns;
  int projection;
};

__host__ __device__ __forceinline__ int64_t tiles_of(int64_t size) {
  return (size + kTileColumns - 1) / kTileColumns;
}

__host__ __device__ __forceinline__ int64_t tiles_per_period(const Factor& f) {
  int64_t tiles = 0;
  for (int p = 0; p < f.num_segments; ++p) {
    tiles += tiles_of(f.segment[p]);
  }
  return tiles;
}

inline int64_t column_tiles(const Factor& f) { return f.columns / f.period * tiles_per_period(f); }

// Column tile `index`: it never straddles two projections.
__device__ __forceinline__ ColumnTile column_tile(const Factor& f, int64_t index) {
  const int64_t per_period = tiles_per_period(f);
  int64_t begin = index / per_period * f.period;
  int64_t tile = index % per_period;
  int p = 0;
  for (; tile >= tiles_of(f.segment[p]); ++p) {
    tile -= tiles_of(f.segment[p]);
    begin += f.segment[p];
  }
  const int64_t columns =
      min(f.segment[p] - tile * kTileColumns, static_cast<int64_t>(kTileColumns));
  return {begin + tile * kTileColumns, static_cast<int>(columns), p};
}

__device__ __forceinline__ int clamp_to(int64_t size, int limit) {
  return static_cast<int>(max(int64_t{0}, min(size, static_cast<int64_t>(limit))));
}

// Copies rows x columns elements to a [ROWS, COLUMNS] tile of shared memory and zeroes the rest of
// it. The copies of whole vectors are asynchronous: commit_copies and wait_copies order them.
template <int ROWS, int COLUMNS, class T>
__device__ __forceinline__ void load_tile(T* tile, const T* from, int64_t stride, int rows,
                                          int columns) {
  constexpr int kPerRow = COLUMNS / kVector<T>;
  constexpr int kPitch = COLUMNS + kVector<T>;
  const bool aligned =
      (reinterpret_cast<uintptr_t>(from) | static_cast<uint64_t>(stride) * sizeof(T)) % 16 == 0;
  for (int i = threadIdx.x; i < ROWS * kPerRow; i += kThreads) {
    const int row = i / kPerRow;
    const int column = i % kPerRow * kVector<T>;
    T* to = tile + row * kPitch + column;
    if (aligned && row < rows && column + kVector<T> <= columns) {
      copy_async(to, from + row * stride + column);
      continue;
    }
    for (int k = 0; k < kVector<T>; ++k) {
      to[k] = row < rows && column + k < columns ? from[row * stride + column + k] : T(0);
    }
  }
}

// Bit k of the result: whether element first + k, counted row-major over wide, is kept. k < 4.
__device__ __forceinline__ uint32_t kept_four(const Factor& f, int64_t first) {
  const uint64_t seed = static_cast<uint64_t>(*f.seed);
  const int skipped = static_cast<int>(first % 4);
  uint32_t kept = 0;
  uint64_t words[4];
  philox(static_cast<uint64_t>(first / 4), seed, words);
  for (int k = 0; k < 4; ++k) {
    kept |= static_cast<uint32_t>(words[k] >= f.threshold) << k;
  }
  if (skipped != 0) {
    philox(static_cast<uint64_t>(first / 4 + 1), seed, words);
    for (int k = 0; k < 4; ++k) {
      kept |= static_cast<uint32_t>(words[k] >= f.threshold) << (k + 4);
    }
  }
  return kept >> skipped & 15u;
}

// Zeroes the dropped elements of a tile of wide that starts at (row, column).
template <int ROWS, int COLUMNS, class T>
__device__ __forceinline__ void drop_tile(T* tile, const Factor& f, int64_t row, int64_t column) {
  constexpr int kPitch = COLUMNS + kVector<T>;
  for (int i = threadIdx.x; i < ROWS * COLUMNS / 4; i += kThreads) {
    const int r = i / (COLUMNS / 4);
    const int c = i % (COLUMNS / 4) * 4;
    const uint32_t kept = kept_four(f, (row + r) * f.columns + column + c);
    for (int k = 0; k < 4; ++k) {
      if ((kept >> k & 1u) == 0) {
        tile[r * kPitch + c + k] = T(0);
      }
    }
  }
}

// Row and column of accumulator i of this lane in a 16 x 8 product (PTX ISA, mma.m16n8k16, fragment
// C).
__device__ __forceinline__ int sum_row(int i) {
  return static_cast<int>(threadIdx.x) % 32 / 4 + i / 2 * 8;
}
__device__ __forceinline__ int sum_column(int i) {
  return static_cast<int>(threadIdx.x) % 4 * 2 + i % 2;
}

// sums[16, N] += a[16, DEPTH] b[DEPTH, N] of one warp. In shared memory a is [16, DEPTH], or
// [DEPTH, 16] where A_BY_DEPTH, and b is [N, DEPTH], or [DEPTH, N] where B_BY_DEPTH, rows at the
// given pitches.
template <bool A_BY_DEPTH, bool B_BY_DEPTH, int DEPTH, int N, class T>
__device__ __forceinline__ void multiply(float (&sums)[N / 8][4], const T* a, int a_pitch,
                                         const T* b, int b_pitch) {
  if constexpr (sizeof(T) == 2) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int row = lane % 8;
    const int half = lane / 8 % 2 * 8;
    const int upper = lane / 16 * 8;
    for (int k = 0; k < DEPTH; k += 16) {
      uint32_t left[4];
      load_matrices<A_BY_DEPTH>(left, A_BY_DEPTH ? a + (k + upper + row) * a_pitch + half
                                                 : a + (half + row) * a_pitch + k + upper);
#pragma unroll
      for (int n = 0; n < N / 8; ++n) {
        uint32_t right[2];
        load_matrices<B_BY_DEPTH>(right, B_BY_DEPTH ? b + (k + half + row) * b_pitch + n * 8
                                                    : b + (n * 8 + row) * b_pitch + k + half);
        tensor_core(T{}, sums[n], left, right);
      }
    }
  } else {
    for (int k = 0; k < DEPTH; ++k) {
#pragma unroll
      for (int n = 0; n < N / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int m = sum_row(i);
          const int column = n * 8 + sum_column(i);
          sums[n][i] += (A_BY_DEPTH ? a[k * a_pitch + m] : a[m * a_pitch + k]) *
                        (B_BY_DEPTH ? b[k * b_pitch + column] : b[column * b_pitch + k]);
        }
      }
    }
  }
}

template <class T>
__device__ __forceinline__ T* weight_at(const Factor& f, int64_t expert, int64_t column,
                                        int64_t rank) {
  return static_cast<T*>(f.weight) + expert * f.expert_stride + column * f.column_stride +
         rank * f.rank_stride;
}

// W = sum, or W += sum, in the dtype of W.
template <class T>
__device__ __forceinline__ void store_weight(const Factor& f, int64_t expert, int64_t column,
                                             int64_t rank, float sum) {
  if (f.weight_is_fp32) {
    float* const w = weight_at<float>(f, expert, column, rank);
    *w = f.accumulates ? *w + sum : sum;
  } else {
    T* const w = weight_at<T>(f, expert, column, rank);
    *w = static_cast<T>(f.accumulates ? static_cast<float>(*w) + sum : sum);
  }
}

template <class T>
__device__ __forceinline__ T* wide_at(const Factor& f, int64_t token, int64_t column) {
  return static_cast<T*>(f.wide) + token * f.wide_stride + column;
}

template <class T>
__device__ __forceinline__ T* thin_at(const Factor& f, int64_t token, int projection,
                                      int64_t rank) {
  return static_cast<T*>(f.thin) + token * f.thin_stride + projection * f.rank + rank;
}

// Calls body with the element type and the narrowest rank tile that covers the rank, at most 64.
template <class Body>
void with_rank_tile(const Factor& f, Body body) {
  const auto with_type = [&](auto element) {
    using T = decltype(element);
    if (f.rank <= 8) {
      body.template operator()<T, 8>();
    } else if (f.rank <= 16) {
      body.template operator()<T, 16>();
    } else if (f.rank <= 32) {
      body.template operator()<T, 32>();
    } else {
      body.template operator()<T, 64>();
    }
  };
  if (f.dtype == c10::ScalarType::BFloat16) {
    with_type(c10::BFloat16{});
  } else if (f.dtype == c10::ScalarType::Half) {
    with_type(c10::Half{});
  } else {
    with_type(float{});
  }
}

}  // namespace megalora::cuda
