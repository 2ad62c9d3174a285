#include "kernels.cuh"
#include "tile.cuh"

namespace megalora::cuda {
namespace {

constexpr int kRankDepth = 32;
constexpr int kDeltaPitch = kTileColumns + 4;

template <class T>
struct alignas(16) Pack {
  T element[kVector<T>];
};

// One block: 64 tokens of one expert, 64 columns of one projection. wide is read before the
// product, so that its latency passes meanwhile, and written once. grid: (token slots, column
// tiles).
template <class T, bool RANK_FIRST>
__global__ void __launch_bounds__(kThreads) update_kernel(const __grid_constant__ Factor f) {
  constexpr int kThinPitch = kRankDepth + kVector<T>;
  constexpr int kWeightRows = RANK_FIRST ? kRankDepth : kTileColumns;
  constexpr int kWeightColumns = RANK_FIRST ? kTileColumns : kRankDepth;
  constexpr int kWeightPitch = kWeightColumns + kVector<T>;
  constexpr int kPacksPerRow = kTileColumns / kVector<T>;
  constexpr int kPacks = kTileTokens * kPacksPerRow / kThreads;
  __shared__ __align__(16) T thin[kTileTokens * kThinPitch];
  __shared__ __align__(16) T weight[kWeightRows * kWeightPitch];
  __shared__ __align__(16) float delta[kTileTokens * kDeltaPitch];

  const TokenTile tokens = token_tile(f, blockIdx.x);
  if (tokens.begin >= tokens.end) {
    return;
  }
  const ColumnTile columns = column_tile(f, blockIdx.y);
  const int rows = clamp_to(tokens.end - tokens.begin, kTileTokens);

  const T* corner = wide_at<T>(f, tokens.begin, columns.begin);
  const bool aligned =
      (reinterpret_cast<uintptr_t>(corner) | static_cast<uint64_t>(f.wide_stride) * sizeof(T)) %
          16 ==
      0;
  Pack<T> packs[kPacks];
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int row = (static_cast<int>(threadIdx.x) + i * kThreads) / kPacksPerRow;
    const int column = (static_cast<int>(threadIdx.x) + i * kThreads) % kPacksPerRow * kVector<T>;
    const T* from = corner + row * f.wide_stride + column;
    if (aligned && row < rows && column + kVector<T> <= columns.columns) {
      load_vector(&packs[i], from);
      continue;
    }
#pragma unroll
    for (int k = 0; k < kVector<T>; ++k) {
      packs[i].element[k] = row < rows && column + k < columns.columns ? from[k] : T(0);
    }
  }

  float sums[kTileColumns / 8][4] = {};
  const int warp_row = static_cast<int>(threadIdx.x) / 32 * 16;
  for (int64_t first_rank = 0; first_rank < f.rank; first_rank += kRankDepth) {
    const int ranks = clamp_to(f.rank - first_rank, kRankDepth);
    __syncthreads();
    load_tile<kTileTokens, kRankDepth>(thin,
                                       thin_at<T>(f, tokens.begin, columns.projection, first_rank),
                                       f.thin_stride, rows, ranks);
    load_tile<kWeightRows, kWeightColumns>(
        weight, weight_at<T>(f, tokens.expert, columns.begin, first_rank),
        RANK_FIRST ? f.rank_stride : f.column_stride, RANK_FIRST ? ranks : columns.columns,
        RANK_FIRST ? columns.columns : ranks);
    commit_copies();
    wait_copies<0>();
    __syncthreads();
    multiply<false, RANK_FIRST, kRankDepth, kTileColumns>(sums, thin + warp_row * kThinPitch,
                                                          kThinPitch, weight, kWeightPitch);
  }
#pragma unroll
  for (int n = 0; n < kTileColumns / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      delta[(warp_row + sum_row(i)) * kDeltaPitch + n * 8 + sum_column(i)] =
          sums[n][i] * static_cast<float>(f.scale);
    }
  }
  __syncthreads();

#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int row = (static_cast<int>(threadIdx.x) + i * kThreads) / kPacksPerRow;
    const int column = (static_cast<int>(threadIdx.x) + i * kThreads) % kPacksPerRow * kVector<T>;
    if (row >= rows || column >= columns.columns) {
      continue;
    }
#pragma unroll
    for (int k = 0; k < kVector<T>; k += 4) {
      uint32_t kept = 15;
      if (f.drops()) {
        kept = kept_four(f, (tokens.begin + row) * f.columns + columns.begin + column + k);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float added = kept >> j & 1u ? delta[row * kDeltaPitch + column + k + j] : 0.0f;
        packs[i].element[k + j] =
            static_cast<T>(static_cast<float>(packs[i].element[k + j]) + added);
      }
    }
    T* to = wide_at<T>(f, tokens.begin + row, columns.begin + column);
    if (aligned && column + kVector<T> <= columns.columns) {
      store_vector(to, &packs[i]);
      continue;
    }
#pragma unroll
    for (int k = 0; k < kVector<T>; ++k) {
      if (column + k < columns.columns) {
        to[k] = packs[i].element[k];
      }
    }
  }
}

template <class T>
void start(const Factor& f, Stream stream) {
  const dim3 grid(token_slots(f), column_tiles(f));
  launch(f.column_stride == 1 ? update_kernel<T, true> : update_kernel<T, false>, grid, stream, f);
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
