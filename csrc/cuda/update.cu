#include "kernels.cuh"
#include "tile.cuh"

// A warp owns 128 bytes of a row at a time, each lane 16 of them. It multiplies W [16 columns,
// ranks] by thinᵀ [ranks, 8 tokens] on the tensor cores, so that a lane's sums, at rows lane / 4
// and lane / 4 + 8 and at tokens 2 (lane % 4) and the next, are those of the elements that it owns:
// row r of product j stands for column 8 (r % 8) + 2 j + r / 8 of the tile. W waits in shared
// memory in the order of the fragments; wide and thin go straight from global memory to registers.
namespace megalora::cuda {
namespace {

constexpr int kBlockTokens = 256;

// Products that a warp makes together: it asks for the elements of all before it uses one.
constexpr int kUnits = 2;
constexpr int kUnitTokens = 8;
constexpr int kWarpTokens = kUnits * kUnitTokens;
constexpr int kStepTokens = kThreads / 32 * kWarpTokens;

template <class T>
constexpr int kColumns = 128 / sizeof(T);

// Steps of 16 ranks whose W a block holds: as many as there are, or this many at a time.
constexpr int kMostSteps = 4;

// Blocks on a multiprocessor, by registers.
template <int STEPS, bool WHOLE>
constexpr int update_blocks = !WHOLE               ? 3
                              : STEPS < kMostSteps ? 5
                                                   : 4;

// W of a column tile and of 16 * STEPS ranks, zero beyond those that there are. 16-bit elements:
// vector 128 s + 32 j + lane is the fragment of product j and the ranks from 16 s on. fp32: vector
// 8 r + g has the columns from 4 g on of rank r.
template <int STEPS>
struct UpdateTiles {
  Words weight[STEPS * kThreads];
};

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

// Copies W of `columns` columns and of the ranks from first_rank on: each thread a vector of each
// 16 ranks.
template <int STEPS, class T>
__device__ __forceinline__ void load_weight(UpdateTiles<STEPS>& shared, const Factor& f,
                                            const T* weight, int columns, int first_rank) {
  const int thread = static_cast<int>(threadIdx.x);
  const Place at;
  const int column = sizeof(T) == 2 ? 8 * at.group + 2 * at.warp : thread % 8 * 4;
  const int rank = sizeof(T) == 2 ? 2 * at.member : thread / 8;
  const int columns_left = columns - column;
  const T* from = weight + weight_offset(f, column, first_rank + rank);
#pragma unroll(STEPS < kMostSteps ? STEPS : 1)
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
    shared.weight[step * kThreads + threadIdx.x] = loaded;
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

// sums += thin · Wᵀ over the ranks in shared memory, on the tensor cores.
template <class T, int STEPS>
__device__ __forceinline__ void multiply_fragments(float (&sums)[kUnits][4][4],
                                                   const UpdateTiles<STEPS>& shared,
                                                   const uint32_t (&thin)[kUnits][STEPS][2]) {
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const Words weight =
          shared.weight[step * kThreads + j * 32 + static_cast<int>(threadIdx.x) % 32];
#pragma unroll
      for (int unit = 0; unit < kUnits; ++unit) {
        tensor_core(T{}, sums[unit][j], weight.word, thin[unit][step]);
      }
    }
  }
}

// The same in fp32. thin points at the warp's first token.
template <int STEPS>
__device__ __forceinline__ void multiply_floats(float (&sums)[kUnits][4][4],
                                                const UpdateTiles<STEPS>& shared, const float* thin,
                                                int stride, int rows, int ranks) {
  const Place at;
  for (int rank = 0; rank < min(ranks, 16 * STEPS); ++rank) {
    float weight[4];
    memcpy(weight, &shared.weight[rank * 8 + at.group], sizeof(weight));
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int64_t row = unit * kUnitTokens + 2 * at.member + i;
        const float value = row < rows ? thin[row * stride + rank] : 0.0f;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          sums[unit][k][i] += value * weight[k];
        }
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

// Adds scale * the sums of token i of a unit, but not those that are dropped; the lane's first
// element is number `first` of wide.
template <class T>
__device__ __forceinline__ void add_sums(Vector<T>& wide, float (&sums)[4][4], int i,
                                         const Factor& f, int64_t first) {
  if (f.drops()) {
    uint32_t words[4];
    draw_words(f, first, words);
#pragma unroll
    for (int k = 0; k < kVector<T>; ++k) {
      if (!keeps(f, words, k)) {
        sum_at<T>(sums, i, k) = 0.0f;
      }
    }
  }
#pragma unroll
  for (int k = 0; k < kVector<T>; ++k) {
    wide.element[k] = static_cast<T>(static_cast<float>(wide.element[k]) +
                                     sum_at<T>(sums, i, k) * static_cast<float>(f.scale));
  }
}

// One block: kBlockTokens tokens of one expert, one column tile, a step of kStepTokens after the
// other; all ranks of a step, 16 * STEPS at a time, before wide is added to. grid: (column tiles,
// token slots), so that blocks of one time share rows.
template <class T, int STEPS, bool WHOLE>
__global__ void __launch_bounds__(kThreads, update_blocks<STEPS, WHOLE>)
    update_kernel(const __grid_constant__ Factor f, int tiles_per_period) {
  UpdateTiles<STEPS>& shared = shared_memory<UpdateTiles<STEPS>>();
  const TokenTile tokens = token_tile(f, static_cast<int>(blockIdx.y), kBlockTokens);
  if (tokens.begin >= tokens.end) {
    return;
  }
  const ColumnTile columns =
      column_tile<kColumns<T>>(f, static_cast<int>(blockIdx.x), tiles_per_period);
  const T* const weight = weight_at<T>(f, tokens.expert, columns.begin, 0);
  const int ranks = static_cast<int>(f.rank);
  const bool at_once = STEPS < kMostSteps || ranks <= 16 * STEPS;
  if (at_once) {
    load_weight(shared, f, weight, columns.columns, 0);
    __syncthreads();
  }

  const Place at;
  const int own_columns = columns.columns - at.group * kVector<T>;
  const int64_t column = columns.begin + at.group * kVector<T>;
  const int wide_stride = static_cast<int>(f.wide_stride);
  const int thin_stride = static_cast<int>(f.thin_stride);
  const int all_columns = static_cast<int>(f.columns);
  const int64_t token = tokens.begin + at.warp * kWarpTokens;
  int rows = clamp_to(tokens.end - tokens.begin, kBlockTokens) - at.warp * kWarpTokens;
  int steps = (clamp_to(tokens.end - tokens.begin, kBlockTokens) + kStepTokens - 1) / kStepTokens;
  T* wide = wide_at<T>(f, token + 2 * at.member, column);
  int64_t element = (token + 2 * at.member) * f.columns + column;  // counted without gaps
  const T* thin = thin_at<T>(f, token + (sizeof(T) == 2 ? at.group : 0), columns.projection, 0);
  const bool thin_in_words = (static_cast<uint32_t>(reinterpret_cast<uintptr_t>(thin)) |
                              static_cast<uint32_t>(f.thin_stride * sizeof(T)) |
                              static_cast<uint32_t>(ranks * sizeof(T))) %
                                 4 ==
                             0;

#pragma unroll 1
  for (; steps > 0; --steps) {
    Vector<T> vectors[kUnits][2];
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int64_t row = unit * kUnitTokens + i;
        load_wide<WHOLE>(vectors[unit][i], wide + row * wide_stride,
                         row + 2 * at.member < rows ? own_columns : 0);
      }
    }

    float sums[kUnits][4][4] = {};
    const auto add_ranks = [&](int first_rank) {
      const int left = ranks - first_rank;
      uint32_t fragments[kUnits][STEPS][2];
      if constexpr (sizeof(T) == 2) {
        if (thin_in_words) {
          load_thin<true>(fragments, thin + first_rank, thin_stride, rows, left);
        } else {
          load_thin<false>(fragments, thin + first_rank, thin_stride, rows, left);
        }
      }
      if (!at_once) {
        __syncthreads();
        load_weight(shared, f, weight, columns.columns, first_rank);
        __syncthreads();
      }
      if constexpr (sizeof(T) == 2) {
        multiply_fragments<T>(sums, shared, fragments);
      } else {
        multiply_floats(sums, shared, thin + first_rank, thin_stride, rows, left);
      }
    };
    if constexpr (STEPS < kMostSteps) {
      add_ranks(0);
    } else {
#pragma unroll 1
      for (int first_rank = 0; first_rank < ranks; first_rank += 16 * STEPS) {
        add_ranks(first_rank);
      }
    }

#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int64_t row = unit * kUnitTokens + i;
        add_sums(vectors[unit][i], sums[unit], i, f, element + row * all_columns);
        store_wide<WHOLE>(wide + row * wide_stride, vectors[unit][i],
                          row + 2 * at.member < rows ? own_columns : 0);
      }
    }
    rows -= kStepTokens;
    wide += int64_t{kStepTokens} * wide_stride;
    thin += int64_t{kStepTokens} * thin_stride;
    element += int64_t{kStepTokens} * all_columns;
  }
}

