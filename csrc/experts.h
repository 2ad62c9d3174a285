#pragma once

#include <tuple>
#include <vector>

#include "call.h"

// The base linears of experts with their adapters in one op each way: what linear.h is for a dense
// one, for every expert. Tokens are sorted by expert and every token belongs to one. s has the
// ranks of all projections and zeros behind them, up to a multiple of 8. Products has
// experts_linear(ExpertsLinear&) and experts_backward(ExpertsBackward&), which may be
// compose_experts of this file.
namespace megalora {

// thin = project of in; out = in · weight of its expert + update by thin.
struct ExpertsLinear {
  Tensor in;                    // x or dy: [tokens, columns], unit column stride
  std::vector<Tensor> weights;  // W [out, in] of each expert
  bool transposes;              // forward: by Wᵀ
  Tensor offsets;               // int32 or int64 [experts], on the tokens' device
  Tensor out;                   // y or dx: [tokens, columns], contiguous, nothing in it yet
  Tensor thin;                  // s or ds: [tokens, ranks and padding], zero in the padding
  Factor project;               // its wide is in
  Factor update;                // its wide is out
};

struct ExpertsBackward {
  ExpertsLinear dgrad;
  Tensor x, s;  // [tokens, columns], unit column stride
  Factor d_a;   // outer of x and ds
  Factor d_b;   // outer of dy and s
};

inline int64_t padded(int64_t ranks) { return (ranks + 7) / 8 * 8; }

// The base alone, expert by expert. Reads the offsets on the host.
inline void base_of_experts(const ExpertsLinear& l) {
  const Tensor ends = l.offsets.to(ScalarType::Long, Device{});
  int64_t begin = 0;
  for (size_t expert = 0; expert < l.weights.size(); ++expert) {
    const int64_t end = ends.data<int64_t>()[expert];
    const Tensor& w = l.weights[expert];
    multiply(l.out.narrow(0, begin, end - begin), l.in.narrow(0, begin, end - begin),
             l.transposes ? w.t() : w);
    begin = end;
  }
}

template <class Products>
void compose_experts(const ExpertsLinear& l) {
  Products::project(l.project);
  base_of_experts(l);
  Products::update(l.update);
}

template <class Products>
void compose_experts(const ExpertsBackward& b) {
  Products::backward(b.dgrad.project, b.d_b);
  base_of_experts(b.dgrad);
  Products::update(b.dgrad.update);
  Products::outer(b.d_a);
}

template <class Products>
struct ExpertsOps {
  static std::tuple<Tensor, Tensor> experts_linear(const Tensor& x,
                                                   const std::vector<Tensor>& weights,
                                                   const Tensor& lora_A, const Tensor& lora_B,
                                                   double scale, const Tensor& offsets,
                                                   const Segments& segments) {
    const int64_t period = check(x, "x", weights, -1, lora_A, lora_B, offsets, segments);
    const int64_t ranks = lora_A.size(1);
    const Tensor y = empty({x.size(0), weights[0].size(0)}, x);
    const Tensor s = zeros_behind(x, ranks), thin = s.narrow(1, 0, ranks), in = rows(x);
    Call shrink(offsets), expand(offsets);
    shrink.shrink(in, thin, lora_A, scale);
    expand.expand(y, thin, lora_B, segments, period, 1.0);
    if (x.size(0) > 0) {
      Products::experts_linear({in, weights, true, offsets, y, s, shrink.factor, expand.factor});
    }
    return {y, s};
  }

  static std::tuple<Tensor, Tensor, Tensor> experts_linear_backward(
      const Tensor& dy, const Tensor& x, const Tensor& s, const std::vector<Tensor>& weights,
      const Tensor& lora_A, const Tensor& lora_B, double scale, const Tensor& offsets,
      const Segments& segments) {
    const Tensor d_a = empty(lora_A.sizes(), lora_A);
    const Tensor d_b = empty(lora_B.sizes(), lora_B);
    const Tensor dx =
        backward(d_a, d_b, false, dy, x, s, weights, lora_A, lora_B, scale, offsets, segments);
    return {dx, d_a, d_b};
  }

  static Tensor experts_linear_backward_(const Tensor& d_a, const Tensor& d_b, const Tensor& dy,
                                         const Tensor& x, const Tensor& s,
                                         const std::vector<Tensor>& weights, const Tensor& lora_A,
                                         const Tensor& lora_B, double scale, const Tensor& offsets,
                                         const Segments& segments) {
    check_sum(d_a, "d_a", lora_A, "lora_A", x, "x");
    check_sum(d_b, "d_b", lora_B, "lora_B", dy, "dy");
    Tensor dx;
    in_place_weight(d_a, [&](const Tensor& a) {
      in_place_weight(d_b, [&](const Tensor& b) {
        dx = backward(a, b, true, dy, x, s, weights, lora_A, lora_B, scale, offsets, segments);
      });
    });
    return dx;
  }

