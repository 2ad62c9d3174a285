#pragma once

#include <cstdint>

namespace megalora {

// The inner loops for one accumulator type, compiled for the instruction set that the table was
// picked for.
template <class T>
struct Table {
  // out[m, n] += sum_k a[m, k] * b[n, k]
  void (*dot)(const T* a, int64_t a_row, const T* b, int64_t b_row, int64_t m_end, int64_t n_end,
              int64_t depth, T* out, int64_t out_row);
  // out[m, c] += sum_k a[m * a_row + k * a_step] * b[k, c]
  void (*axpy)(const T* a, int64_t a_row, int64_t a_step, const T* b, int64_t b_row, int64_t m_end,
               int64_t columns, int64_t depth, T* out, int64_t out_row);
  // Zeroes the dropped ones of count values whose row-major index starts at first.
  void (*drop)(T* values, int64_t first, int64_t count, uint64_t seed, uint32_t threshold);
  // a = silu(gate) * up * weight
  void (*swiglu)(const T* gate, const T* up, T weight, int64_t count, T* a);
  // a, and the gradients of gate and up from da; returns that of weight.
  T (*swiglu_backward)(const T* da, const T* gate, const T* up, T weight, int64_t count, T* a,
                       T* d_gate, T* d_up);
};

// The table for the widest instruction set of this machine.
template <class T>
const Table<T>& table();

}  // namespace megalora
