#include <algorithm>

#include "fragments.cuh"
#include "kernels.cuh"

// The pass between the two base products of a gated MLP: each tile of the wide tensors is read once
// and written once, by the lanes that have the low-rank terms of its elements in their registers.
// From there a, or dy, goes through shared memory, each warp's own rows, into the product that
// reads the thin tensor off it. A block keeps the factors of its columns and passes over all its
// tokens with them. y stays as the base gives it: backward adds the terms of gate and up again,
// which costs no memory traffic, where to write them would.
namespace megalora::cuda {
namespace {

// Registers for so many blocks of 128 threads on a multiprocessor.
constexpr int kForwardBlocks = 3;
constexpr int kBackwardBlocks = 2;

// The most steps of a block where experts have unlike numbers of tokens, so that some waves of
// small blocks even them out.
constexpr int64_t kMostGroupedSteps = 4;

// Column tiles of gate in one block, and as many of up.
template <int RANK>
constexpr int kForwardTiles = RANK <= 16 ? 8 : 4;
template <int RANK>
constexpr int kBackwardTiles = RANK <= 16 ? 4 : 2;

// A tile of a wide tensor; each warp writes and reads rows of its own.
template <class T>
struct Staged {
  static constexpr int kPitch = kTileColumns + kVector<T>;
  alignas(16) T wide[kTileTokens * kPitch];
};

template <class T, int RANK>
struct GateTiles {
  static constexpr int kTiles = kForwardTiles<RANK>;
  static constexpr int kWeightPitch = kTileColumns + kVector<T>;
  Fragments<RANK / 16> gate[kTiles], up[kTiles];      // B1
  alignas(16) T weight[kTiles][RANK * kWeightPitch];  // A2
  Staged<T> a;
};

template <class T, int RANK>
struct GateBackwardTiles {
  static constexpr int kTiles = kBackwardTiles<RANK>;
  static constexpr int kWeightPitch = RANK + kVector<T>;
  Fragments<RANK / 16> gate[kTiles], up[kTiles], da[kTiles];       // B1 and A2
  alignas(16) T gate_weight[kTiles][kTileColumns * kWeightPitch];  // B1
  alignas(16) T up_weight[kTiles][kTileColumns * kWeightPitch];
  Staged<T> d_gate, d_up;
};

// How the work is divided, from the shapes alone.
struct GateDivision {
  int group_tiles;  // column tiles of a block
  int groups;       // of so many
  int64_t tokens;   // of a block, a multiple of kStepTokens
};

// f: a factor whose wide has the columns of gate alone.
GateDivision gate_division(const Factor& f, int most_tiles, int64_t blocks_per_processor) {
  const int64_t tiles = tiles_of(f.columns);
  const int64_t groups = (tiles + most_tiles - 1) / most_tiles;
  // Groups are alike: 10 tiles are 5 and 5, where a group may have 8.
  const int64_t group_tiles = (tiles + groups - 1) / groups;
  const int64_t at_once = kBlocksAtOnce / kBlocksPerProcessor * blocks_per_processor;
  const int64_t blocks = std::max<int64_t>(at_once / groups, 1);
  const int64_t tokens = (f.tokens + blocks - 1) / blocks;
  const int64_t steps = std::max<int64_t>(ceil_divide(tokens, kStepTokens), 1);
  const int64_t most_steps = f.offsets == nullptr ? steps : kMostGroupedSteps;
  return {static_cast<int>(group_tiles), static_cast<int>((tiles + group_tiles - 1) / group_tiles),
          std::min(steps, most_steps) * kStepTokens};
}

// The columns of a block.
struct Columns {
  int64_t begin;
  int tiles;
};

__device__ __forceinline__ Columns columns_of(const Factor& f, int group, int group_tiles) {
  const int64_t begin = int64_t{group} * group_tiles * kTileColumns;
  return {begin, clamp_to(tiles_of(f.columns - begin), group_tiles)};
}

// thinᵀ of a warp's tokens.
template <int STEPS>
struct Thin {
  uint32_t fragments[kUnits][STEPS][2];

  template <class T>
  __device__ __forceinline__ void load(const Factor& f, int64_t token, int projection, int rows) {
    const T* const thin = thin_at<T>(f, token + Place().group, projection, 0);
    const int stride = static_cast<int>(f.thin_stride);
    const int ranks = static_cast<int>(f.rank);
    if (in_words(f, thin)) {
      load_thin<true>(fragments, thin, stride, rows, ranks);
    } else {
      load_thin<false>(fragments, thin, stride, rows, ranks);
    }
  }
};

// The lane's elements of a wide tensor in a unit: its two tokens.
template <class T>
struct Own {
  Vector<T> token[2];

