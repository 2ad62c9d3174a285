#include "kernels.cuh"
#include "tile.cuh"

namespace megalora::cuda {
namespace {

// Blocks that keep the largest GPUs busy, and the fewest tokens that are worth one. Constants, so
// that the order of summation, and with it every bit, depends on the shapes alone.
constexpr int64_t kBackwardBlocks = 528;
constexpr int64_t kFewestTokens = 128;

// Column tiles of one block: their part of dB stays in its registers, their B in shared memory.
template <int RANK>
constexpr int group_tiles = RANK <= 16 ? 8 : 4;

__host__ __device__ __forceinline__ int64_t tiles_of_projection(const Factor& f, int p) {
  return f.columns / f.period * tiles_of(f.segment[p]);
}

// Groups of at most `size` column tiles of one projection.
__host__ __device__ __forceinline__ int64_t groups_of(const Factor& f, int p, int size) {
  return (tiles_of_projection(f, p) + size - 1) / size;
}

struct Groups {
  int64_t all;   // of all projections
  int64_t most;  // of one
};

Groups groups(const Factor& f) {
  const int size = f.rank <= 16 ? group_tiles<16> : group_tiles<32>;
  Groups found{0, 0};
  for (int p = 0; p < f.num_segments; ++p) {
    const int64_t own = groups_of(f, p, size);
    found.all += own;
    found.most = found.most < own ? own : found.most;
  }
  return found;
}

// Tokens of one block, a multiple of kTileTokens.
int64_t tokens_per_block(const Factor& f) {
  const int64_t blocks = (kBackwardBlocks + groups(f).all - 1) / groups(f).all;
  const int64_t tokens = (f.tokens + blocks - 1) / blocks;
  const int64_t rounded = (tokens + kTileTokens - 1) / kTileTokens * kTileTokens;
  return rounded < kFewestTokens ? kFewestTokens : rounded;
}

// One block: tokens_per_block tokens of one expert, a group of column tiles of one projection. It
// reads its part of dY once and leaves its parts of ds [group of the projection, tokens,
// projections * rank] and of dB [token slot, columns, rank]. grid: (token slots, groups).
template <class T, int RANK>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(const __grid_constant__ Factor dgrad, const __grid_constant__ Factor wgrad,
                    int64_t block_tokens, float* ds_parts, float* db_parts) {
  constexpr int kTiles = group_tiles<RANK>;
  constexpr int kWidePitch = kTileColumns + kVector<T>;
  constexpr int kRankPitch = RANK + kVector<T>;
  __shared__ __align__(16) T wide[2][kTileTokens * kWidePitch];
  __shared__ __align__(16) T thin[2][kTileTokens * kRankPitch];
  __shared__ __align__(16) T weight[kTiles][kTileColumns * kRankPitch];

  const TokenTile tokens = token_tile(dgrad, blockIdx.x, block_tokens);
  if (tokens.begin >= tokens.result_end) {
    return;
  }
  int projection = 0;
  int64_t group = blockIdx.y;
  int64_t start = 0;
  for (; group >= groups_of(dgrad, projection, kTiles); ++projection) {
    group -= groups_of(dgrad, projection, kTiles);
    start += dgrad.segment[projection];
  }
  const int ranks = static_cast<int>(dgrad.rank);
  const int64_t tiles_per_segment = tiles_of(dgrad.segment[projection]);
  const int64_t first_tile = group * kTiles;
  const int num_tiles = clamp_to(tiles_of_projection(dgrad, projection) - first_tile, kTiles);
  const auto column_of = [&](int tile) {
    const int64_t index = first_tile + tile;
    return index / tiles_per_segment * dgrad.period + start +
           index % tiles_per_segment * kTileColumns;
  };
  const auto columns_of = [&](int tile) {
    const int64_t index = first_tile + tile;
    return clamp_to(dgrad.segment[projection] - index % tiles_per_segment * kTileColumns,
                    kTileColumns);
  };
  const auto load_wide = [&](int64_t token, int tile) {
    if (tile < num_tiles) {
      load_tile<kTileTokens, kTileColumns>(
          wide[tile % 2], wide_at<T>(dgrad, token, column_of(tile)), dgrad.wide_stride,
          clamp_to(tokens.end - token, kTileTokens), columns_of(tile));
    }
  };
  const auto load_thin = [&](int64_t token, int buffer) {
    load_tile<kTileTokens, RANK>(thin[buffer], thin_at<T>(wgrad, token, projection, 0),
                                 wgrad.thin_stride, clamp_to(tokens.end - token, kTileTokens),
                                 ranks);
  };

  for (int tile = 0; tile < num_tiles; ++tile) {
    load_tile<kTileColumns, RANK>(weight[tile],
                                  weight_at<T>(dgrad, tokens.expert, column_of(tile), 0),
                                  dgrad.column_stride, columns_of(tile), ranks);
  }
  load_thin(tokens.begin, 0);
  load_wide(tokens.begin, 0);
  commit_copies();

  float db_sums[kTiles][RANK / 8][4] = {};
  const int warp_row = static_cast<int>(threadIdx.x) / 32 * 16;
  int buffer = 0;
  for (int64_t token = tokens.begin; token < tokens.result_end; token += kTileTokens) {
    float ds_sums[RANK / 8][4] = {};
    // kTiles is even, so a tile has the same buffer for all tokens.
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      wait_copies<0>();
      __syncthreads();
      if (tile + 1 < kTiles) {
        load_wide(token, tile + 1);
      } else if (token + kTileTokens < tokens.result_end) {
        load_wide(token + kTileTokens, 0);
        load_thin(token + kTileTokens, 1 - buffer);
      }
      commit_copies();
      if (tile < num_tiles) {
        multiply<false, true, kTileColumns, RANK>(ds_sums, wide[tile % 2] + warp_row * kWidePitch,
                                                  kWidePitch, weight[tile], kRankPitch);
        multiply<true, true, kTileTokens, RANK>(db_sums[tile], wide[tile % 2] + warp_row,
                                                kWidePitch, thin[buffer], kRankPitch);
      }
    }
    buffer = 1 - buffer;
#pragma unroll
    for (int n = 0; n < RANK / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t row = token + warp_row + sum_row(i);
        const int rank = n * 8 + sum_column(i);
        if (row < tokens.result_end && rank < ranks) {
          const int64_t width = dgrad.num_segments * dgrad.rank;
          ds_parts[(group * dgrad.tokens + row) * width + projection * dgrad.rank + rank] =
              ds_sums[n][i];
        }
      }
    }
  }

#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    if (tile >= num_tiles) {
      continue;
    }
    const int columns = columns_of(tile);
