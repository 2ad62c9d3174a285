#pragma once

#include <cstdint>
#include <cstring>

#include "../philox.h"

// Register-blocked loops over vectors of L accumulators (float or double), in the compiler's own
// vector types so that one source serves every instruction set. All are inlined into a function
// that names its target (see table.cpp).
namespace megalora::micro {

#define MEGALORA_INLINE inline __attribute__((always_inline))

template <class T, int L>
struct VectorOf {
  typedef T Type __attribute__((vector_size(L * sizeof(T))));
};
template <class T, int L>
using Vector = typename VectorOf<T, L>::Type;

template <class V, class T>
MEGALORA_INLINE V load(const T* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}

template <class V, class T>
MEGALORA_INLINE void store(T* to, const V& v) {
  std::memcpy(to, &v, sizeof(V));
}

template <class T, int L>
MEGALORA_INLINE T horizontal_sum(const Vector<T, L>& v) {
  if constexpr (L == 1) {
    return v[0];
  } else {
    Vector<T, L / 2> halves[2];
    std::memcpy(halves, &v, sizeof(v));
    return horizontal_sum<T, L / 2>(halves[0] + halves[1]);
  }
}

// out[m, n] += sum_k a[m, k] * b[n, k] for an M x N block, k contiguous in both.
template <class T, int L, int M, int N>
MEGALORA_INLINE void dot_block(const T* a, int64_t a_row, const T* b, int64_t b_row, int64_t depth,
                               T* out, int64_t out_row) {
  using V = Vector<T, L>;
  V sums[M][N] = {};
  int64_t k = 0;
  for (; k + L <= depth; k += L) {
    V right[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      right[n] = load<V>(b + n * b_row + k);
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const V left = load<V>(a + m * a_row + k);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        sums[m][n] += left * right[n];
      }
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      T sum = horizontal_sum<T, L>(sums[m][n]);
      for (int64_t tail = k; tail < depth; ++tail) {
        sum += a[m * a_row + tail] * b[n * b_row + tail];
      }
      out[m * out_row + n] += sum;
    }
  }
}

template <class T, int L, int M>
MEGALORA_INLINE void dot_rows(const T* a, int64_t a_row, const T* b, int64_t b_row, int64_t n_end,
                              int64_t depth, T* out, int64_t out_row) {
  int64_t n = 0;
  for (; n + 4 <= n_end; n += 4) {
    dot_block<T, L, M, 4>(a, a_row, b + n * b_row, b_row, depth, out + n, out_row);
  }
  for (; n + 2 <= n_end; n += 2) {
    dot_block<T, L, M, 2>(a, a_row, b + n * b_row, b_row, depth, out + n, out_row);
  }
  for (; n < n_end; ++n) {
    dot_block<T, L, M, 1>(a, a_row, b + n * b_row, b_row, depth, out + n, out_row);
  }
}

template <class T, int L>
MEGALORA_INLINE void dot(const T* a, int64_t a_row, const T* b, int64_t b_row, int64_t m_end,
                         int64_t n_end, int64_t depth, T* out, int64_t out_row) {
  int64_t m = 0;
  for (; m + 4 <= m_end; m += 4) {
    dot_rows<T, L, 4>(a + m * a_row, a_row, b, b_row, n_end, depth, out + m * out_row, out_row);
  }
  for (; m < m_end; ++m) {
    dot_rows<T, L, 1>(a + m * a_row, a_row, b, b_row, n_end, depth, out + m * out_row, out_row);
  }
}

// out[m, c] += sum_k a[m, k] * b[k, c] for M rows and N vectors of columns, c contiguous in b and
// out.
template <class T, int L, int M, int N>
MEGALORA_INLINE void axpy_block(const T* a, int64_t a_row, int64_t a_step, const T* b,
                                int64_t b_row, int64_t depth, T* out, int64_t out_row) {
  using V = Vector<T, L>;
  V sums[M][N];
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      sums[m][n] = load<V>(out + m * out_row + n * L);
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    V right[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      right[n] = load<V>(b + k * b_row + n * L);
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const T left = a[m * a_row + k * a_step];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        sums[m][n] += left * right[n];
      }
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      store(out + m * out_row + n * L, sums[m][n]);
    }
  }
}