  // Zero where there is none: `columns` elements of each row are. wide points at the row of the
  // warp's first token.
  __device__ __forceinline__ void load(const T* wide, int stride, int unit, int rows, int columns) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = unit * kUnitTokens + 2 * Place().member + i;
      token[i] = Vector<T>{};
      load_wide<true>(token[i], wide + row * stride, row < rows ? columns : 0);
    }
  }
};

// wide points at the row of the warp's first token.
template <class T>
__device__ __forceinline__ void store_row(T* wide, int stride, const Vector<T>& from, int row,
                                          int rows, int columns) {
  store_wide<true>(wide + row * stride, from, row < rows ? columns : 0);
}

template <class T>
__device__ __forceinline__ void stage_row(Staged<T>& staged, const Vector<T>& from, int row) {
  const Place at;
  T* const to = staged.wide + (at.warp * kWarpTokens + row) * Staged<T>::kPitch;
  store_shared(to + at.group * kVector<T>, &from);
}

// Element k of the lane's token i of a unit, its low-rank term added.
template <class T>
__device__ __forceinline__ float element_of(const Vector<T>& wide, float (&sums)[4][4], int i,
                                            int k, float scale) {
  return static_cast<float>(wide.element[k]) + sum_at<T>(sums, i, k) * scale;
}

__device__ __forceinline__ float sigmoid(float x) { return reciprocal(1.0f + exponential(-x)); }

// p of a token, 1 where there is none.
template <class T>
__device__ __forceinline__ float weight_of(const void* weights, bool are_fp32, int64_t token) {
  if (weights == nullptr) {
    return 1.0f;
  }
  return are_fp32 ? static_cast<const float*>(weights)[token]
                  : static_cast<float>(static_cast<const T*>(weights)[token]);
}

// Leaves a warp's sums [16 tokens, RANK] as its part of thin, [tokens, width] from `to` on.
template <int RANK>
__device__ __forceinline__ void store_part(float* to, int64_t width, float (&sums)[RANK / 8][4],
                                           int rows, int ranks) {
#pragma unroll
  for (int n = 0; n < RANK / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int rank = n * 8 + sum_column(i);
      if (sum_row(i) < rows && rank < ranks) {
        to[sum_row(i) * width + rank] = sums[n][i];
      }
    }
  }
}

