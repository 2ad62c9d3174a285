#include "kernels.cuh"
#include "tile.cuh"

namespace megalora::cuda {
namespace {

// Blocks that fill the largest GPUs; tokens that are worth a split of their own. Constants, so that
// the order of summation, and with it every bit of the result, depends on the shapes alone.
constexpr int64_t kWantedBlocks = 264;
constexpr int64_t kTokensPerSplit = 512;

// One block: 64 columns of one projection, RANK ranks, the tokens of one expert or of one split of
// a dense factor, in stages of kDepth tokens. grid: (column tiles, rank tiles, experts or splits).
template <class T, int RANK>
__global__ void __launch_bounds__(kThreads)
    outer_kernel(const __grid_constant__ Factor f, int64_t splits, float* workspace) {
  constexpr int kStages = stages<RANK>;
  constexpr int kWidePitch = kTileColumns + kVector<T>;
  constexpr int kThinPitch = RANK + kVector<T>;
  __shared__ __align__(16) T wide[kStages][kDepth<T> * kWidePitch];
  __shared__ __align__(16) T thin[kStages][kDepth<T> * kThinPitch];

  const ColumnTile columns = column_tile(f, blockIdx.x);
  const int64_t first_rank = static_cast<int64_t>(blockIdx.y) * RANK;
  const int ranks = clamp_to(f.rank - first_rank, RANK);
  const int64_t part = blockIdx.z;
  const bool grouped = f.offsets != nullptr;
  const int64_t expert = grouped ? part : 0;
  const int64_t tokens_per_split = (f.tokens + splits - 1) / splits;
  const int64_t begin = grouped ? expert_end(f, part - 1) : min(part * tokens_per_split, f.tokens);
  const int64_t end = grouped ? expert_end(f, part) : min(begin + tokens_per_split, f.tokens);
  const int64_t steps = (end - begin + kDepth<T> - 1) / kDepth<T>;

  const auto load_stage = [&](int64_t step) {
    if (step < steps) {
      const int64_t token = begin + step * kDepth<T>;
      const int rows = clamp_to(end - token, kDepth<T>);
      load_tile<kDepth<T>, kTileColumns>(wide[step % kStages], wide_at<T>(f, token, columns.begin),
                                         f.wide_stride, rows, columns.columns);
      load_tile<kDepth<T>, RANK>(thin[step % kStages],
                                 thin_at<T>(f, token, columns.projection, first_rank),
                                 f.thin_stride, rows, ranks);
    }
    commit_copies();
  };

  float sums[RANK / 8][4] = {};
  const int warp_column = static_cast<int>(threadIdx.x) / 32 * 16;
  for (int64_t step = 0; step < kStages - 1; ++step) {
    load_stage(step);
  }
  for (int64_t step = 0; step < steps; ++step) {
    wait_copies<kStages - 2>();
    __syncthreads();
    load_stage(step + kStages - 1);
    T* tile = wide[step % kStages];
    if (f.drops()) {
      drop_tile<kDepth<T>, kTileColumns>(tile, f, begin + step * kDepth<T>, columns.begin);
      __syncthreads();
    }
    multiply<true, true, kDepth<T>, RANK>(sums, tile + warp_column, kWidePitch,
                                          thin[step % kStages], kThinPitch);
  }

#pragma unroll
  for (int n = 0; n < RANK / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int column = warp_column + sum_row(i);
      const int rank = n * 8 + sum_column(i);
      if (column >= columns.columns || rank >= ranks) {
        continue;
      }
      if (splits > 1) {
        workspace[(part * f.columns + columns.begin + column) * f.rank + first_rank + rank] =
            sums[n][i];
      } else {
        store_weight<T>(f, expert, columns.begin + column, first_rank + rank,
                        sums[n][i] * static_cast<float>(f.scale));
      }
    }
  }
}

// W = (or +=) scale * the sum of the splits, always in the same order.
template <class T>
__global__ void __launch_bounds__(kThreads)
    add_splits_kernel(const __grid_constant__ Factor f, int64_t splits, const float* workspace) {
  const int64_t count = f.columns * f.rank;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= count) {
    return;
  }
  float sum = 0.0f;
  for (int64_t split = 0; split < splits; ++split) {
    sum += workspace[split * count + index];
  }
  store_weight<T>(f, 0, index / f.rank, index % f.rank, sum * static_cast<float>(f.scale));
}

}  // namespace

int64_t outer_splits(const Factor& f) {
  if (f.offsets != nullptr) {
    return 1;
  }
  const int64_t tiles = column_tiles(f) * ((f.rank + 63) / 64);
  const int64_t wanted = (kWantedBlocks + tiles - 1) / tiles;
  const int64_t useful = (f.tokens + kTokensPerSplit - 1) / kTokensPerSplit;
  return useful < 1 ? 1 : wanted < useful ? wanted : useful;
}

void outer(const Factor& f, float* workspace, Stream stream) {
  const int64_t splits = outer_splits(f);
  with_rank_tile(f, [&]<class T, int RANK>() {
    const dim3 grid(column_tiles(f), (f.rank + RANK - 1) / RANK,
                    f.offsets != nullptr ? f.experts : splits);
    launch(outer_kernel<T, RANK>, grid, stream, f, splits, workspace);
    if (splits > 1) {
      const dim3 blocks((f.columns * f.rank + kThreads - 1) / kThreads);
      launch(add_splits_kernel<T>, blocks, stream, f, splits, static_cast<const float*>(workspace));
    }
  });
}

}  // namespace megalora::cuda
