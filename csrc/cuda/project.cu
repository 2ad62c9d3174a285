#include "kernels.cuh"
#include "tile.cuh"

namespace megalora::cuda {
namespace {

// One block: 64 tokens of one expert, one projection, RANK ranks. It reads only the columns of that
// projection, in stages of kDepth columns. grid: (token slots, projections * rank tiles).
template <class T, int RANK, bool RANK_FIRST>
__global__ void __launch_bounds__(kThreads) project_kernel(const __grid_constant__ Factor f) {
  constexpr int kStages = stages<RANK>;
  constexpr int kWidePitch = kDepth<T> + kVector<T>;
  constexpr int kWeightRows = RANK_FIRST ? RANK : kDepth<T>;
  constexpr int kWeightColumns = RANK_FIRST ? kDepth<T> : RANK;
  constexpr int kWeightPitch = kWeightColumns + kVector<T>;
  __shared__ __align__(16) T wide[kStages][kTileTokens * kWidePitch];
  __shared__ __align__(16) T weight[kStages][kWeightRows * kWeightPitch];

  const TokenTile tokens = token_tile(f, blockIdx.x);
  if (tokens.begin >= tokens.result_end) {
    return;
  }
  const int64_t rank_tiles = (f.rank + RANK - 1) / RANK;
  const int projection = static_cast<int>(blockIdx.y / rank_tiles);
  const int64_t first_rank = blockIdx.y % rank_tiles * RANK;
  const int ranks = clamp_to(f.rank - first_rank, RANK);
  const int rows = clamp_to(tokens.end - tokens.begin, kTileTokens);

  int64_t start = 0;
  for (int p = 0; p < projection; ++p) {
    start += f.segment[p];
  }
  const int64_t size = f.segment[projection];
  const int64_t steps_per_block = (size + kDepth<T> - 1) / kDepth<T>;
  const int64_t steps = f.columns / f.period * steps_per_block;

  const auto column_of = [&](int64_t step) {
    return step / steps_per_block * f.period + start + step % steps_per_block * kDepth<T>;
  };
  const auto load_stage = [&](int64_t step) {
    if (step < steps) {
      const int64_t column = column_of(step);
      const int columns = clamp_to(size - step % steps_per_block * kDepth<T>, kDepth<T>);
      load_tile<kTileTokens, kDepth<T>>(wide[step % kStages], wide_at<T>(f, tokens.begin, column),
                                        f.wide_stride, rows, columns);
      load_tile<kWeightRows, kWeightColumns>(
          weight[step % kStages], weight_at<T>(f, tokens.expert, column, first_rank),
          RANK_FIRST ? f.rank_stride : f.column_stride, RANK_FIRST ? ranks : columns,
          RANK_FIRST ? columns : ranks);
    }
    commit_copies();
  };

  float sums[RANK / 8][4] = {};
  const int warp_row = static_cast<int>(threadIdx.x) / 32 * 16;
  for (int64_t step = 0; step < kStages - 1; ++step) {
    load_stage(step);
  }
  for (int64_t step = 0; step < steps; ++step) {
    wait_copies<kStages - 2>();
    __syncthreads();
    load_stage(step + kStages - 1);
    T* tile = wide[step % kStages];
    if (f.drops()) {
      drop_tile<kTileTokens, kDepth<T>>(tile, f, tokens.begin, column_of(step));
      __syncthreads();
    }
    multiply<false, !RANK_FIRST, kDepth<T>, RANK>(sums, tile + warp_row * kWidePitch, kWidePitch,
                                                  weight[step % kStages], kWeightPitch);
  }

#pragma unroll
  for (int n = 0; n < RANK / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t token = tokens.begin + warp_row + sum_row(i);
      const int rank = n * 8 + sum_column(i);
      if (token < tokens.result_end && rank < ranks) {
        *thin_at<T>(f, token, projection, first_rank + rank) =
            static_cast<T>(sums[n][i] * static_cast<float>(f.scale));
      }
    }
  }
}

}  // namespace

void project(const Factor& f, Stream stream) {
  with_rank_tile(f, [&]<class T, int RANK>() {
    const int64_t rank_tiles = (f.rank + RANK - 1) / RANK;
    const dim3 grid(token_slots(f), f.num_segments * rank_tiles);
    launch(f.column_stride == 1 ? project_kernel<T, RANK, true> : project_kernel<T, RANK, false>,
           grid, stream, f);
  });
}

}  // namespace megalora::cuda