// One block: some tokens of one expert, a group of column tiles of gate and those of up. It writes
// a and leaves its part of s2 [group, tokens, rank]. grid: (groups, token slots).
template <class T, int RANK>
__global__ void __launch_bounds__(kThreads, kForwardBlocks)
    gate_kernel(const __grid_constant__ Gate g, int group_tiles, int64_t block_tokens,
                float* parts) {
  using Tiles = GateTiles<T, RANK>;
  constexpr int kSteps = RANK / 16;
  Tiles& shared = shared_memory<Tiles>();
  const Factor& y = g.update;
  const Factor& a = g.project;
  const TokenTile tokens = token_tile(y, static_cast<int>(blockIdx.y), block_tokens);
  if (tokens.begin >= tokens.result_end) {
    return;
  }
  const int group = static_cast<int>(blockIdx.x);
  const Columns columns = columns_of(a, group, group_tiles);
  const int half = static_cast<int>(a.columns);
  const int ranks = static_cast<int>(a.rank);
  const int projection_of_up = y.num_segments - 1;

#pragma unroll 1
  for (int tile = 0; tile < columns.tiles; ++tile) {
    const int64_t column = columns.begin + tile * kTileColumns;
    const int size = clamp_to(half - column, kTileColumns);
    load_tile<RANK, kTileColumns>(shared.weight[tile], weight_at<T>(a, tokens.expert, column, 0),
                                  a.rank_stride, ranks, size);
    load_weight<kSteps, kSteps>(shared.gate[tile], y, weight_at<T>(y, tokens.expert, column, 0),
                                size, 0);
    load_weight<kSteps, kSteps>(shared.up[tile], y,
                                weight_at<T>(y, tokens.expert, half + column, 0), size, 0);
  }
  commit_copies();
  wait_copies<0>();
  __syncthreads();

  const Place at;
  const float scale = static_cast<float>(y.scale);
#pragma unroll 1
  for (int64_t token = tokens.begin + at.warp * kWarpTokens; token < tokens.result_end;
       token += kStepTokens) {
    const int rows = clamp_to(tokens.result_end - token, kWarpTokens);
    const int owned = clamp_to(tokens.end - token, kWarpTokens);  // zero in the other rows
    Thin<kSteps> gate_thin, up_thin;
    gate_thin.template load<T>(y, token, 0, owned);
    up_thin.template load<T>(y, token, projection_of_up, owned);
    float sums[RANK / 8][4] = {};
#pragma unroll 1
    for (int tile = 0; tile < columns.tiles; ++tile) {
      const int64_t column = columns.begin + tile * kTileColumns + at.group * kVector<T>;
      const int own_columns = clamp_to(half - column, kVector<T>);
      sync_warp();  // The product has read the tile before.
#pragma unroll
      for (int unit = 0; unit < kUnits; ++unit) {
        Own<T> gate, up;
        gate.load(wide_at<T>(y, token, column), y.wide_stride, unit, owned, own_columns);
        up.load(wide_at<T>(y, token, half + column), y.wide_stride, unit, owned, own_columns);
        float gate_sums[1][4][4] = {}, up_sums[1][4][4] = {};
        multiply_fragments<T, kSteps>(gate_sums, shared.gate[tile], gate_thin.fragments + unit);
        multiply_fragments<T, kSteps>(up_sums, shared.up[tile], up_thin.fragments + unit);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int row = unit * kUnitTokens + 2 * at.member + i;
          const float p =
              row < owned ? weight_of<T>(g.weights, g.weights_are_fp32, token + row) : 0.0f;
          Vector<T> made;
#pragma unroll
          for (int k = 0; k < kVector<T>; ++k) {
            const float x = element_of(gate.token[i], gate_sums[0], i, k, scale);
            const float by = element_of(up.token[i], up_sums[0], i, k, scale);
            made.element[k] = static_cast<T>(x * sigmoid(x) * by * p);
          }
          store_row(wide_at<T>(a, token, column), a.wide_stride, made, row, rows, own_columns);
          stage_row(shared.a, made, row);
        }
      }
      sync_warp();
      multiply<false, false, kTileColumns, RANK>(
          sums, shared.a.wide + at.warp * kWarpTokens * Staged<T>::kPitch, Staged<T>::kPitch,
          shared.weight[tile], Tiles::kWeightPitch);
    }
    store_part<RANK>(parts + (group * a.tokens + token) * ranks, ranks, sums, rows, ranks);
  }
}

