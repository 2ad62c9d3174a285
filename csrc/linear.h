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

template <class Products>
struct LinearOps {
  static std::tuple<Tensor, Tensor> linear(const Tensor& x, const Tensor& weight,
                                           const Tensor& lora_A, const Tensor& lora_B, double scale,
                                           const Segments& segments) {
    const int64_t period = check(x, "x", weight, -1, lora_A, lora_B, segments);
    const Tensor y = empty(with_last(x, weight.size(0)), x);
    const Tensor s = empty(with_last(x, lora_A.size(0)), x);
    const Tensor in = rows(x), out = rows(y), thin = rows(s);
    Call shrink, expand;
    shrink.shrink(in, thin, lora_A, scale);
    expand.expand(out, thin, lora_B, segments, period, 1.0);
    const Linear linear{in, weight.t(), out, thin, shrink.factor, expand.factor};
    is_empty(linear) ? base_alone(linear) : Products::linear(linear);
    return {y, s};
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
  // dx; d_a and d_b, contiguous, are written or added to.
  static Tensor backward(const Tensor& d_a, const Tensor& d_b, bool accumulates, const Tensor& dy,
                         const Tensor& x, const Tensor& s, const Tensor& weight,
                         const Tensor& lora_A, const Tensor& lora_B, double scale,
                         const Segments& segments) {
    const int64_t period = check(dy, "dy", weight, 0, lora_A, lora_B, segments);
    check_rows(x, "x", dy, "dy");
    check_size(x.size(-1), "the last size of x", weight.size(1), "weight's last size");
    check_thin(s, "s", dy, "dy", lora_B.size(1), segments);
    const Tensor dx = empty(with_last(dy, weight.size(1)), dy);
    const Tensor in = rows(dy), out = rows(dx), wide = rows(x), thin = rows(s);
    const Tensor d_thin = empty({in.size(0), lora_A.size(0)}, dy);
    Call expand_dgrad, shrink_dgrad, expand_wgrad, shrink_wgrad;
    expand_dgrad.expand(in, d_thin, lora_B, segments, period, scale);
    shrink_dgrad.shrink(out, d_thin, lora_A, 1.0);
    expand_wgrad.expand(in, thin, d_b, segments, period, 1.0);
    expand_wgrad.gradient(d_b, accumulates);
    shrink_wgrad.shrink(wide, d_thin, d_a, 1.0);
    shrink_wgrad.gradient(d_a, accumulates);
    const Linear dgrad{in, weight, out, d_thin, expand_dgrad.factor, shrink_dgrad.factor};
    if (!is_empty(dgrad)) {
      Products::linear_backward({dgrad, wide, thin, shrink_wgrad.factor, expand_wgrad.factor});
      return dx;
    }
    base_alone(dgrad);
    if (!accumulates) {
      d_a.zero_();
      d_b.zero_();
    }
    return dx;
  }

  static bool is_empty(const Linear& l) {
    return l.in.numel() == 0 || l.out.numel() == 0 || l.thin.numel() == 0;
  }

  static void base_alone(const Linear& l) {
    l.thin.zero_();
    multiply(l.out, l.in, l.weight);
  }

  // axis: that of the weight along which the tokens are read.
  static int64_t check(const Tensor& tokens, const char* name, const Tensor& weight, int64_t axis,
                       const Tensor& lora_A, const Tensor& lora_B, const Segments& segments) {
    check_tokens(tokens, name, {});
    check_supported<Products>(tokens);
    check_factor(weight, "weight", tokens, name);
    check_factor(lora_A, "lora_A", tokens, name);
    check_factor(lora_B, "lora_B", tokens, name);
    check_size(weight.size(axis), axis == 0 ? "weight's first size" : "weight's last size",
               tokens.size(-1), axis == 0 ? "the last size of dy" : "the last size of x");
    check_size(lora_A.size(1), "lora_A's last size", weight.size(1), "the input features");
    check_size(lora_B.size(0), "lora_B's number of rows", weight.size(0), "the output features");
    const int64_t blocks = segments.empty() ? 1 : static_cast<int64_t>(segments.size());
    check_size(lora_A.size(0), "lora_A's number of rows", blocks * lora_B.size(1),
               "one rank block for each segment");
    return check_segments(segments, weight.size(0));
  }

  static void check_factor(const Tensor& matrix, const char* name, const Tensor& tokens,
                           const char* tokens_name) {
    check_dtype(matrix, name, tokens, tokens_name);
    check_weight(matrix, name, {});
  }
};

}  // namespace megalora
