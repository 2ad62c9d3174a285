#include <algorithm>

#include "kernels.cuh"
#include "tile.cuh"

namespace megalora::cuda {
namespace {

// Columns of a projection that are worth a split of their own.
constexpr int64_t kColumnsPerSplit = 512;

template <class T, int RANK, bool RANK_FIRST>
struct ProjectTiles {
  static constexpr int kStages = stages<RANK>;
  static constexpr int kWidePitch = kDepth<T> + kVector<T>;
  static constexpr int kWeightRows = RANK_FIRST ? RANK : kDepth<T>;
  static constexpr int kWeightColumns = RANK_FIRST ? kDepth<T> : RANK;
  static constexpr int kWeightPitch = kWeightColumns + kVector<T>;
  alignas(16) T wide[kStages][kTileTokens * kWidePitch];
  alignas(16) T weight[kStages][kWeightRows * kWeightPitch];
};

// One block: 64 tokens of one expert, one projection, RANK ranks, one split of the columns. It
// reads only the columns of that projection, in stages of kDepth columns, and leaves thin, or where
// there are several splits its part of it in workspace [split, tokens, projections * rank]. grid:
// (token slots, projections * rank tiles, splits).
template <class T, int RANK, bool RANK_FIRST>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    project_kernel(const __grid_constant__ Factor f, int splits, float* workspace) {
  using Tiles = ProjectTiles<T, RANK, RANK_FIRST>;
  constexpr int kStages = Tiles::kStages;
  Tiles& shared = shared_memory<Tiles>();

  const TokenTile tokens = token_tile(f, static_cast<int>(blockIdx.x));
  if (tokens.begin >= tokens.result_end) {
    return;
  }
  const int rank_tiles = (static_cast<int>(f.rank) + RANK - 1) / RANK;
  const int projection = static_cast<int>(blockIdx.y) / rank_tiles;
  const int first_rank = static_cast<int>(blockIdx.y) % rank_tiles * RANK;
  const int ranks = clamp_to(f.rank - first_rank, RANK);
  const int rows = clamp_to(tokens.end - tokens.begin, kTileTokens);

  const int split = static_cast<int>(blockIdx.z);
  const int all_steps =
      static_cast<int>(divide(f.columns, f.period) * tiles_of(f.segment[projection], kDepth<T>));
  const int steps_per_split = (all_steps + splits - 1) / splits;
  const int first_step = split * steps_per_split;
  const int steps = clamp_to(all_steps - first_step, steps_per_split);

  ColumnSteps<kDepth<T>> loaded(f, projection, first_step);
  int to_load = steps;
  int load_stage = 0;
  const auto load_next = [&] {
    if (to_load-- > 0) {
      load_tile<kTileTokens, kDepth<T>>(shared.wide[load_stage],
                                        wide_at<T>(f, tokens.begin, loaded.column), f.wide_stride,
                                        rows, loaded.columns());
      load_tile<Tiles::kWeightRows, Tiles::kWeightColumns>(
          shared.weight[load_stage], weight_at<T>(f, tokens.expert, loaded.column, first_rank),
          RANK_FIRST ? f.rank_stride : f.column_stride, RANK_FIRST ? ranks : loaded.columns(),
          RANK_FIRST ? loaded.columns() : ranks);
      loaded.advance();
      load_stage = next_stage<kStages>(load_stage);
    }
    commit_copies();
  };

  float sums[RANK / 8][4] = {};
  const int warp_row = static_cast<int>(threadIdx.x) / 32 * 16;
#pragma unroll 1
  for (int step = 0; step < kStages - 1; ++step) {
    load_next();
  }
  ColumnSteps<kDepth<T>> multiplied(f, projection, first_step);
  int stage = 0;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    wait_copies<kStages - 2>();
    __syncthreads();
    load_next();
    T* tile = shared.wide[stage];
    if (f.drops()) {
      drop_tile<kTileTokens, kDepth<T>>(tile, f, tokens.begin, multiplied.column);
      multiplied.advance();
      __syncthreads();
    }
    multiply<false, !RANK_FIRST, kDepth<T>, RANK>(sums, tile + warp_row * Tiles::kWidePitch,
                                                  Tiles::kWidePitch, shared.weight[stage],
                                                  Tiles::kWeightPitch);
    stage = next_stage<kStages>(stage);
  }

  const int64_t width = f.num_segments * f.rank;
#pragma unroll
  for (int n = 0; n < RANK / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t token = tokens.begin + warp_row + sum_row(i);
      const int rank = n * 8 + sum_column(i);
      if (token >= tokens.result_end || rank >= ranks) {
        continue;
      }
      if (splits > 1) {
        workspace[(split * f.tokens + token) * width + projection * f.rank + first_rank + rank] =
            sums[n][i];
      } else {
        *thin_at<T>(f, token, projection, first_rank + rank) =
            static_cast<T>(sums[n][i] * static_cast<float>(f.scale));
      }
    }
  }
}

}  // namespace

int project_splits(const Factor& f) {
  if (f.offsets != nullptr) {
    return 1;
  }
  const int64_t blocks = token_slots(f) * f.num_segments * ((f.rank + 63) / 64);
  const int64_t useful = f.columns / f.num_segments / kColumnsPerSplit;
  return splits_for(blocks, useful);
}

void project(const Factor& f, float* workspace, Stream stream) {
  const int splits = project_splits(f);
  with_rank_tile(f, [&]<class T, int RANK>() {
    const int64_t rank_tiles = (f.rank + RANK - 1) / RANK;
    const dim3 grid(token_slots(f), f.num_segments * rank_tiles, splits);
    if (f.column_stride == 1) {
      launch(project_kernel<T, RANK, true>, grid, sizeof(ProjectTiles<T, RANK, true>), stream, f,
             splits, workspace);
    } else {
      launch(project_kernel<T, RANK, false>, grid, sizeof(ProjectTiles<T, RANK, false>), stream, f,
             splits, workspace);
    }
  });
  if (splits > 1) {
    ThinParts parts{workspace, {}};
    std::fill_n(parts.count, f.num_segments, splits);
    add_parts(f, parts, f, {}, stream);
  }
}

}  // namespace megalora::cuda