// One block: some tokens of one expert, a group of column tiles of gate and those of up. It writes
// dy and a, and leaves its parts of ds1 [group, tokens, projections * rank] and of p's gradient
// [group, tokens]. grid: (groups, token slots).
template <class T, int RANK>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks)
    gate_backward_kernel(const __grid_constant__ GateBackward g, int group_tiles,
                         int64_t block_tokens, float* parts, float* weight_parts) {
  using Tiles = GateBackwardTiles<T, RANK>;
  constexpr int kSteps = RANK / 16;
  constexpr int kPitch = Staged<T>::kPitch;
  Tiles& shared = shared_memory<Tiles>();
  const Factor& y = g.gates;
  const Factor& da = g.update;
  const Factor& dy = g.project;
  const TokenTile tokens = token_tile(y, static_cast<int>(blockIdx.y), block_tokens);
  if (tokens.begin >= tokens.result_end) {
    return;
  }
  const int group = static_cast<int>(blockIdx.x);
  const Columns columns = columns_of(da, group, group_tiles);
  const int half = static_cast<int>(da.columns);
  const int ranks = static_cast<int>(dy.rank);
  const int projection_of_up = y.num_segments - 1;

#pragma unroll 1
  for (int tile = 0; tile < columns.tiles; ++tile) {
    const int64_t column = columns.begin + tile * kTileColumns;
    const int size = clamp_to(half - column, kTileColumns);
    const T* const gate_weight = weight_at<T>(y, tokens.expert, column, 0);
    const T* const up_weight = weight_at<T>(y, tokens.expert, half + column, 0);
    load_tile<kTileColumns, RANK>(shared.gate_weight[tile], gate_weight, y.column_stride, size,
                                  ranks);
    load_tile<kTileColumns, RANK>(shared.up_weight[tile], up_weight, y.column_stride, size, ranks);
    load_weight<kSteps, kSteps>(shared.gate[tile], y, gate_weight, size, 0);
    load_weight<kSteps, kSteps>(shared.up[tile], y, up_weight, size, 0);
    load_weight<kSteps, kSteps>(shared.da[tile], da, weight_at<T>(da, tokens.expert, column, 0),
                                size, 0);
  }
  commit_copies();
  wait_copies<0>();
  __syncthreads();

  const Place at;
  const float scale = static_cast<float>(y.scale);
  const float da_scale = static_cast<float>(da.scale);
  const int warp_row = at.warp * kWarpTokens;
#pragma unroll 1
  for (int64_t token = tokens.begin + warp_row; token < tokens.result_end; token += kStepTokens) {
    const int rows = clamp_to(tokens.result_end - token, kWarpTokens);
    const int owned = clamp_to(tokens.end - token, kWarpTokens);  // zero in the other rows
    Thin<kSteps> gate_thin, up_thin, da_thin;
    gate_thin.template load<T>(y, token, 0, owned);
    up_thin.template load<T>(y, token, projection_of_up, owned);
    da_thin.template load<T>(da, token, 0, owned);
    float gate_sums[RANK / 8][4] = {}, up_sums[RANK / 8][4] = {};
    float weight_sums[kUnits][2] = {};
#pragma unroll 1
    for (int tile = 0; tile < columns.tiles; ++tile) {
      const int64_t column = columns.begin + tile * kTileColumns + at.group * kVector<T>;
      const int own_columns = clamp_to(half - column, kVector<T>);
      sync_warp();  // The products have read the tiles before.
#pragma unroll
      for (int unit = 0; unit < kUnits; ++unit) {
        Own<T> own_gate, own_up, own_da;
        own_gate.load(wide_at<T>(y, token, column), y.wide_stride, unit, owned, own_columns);
        own_up.load(wide_at<T>(y, token, half + column), y.wide_stride, unit, owned, own_columns);
        own_da.load(wide_at<T>(da, token, column), da.wide_stride, unit, owned, own_columns);
        float x_terms[1][4][4] = {}, by_terms[1][4][4] = {}, da_terms[1][4][4] = {};
        multiply_fragments<T, kSteps>(x_terms, shared.gate[tile], gate_thin.fragments + unit);
        multiply_fragments<T, kSteps>(by_terms, shared.up[tile], up_thin.fragments + unit);
        multiply_fragments<T, kSteps>(da_terms, shared.da[tile], da_thin.fragments + unit);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int row = unit * kUnitTokens + 2 * at.member + i;
          const float p =
              row < owned ? weight_of<T>(g.weights, g.weights_are_fp32, token + row) : 0.0f;
          Vector<T> made, d_gate, d_up;
#pragma unroll
          for (int k = 0; k < kVector<T>; ++k) {
            const float x = element_of(own_gate.token[i], x_terms[0], i, k, scale);
            const float by = element_of(own_up.token[i], by_terms[0], i, k, scale);
            const float d = element_of(own_da.token[i], da_terms[0], i, k, da_scale);
            const float s = sigmoid(x);
            const float silu = x * s;
            weight_sums[unit][i] += d * silu * by;
            made.element[k] = static_cast<T>(silu * by * p);
            d_gate.element[k] = static_cast<T>(d * p * by * (s + silu * (1.0f - s)));
            d_up.element[k] = static_cast<T>(d * p * silu);
          }
          store_row(static_cast<T*>(g.a) + token * half + column, half, made, row, rows,
                    own_columns);
          store_row(wide_at<T>(dy, token, column), dy.wide_stride, d_gate, row, rows, own_columns);
          store_row(wide_at<T>(dy, token, half + column), dy.wide_stride, d_up, row, rows,
                    own_columns);
          stage_row(shared.d_gate, d_gate, row);
          stage_row(shared.d_up, d_up, row);
        }
      }
      sync_warp();
      multiply<false, true, kTileColumns, RANK>(gate_sums, shared.d_gate.wide + warp_row * kPitch,
                                                kPitch, shared.gate_weight[tile],
                                                Tiles::kWeightPitch);
      multiply<false, true, kTileColumns, RANK>(up_sums, shared.d_up.wide + warp_row * kPitch,
                                                kPitch, shared.up_weight[tile],
                                                Tiles::kWeightPitch);
    }

    const int64_t width = dy.num_segments * dy.rank;
    float* const part = parts + (group * dy.tokens + token) * width;
    if (projection_of_up > 0) {
      store_part<RANK>(part + ranks, width, up_sums, rows, ranks);
    } else {
#pragma unroll
      for (int n = 0; n < RANK / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          gate_sums[n][i] += up_sums[n][i];
        }
      }
    }
    store_part<RANK>(part, width, gate_sums, rows, ranks);
    if (weight_parts != nullptr) {
#pragma unroll
      for (int unit = 0; unit < kUnits; ++unit) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int row = unit * kUnitTokens + 2 * at.member + i;
          const float sum = sum_of_groups(weight_sums[unit][i]);
          if (at.group == 0 && row < rows) {
            weight_parts[group * dy.tokens + token + row] = sum;
          }
        }
      }
    }
  }
}

