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

template <class T>
struct alignas(16) Vector {
  T element[kVector<T>];
};

struct alignas(16) Words {
  uint32_t word[4];
};

// Columns (project) or tokens (outer) that one pipeline stage holds: 128 bytes of a row.
template <class T>
constexpr int kDepth = 128 / sizeof(T);

// Pipeline stages of project and outer, so many as let four blocks share the 227 KiB of a
// multiprocessor.
template <int RANK_TILE>
constexpr int stages = RANK_TILE <= 16 ? 4 : 3;

// Registers for four blocks of 128 threads on a multiprocessor.
constexpr int kBlocksPerProcessor = 4;

// Blocks that the largest GPUs of their time (132 multiprocessors) hold at once. A constant, so
// that the order of summation, and with it every bit, depends on the shapes alone.
constexpr int64_t kBlocksAtOnce = 132 * kBlocksPerProcessor;

// Splits of a dense sum that fill the GPU in one wave with blocks of one split each.
inline int splits_for(int64_t blocks, int64_t useful) {
  const int64_t wanted = kBlocksAtOnce / (blocks < 1 ? 1 : blocks);
  const int64_t splits = wanted < useful ? wanted : useful;
  return static_cast<int>(splits < 1 ? 1 : splits);
}

template <int STAGES>
__device__ __forceinline__ int next_stage(int stage) {
  return stage + 1 == STAGES ? 0 : stage + 1;
}

// Quotients in 32 bits, several times as fast as in 64: tokens and columns are fewer than 2^32.
__host__ __device__ __forceinline__ int64_t divide(int64_t dividend, int64_t divisor) {
  return static_cast<uint32_t>(dividend) / static_cast<uint32_t>(divisor);
}

__host__ __device__ __forceinline__ int64_t ceil_divide(int64_t dividend, int64_t divisor) {
  return divide(dividend + divisor - 1, divisor);
}

struct TokenTile {
  int64_t expert;
  int64_t begin;
  int64_t end;  // of the tokens that belong to the expert
  int64_t
      result_end;  // of the rows that this tile writes: beyond end where no expert owns the rest
};