template <class T, int L, int M>
MEGALORA_INLINE void axpy_rows(const T* a, int64_t a_row, int64_t a_step, const T* b, int64_t b_row,
                               int64_t columns, int64_t depth, T* out, int64_t out_row) {
  int64_t c = 0;
  for (; c + 4 * L <= columns; c += 4 * L) {
    axpy_block<T, L, M, 4>(a, a_row, a_step, b + c, b_row, depth, out + c, out_row);
  }
  for (; c + L <= columns; c += L) {
    axpy_block<T, L, M, 1>(a, a_row, a_step, b + c, b_row, depth, out + c, out_row);
  }
  for (; c < columns; ++c) {
    for (int m = 0; m < M; ++m) {
      T sum = out[m * out_row + c];
      for (int64_t k = 0; k < depth; ++k) {
        sum += a[m * a_row + k * a_step] * b[k * b_row + c];
      }
      out[m * out_row + c] = sum;
    }
  }
}

template <class T, int L>
MEGALORA_INLINE void axpy(const T* a, int64_t a_row, int64_t a_step, const T* b, int64_t b_row,
                          int64_t m_end, int64_t columns, int64_t depth, T* out, int64_t out_row) {
  int64_t m = 0;
  for (; m + 4 <= m_end; m += 4) {
    axpy_rows<T, L, 4>(a + m * a_row, a_row, a_step, b, b_row, columns, depth, out + m * out_row,
                       out_row);
  }
  for (; m < m_end; ++m) {
    axpy_rows<T, L, 1>(a + m * a_row, a_row, a_step, b, b_row, columns, depth, out + m * out_row,
                       out_row);
  }
}

// Zeroes the dropped ones of count values whose row-major index starts at first.
template <class T, int L>
MEGALORA_INLINE void drop(T* values, int64_t first, int64_t count, uint64_t seed,
                          uint32_t threshold) {
  using Lane = Vector<uint64_t, L>;
  Lane lane_index;
  for (int lane = 0; lane < L; ++lane) {
    lane_index[lane] = lane;
  }
  const int64_t last = first + count;
  for (int64_t counter = first / 8; counter * 8 < last; counter += L) {
    const Lane counters = static_cast<uint64_t>(counter) + lane_index;
    Lane words[4] = {counters & uint64_t{0xFFFFFFFFu}, counters >> 32};
    philox(seed, words);
    const Lane low = words[0] | words[1] << 32;
    const Lane high = words[2] | words[3] << 32;
    uint64_t pairs[2 * L];
    for (int lane = 0; lane < L; ++lane) {
      pairs[2 * lane] = low[lane];
      pairs[2 * lane + 1] = high[lane];
    }
    uint16_t draws[8 * L];
    std::memcpy(draws, pairs, sizeof(pairs));
    const int64_t start = counter * 8 - first;
    if (start >= 0 && start + 8 * L <= count) {
      for (int i = 0; i < 8 * L; ++i) {
        values[start + i] = draws[i] >= threshold ? values[start + i] : T(0);
      }
      continue;
    }
    for (int64_t i = start < 0 ? -start : 0; i < 8 * L && start + i < count; ++i) {
      values[start + i] = draws[i] >= threshold ? values[start + i] : T(0);
    }
  }
}

// What the exponential needs to know of a type of floating-point numbers.
template <class T>
struct Exponential;
template <>
struct Exponential<float> {
  using Int = int32_t;
  static constexpr int kTerms = 7, kMantissa = 23, kBias = 127;
  static constexpr float kLargest = 87.0f, kHigh = 0.693359375f, kLow = -2.12194440e-4f;
};
template <>
struct Exponential<double> {
  using Int = int64_t;
  static constexpr int kTerms = 13, kMantissa = 52, kBias = 1023;
  static constexpr double kLargest = 708.0, kHigh = 6.93145751953125e-1,
                          kLow = 1.42860682030941723212e-6;
};