// Calls body with the element type and the narrowest rank tile that covers both ranks.
template <class Body>
void with_gate_tile(const Factor& one, const Factor& two, Body body) {
  const bool narrow = std::max(one.rank, two.rank) <= 16;
  const auto with_type = [&](auto element) {
    using T = decltype(element);
    narrow ? body.template operator()<T, 16>() : body.template operator()<T, 32>();
  };
  one.dtype == ScalarType::BFloat16 ? with_type(BFloat16{}) : with_type(Half{});
}

template <int RANK>
GateDivision forward_division(const Gate& g) {
  return gate_division(g.project, kForwardTiles<RANK>, kForwardBlocks);
}
template <int RANK>
GateDivision backward_division(const GateBackward& g) {
  return gate_division(g.update, kBackwardTiles<RANK>, kBackwardBlocks);
}

int64_t thin_size(const Factor& f) { return f.tokens * f.num_segments * f.rank; }

void add_thin_parts(const Factor& f, const float* parts, int groups, Stream stream) {
  ThinParts given{parts, {}};
  std::fill_n(given.count, f.num_segments, groups);
  add_parts(f, given, f, {}, stream);
}

// The gradients of p as a thin tensor of one rank.
Factor thin_of_weights(const GateBackward& g) {
  Factor f = g.project;
  f.dtype = g.weights_are_fp32 ? ScalarType::Float : f.dtype;
  f.thin = g.d_weights;
  f.thin_stride = f.rank = f.num_segments = 1;
  f.scale = 1.0;
  return f;
}

}  // namespace

bool gate_supports(ScalarType dtype, int64_t columns, int64_t rank) {
  return (dtype == ScalarType::BFloat16 || dtype == ScalarType::Half) && columns % 8 == 0 &&
         rank <= 32;
}

int64_t gate_workspace(const Gate& g) {
  int64_t size = 0;
  with_gate_tile(g.update, g.project, [&]<class T, int RANK>() {
    size = forward_division<RANK>(g).groups * thin_size(g.project);
  });
  return size;
}

int64_t gate_workspace(const GateBackward& g) {
  int64_t size = 0;
  with_gate_tile(g.project, g.update, [&]<class T, int RANK>() {
    const int64_t of_weights = g.d_weights == nullptr ? 0 : g.update.tokens;
    size = backward_division<RANK>(g).groups * (thin_size(g.project) + of_weights);
  });
  return size;
}

void gate(const Gate& g, float* workspace, Stream stream) {
  with_gate_tile(g.update, g.project, [&]<class T, int RANK>() {
    const GateDivision d = forward_division<RANK>(g);
    launch(gate_kernel<T, RANK>, dim3(d.groups, token_slots(g.update, d.tokens)),
           sizeof(GateTiles<T, RANK>), stream, g, d.group_tiles, d.tokens, workspace);
    add_thin_parts(g.project, workspace, d.groups, stream);
  });
}

void gate_backward(const GateBackward& g, float* workspace, Stream stream) {
  with_gate_tile(g.project, g.update, [&]<class T, int RANK>() {
    const GateDivision d = backward_division<RANK>(g);
    float* const of_weights =
        g.d_weights == nullptr ? nullptr : workspace + d.groups * thin_size(g.project);
    launch(gate_backward_kernel<T, RANK>, dim3(d.groups, token_slots(g.gates, d.tokens)),
           sizeof(GateBackwardTiles<T, RANK>), stream, g, d.group_tiles, d.tokens, workspace,
           of_weights);
    add_thin_parts(g.project, workspace, d.groups, stream);
    if (of_weights != nullptr) {
      add_thin_parts(thin_of_weights(g), of_weights, d.groups, stream);
    }
  });
}

}  // namespace megalora::cuda