// The lower word of an int64 offset says all: there are fewer than 2^32 tokens.
__device__ __forceinline__ int64_t expert_end(const Factor& f, int64_t expert) {
  const uint32_t word = static_cast<uint32_t>(expert) << (f.offsets_are_int64 ? 1 : 0);
  return expert < 0 ? 0 : static_cast<const uint32_t*>(f.offsets)[word];
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
__device__ __forceinline__ TokenTile token_tile(const Factor& f, int slot,
                                                int64_t size = kTileTokens) {
  if (f.offsets == nullptr) {
    const int64_t begin = slot * size;
    const int64_t end = min(begin + size, f.tokens);
    return {0, begin, end, end};
  }
  int begun = 0;
  const int experts = static_cast<int>(f.experts);
  for (int e = static_cast<int>(threadIdx.x) % 32; e < experts; e += 32) {
    begun += static_cast<int>(divide(expert_end(f, e - 1), size)) + e <= slot ? 1 : 0;
  }
  const int64_t expert = warp_sum(begun) - 1;
  const int64_t first_token = expert_end(f, expert - 1);
  const int64_t begin = first_token + (slot - divide(first_token, size) - expert) * size;
  const int64_t owned = expert + 1 == f.experts ? f.tokens : expert_end(f, expert);
  return {expert, begin, min(begin + size, expert_end(f, expert)), min(begin + size, owned)};
}

struct ColumnTile {
  int64_t begin;
  int columns;
  int projection;
};

__host__ __device__ __forceinline__ int64_t tiles_of(int64_t size, int tile = kTileColumns) {
  return ceil_divide(size, tile);
}

__host__ __device__ __forceinline__ int64_t tiles_per_period(const Factor& f,
                                                             int tile = kTileColumns) {
  int64_t tiles = 0;
  for (int p = 0; p < f.num_segments; ++p) {
    tiles += tiles_of(f.segment[p], tile);
  }
  return tiles;
}

// Columns before projection p within a period.
__device__ __forceinline__ int64_t columns_before(const Factor& f, int p) {
  int64_t columns = 0;
  for (int q = 0; q < p; ++q) {
    columns += f.segment[q];
  }
  return columns;
}

inline int64_t column_tiles(const Factor& f, int tile = kTileColumns) {
  return f.columns / f.period * tiles_per_period(f, tile);
}

// Column tile `index`, of so many in a period: it never straddles two projections.
template <int COLUMNS>
__device__ __forceinline__ ColumnTile column_tile(const Factor& f, int index, int per_period) {
  const int before = static_cast<int>(divide(index, per_period));
  int tile = index - before * per_period;
  int64_t begin = before * f.period;
  int p = 0;
  int size = static_cast<int>(f.segment[0]);
  while (tile >= (size + COLUMNS - 1) / COLUMNS) {
    tile -= (size + COLUMNS - 1) / COLUMNS;
    begin += size;
    size = static_cast<int>(f.segment[++p]);
  }
  return {begin + tile * COLUMNS, min(size - tile * COLUMNS, COLUMNS), p};
}

__device__ __forceinline__ int clamp_to(int64_t size, int limit) {
  return static_cast<int>(max(int64_t{0}, min(size, static_cast<int64_t>(limit))));
}

// The columns of one projection in steps of STEP, none across the end of a segment.
template <int STEP>
struct ColumnSteps {
  int64_t column;  // where the step begins
  int left;        // columns from there to the end of the segment
  int size;        // of the segment
  int64_t period;

  __device__ __forceinline__ ColumnSteps(const Factor& f, int projection, int64_t index)
      : size(static_cast<int>(f.segment[projection])), period(f.period) {
    const int64_t per_segment = max(tiles_of(size, STEP), int64_t{1});
    const int64_t before = divide(index, per_segment);
    const int inside = static_cast<int>(index - before * per_segment) * STEP;
    column = before * period + columns_before(f, projection) + inside;
    left = size - inside;
  }

  __device__ __forceinline__ int columns() const { return min(left, STEP); }

  __device__ __forceinline__ void advance() {
    if (left > STEP) {
      column += STEP;
      left -= STEP;
    } else {
      column += period - (size - left);
      left = size;
    }
  }
};

// Starts to copy a whole [ROWS, COLUMNS] tile whose rows are multiples of 16 bytes.
template <int ROWS, int COLUMNS, class T>
__device__ __forceinline__ void load_whole_tile(T* tile, const T* from, int64_t stride) {
  constexpr int kPerRow = COLUMNS / kVector<T>;
  constexpr int kPitch = COLUMNS + kVector<T>;
  constexpr int kRows = kThreads / kPerRow;  // that the block copies at once
  const int row = static_cast<int>(threadIdx.x) / kPerRow;
  const int column = static_cast<int>(threadIdx.x) % kPerRow * kVector<T>;
  T* to = tile + row * kPitch + column;
  from += row * stride + column;
#pragma unroll
  for (int first = 0; first < ROWS; first += kRows) {
    if (ROWS % kRows == 0 || first + row < ROWS) {
      copy_async<16>(to + first * kPitch, from);
    }
    from += kRows * stride;
  }
}

// Copies `columns` elements, at most a vector, to shared memory and zeroes the rest of the vector.
// BYTES, at least 4 for an asynchronous copy, divide the addresses and the bytes to copy.
template <int BYTES, class T>
__device__ __forceinline__ void load_pieces(T* to, const T* from, int columns) {
  constexpr int kPiece = BYTES / sizeof(T);
#pragma unroll
  for (int first = 0; first < kVector<T>; first += kPiece) {
    if (first >= columns) {
#pragma unroll
      for (int k = first; k < first + kPiece; ++k) {
        to[k] = T(0);
      }
    } else if constexpr (BYTES >= 4) {
      copy_async<BYTES>(to + first, from + first);
    } else {
      to[first] = from[first];
    }
  }
}

// Copies rows x columns elements to a [ROWS, COLUMNS] tile of shared memory and zeroes the rest of
// it. The copies are asynchronous: commit_copies and wait_copies order them.
template <int ROWS, int COLUMNS, class T>
__device__ __forceinline__ void load_tile(T* tile, const T* from, int64_t stride, int rows,
                                          int columns) {
  constexpr int kPerRow = COLUMNS / kVector<T>;
  constexpr int kPitch = COLUMNS + kVector<T>;
  const uint32_t bytes = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(from)) |
                         static_cast<uint32_t>(stride * sizeof(T)) |
                         static_cast<uint32_t>(columns * sizeof(T));
  if (bytes % 16 == 0 && rows == ROWS && columns == COLUMNS) {
    load_whole_tile<ROWS, COLUMNS>(tile, from, stride);
    return;
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < ROWS * kPerRow; i += kThreads) {
    const int row = i / kPerRow;
    const int column = i % kPerRow * kVector<T>;
    T* const to = tile + row * kPitch + column;
    const T* const source = from + row * stride + column;
    const int wanted = row < rows ? columns - column : 0;
    if (bytes % 16 == 0) {
      load_pieces<16>(to, source, wanted);
    } else if (bytes % 8 == 0) {
      load_pieces<8>(to, source, wanted);
    } else {
      load_pieces<sizeof(T)>(to, source, wanted);
    }
  }
}

