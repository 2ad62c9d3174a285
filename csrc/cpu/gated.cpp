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

template <class T>
T* at(const void* first, int64_t index) {
  return first ? static_cast<T*>(const_cast<void*>(first)) + index : nullptr;
}

// What an expert has of all tokens.
template <class T>
Factor of_expert(const Factor& f, Span rows, int64_t expert) {
  const View<T> view{f};
  Factor own = f;
  own.wide = view.wide(rows.begin, 0);
  own.thin = view.thin(rows.begin);
  own.weight = view.weight(expert, 0, 0);
  own.tokens = rows.size();
  own.experts = 1;
  own.offsets = nullptr;
  return own;
}

template <class T>
Gate of_expert(const Gate& g, Span rows, int64_t expert) {
  return {of_expert<T>(g.update, rows, expert), of_expert<T>(g.project, rows, expert),
          at<T>(g.weights, rows.begin), g.weights_are_fp32};
}

template <class T>
GateBackward of_expert(const GateBackward& g, Span rows, int64_t expert) {
  return {of_expert<T>(g.gates, rows, expert),
          of_expert<T>(g.update, rows, expert),
          of_expert<T>(g.project, rows, expert),
          at<T>(g.a, rows.begin * g.update.columns),
          at<T>(g.weights, rows.begin),
          at<T>(g.d_weights, rows.begin),
          g.weights_are_fp32};
}

// Zeroes the results of rows that no expert owns.
template <class T>
void clear(const Factor& f, Span rows) {
  const View<T> view{f};
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    std::fill_n(view.wide(row, 0), f.columns, T(0));
    std::fill_n(view.thin(row), view.thin_columns(), T(0));
  }
}

template <class T>
void clear(const Gate& g, Span rows) {
  clear<T>(g.project, rows);
}

template <class T>
void clear(const GateBackward& g, Span rows) {
  clear<T>(g.project, rows);
  std::fill_n(at<T>(g.a, rows.begin * g.update.columns), rows.size() * g.update.columns, T(0));
  if (g.d_weights) {
    std::fill_n(at<T>(g.d_weights, rows.begin), rows.size(), T(0));
  }
}

template <class T, class Given>
void of_all_experts(const Given& given) {
  const std::vector<Span> experts = expert_rows(given.update);
  for (size_t expert = 0; expert < experts.size(); ++expert) {
    if (experts[expert].size() > 0) {
      pass<T>(of_expert<T>(given, experts[expert], static_cast<int64_t>(expert)));
    }
  }
  clear<T>(given, {experts.back().end, given.update.tokens});
}

}  // namespace

void Products::gate(const Gate& given) {
  given.update.dtype == ScalarType::Double ? of_all_experts<double>(given)
                                           : of_all_experts<float>(given);
}

void Products::gate_backward(const GateBackward& given) {
  given.update.dtype == ScalarType::Double ? of_all_experts<double>(given)
                                           : of_all_experts<float>(given);
}

}  // namespace megalora::cpu