// Whether every vector of wide is at a multiple of 16 bytes and in one projection.
template <class T>
bool in_vectors(const Factor& f) {
  bool whole = reinterpret_cast<uintptr_t>(f.wide) % 16 == 0 && f.wide_stride % kVector<T> == 0;
  for (int p = 0; p < f.num_segments; ++p) {
    whole = whole && f.segment[p] % kVector<T> == 0;
  }
  return whole;
}

template <class T, int STEPS>
void start(const Factor& f, Stream stream) {
  const int per_period = static_cast<int>(tiles_per_period(f, kColumns<T>));
  const dim3 grid(f.columns / f.period * per_period, token_slots(f, kBlockTokens));
  if (in_vectors<T>(f)) {
    launch(update_kernel<T, STEPS, true>, grid, sizeof(UpdateTiles<STEPS>), stream, f, per_period);
  } else {
    launch(update_kernel<T, STEPS, false>, grid, sizeof(UpdateTiles<STEPS>), stream, f, per_period);
  }
}

template <class T>
void start(const Factor& f, Stream stream) {
  f.rank <= 16   ? start<T, 1>(f, stream)
  : f.rank <= 32 ? start<T, 2>(f, stream)
                 : start<T, 4>(f, stream);
}

}  // namespace

void update(const Factor& f, Stream stream) {
  if (f.dtype == ScalarType::BFloat16) {
    start<BFloat16>(f, stream);
  } else if (f.dtype == ScalarType::Half) {
    start<Half>(f, stream);
  } else {
    start<float>(f, stream);
  }
}

}  // namespace megalora::cuda