// Draws for a vector of wide that begins at element `first`, counted row-major: 16 bits for each
// element, two in a word.
__device__ __forceinline__ void draw_words(const Factor& f, int64_t first, uint32_t (&words)[4]) {
  const uint64_t seed = static_cast<uint64_t>(*f.seed);
  const uint64_t counter = static_cast<uint64_t>(first) / 8;
  const uint64_t next = counter + 1;
  words[0] = static_cast<uint32_t>(counter);
  words[1] = static_cast<uint32_t>(counter >> 32);
  philox(seed, words);
  const int skipped = static_cast<int>(first % 8);
  if (skipped == 0) {
    return;
  }
  uint32_t more[4] = {static_cast<uint32_t>(next), static_cast<uint32_t>(next >> 32)};
  philox(seed, more);
  uint32_t both[8] = {words[0], words[1], words[2], words[3], more[0], more[1], more[2], more[3]};
#pragma unroll
  for (int i = 0; i < 6; ++i) {
    both[i] = skipped >= 4 ? both[i + 2] : both[i];
  }
#pragma unroll
  for (int i = 0; i < 5; ++i) {
    both[i] = skipped % 4 >= 2 ? both[i + 1] : both[i];
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    words[i] = skipped % 2 == 1 ? both[i] >> 16 | both[i + 1] << 16 : both[i];
  }
}

// Whether element k of a vector is kept, by its draws.
__device__ __forceinline__ bool keeps(const Factor& f, const uint32_t (&words)[4], int k) {
  return (k % 2 == 0 ? words[k / 2] << 16 : words[k / 2]) >= f.threshold << 16;
}

// Zeroes the dropped elements of a tile of wide that starts at (row, column).
template <int ROWS, int COLUMNS, class T>
__device__ __forceinline__ void drop_tile(T* tile, const Factor& f, int64_t row, int64_t column) {
  constexpr int kPitch = COLUMNS + kVector<T>;
  constexpr int kPerRow = COLUMNS / kVector<T>;
#pragma unroll 1
  for (int i = threadIdx.x; i < ROWS * kPerRow; i += kThreads) {
    const int r = i / kPerRow;
    const int c = i % kPerRow * kVector<T>;
    uint32_t draws[4];
    draw_words(f, (row + r) * f.columns + column + c, draws);
    Words* const words = reinterpret_cast<Words*>(tile + r * kPitch + c);
    Words kept = *words;
#pragma unroll
    for (int k = 0; k < kVector<T>; ++k) {
      if (!keeps(f, draws, k)) {
        kept.word[k * sizeof(T) / 4] &= sizeof(T) == 4 ? 0u : k % 2 == 0 ? 0xFFFF0000u : 0xFFFFu;
      }
    }
    *words = kept;
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
#pragma unroll
    for (int k = 0; k < DEPTH; k += 16) {
      uint32_t left[4];
      load_matrices<A_BY_DEPTH>(left, A_BY_DEPTH ? a + (k + upper + row) * a_pitch + half
                                                 : a + (half + row) * a_pitch + k + upper);
      if constexpr (N == 8) {
        uint32_t right[2];
        load_matrices<B_BY_DEPTH>(
            right, B_BY_DEPTH ? b + (k + half + row) * b_pitch : b + row * b_pitch + k + half);
        tensor_core(T{}, sums[0], left, right);
      } else {
#pragma unroll
        for (int n = 0; n < N; n += 16) {
          uint32_t right[4];
          load_matrices<B_BY_DEPTH>(right, B_BY_DEPTH ? b + (k + half + row) * b_pitch + n + upper
                                                      : b + (n + upper + row) * b_pitch + k + half);
          tensor_core(T{}, sums[n / 8], left, {right[0], right[1]});
          tensor_core(T{}, sums[n / 8 + 1], left, {right[2], right[3]});
        }
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

// Element (column, rank) of one expert's W, counted in its memory.
__device__ __forceinline__ int64_t weight_offset(const Factor& f, int64_t column, int64_t rank) {
  return column * f.column_stride + rank * f.rank_stride;
}

template <class T>
__device__ __forceinline__ T* weight_at(const Factor& f, int64_t expert, int64_t column,
                                        int64_t rank) {
  return static_cast<T*>(f.weight) + expert * f.expert_stride + weight_offset(f, column, rank);
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
  if (f.dtype == ScalarType::BFloat16) {
    with_type(BFloat16{});
  } else if (f.dtype == ScalarType::Half) {
    with_type(Half{});
  } else {
    with_type(float{});
  }
}

}  // namespace megalora::cuda
