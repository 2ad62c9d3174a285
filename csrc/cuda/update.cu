#include "kernels.cuh"
#include "tile.cuh"

namespace megalora::cuda {
namespace {

// Column tiles of one block: enough to hide where it starts, few enough to fill a GPU.
constexpr int kGroupTiles = 4;

template <class T, int RANK, bool RANK_FIRST>
struct UpdateTiles {
  static constexpr int kStages = sizeof(T) == 2 ? 3 : 2;
  static constexpr int kWidePitch = kTileColumns + kVector<T>;
  static constexpr int kThinPitch = RANK + kVector<T>;
  static constexpr int kWeightRows = RANK_FIRST ? RANK : kTileColumns;
  static constexpr int kWeightColumns = RANK_FIRST ? kTileColumns : RANK;
  static constexpr int kWeightPitch = kWeightColumns + kVector<T>;
  alignas(16) T wide[kStages][kTileTokens * kWidePitch];
  alignas(16) T thin[kStages][kTileTokens * kThinPitch];
  alignas(16) T weight[kStages][kWeightRows * kWeightPitch];
};

template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T element[2];
};

// Bits 0 and 1: whether accumulators 0 and 1 of this lane are kept, 2 and 3: accumulators 2 and 3,
// of the 16 x 8 product at (row, column) of wide. Each lane draws for four columns of one row and
// hands half of it to its neighbour.
__device__ __forceinline__ uint32_t kept_sums(const Factor& f, int64_t row, int64_t column) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const bool lower = lane % 2 == 1;
  const uint32_t own = kept_four(f, (row + lane / 4 + (lower ? 8 : 0)) * f.columns + column +
                                        lane % 4 / 2 * 4);
  const uint32_t other = neighbours(own);
  return lower ? (other >> 2 & 3u) | (own >> 2 & 3u) << 2 : (own & 3u) | (other & 3u) << 2;
}

// Adds scale * sums to the 16 x 64 elements of wide that a warp has in shared memory.
template <int PITCH, class T>
__device__ __forceinline__ void add_to_tile(T* wide, const float (&sums)[kTileColumns / 8][4],
                                            const Factor& f, int64_t row, int64_t column) {
  const float scale = static_cast<float>(f.scale);
#pragma unroll
  for (int n = 0; n < kTileColumns / 8; ++n) {
    const uint32_t kept = f.drops() ? kept_sums(f, row, column + n * 8) : 15u;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      auto* const pair =
          reinterpret_cast<Pair<T>*>(wide + sum_row(i) * PITCH + n * 8 + sum_column(0));
      Pair<T> result = *pair;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float added = kept >> (i + j) & 1u ? sums[n][i + j] * scale : 0.0f;
        result.element[j] = static_cast<T>(static_cast<float>(result.element[j]) + added);
      }
      *pair = result;
    }
  }
}

// Writes the rows x columns elements of a warp's 16 x 64 from shared to global memory.
template <int PITCH, class T>
__device__ __forceinline__ void store_tile(T* to, int64_t stride, const T* wide, int rows,
                                           int columns) {
  constexpr int kPerRow = kTileColumns / kVector<T>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int column = lane % kPerRow * kVector<T>;
  const bool whole = (static_cast<uint32_t>(reinterpret_cast<uintptr_t>(to)) |
                      static_cast<uint32_t>(stride * sizeof(T)) |
                      static_cast<uint32_t>(columns * sizeof(T))) %
                         16 ==
                     0;
#pragma unroll
  for (int first = 0; first < 16; first += 32 / kPerRow) {
    const int row = first + lane / kPerRow;
    const T* const from = wide + row * PITCH + column;
    if (row < rows && column < columns) {
      if (whole) {
        store_vector(to + row * stride + column, from);
      } else {
#pragma unroll 1
        for (int k = 0; k < min(columns - column, kVector<T>); ++k) {
          to[row * stride + column + k] = from[k];
        }
      }
    }
  }
}

