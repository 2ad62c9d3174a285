#include <algorithm>

#include "kernels.cuh"
#include "tile.cuh"

namespace megalora::cuda {
namespace {

// The fewest tokens that are worth a block; and the most where experts have unlike numbers of them,
// so that some waves of small blocks even them out.
constexpr int64_t kFewestTokens = 128;
constexpr int64_t kMostGroupedTokens = 256;

// Column tiles of one block: their part of dB stays in its registers, their B in shared memory.
constexpr int kGroupTiles = 4;

// Blocks on a multiprocessor, by registers and shared memory.
template <int RANK>
constexpr int blocks_per_processor = RANK <= 8    ? 5
                                     : RANK <= 16 ? 4
                                                  : 3;

template <class T, int RANK>
struct BackwardTiles {
  static constexpr int kStages = 3;
  static constexpr int kWidePitch = kTileColumns + kVector<T>;
  static constexpr int kRankPitch = RANK + kVector<T>;
  alignas(16) T wide[kStages][kTileTokens * kWidePitch];
  alignas(16) T thin[kStages][kTileTokens * kRankPitch];
  alignas(16) T weight[kGroupTiles][kTileColumns * kRankPitch];
};

__host__ __device__ __forceinline__ int64_t tiles_of_projection(const Factor& f, int p) {
  return divide(f.columns, f.period) * tiles_of(f.segment[p]);
}

// Groups of at most `size` column tiles of one projection.
__host__ __device__ __forceinline__ int groups_of(const Factor& f, int p, int size) {
  return static_cast<int>(ceil_divide(tiles_of_projection(f, p), size));
}

// How the work is divided, from the shapes alone.
struct Division {
  int64_t groups;             // of all projections
  int64_t most_groups;        // of one
  int count[kMaxSegments]{};  // of each
  int64_t tokens;             // of one block, a multiple of kTileTokens
  int64_t slots;              // of so many tokens
};

template <int RANK>
Division division(const Factor& f) {
  Division d{};
  for (int p = 0; p < f.num_segments; ++p) {
    d.count[p] = groups_of(f, p, kGroupTiles);
    d.groups += d.count[p];
    d.most_groups = std::max<int64_t>(d.most_groups, d.count[p]);
  }
  const int64_t blocks_at_once = kBlocksAtOnce / kBlocksPerProcessor * blocks_per_processor<RANK>;
  const int64_t blocks = std::max<int64_t>(blocks_at_once / d.groups, 1);
  const int64_t tokens = (f.tokens + blocks - 1) / blocks;
  d.tokens = std::max((tokens + kTileTokens - 1) / kTileTokens * kTileTokens, kFewestTokens);
  if (f.offsets != nullptr) {
    d.tokens = std::min(d.tokens, kMostGroupedTokens);
  }
  d.slots = token_slots(f, d.tokens);
  return d;
}

// Calls body with the narrowest rank tile that covers the rank, at most 32.
template <class Body>
auto with_narrow_rank_tile(const Factor& f, Body body) {
  if (f.rank <= 8) {
    return body.template operator()<8>();
  }
  return f.rank <= 16 ? body.template operator()<16>() : body.template operator()<32>();
}

int64_t ds_parts_size(const Factor& f, const Division& d) {
  return d.most_groups * f.tokens * f.num_segments * f.rank;
}

// One block: block_tokens tokens of one expert, a group of column tiles of one projection. It reads
// its part of dY once and leaves its parts of ds [group of the projection, tokens, projections *
// rank] and of dB [token slot, columns * rank in the order of dB's memory]. grid: (groups, token
// slots).
template <class T, int RANK>
__global__ void __launch_bounds__(kThreads, blocks_per_processor<RANK>)
    backward_kernel(const __grid_constant__ Factor dgrad, const __grid_constant__ Factor wgrad,
                    int64_t block_tokens, float* ds_parts, float* db_parts) {
  using Tiles = BackwardTiles<T, RANK>;
  using Columns = ColumnSteps<kTileColumns>;
  constexpr int kStages = Tiles::kStages;
  Tiles& shared = shared_memory<Tiles>();

  const int64_t slot = blockIdx.y;
  const TokenTile tokens = token_tile(dgrad, static_cast<int>(slot), block_tokens);
  if (tokens.begin >= tokens.result_end) {
    return;
  }
  int projection = 0;
  int group = static_cast<int>(blockIdx.x);
  for (; group >= groups_of(dgrad, projection, kGroupTiles); ++projection) {
    group -= groups_of(dgrad, projection, kGroupTiles);
  }
  const int ranks = static_cast<int>(dgrad.rank);
  // Groups of a projection are alike: 6 tiles are 3 and 3, where a group holds 4.
  const int64_t tiles = tiles_of_projection(dgrad, projection);
  const int even_tiles =
      static_cast<int>(ceil_divide(tiles, groups_of(dgrad, projection, kGroupTiles)));
  const int first_tile = group * even_tiles;
  const int num_tiles = clamp_to(tiles - first_tile, even_tiles);
  const Columns first_columns(dgrad, projection, first_tile);

  Columns loaded = first_columns;
  int loaded_tile = 0;
  int load_stage = 0;
  int load_buffer = 0;
  int64_t load_token = tokens.begin;
  const auto load_next = [&] {
    if (load_token < tokens.result_end) {
      const int rows = clamp_to(tokens.end - load_token, kTileTokens);
      if (loaded_tile == 0) {
        load_tile<kTileTokens, RANK>(shared.thin[load_buffer],
                                     thin_at<T>(wgrad, load_token, projection, 0),
                                     wgrad.thin_stride, rows, ranks);
        load_buffer = next_stage<kStages>(load_buffer);
      }
      load_tile<kTileTokens, kTileColumns>(shared.wide[load_stage],
                                           wide_at<T>(dgrad, load_token, loaded.column),
                                           dgrad.wide_stride, rows, loaded.columns());
      load_stage = next_stage<kStages>(load_stage);
      loaded.advance();
      if (++loaded_tile == num_tiles) {
        loaded_tile = 0;
        loaded = first_columns;
        load_token += kTileTokens;
      }
    }
    commit_copies();
  };

  Columns columns = first_columns;
#pragma unroll 1
  for (int tile = 0; tile < num_tiles; ++tile) {
    load_tile<kTileColumns, RANK>(shared.weight[tile],
                                  weight_at<T>(dgrad, tokens.expert, columns.column, 0),
                                  dgrad.column_stride, columns.columns(), ranks);
    columns.advance();
  }
#pragma unroll 1
  for (int step = 0; step < kStages - 1; ++step) {
    load_next();
  }

  float db_sums[kGroupTiles][RANK / 8][4] = {};
  const int warp_row = static_cast<int>(threadIdx.x) / 32 * 16;
  const int64_t width = dgrad.num_segments * dgrad.rank;
  int stage = 0;
  int buffer = 0;
#pragma unroll 1
  for (int64_t token = tokens.begin; token < tokens.result_end; token += kTileTokens) {
    float ds_sums[RANK / 8][4] = {};
#pragma unroll
    for (int tile = 0; tile < kGroupTiles; ++tile) {
      if (tile < num_tiles) {
        wait_copies<kStages - 2>();
        __syncthreads();
        load_next();
        const T* const wide = shared.wide[stage];
        multiply<false, true, kTileColumns, RANK>(ds_sums, wide + warp_row * Tiles::kWidePitch,
                                                  Tiles::kWidePitch, shared.weight[tile],
                                                  Tiles::kRankPitch);
        multiply<true, true, kTileTokens, RANK>(db_sums[tile], wide + warp_row, Tiles::kWidePitch,
                                                shared.thin[buffer], Tiles::kRankPitch);
        stage = next_stage<kStages>(stage);
      }
    }
    buffer = next_stage<kStages>(buffer);
    float* const ds = ds_parts + (group * dgrad.tokens + token) * width + projection * ranks;
    const int rows = clamp_to(tokens.result_end - token, kTileTokens);
#pragma unroll
    for (int n = 0; n < RANK / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = warp_row + sum_row(i);
        const int rank = n * 8 + sum_column(i);
        if (row < rows && rank < ranks) {
          ds[row * width + rank] = ds_sums[n][i];
        }
      }
    }
  }

