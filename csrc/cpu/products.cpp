#include "products.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "../experts.h"
#include "../gemm.h"
#include "../linear.h"
#include "view.h"

namespace megalora::cpu {
namespace {

// Sized so that a tile of wide and the weights of its columns stay in a 1 MiB second-level cache.
constexpr int64_t kTileRows = 32;
constexpr int64_t kTileColumns = 1024;
constexpr int64_t kOuterRows = 64;
constexpr int64_t kOuterColumns = 256;
// Rows that share one packing of an expert's weights.
constexpr int64_t kItemRows = 256;

// The rows of each expert; all rows for a dense factor.

// Columns of one projection: a whole block, or a piece of one of at most `limit` columns.
struct Block {
  Span columns;
  int64_t projection;
};

std::vector<Block> column_blocks(const Factor& f, int64_t limit) {
  std::vector<Block> blocks;
  for (int64_t start = 0; start < f.columns;) {
    for (int64_t p = 0; p < f.num_segments; ++p) {
      const int64_t end = start + f.segment[p];
      for (; start < end; start = std::min(start + limit, end)) {
        blocks.push_back({{start, std::min(start + limit, end)}, p});
      }
    }
  }
  return blocks;
}

struct Item {
  int64_t expert;
  Span rows;
};

std::vector<Item> row_items(const Factor& f) {
  std::vector<Item> items;
  const std::vector<Span> experts = expert_rows(f);
  for (int64_t e = 0; e < f.experts; ++e) {
    for (int64_t begin = experts[e].begin; begin < experts[e].end; begin += kItemRows) {
      items.push_back({e, {begin, std::min(begin + kItemRows, experts[e].end)}});
    }
  }
  return items;
}

template <class T>
void project(const View<T>& view) {
  using Acc = typename View<T>::Acc;
  const Factor& f = view.f;
  const std::vector<Item> items = row_items(f);
  const std::vector<Block> blocks = column_blocks(f, kTileColumns);
  const int64_t width = view.thin_columns();
  for (int64_t row = items.empty() ? 0 : items.back().rows.end; row < f.tokens; ++row) {
    std::fill_n(view.thin(row), width, T(0));
  }
  torch::stable::parallel_for(0, items.size(), 1, [&](int64_t first, int64_t last) {
    const Buffer<Acc> tile(kTileRows * kTileColumns), packed(f.rank * f.columns),
        sums(kTileRows * width);
    for (int64_t i = first; i < last; ++i) {
      const Matrix<Acc> weight = view.pack_weight(items[i].expert, packed.get());
      for (int64_t row = items[i].rows.begin; row < items[i].rows.end; row += kTileRows) {
        const Span rows{row, std::min(row + kTileRows, items[i].rows.end)};
        std::fill_n(sums.get(), rows.size() * width, Acc(0));
        for (const Block& block : blocks) {
          const Matrix<Acc> wide = view.read_wide(rows, block.columns, tile.get());
          view.loops.dot(wide.data, wide.stride, weight.data + block.columns.begin, weight.stride,
                         rows.size(), f.rank, block.columns.size(),
                         sums.get() + block.projection * f.rank, width);
        }
        view.write_thin(rows, sums.get());
      }
    }
  });
}

// wide += the tile, rounded once.
template <class T, class Acc>
void add_tile(const View<T>& view, Span rows, Span columns, const Acc* tile) {
  for (int64_t i = 0; i < rows.size(); ++i) {
    T* to = view.wide(rows.begin + i, columns.begin);
    for (int64_t c = 0; c < columns.size(); ++c) {
      to[c] = static_cast<T>(static_cast<Acc>(to[c]) + tile[i * columns.size() + c]);
    }
  }
}

template <class T>
void update(const View<T>& view) {
  using Acc = typename View<T>::Acc;
  const Factor& f = view.f;
  const std::vector<Item> items = row_items(f);
  const std::vector<Block> blocks = column_blocks(f, kTileColumns);
  const int64_t width = view.thin_columns();
  const bool in_place = std::is_same_v<T, Acc> && !f.drops();
  torch::stable::parallel_for(0, items.size(), 1, [&](int64_t first, int64_t last) {
    const Buffer<Acc> tile(kTileRows * kTileColumns), packed(f.rank * f.columns),
        thin(kTileRows * width);
    for (int64_t i = first; i < last; ++i) {
      const Matrix<Acc> weight = view.pack_weight(items[i].expert, packed.get());
      for (int64_t row = items[i].rows.begin; row < items[i].rows.end; row += kTileRows) {
        const Span rows{row, std::min(row + kTileRows, items[i].rows.end)};
        view.read_thin(rows, thin.get());
        for (const Block& block : blocks) {
          Matrix<Acc> sums{tile.get(), block.columns.size()};
          if (in_place) {
            sums = {reinterpret_cast<Acc*>(view.wide(rows.begin, block.columns.begin)),
                    f.wide_stride};
          } else {
            std::fill_n(tile.get(), rows.size() * block.columns.size(), Acc(0));
          }
          view.loops.axpy(thin.get() + block.projection * f.rank, width, 1,
                          weight.data + block.columns.begin, weight.stride, rows.size(),
                          block.columns.size(), f.rank, sums.data, sums.stride);
          if (!in_place) {
            view.drop(rows, block.columns, tile.get());
            add_tile(view, rows, block.columns, tile.get());
          }
        }
      }
    }
  });
}

template <class T>
void outer(const View<T>& view) {
  using Acc = typename View<T>::Acc;
  const Factor& f = view.f;
  const std::vector<Span> experts = expert_rows(f);
  const std::vector<Block> blocks = column_blocks(f, kOuterColumns);
  const int64_t width = view.thin_columns();
  const int64_t num_blocks = static_cast<int64_t>(blocks.size());
  torch::stable::parallel_for(0, f.experts * num_blocks, 1, [&](int64_t first, int64_t last) {
    const Buffer<Acc> tile(kOuterRows * kOuterColumns), thin(kOuterRows * width),
        sums(f.rank * kOuterColumns);
    for (int64_t i = first; i < last; ++i) {
      const Span& all_rows = experts[i / num_blocks];
      const Block& block = blocks[i % num_blocks];
      const int64_t columns = block.columns.size();
      std::fill_n(sums.get(), f.rank * columns, Acc(0));
      for (int64_t row = all_rows.begin; row < all_rows.end; row += kOuterRows) {
        const Span rows{row, std::min(row + kOuterRows, all_rows.end)};
        view.read_thin(rows, thin.get());
        const Matrix<Acc> wide = view.read_wide(rows, block.columns, tile.get());
        view.loops.axpy(thin.get() + block.projection * f.rank, 1, width, wide.data, wide.stride,
                        f.rank, columns, rows.size(), sums.get(), columns);
      }
      if (f.weight_is_fp32) {
        view.template write_weight<float>(i / num_blocks, block.columns, sums.get());
      } else {
        view.template write_weight<T>(i / num_blocks, block.columns, sums.get());
      }
    }
  });
}

// Up to rank 128 our loops take half the time of MKL's sgemm on AMD and a tenth at rank 4, but they
// multiply in fp32 where oneDNN has bf16 and fp16 instructions. Those would round thin once per
// period, and a sum before it is added to.
bool gemm_is_faster(const Factor& f) {
  const bool narrow = f.dtype == ScalarType::BFloat16 || f.dtype == ScalarType::Half;
  if (f.offsets != nullptr || f.drops() || (narrow && f.accumulates)) {
    return false;
  }
  return narrow ? f.columns == f.period : f.rank > 128;
}

template <class Body>
void with_dtype(const Factor& f, Body body) {
  f.dtype == ScalarType::Double     ? body(View<double>{f})
  : f.dtype == ScalarType::Float    ? body(View<float>{f})
  : f.dtype == ScalarType::BFloat16 ? body(View<BFloat16>{f})
                                    : body(View<Half>{f});
}

}  // namespace

void Products::project(const Factor& factor) {
  if (gemm_is_faster(factor)) {
    gemm::project(factor);
    return;
  }
  with_dtype(factor, [](const auto& view) { cpu::project(view); });
}

void Products::update(const Factor& factor) {
  if (gemm_is_faster(factor)) {
    gemm::update(factor);
    return;
  }
  with_dtype(factor, [](const auto& view) { cpu::update(view); });
}

void Products::outer(const Factor& factor) {
  if (gemm_is_faster(factor)) {
    gemm::outer(factor);
    return;
  }
  with_dtype(factor, [](const auto& view) { cpu::outer(view); });
}

// Reading dY once saves nothing here: against the base's product its second reading is not seen.
void Products::backward(const Factor& dgrad, const Factor& wgrad) {
  project(dgrad);
  outer(wgrad);
}

// MKL with beta = 1 takes longer than our update of y.
void Products::add_base(const Linear& linear) { base_first<Products>(linear); }

void Products::linear(const Linear& linear) { compose<Products>(linear); }

void Products::linear_backward(const LinearBackward& backward) { compose<Products>(backward); }

void Products::experts_linear(const ExpertsLinear& linear) { compose_experts<Products>(linear); }

void Products::experts_backward(const ExpertsBackward& backward) {
  compose_experts<Products>(backward);
}

}  // namespace megalora::cpu
