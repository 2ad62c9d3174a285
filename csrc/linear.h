#pragma once

#include <tuple>

#include "call.h"
#include "gemm.h"

// A base linear with its adapter in one op each way. Forward and dgrad are one form:
//   forward  s = scale * x · Aᵀ    y = x · Wᵀ + s · Bᵀ
//   dgrad    ds = scale * dy · B   dx = dy · W + ds · A
//   wgrad    dA = dsᵀ · x          dB = dyᵀ · s
// Products has linear(Linear&), linear_backward(LinearBackward&), which may be compose of this
// file, and add_base(Linear&), one of its two ways from a thin that is there.
namespace megalora {

// thin = project of in; out = in · weight + update by thin.
struct Linear {
  Tensor in;       // x or dy: [tokens, columns], unit column stride
  Tensor weight;   // Wᵀ or W: [columns of in, columns of out]
  Tensor out;      // y or dx: [tokens, columns], contiguous, nothing in it yet
  Tensor thin;     // s or ds, likewise
  Factor project;  // its wide is in
  Factor update;   // its wide is out
};

struct LinearBackward {
  Linear dgrad;
  Tensor x, s;  // [tokens, columns], unit column stride
  Factor d_a;   // outer of x and ds
  Factor d_b;   // outer of dy and s
};

// The base's product, then the low-rank term on top of it.
template <class Products>
void base_first(const Linear& l) {
  multiply(l.out, l.in, l.weight);
  Products::update(l.update);
}

// The low-rank term, to which the BLAS adds the base's product in its epilogue: where the BLAS can
// update.
inline void low_rank_first(const Linear& l) {
  gemm::write(l.update);
  multiply(l.out, l.in, l.weight, 1.0, 1.0);
}

template <class Products>
void compose(const Linear& l) {
  Products::project(l.project);
  Products::add_base(l);
}

template <class Products>
void compose(const LinearBackward& b) {
  Products::backward(b.dgrad.project, b.d_b);
  Products::add_base(b.dgrad);
  Products::outer(b.d_a);
}

inline bool is_empty(const Linear& l) {
  return l.in.numel() == 0 || l.out.numel() == 0 || l.thin.numel() == 0;
}

// Checks what an op is given of a linear; returns the period of segments.
// axis: that of the weight along which the tokens are read.
template <class Products>
int64_t check_linear(const Tensor& tokens, const char* name, const Tensor& weight, int64_t axis,
                     const Tensor& lora_A, const Tensor& lora_B, const Segments& segments) {
  check_tokens(tokens, name, {});
  check_supported<Products>(tokens);
  const auto check_matrix = [&](const Tensor& matrix, const char* matrix_name) {
    check_dtype(matrix, matrix_name, tokens, name);
    check_weight(matrix, matrix_name, {});
  };
  check_matrix(weight, "weight");
  check_matrix(lora_A, "lora_A");
  check_matrix(lora_B, "lora_B");
  check_size(weight.size(axis), axis == 0 ? "weight's first size" : "weight's last size",
             tokens.size(-1), axis == 0 ? "the last size of dy" : "the last size of x");
  check_size(lora_A.size(1), "lora_A's last size", weight.size(1), "the input features");
  check_size(lora_B.size(0), "lora_B's number of rows", weight.size(0), "the output features");
  const int64_t blocks = segments.empty() ? 1 : static_cast<int64_t>(segments.size());
  check_size(lora_A.size(0), "lora_A's number of rows", blocks * lora_B.size(1),
             "one rank block for each segment");
  return check_segments(segments, weight.size(0));
}

// A linear as an op is given it, its results, and what keeps alive that its factors point to.
struct LinearForward {
  Tensor y, s;
  Call shrink = Call(), expand = Call();
  Linear linear;
};

template <class Products>
LinearForward forward_of(const Tensor& x, const Tensor& weight, const Tensor& lora_A,
                         const Tensor& lora_B, double scale, const Segments& segments) {
  const int64_t period = check_linear<Products>(x, "x", weight, -1, lora_A, lora_B, segments);
  LinearForward f{empty(with_last(x, weight.size(0)), x), empty(with_last(x, lora_A.size(0)), x)};
  const Tensor in = rows(x), out = rows(f.y), thin = rows(f.s);
  f.shrink.shrink(in, thin, lora_A, scale);
  f.expand.expand(out, thin, lora_B, segments, period, 1.0);
  f.linear = {in, weight.t(), out, thin, f.shrink.factor, f.expand.factor};
  return f;
}

// Its backward pass, likewise.
struct LinearGradients {
  Tensor dx;
  Call expand_dgrad = Call(), shrink_dgrad = Call();
  Call expand_wgrad = Call(), shrink_wgrad = Call();
  LinearBackward backward;
};

// d_a and d_b, contiguous, are written or added to.
template <class Products>
LinearGradients gradients_of(const Tensor& d_a, const Tensor& d_b, bool accumulates,
                             const Tensor& dy, const Tensor& x, const Tensor& s,
                             const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
                             double scale, const Segments& segments) {
  const int64_t period = check_linear<Products>(dy, "dy", weight, 0, lora_A, lora_B, segments);
  check_rows(x, "x", dy, "dy");
  check_size(x.size(-1), "the last size of x", weight.size(1), "weight's last size");
  check_thin(s, "s", dy, "dy", lora_B.size(1), segments);
  LinearGradients g{empty(with_last(dy, weight.size(1)), dy)};
  const Tensor in = rows(dy), out = rows(g.dx), wide = rows(x), thin = rows(s);
  const Tensor d_thin = empty({in.size(0), lora_A.size(0)}, dy);
  g.expand_dgrad.expand(in, d_thin, lora_B, segments, period, scale);
  g.shrink_dgrad.shrink(out, d_thin, lora_A, 1.0);
  g.expand_wgrad.expand(in, thin, d_b, segments, period, 1.0);
  g.expand_wgrad.gradient(d_b, accumulates);
  g.shrink_wgrad.shrink(wide, d_thin, d_a, 1.0);
  g.shrink_wgrad.gradient(d_a, accumulates);
  const Linear dgrad{in, weight, out, d_thin, g.expand_dgrad.factor, g.shrink_dgrad.factor};
  g.backward = {dgrad, wide, thin, g.shrink_wgrad.factor, g.expand_wgrad.factor};
  return g;
}

template <class Products>
struct LinearOps {
  static std::tuple<Tensor, Tensor> linear(const Tensor& x, const Tensor& weight,
                                           const Tensor& lora_A, const Tensor& lora_B, double scale,
                                           const Segments& segments) {
    const LinearForward f = forward_of<Products>(x, weight, lora_A, lora_B, scale, segments);
    is_empty(f.linear) ? base_alone(f.linear) : Products::linear(f.linear);
    return {f.y, f.s};
  }