  // Whether one launch computes experts with a weight like this one.
  static bool experts_linear_is_fused(const Tensor& weight, int64_t experts, int64_t ranks) {
    return Products::fuses_experts(weight, experts, ranks);
  }

 private:
  static Tensor zeros_behind(const Tensor& tokens, int64_t ranks) {
    const Tensor thin = empty({tokens.size(0), padded(ranks)}, tokens);
    if (padded(ranks) > ranks) {
      thin.narrow(1, ranks, padded(ranks) - ranks).zero_();
    }
    return thin;
  }

  // dx; d_a and d_b, contiguous, are written or added to.
  static Tensor backward(const Tensor& d_a, const Tensor& d_b, bool accumulates, const Tensor& dy,
                         const Tensor& x, const Tensor& s, const std::vector<Tensor>& weights,
                         const Tensor& lora_A, const Tensor& lora_B, double scale,
                         const Tensor& offsets, const Segments& segments) {
    const int64_t period = check(dy, "dy", weights, 0, lora_A, lora_B, offsets, segments);
    const int64_t ranks = lora_A.size(1);
    check_rows(x, "x", dy, "dy");
    check_size(x.size(-1), "the last size of x", weights[0].size(1), "that of the weights");
    check_rows(s, "s", dy, "dy");
    check_size(s.size(-1), "the last size of s", padded(ranks), "the ranks up to a multiple of 8");
    const Tensor dx = empty({dy.size(0), weights[0].size(1)}, dy);
    const Tensor in = rows(dy), wide = rows(x), thin = rows(s);
    const Tensor ds = zeros_behind(dy, ranks), d_thin = ds.narrow(1, 0, ranks);
    Call expand_dgrad(offsets), shrink_dgrad(offsets), expand_wgrad(offsets), shrink_wgrad(offsets);
    expand_dgrad.expand(in, d_thin, lora_B, segments, period, scale);
    shrink_dgrad.shrink(dx, d_thin, lora_A, 1.0);
    expand_wgrad.expand(in, thin.narrow(1, 0, ranks), d_b, segments, period, 1.0);
    expand_wgrad.gradient(d_b, accumulates);
    shrink_wgrad.shrink(wide, d_thin, d_a, 1.0);
    shrink_wgrad.gradient(d_a, accumulates);
    if (dy.size(0) > 0) {
      Products::experts_backward(
          {{in, weights, false, offsets, dx, ds, expand_dgrad.factor, shrink_dgrad.factor},
           wide,
           thin,
           shrink_wgrad.factor,
           expand_wgrad.factor});
    } else if (!accumulates) {
      d_a.zero_();
      d_b.zero_();
    }
    return dx;
  }

  // axis: that of the weights along which the tokens are read.
  static int64_t check(const Tensor& tokens, const char* name, const std::vector<Tensor>& weights,
                       int64_t axis, const Tensor& lora_A, const Tensor& lora_B,
                       const Tensor& offsets, const Segments& segments) {
    check_tokens(tokens, name, offsets);
    check_supported<Products>(tokens);
    check_offsets(offsets, tokens);
    check_size(static_cast<int64_t>(weights.size()), "the number of weights", offsets.numel(),
               "one for each of the offsets");
    for (const Tensor& weight : weights) {
      check_dtype(weight, "weight", tokens, name);
      check_weight(weight, "weight", {});
      check_size(weight.size(0), "weight's first size", weights[0].size(0), "that of the first");
      check_size(weight.size(1), "weight's last size", weights[0].size(1), "that of the first");
    }
    check_factor(lora_A, "lora_A", tokens, name, offsets);
    check_factor(lora_B, "lora_B", tokens, name, offsets);
    check_size(weights[0].size(axis), axis == 0 ? "weight's first size" : "weight's last size",
               tokens.size(-1), axis == 0 ? "the last size of dy" : "the last size of x");
    check_size(lora_A.size(2), "lora_A's last size", weights[0].size(1), "the input features");
    check_size(lora_B.size(1), "lora_B's number of rows", weights[0].size(0),
               "the output features");
    const int64_t blocks = segments.empty() ? 1 : static_cast<int64_t>(segments.size());
    check_size(lora_A.size(1), "lora_A's number of rows", blocks * lora_B.size(2),
               "one rank block for each segment");
    return check_segments(segments, weights[0].size(0));
  }

  static void check_factor(const Tensor& matrix, const char* name, const Tensor& tokens,
                           const char* tokens_name, const Tensor& offsets) {
    check_dtype(matrix, name, tokens, tokens_name);
    check_weight(matrix, name, offsets);
  }
};

}  // namespace megalora
