#pragma once

#include <algorithm>
#include <memory>
#include <type_traits>
#include <vector>

#include "../errors.h"
#include "../factor.h"
#include "table.h"

// How the products of the CPU read and write the tensors of a factor.
namespace megalora::cpu {

struct Span {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

template <class Acc>
struct Matrix {
  Acc* data;
  int64_t stride;
};

template <class Acc>
class Buffer {
 public:
  explicit Buffer(int64_t size) : data_(new Acc[size]) {}
  Acc* get() const { return data_.get(); }

 private:
  std::unique_ptr<Acc[]> data_;
};

// The rows of each expert; all rows for a dense factor.
inline std::vector<Span> expert_rows(const Factor& f) {
  std::vector<Span> spans;
  if (f.offsets == nullptr) {
    return {{0, f.tokens}};
  }
  int64_t begin = 0;
  for (int64_t e = 0; e < f.experts; ++e) {
    const int64_t end = f.offsets_are_int64 ? static_cast<const int64_t*>(f.offsets)[e]
                                            : static_cast<const int32_t*>(f.offsets)[e];
    check_value(end >= begin && end <= f.tokens, "offsets[", e, "] is ", end, ", expected ", begin,
                " to ", f.tokens, ": the inclusive cumulative sum of tokens per expert");
    spans.push_back({begin, end});
    begin = end;
  }
  return spans;
}

// One factor seen through its element type T and accumulation type Acc.
template <class T>
struct View {
  using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const Factor& f;
  const Table<Acc>& loops = table<Acc>();

  T* wide(int64_t row, int64_t column) const {
    return static_cast<T*>(f.wide) + row * f.wide_stride + column;
  }
  T* thin(int64_t row) const { return static_cast<T*>(f.thin) + row * f.thin_stride; }
  T* weight(int64_t expert, int64_t column, int64_t j) const {
    return static_cast<T*>(f.weight) + expert * f.expert_stride + column * f.column_stride +
           j * f.rank_stride;
  }

  // A tile of wide with its dropped elements zero: wide itself where that is the same, else a copy
  // in buffer.
  Matrix<Acc> read_wide(Span rows, Span columns, Acc* buffer) const {
    if (std::is_same_v<T, Acc> && !f.drops()) {
      return {reinterpret_cast<Acc*>(wide(rows.begin, columns.begin)), f.wide_stride};
    }
    for (int64_t i = 0; i < rows.size(); ++i) {
      const T* from = wide(rows.begin + i, columns.begin);
      std::copy(from, from + columns.size(), buffer + i * columns.size());
    }
    drop(rows, columns, buffer);
    return {buffer, columns.size()};
  }

  void drop(Span rows, Span columns, Acc* buffer) const {
    if (!f.drops()) {
      return;
    }
    for (int64_t i = 0; i < rows.size(); ++i) {
      const int64_t first = (rows.begin + i) * f.columns + columns.begin;
      loops.drop(buffer + i * columns.size(), first, columns.size(), static_cast<uint64_t>(*f.seed),
                 f.threshold);
    }
  }

  // An expert's weights as [rank, columns]: themselves where they lie so, else a copy in buffer.
  Matrix<Acc> pack_weight(int64_t expert, Acc* buffer) const {
    if (std::is_same_v<T, Acc> && f.column_stride == 1) {
      return {reinterpret_cast<Acc*>(weight(expert, 0, 0)), f.rank_stride};
    }
    for (int64_t j = 0; j < f.rank; ++j) {
      const T* from = weight(expert, 0, j);
      for (int64_t c = 0; c < f.columns; ++c) {
        buffer[j * f.columns + c] = static_cast<Acc>(from[c * f.column_stride]);
      }
    }
    return {buffer, f.columns};
  }

  // Writes, or adds to, an expert's weights of some columns from [rank, columns], in the order in
  // which they lie.
  template <class W>
  void write_weight(int64_t expert, Span columns, const Acc* from) const {
    W* const to = static_cast<W*>(f.weight) + expert * f.expert_stride;
    const bool column_last = f.column_stride == 1;
    const int64_t outer_end = column_last ? f.rank : columns.size();
    const int64_t inner_end = column_last ? columns.size() : f.rank;
    for (int64_t outer = 0; outer < outer_end; ++outer) {
      for (int64_t inner = 0; inner < inner_end; ++inner) {
        const int64_t j = column_last ? outer : inner;
        const int64_t c = column_last ? inner : outer;
        W& w = to[(columns.begin + c) * f.column_stride + j * f.rank_stride];
        const Acc before = f.accumulates ? static_cast<Acc>(w) : Acc(0);
        w = static_cast<W>(before + from[j * columns.size() + c]);
      }
    }
  }

  int64_t thin_columns() const { return f.num_segments * f.rank; }

  // scale * thin of some rows, [rows, num_segments * rank].
  void read_thin(Span rows, Acc* buffer) const {
    for (int64_t i = 0; i < rows.size(); ++i) {
      const T* from = thin(rows.begin + i);
      for (int64_t j = 0; j < thin_columns(); ++j) {
        buffer[i * thin_columns() + j] = static_cast<Acc>(f.scale) * static_cast<Acc>(from[j]);
      }
    }
  }

  // thin of some rows = scale * sums [rows, num_segments * rank].
  void write_thin(Span rows, const Acc* sums) const {
    for (int64_t i = 0; i < rows.size(); ++i) {
      for (int64_t j = 0; j < thin_columns(); ++j) {
        thin(rows.begin + i)[j] =
            static_cast<T>(static_cast<Acc>(f.scale) * sums[i * thin_columns() + j]);
      }
    }
  }
};

}  // namespace megalora::cpu