  static std::tuple<Tensor, Tensor, Tensor> linear_backward(const Tensor& dy, const Tensor& x,
                                                            const Tensor& s, const Tensor& weight,
                                                            const Tensor& lora_A,
                                                            const Tensor& lora_B, double scale,
                                                            const Segments& segments) {
    const Tensor d_a = empty(lora_A.sizes(), lora_A);
    const Tensor d_b = empty(lora_B.sizes(), lora_B);
    const Tensor dx = backward(d_a, d_b, false, dy, x, s, weight, lora_A, lora_B, scale, segments);
    return {dx, d_a, d_b};
  }

  static Tensor linear_backward_(const Tensor& d_a, const Tensor& d_b, const Tensor& dy,
                                 const Tensor& x, const Tensor& s, const Tensor& weight,
                                 const Tensor& lora_A, const Tensor& lora_B, double scale,
                                 const Segments& segments) {
    check_sum(d_a, "d_a", lora_A, "lora_A", x, "x");
    check_sum(d_b, "d_b", lora_B, "lora_B", dy, "dy");
    Tensor dx;
    in_place_weight(d_a, [&](const Tensor& a) {
      in_place_weight(d_b, [&](const Tensor& b) {
        dx = backward(a, b, true, dy, x, s, weight, lora_A, lora_B, scale, segments);
      });
    });
    return dx;
  }

 private:
  static Tensor backward(const Tensor& d_a, const Tensor& d_b, bool accumulates, const Tensor& dy,
                         const Tensor& x, const Tensor& s, const Tensor& weight,
                         const Tensor& lora_A, const Tensor& lora_B, double scale,
                         const Segments& segments) {
    const LinearGradients g = gradients_of<Products>(d_a, d_b, accumulates, dy, x, s, weight,
                                                     lora_A, lora_B, scale, segments);
    if (!is_empty(g.backward.dgrad)) {
      Products::linear_backward(g.backward);
      return g.dx;
    }
    base_alone(g.backward.dgrad);
    if (!accumulates) {
      d_a.zero_();
      d_b.zero_();
    }
    return g.dx;
  }

  static void base_alone(const Linear& l) {
    l.thin.zero_();
    multiply(l.out, l.in, l.weight);
  }
};

}  // namespace megalora