#pragma unroll
    for (int n = 0; n < RANK / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = warp_row + sum_row(i);
        const int rank = n * 8 + sum_column(i);
        if (column < columns && rank < ranks) {
          db_parts[(blockIdx.x * dgrad.columns + column_of(tile) + column) * dgrad.rank + rank] =
              db_sums[tile][n][i];
        }
      }
    }
  }
}

// ds = scale * the sum of its parts, dB = (or +=) scale * the sum of its own, always in the same
// order. One thread for each element of both.
template <class T>
__global__ void __launch_bounds__(kThreads)
    add_parts_kernel(const __grid_constant__ Factor dgrad, const __grid_constant__ Factor wgrad,
                     int group_size, int64_t block_tokens, const float* ds_parts,
                     const float* db_parts) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t width = dgrad.num_segments * dgrad.rank;
  const int64_t ds_count = dgrad.tokens * width;
  const float scale = static_cast<float>(dgrad.scale);
  float sum = 0.0f;
  if (index < ds_count) {
    const int projection = static_cast<int>(index % width / dgrad.rank);
    const int64_t parts = groups_of(dgrad, projection, group_size);
    for (int64_t part = 0; part < parts; ++part) {
      sum += ds_parts[part * ds_count + index];
    }
    *thin_at<T>(dgrad, index / width, 0, index % width) = static_cast<T>(sum * scale);
    return;
  }
  const int64_t per_expert = wgrad.columns * wgrad.rank;
  const int64_t element = index - ds_count;
  const int64_t expert = element / per_expert;
  if (expert >= wgrad.experts) {
    return;
  }
  const bool grouped = wgrad.offsets != nullptr;
  const int64_t begin = grouped ? expert_end(wgrad, expert - 1) : 0;
  const int64_t end = grouped ? expert_end(wgrad, expert) : wgrad.tokens;
  const int64_t first_slot = begin / block_tokens + expert;
  const int64_t parts = (end - begin + block_tokens - 1) / block_tokens;
  for (int64_t part = 0; part < parts; ++part) {
    sum += db_parts[(first_slot + part) * per_expert + element % per_expert];
  }
  store_weight<T>(wgrad, expert, element % per_expert / wgrad.rank, element % wgrad.rank,
                  sum * scale);
}

template <class T, int RANK>
void start(const Factor& dgrad, const Factor& wgrad, float* ds_parts, float* db_parts,
           Stream stream) {
  const int64_t tokens = tokens_per_block(dgrad);
  const dim3 grid(token_slots(dgrad, tokens), groups(dgrad).all);
  launch(backward_kernel<T, RANK>, grid, stream, dgrad, wgrad, tokens, ds_parts, db_parts);
  const int64_t elements =
      dgrad.tokens * dgrad.num_segments * dgrad.rank + dgrad.experts * dgrad.columns * dgrad.rank;
  launch(add_parts_kernel<T>, dim3((elements + kThreads - 1) / kThreads), stream, dgrad, wgrad,
         group_tiles<RANK>, tokens, static_cast<const float*>(ds_parts),
         static_cast<const float*>(db_parts));
}

template <class T>
void start(const Factor& dgrad, const Factor& wgrad, float* workspace, Stream stream) {
  float* const db_parts =
      workspace + groups(dgrad).most * dgrad.tokens * dgrad.num_segments * dgrad.rank;
  if (dgrad.rank <= 8) {
    start<T, 8>(dgrad, wgrad, workspace, db_parts, stream);
  } else if (dgrad.rank <= 16) {
    start<T, 16>(dgrad, wgrad, workspace, db_parts, stream);
  } else {
    start<T, 32>(dgrad, wgrad, workspace, db_parts, stream);
  }
}

}  // namespace

bool one_read_is_faster(const Factor& f) {
  return f.dtype != c10::ScalarType::Float && f.rank <= 32;
}

int64_t backward_workspace(const Factor& f) {
  return groups(f).most * f.tokens * f.num_segments * f.rank +
         token_slots(f, tokens_per_block(f)) * f.columns * f.rank;
}

void backward(const Factor& dgrad, const Factor& wgrad, float* workspace, Stream stream) {
  if (dgrad.dtype == c10::ScalarType::BFloat16) {
    start<c10::BFloat16>(dgrad, wgrad, workspace, stream);
  } else {
    start<c10::Half>(dgrad, wgrad, workspace, stream);
  }
}

}  // namespace megalora::cuda
