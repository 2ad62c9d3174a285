#include "../gated.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "products.h"
#include "view.h"

// The pass between the two base products of a gated MLP. Each tile of the wide tensors is read and
// written once, while it is in a core's cache. It leaves gate and up in y, with their low-rank
// terms: to write them costs less than to add the terms again.
namespace megalora::cpu {
namespace {

constexpr int64_t kRows = 32;
constexpr int64_t kColumns = 512;  // of gate, and as many of up

// One factor on one thread: its weight as [rank, columns], and the thin rows of a tile.
template <class T>
class Side {
 public:
  explicit Side(const Factor& factor)
      : view_{factor},
        packed_(factor.rank * factor.columns),
        thin_(kRows * view_.thin_columns()),
        weight_(view_.pack_weight(0, packed_.get())) {}

  T* wide(int64_t row, int64_t column) const { return view_.wide(row, column); }

  void read(Span rows) const { view_.read_thin(rows, thin_.get()); }
  void clear(Span rows) const {
    std::fill_n(thin_.get(), rows.size() * view_.thin_columns(), T(0));
  }
  void write(Span rows) const { view_.write_thin(rows, thin_.get()); }

  // wide += thin · Wᵀ; all columns are of one projection.
  void update(Span rows, Span columns) const {
    view_.loops.axpy(ranks(columns), view_.thin_columns(), 1, weight_.data + columns.begin,
                     weight_.stride, rows.size(), columns.size(), view_.f.rank,
                     wide(rows.begin, columns.begin), view_.f.wide_stride);
  }

  // thin += wide · W
  void project(Span rows, Span columns) const {
    view_.loops.dot(wide(rows.begin, columns.begin), view_.f.wide_stride,
                    weight_.data + columns.begin, weight_.stride, rows.size(), view_.f.rank,
                    columns.size(), ranks(columns), view_.thin_columns());
  }

 private:
  // Where gate and up have rank blocks of their own, that of up is the second.
  T* ranks(Span columns) const {
    const bool second = view_.f.num_segments > 1 && columns.begin >= view_.f.segment[0];
    return thin_.get() + (second ? view_.f.rank : 0);
  }

  View<T> view_;
  Buffer<T> packed_, thin_;
  Matrix<T> weight_;
};

// body(columns) for pieces of all columns.
template <class Body>
void for_columns(int64_t columns, Body body) {
  for (int64_t start = 0; start < columns; start += kColumns) {
    body(Span{start, std::min(start + kColumns, columns)});
  }
}

// body(first, second, rows) for tiles of all rows, on several threads with sides of their own.
template <class T, class Body>
void for_tiles(const Factor& first, const Factor& second, Body body) {
  const int64_t tiles = (first.tokens + kRows - 1) / kRows;
  torch::stable::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
    const Side<T> one(first), two(second);
    for (int64_t tile = begin; tile < end; ++tile) {
      body(one, two, Span{tile * kRows, std::min((tile + 1) * kRows, first.tokens)});
    }
  });
}

Span of_up(Span gate, int64_t half) { return {gate.begin + half, gate.end + half}; }

template <class T>
void pass(const Gate& given) {
  const int64_t half = given.project.columns;
  const T* const weights = static_cast<const T*>(given.weights);
  for_tiles<T>(given.update, given.project, [&](const auto& y, const auto& a, Span rows) {
    y.read(rows);
    a.clear(rows);
    for_columns(half, [&](Span gate) {
      const Span up = of_up(gate, half);
      y.update(rows, gate);
      y.update(rows, up);
      for (int64_t row = rows.begin; row < rows.end; ++row) {
        table<T>().swiglu(y.wide(row, gate.begin), y.wide(row, up.begin),
                          weights ? weights[row] : T(1), gate.size(), a.wide(row, gate.begin));
      }
      a.project(rows, gate);
    });
    a.write(rows);
  });
}

template <class T>
void pass(const GateBackward& given) {
  const int64_t half = given.update.columns;
  const T* const y = static_cast<const T*>(given.gates.wide);
  const T* const weights = static_cast<const T*>(given.weights);
  T* const a = static_cast<T*>(given.a);
  T* const d_weights = static_cast<T*>(given.d_weights);
  for_tiles<T>(given.update, given.project, [&](const auto& da, const auto& dy, Span rows) {
    da.read(rows);
    dy.clear(rows);
    T sums[kRows] = {};
    for_columns(half, [&](Span gate) {
      const Span up = of_up(gate, half);
      da.update(rows, gate);
      for (int64_t row = rows.begin; row < rows.end; ++row) {
        const T* const own = y + row * 2 * half;
        sums[row - rows.begin] += table<T>().swiglu_backward(
            da.wide(row, gate.begin), own + gate.begin, own + up.begin,
            weights ? weights[row] : T(1), gate.size(), a + row * half + gate.begin,
            dy.wide(row, gate.begin), dy.wide(row, up.begin));
      }
      dy.project(rows, gate);
      dy.project(rows, up);
    });
    dy.write(rows);
    if (d_weights) {
      std::copy_n(sums, rows.size(), d_weights + rows.begin);
    }
  });
}

}  // namespace

void Products::gate(const Gate& given) {
  given.update.dtype == ScalarType::Double ? pass<double>(given) : pass<float>(given);
}

void Products::gate_backward(const GateBackward& given) {
  given.update.dtype == ScalarType::Double ? pass<double>(given) : pass<float>(given);
}

}  // namespace megalora::cpu
