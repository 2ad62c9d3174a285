#include "table.h"

#include "microkernels.h"

namespace megalora {
namespace {

// The three loops of one instruction set: BYTES is the width of its vector registers.
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
    return {avx512::dot<T>, avx512::axpy<T>, avx512::drop<T>};
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return {avx2::dot<T>, avx2::axpy<T>, avx2::drop<T>};
  }
#endif
  return {portable::dot<T>, portable::axpy<T>, portable::drop<T>};
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