  columns = first_columns;
#pragma unroll
  for (int tile = 0; tile < kGroupTiles; ++tile) {
    if (tile < num_tiles) {
      float* const db = db_parts + slot * dgrad.columns * ranks;
#pragma unroll
      for (int n = 0; n < RANK / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int column = warp_row + sum_row(i);
          const int rank = n * 8 + sum_column(i);
          if (column < columns.columns() && rank < ranks) {
            db[weight_offset(wgrad, columns.column + column, rank)] = db_sums[tile][n][i];
          }
        }
      }
      columns.advance();
    }
  }
}

template <class T>
void start(const Factor& dgrad, const Factor& wgrad, float* workspace, Stream stream) {
  with_narrow_rank_tile(dgrad, [&]<int RANK>() {
    const Division d = division<RANK>(dgrad);
    float* const db_parts = workspace + ds_parts_size(dgrad, d);
    launch(backward_kernel<T, RANK>, dim3(d.groups, d.slots), sizeof(BackwardTiles<T, RANK>),
           stream, dgrad, wgrad, d.tokens, workspace, db_parts);
    ThinParts ds{workspace, {}};
    std::copy_n(d.count, kMaxSegments, ds.count);
    add_parts(dgrad, ds, wgrad, {db_parts, d.tokens}, stream);
  });
}

}  // namespace

bool backward_supports(const Factor& f) { return f.dtype != ScalarType::Float && f.rank <= 32; }

int64_t backward_workspace(const Factor& f) {
  return with_narrow_rank_tile(f, [&]<int RANK>() {
    const Division d = division<RANK>(f);
    return ds_parts_size(f, d) + d.slots * f.columns * f.rank;
  });
}

void backward(const Factor& dgrad, const Factor& wgrad, float* workspace, Stream stream) {
  if (dgrad.dtype == ScalarType::BFloat16) {
    start<BFloat16>(dgrad, wgrad, workspace, stream);
  } else {
    start<Half>(dgrad, wgrad, workspace, stream);
  }
}

}  // namespace megalora::cuda
