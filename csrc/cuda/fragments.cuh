#pragma once

#include "tile.cuh"

// thin · Wᵀ where its elements are wanted: in the registers of the lane that has those of wide.
//
// A warp owns 128 bytes of a row at a time, each lane 16 of them. It multiplies W [16 columns,
// ranks] by thinᵀ [ranks, 8 tokens] on the tensor cores, so that a lane's sums, at rows lane / 4
// and lane / 4 + 8 and at tokens 2 (lane % 4) and the next, are those of the elements that it owns:
// row r of product j stands for column 8 (r % 8) + 2 j + r / 8 of the tile. W waits in shared
// memory in the order of the fragments; wide and thin go straight from global memory to registers.
namespace megalora::cuda {

// Tokens of one product, a unit; products that a warp makes together: it asks for the elements of
// all before it uses one.
constexpr int kUnitTokens = 8;
constexpr int kUnits = 2;
constexpr int kWarpTokens = kUnits * kUnitTokens;
constexpr int kStepTokens = kThreads / 32 * kWarpTokens;

template <class T>
constexpr int kColumns = 128 / sizeof(T);

// Where a lane stands: its columns in the tile; its tokens and ranks in a product.
struct Place {
  int warp = static_cast<int>(threadIdx.x / 32);
  int group = static_cast<int>(threadIdx.x % 32 / 4);
  int member = static_cast<int>(threadIdx.x % 4);
};

template <class T>
__device__ __forceinline__ uint32_t word_of(T first, T second) {
  const T pair[2] = {first, second};
  uint32_t word;
  memcpy(&word, pair, sizeof(word));
  return word;
}

// W of a column tile and of 16 * STEPS ranks, zero beyond those that there are. 16-bit elements:
// vector 128 s + 32 j + lane is the fragment of product j and the ranks from 16 s on. fp32: vector
// 8 r + g has the columns from 4 g on of rank r.
template <int STEPS>
using Fragments = Words[STEPS * kThreads];

// Copies W of `columns` columns and of the ranks from first_rank on: each thread a vector of each
// 16 ranks. UNROLLED: steps whose loads wait together.
template <int STEPS, int UNROLLED, class T>
__device__ __forceinline__ void load_weight(Fragments<STEPS>& to, const Factor& f, const T* weight,
                                            int columns, int first_rank) {
  const int thread = static_cast<int>(threadIdx.x);
  const Place at;
  const int column = sizeof(T) == 2 ? 8 * at.group + 2 * at.warp : thread % 8 * 4;
  const int rank = sizeof(T) == 2 ? 2 * at.member : thread / 8;
  const int columns_left = columns - column;
  const T* from = weight + weight_offset(f, column, first_rank + rank);
#pragma unroll(UNROLLED)
  for (int step = 0; step < STEPS; ++step) {
    const int ranks_left = static_cast<int>(f.rank) - first_rank - 16 * step - rank;
    const auto element = [&](int c, int r) {
      return c < columns_left && r < ranks_left ? from[weight_offset(f, c, r)] : T(0);
    };
    Words loaded;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 2) {
        const int r = i / 2 * 8;
        loaded.word[i] = word_of(element(i % 2, r), element(i % 2, r + 1));
      } else {
        const T value = element(i, 0);
        memcpy(&loaded.word[i], &value, sizeof(value));
      }
    }
    from += 16 * f.rank_stride;
    to[step * kThreads + threadIdx.x] = loaded;
  }
}

// The lane's parts of thinᵀ [16 ranks, 8 tokens] of each unit, zero beyond `ranks` and `rows`. thin
// points at the lane's first token and at the first of these ranks, WORDS where at whole words.
template <bool WORDS, int STEPS, class T>
__device__ __forceinline__ void load_thin(uint32_t (&fragments)[kUnits][STEPS][2], const T* thin,
                                          int stride, int rows, int ranks) {
  const Place at;
#pragma unroll
  for (int unit = 0; unit < kUnits; ++unit) {
    const bool wanted = unit * kUnitTokens + at.group < rows;
    const T* const from = thin + int64_t{unit * kUnitTokens} * stride + 2 * at.member;
    const auto element = [&](int rank) {
      return wanted && 2 * at.member + rank < ranks ? from[rank] : T(0);
    };
#pragma unroll
    for (int i = 0; i < 2 * STEPS; ++i) {
      uint32_t& word = fragments[unit][i / 2][i % 2];
      if constexpr (WORDS) {
        word = wanted && 2 * at.member + 8 * i < ranks
                   ? *reinterpret_cast<const uint32_t*>(from + 8 * i)
                   : 0;
      } else {
        word = word_of(element(8 * i), element(8 * i + 1));
      }
    }
  }
}

// Whether load_thin may read whole words at thin and in the rows behind it.
template <class T>
__device__ __forceinline__ bool in_words(const Factor& f, const T* thin) {
  return (static_cast<uint32_t>(reinterpret_cast<uintptr_t>(thin)) |
          static_cast<uint32_t>(f.thin_stride * sizeof(T)) |
          static_cast<uint32_t>(f.rank * sizeof(T))) %
             4 ==
         0;
}

// sums += thin · Wᵀ of UNITS units over the ranks in shared memory, on the tensor cores.
template <class T, int STEPS, int UNITS>
__device__ __forceinline__ void multiply_fragments(float (&sums)[UNITS][4][4],
                                                   const Fragments<STEPS>& weight,
                                                   const uint32_t (*thin)[STEPS][2]) {
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const Words column = weight[step * kThreads + j * 32 + static_cast<int>(threadIdx.x) % 32];
#pragma unroll
      for (int unit = 0; unit < UNITS; ++unit) {
        tensor_core(T{}, sums[unit][j], column.word, thin[unit][step]);
      }
    }
  }
}

// The sum of the lane's column k and its token i of a unit.
template <class T>
__device__ __forceinline__ float& sum_at(float (&sums)[4][4], int i, int k) {
  return sizeof(T) == 2 ? sums[k / 2][k % 2 * 2 + i] : sums[k][i];
}

// The lane's vector of wide, of which `columns` elements are there: WHOLE where they are all or
// none, at a multiple of 16 bytes.
template <bool WHOLE, class T>
__device__ __forceinline__ void load_wide(Vector<T>& to, const T* wide, int columns) {
  if constexpr (WHOLE) {
    if (columns > 0) {
      load_vector(&to, wide);
    }
  } else {
#pragma unroll
    for (int k = 0; k < kVector<T>; ++k) {
      to.element[k] = k < columns ? wide[k] : T(0);
    }
  }
}

template <bool WHOLE, class T>
__device__ __forceinline__ void store_wide(T* wide, const Vector<T>& from, int columns) {
  if constexpr (WHOLE) {
    if (columns > 0) {
      store_vector(wide, &from);
    }
  } else {
#pragma unroll
    for (int k = 0; k < kVector<T>; ++k) {
      if (k < columns) {
        wide[k] = from.element[k];
      }
    }
  }
}

}  // namespace megalora::cuda
