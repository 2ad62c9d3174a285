#include "table.h"

#include "microkernels.h"

namespace megalora {
namespace {

// The loops of one instruction set: BYTES is the width of its vector registers.
#define MEGALORA_LOOPS(name, BYTES, ATTRIBUTE)                                                  \
  namespace name {                                                                              \
  template <class T>                                                                            \
  ATTRIBUTE void dot(const T* a, int64_t a_row, const T* b, int64_t b_row, int64_t m_end,       \
                     int64_t n_end, int64_t depth, T* out, int64_t out_row) {                   \
    micro::dot<T, BYTES / sizeof(T)>(a, a_row, b, b_row, m_end, n_end, depth, out, out_row);    \
  }                                                                                             \
  template <class T>                                                                            \
  ATTRIBUTE void axpy(const T* a, int64_t a_row, int64_t a_step, const T* b, int64_t b_row,     \
                      int64_t m_end, int64_t columns, int64_t depth, T* out, int64_t out_row) { \
    micro::axpy<T, BYTES / sizeof(T)>(a, a_row, a_step, b, b_row, m_end, columns, depth, out,   \
                                      out_row);                                                 \
  }                                                                                             \
  template <class T>                                                                            \
  ATTRIBUTE void drop(T* values, int64_t first, int64_t count, uint64_t seed,                   \
                      uint32_t threshold) {                                                     \
    micro::drop<T, BYTES / sizeof(uint64_t)>(values, first, count, seed, threshold);            \
  }                                                                                             \
  template <class T>                                                                            \
  ATTRIBUTE void swiglu(const T* gate, const T* up, T weight, int64_t count, T* a) {            \
    micro::swiglu<T, BYTES / sizeof(T)>(gate, up, weight, count, a);                            \
  }                                                                                             \
  template <class T>                                                                            \
  ATTRIBUTE T swiglu_backward(const T* da, const T* gate, const T* up, T weight, int64_t count, \
                              T* a, T* d_gate, T* d_up) {                                       \
    return micro::swiglu_backward<T, BYTES / sizeof(T)>(da, gate, up, weight, count, a, d_gate, \
                                                        d_up);                                  \
  }                                                                                             \
  }

MEGALORA_LOOPS(portable, 16, )
#if defined(__x86_64__)
MEGALORA_LOOPS(avx2, 32, __attribute__((target("avx2,fma"))))
MEGALORA_LOOPS(avx512, 64, __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,fma"))))
#endif

template <class T>
Table<T> pick() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
    return {avx512::dot<T>, avx512::axpy<T>, avx512::drop<T>, avx512::swiglu<T>,
            avx512::swiglu_backward<T>};
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return {avx2::dot<T>, avx2::axpy<T>, avx2::drop<T>, avx2::swiglu<T>, avx2::swiglu_backward<T>};
  }
#endif
  return {portable::dot<T>, portable::axpy<T>, portable::drop<T>, portable::swiglu<T>,
          portable::swiglu_backward<T>};
}

}  // namespace

template <class T>
const Table<T>& table() {
  static const Table<T> picked = pick<T>();
  return picked;
}

template const Table<float>& table<float>();
template const Table<double>& table<double>();

}  // namespace megalora
