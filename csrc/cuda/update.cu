#include "fragments.cuh"
#include "kernels.cuh"

namespace megalora::cuda {
namespace {

constexpr int kBlockTokens = 256;

// Steps of 16 ranks whose W a block holds: as many as there are, or this many at a time.
constexpr int kMostSteps = 4;

// Blocks on a multiprocessor, by registers.
template <int STEPS, bool WHOLE>
constexpr int update_blocks = !WHOLE               ? 3
                              : STEPS < kMostSteps ? 5
                                                   : 4;

template <int STEPS>
struct UpdateTiles {
  Fragments<STEPS> weight;
};

// multiply_fragments in fp32, without tensor cores. thin points at the warp's first token.
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
  constexpr int kUnrolled = STEPS < kMostSteps ? STEPS : 1;
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
    load_weight<STEPS, kUnrolled>(shared.weight, f, weight, columns.columns, 0);
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
  const bool thin_in_words = in_words(f, thin);

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
        load_weight<STEPS, kUnrolled>(shared.weight, f, weight, columns.columns, first_rank);
        __syncthreads();
      }
      if constexpr (sizeof(T) == 2) {
        multiply_fragments<T, STEPS>(sums, shared.weight, fragments);
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
