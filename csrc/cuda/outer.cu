#include "kernels.cuh"
#include "tile.cuh"

namespace megalora::cuda {
namespace {

// Tokens that are worth a split of their own.
constexpr int64_t kTokensPerSplit = 512;

template <class T, int RANK>
struct OuterTiles {
  static constexpr int kStages = stages<RANK>;
  static constexpr int kWidePitch = kTileColumns + kVector<T>;
  static constexpr int kThinPitch = RANK + kVector<T>;
  alignas(16) T wide[kStages][kDepth<T> * kWidePitch];
  alignas(16) T thin[kStages][kDepth<T> * kThinPitch];
};

// Tokens of one split of a dense factor, a multiple of kTileTokens.
int64_t tokens_per_split(const Factor& f, int splits) {
  const int64_t tokens = (f.tokens + splits - 1) / splits;
  return (tokens + kTileTokens - 1) / kTileTokens * kTileTokens;
}

// One block: 64 columns of one projection, RANK ranks, the tokens of one expert or of one split of
// a dense factor, in stages of kDepth tokens. It leaves W, or where there are several splits its
// part of it in workspace [split, columns * rank in the order of W's memory]. grid: (column tiles,
// rank tiles, experts or splits).
template <class T, int RANK>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    outer_kernel(const __grid_constant__ Factor f, int64_t split_tokens, float* workspace) {
  using Tiles = OuterTiles<T, RANK>;
  constexpr int kStages = Tiles::kStages;
  Tiles& shared = shared_memory<Tiles>();

  const ColumnTile columns = column_tile<kTileColumns>(f, static_cast<int>(blockIdx.x),
                                                       static_cast<int>(tiles_per_period(f)));
  const int first_rank = static_cast<int>(blockIdx.y) * RANK;
  const int ranks = clamp_to(f.rank - first_rank, RANK);
  const int64_t part = blockIdx.z;
  const bool grouped = f.offsets != nullptr;
  const int64_t begin = grouped ? expert_end(f, part - 1) : min(part * split_tokens, f.tokens);
  const int64_t end = grouped ? expert_end(f, part) : min(begin + split_tokens, f.tokens);
  const int steps = static_cast<int>(tiles_of(end - begin, kDepth<T>));

  int64_t token = begin;
  int load_stage = 0;
  const auto load_next = [&] {
    if (token < end) {
      const int rows = clamp_to(end - token, kDepth<T>);
      load_tile<kDepth<T>, kTileColumns>(shared.wide[load_stage],
                                         wide_at<T>(f, token, columns.begin), f.wide_stride, rows,
                                         columns.columns);
      load_tile<kDepth<T>, RANK>(shared.thin[load_stage],
                                 thin_at<T>(f, token, columns.projection, first_rank),
                                 f.thin_stride, rows, ranks);
      token += kDepth<T>;
      load_stage = next_stage<kStages>(load_stage);
    }
    commit_copies();
  };

  float sums[RANK / 8][4] = {};
  const int warp_column = static_cast<int>(threadIdx.x) / 32 * 16;
#pragma unroll 1
  for (int step = 0; step < kStages - 1; ++step) {
    load_next();
  }
  int stage = 0;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    wait_copies<kStages - 2>();
    __syncthreads();
    load_next();
    T* tile = shared.wide[stage];
    if (f.drops()) {
      drop_tile<kDepth<T>, kTileColumns>(tile, f, begin + step * kDepth<T>, columns.begin);
      __syncthreads();
    }
    multiply<true, true, kDepth<T>, RANK>(sums, tile + warp_column, Tiles::kWidePitch,
                                          shared.thin[stage], Tiles::kThinPitch);
    stage = next_stage<kStages>(stage);
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
      if (workspace != nullptr) {
        workspace[part * f.columns * f.rank +
                  weight_offset(f, columns.begin + column, first_rank + rank)] = sums[n][i];
      } else {
        store_weight<T>(f, grouped ? part : 0, columns.begin + column, first_rank + rank,
                        sums[n][i] * static_cast<float>(f.scale));
      }
    }
  }
}

}  // namespace

int outer_splits(const Factor& f) {
  if (f.offsets != nullptr) {
    return 1;
  }
  const int64_t useful = (f.tokens + kTokensPerSplit - 1) / kTokensPerSplit;
  return splits_for(column_tiles(f) * ((f.rank + 63) / 64), useful);
}

void outer(const Factor& f, float* workspace, Stream stream) {
  const int splits = outer_splits(f);
  const int64_t tokens = tokens_per_split(f, splits);
  float* const parts = splits > 1 ? workspace : nullptr;
  with_rank_tile(f, [&]<class T, int RANK>() {
    const dim3 grid(column_tiles(f), (f.rank + RANK - 1) / RANK,
                    f.offsets != nullptr ? f.experts : splits);
    launch(outer_kernel<T, RANK>, grid, sizeof(OuterTiles<T, RANK>), stream, f, tokens, parts);
  });
  if (parts != nullptr) {
    add_parts(f, {}, f, {parts, tokens}, stream);
  }
}

}  // namespace megalora::cuda