// One block: 64 tokens of one expert, kGroupTiles column tiles, their ranks in steps of RANK. A
// tile of wide comes with the last ranks, is added to in shared memory and written once. grid:
// token slots * groups of column tiles, groups fastest, so that blocks of one time share rows.
template <class T, int RANK, bool RANK_FIRST>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    update_kernel(const __grid_constant__ Factor f, int tiles, int groups) {
  using Tiles = UpdateTiles<T, RANK, RANK_FIRST>;
  constexpr int kStages = Tiles::kStages;
  Tiles& shared = shared_memory<Tiles>();

  const TokenTile tokens = token_tile(f, static_cast<int>(blockIdx.x) / groups);
  if (tokens.begin >= tokens.end) {
    return;
  }
  const int rows = clamp_to(tokens.end - tokens.begin, kTileTokens);
  int tile = static_cast<int>(blockIdx.x) % groups * kGroupTiles;
  const int end_tile = min(tile + kGroupTiles, tiles);
  const int rank = static_cast<int>(f.rank);

  int loaded_tile = tile;
  int loaded_rank = 0;
  int load_stage = 0;
  const auto load_next = [&] {
    if (loaded_tile < end_tile) {
      const ColumnTile columns = column_tile(f, loaded_tile);
      const int ranks = min(rank - loaded_rank, RANK);
      load_tile<kTileTokens, RANK>(shared.thin[load_stage],
                                   thin_at<T>(f, tokens.begin, columns.projection, loaded_rank),
                                   f.thin_stride, rows, ranks);
      load_tile<Tiles::kWeightRows, Tiles::kWeightColumns>(
          shared.weight[load_stage], weight_at<T>(f, tokens.expert, columns.begin, loaded_rank),
          RANK_FIRST ? f.rank_stride : f.column_stride, RANK_FIRST ? ranks : columns.columns,
          RANK_FIRST ? columns.columns : ranks);
      loaded_rank += RANK;
      if (loaded_rank >= rank) {
        load_tile<kTileTokens, kTileColumns>(shared.wide[load_stage],
                                             wide_at<T>(f, tokens.begin, columns.begin),
                                             f.wide_stride, rows, columns.columns);
        loaded_rank = 0;
        ++loaded_tile;
      }
      load_stage = next_stage<kStages>(load_stage);
    }
    commit_copies();
  };

#pragma unroll 1
  for (int step = 0; step < kStages - 1; ++step) {
    load_next();
  }
  const int warp_row = static_cast<int>(threadIdx.x) / 32 * 16;
  int stage = 0;
#pragma unroll 1
  for (; tile < end_tile; ++tile) {
    float sums[kTileColumns / 8][4] = {};
    T* wide = nullptr;
#pragma unroll 1
    for (int first_rank = 0; first_rank < rank; first_rank += RANK) {
      wait_copies<kStages - 2>();
      __syncthreads();
      load_next();
      multiply<false, RANK_FIRST, RANK, kTileColumns>(
          sums, shared.thin[stage] + warp_row * Tiles::kThinPitch, Tiles::kThinPitch,
          shared.weight[stage], Tiles::kWeightPitch);
      wide = shared.wide[stage] + warp_row * Tiles::kWidePitch;
      stage = next_stage<kStages>(stage);
    }
    const ColumnTile columns = column_tile(f, tile);
    add_to_tile<Tiles::kWidePitch>(wide, sums, f, tokens.begin + warp_row, columns.begin);
    sync_warp();
    store_tile<Tiles::kWidePitch>(wide_at<T>(f, tokens.begin + warp_row, columns.begin),
                                  f.wide_stride, wide, rows - warp_row, columns.columns);
  }
}

template <class T, int RANK>
void start(const Factor& f, Stream stream) {
  const int tiles = static_cast<int>(column_tiles(f));
  const int groups = (tiles + kGroupTiles - 1) / kGroupTiles;
  const dim3 grid(token_slots(f) * groups);
  if (f.column_stride == 1) {
    launch(update_kernel<T, RANK, true>, grid, sizeof(UpdateTiles<T, RANK, true>), stream, f,
           tiles, groups);
  } else {
    launch(update_kernel<T, RANK, false>, grid, sizeof(UpdateTiles<T, RANK, false>), stream, f,
           tiles, groups);
  }
}

template <class T>
void start(const Factor& f, Stream stream) {
  f.rank <= 16 ? start<T, 16>(f, stream) : start<T, 32>(f, stream);
}

}  // namespace

void update(const Factor& f, Stream stream) {
  if (f.dtype == c10::ScalarType::BFloat16) {
    start<c10::BFloat16>(f, stream);
  } else if (f.dtype == c10::ScalarType::Half) {
    start<c10::Half>(f, stream);
  } else {
    start<float>(f, stream);
  }
}

}  // namespace megalora::cuda