// e^x = 2^k e^r with |r| <= ln 2 / 2, e^r by the series. ln 2 is kHigh + kLow, where k kHigh is
// exact (Cody and Waite). Beyond kLargest it stays as it is there.
template <class T, int L>
MEGALORA_INLINE Vector<T, L> exponential(Vector<T, L> x) {
  using Type = Exponential<T>;
  using V = Vector<T, L>;
  using I = Vector<typename Type::Int, L>;
  const V largest = V{} + Type::kLargest;
  x = x > largest ? largest : x;
  x = x < -largest ? -largest : x;
  const T round = T(3) * (typename Type::Int(1) << (Type::kMantissa - 1));
  const V k = (x * T(1.44269504088896340736) + round) - round;
  const V r = x - k * Type::kHigh - k * Type::kLow;
  V sum = V{} + T(1);
#pragma GCC unroll 13
  for (int term = Type::kTerms; term > 0; --term) {
    sum = T(1) + sum * (r * (T(1) / term));
  }
  const I bits = (__builtin_convertvector(k, I) + Type::kBias) << Type::kMantissa;
  V power;
  std::memcpy(&power, &bits, sizeof(V));
  return sum * power;
}

template <class T, int L>
MEGALORA_INLINE Vector<T, L> sigmoid(const Vector<T, L>& x) {
  return T(1) / (T(1) + exponential<T, L>(-x));
}

// The first count elements of a vector, the others zero.
template <class V, class T>
MEGALORA_INLINE V load_some(const T* from, int64_t count) {
  V v = {};
  std::memcpy(&v, from, count * sizeof(T));
  return v;
}

template <class V, class T>
MEGALORA_INLINE void store_some(T* to, const V& v, int64_t count) {
  std::memcpy(to, &v, count * sizeof(T));
}

// a = silu(gate) * up * weight, of at most L of each.
template <class T, int L>
MEGALORA_INLINE void swiglu_some(const T* gate, const T* up, T weight, int64_t count, T* a) {
  using V = Vector<T, L>;
  const V g = load_some<V>(gate, count);
  store_some(a, g * sigmoid<T, L>(g) * load_some<V>(up, count) * weight, count);
}

template <class T, int L>
MEGALORA_INLINE void swiglu(const T* gate, const T* up, T weight, int64_t count, T* a) {
  int64_t i = 0;
  for (; i + L <= count; i += L) {
    swiglu_some<T, L>(gate + i, up + i, weight, L, a + i);
  }
  swiglu_some<T, L>(gate + i, up + i, weight, count - i, a + i);
}

// a, and the gradients of gate and up, of at most L of each; returns the terms of that of weight.
template <class T, int L>
MEGALORA_INLINE Vector<T, L> swiglu_backward_some(const T* da, const T* gate, const T* up, T weight,
                                                  int64_t count, T* a, T* d_gate, T* d_up) {
  using V = Vector<T, L>;
  const V g = load_some<V>(gate, count), u = load_some<V>(up, count);
  const V d = load_some<V>(da, count), weighted = d * weight;
  const V at = sigmoid<T, L>(g), silu = g * at;
  store_some(a, silu * u * weight, count);
  store_some(d_gate, weighted * u * (at + silu * (T(1) - at)), count);
  store_some(d_up, weighted * silu, count);
  return d * silu * u;
}

template <class T, int L>
MEGALORA_INLINE T swiglu_backward(const T* da, const T* gate, const T* up, T weight, int64_t count,
                                  T* a, T* d_gate, T* d_up) {
  Vector<T, L> d_weight = {};
  int64_t i = 0;
  for (; i + L <= count; i += L) {
    d_weight += swiglu_backward_some<T, L>(da + i, gate + i, up + i, weight, L, a + i, d_gate + i,
                                           d_up + i);
  }
  d_weight += swiglu_backward_some<T, L>(da + i, gate + i, up + i, weight, count - i, a + i,
                                         d_gate + i, d_up + i);
  return horizontal_sum<T, L>(d_weight);
}

}  // namespace megalora::micro
