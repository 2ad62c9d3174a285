#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include <tuple>

#include "call.h"
#include "gemm.h"

// A base linear with its adapter in one op, forward and dgrad, which are one form:
//   forward  s = x · Aᵀ            y = x · Wᵀ + scale * s · Bᵀ
//   dgrad    ds = scale * dy · B   dx = dy · W + ds · A
// Products has linear(Linear&), and linear_backward(Linear&, Factor&), which is linear and the outer
// product that gives dB, of the same dy.
namespace megalora {

// thin = project of in; out = in · weight + update by thin.
struct Linear {
  Tensor in;       // x or dy: [tokens, columns], unit column stride
  Tensor weight;   // Wᵀ or W: [columns of in, columns of out]
  Tensor out;      // y or dx: [tokens, columns], contiguous, nothing in it yet
  Factor project;  // its wide is in
  Factor update;   // its wide is out
};

// The two ways from a thin that is there: the base's product, to which the low-rank term is added,
// and the low-rank term, to which the BLAS adds the base's product in its epilogue, for what it can
// update.
template <class Products>
void base_first(const Linear& l) {
  Tensor out = l.out;
  at::mm_out(out, l.in, l.weight);
  Products::update(l.update);
}

inline void low_rank_first(const Linear& l) {
  gemm::write(l.update);
  Tensor out = l.out;
  at::addmm_out(out, out, l.in, l.weight);
}

template <class Products>
struct LinearOps {
  static std::tuple<Tensor, Tensor> linear(const Tensor& x, const Tensor& weight,
                                           const Tensor& lora_A, const Tensor& lora_B, double scale,
                                           at::IntArrayRef segments) {
    const int64_t period = check(x, "x", weight, -1, lora_A, lora_B, segments);
    const at::AutoDispatchBelowADInplaceOrView no_autograd;
    const Tensor y = at::empty(with_last(x, weight.size(0)), x.options());
    const Tensor s = at::empty(with_last(x, lora_A.size(0)), x.options());
    const Tensor in = rows(x), out = rows(y), thin = rows(s);
    Call shrink, expand;
    shrink.shrink(in, thin, lora_A);
    expand.expand(out, thin, lora_B, segments, period, scale);
    const Linear linear{in, weight.t(), out, shrink.factor, expand.factor};
    is_empty(linear, thin) ? base_alone(linear, thin) : Products::linear(linear);
    return {y, s};
  }

  static std::tuple<Tensor, Tensor> linear_dgrad(const Tensor& dy, const Tensor& weight,
                                                 const Tensor& lora_A, const Tensor& lora_B,
                                                 double scale, at::IntArrayRef segments) {
    return dgrad(nullptr, {}, dy, weight, lora_A, lora_B, scale, segments, false);
  }

  static std::tuple<Tensor, Tensor, Tensor> linear_backward(const Tensor& dy, const Tensor& s,
                                                            const Tensor& weight,
                                                            const Tensor& lora_A,
                                                            const Tensor& lora_B, double scale,
                                                            at::IntArrayRef segments) {
    const Tensor d_b = at::empty(lora_B.sizes(), lora_B.options());
    auto [dx, ds] = dgrad(&d_b, s, dy, weight, lora_A, lora_B, scale, segments, false);
    return {dx, ds, d_b};
  }

  static std::tuple<Tensor, Tensor> linear_backward_(const Tensor& d_b, const Tensor& dy,
                                                     const Tensor& s, const Tensor& weight,
                                                     const Tensor& lora_A, const Tensor& lora_B,
                                                     double scale, at::IntArrayRef segments) {
    check_gradient(d_b, "d_b", dy, "dy");
    TORCH_CHECK_VALUE(d_b.sizes() == lora_B.sizes(), "d_b has shape ", d_b.sizes(),
                      ", expected that of lora_B, ", lora_B.sizes());
    std::tuple<Tensor, Tensor> result;
    in_place_weight(d_b, [&](const Tensor& target) {
      result = dgrad(&target, s, dy, weight, lora_A, lora_B, scale, segments, true);
    });
    return result;
  }

 private:
  // dx and ds; d_b too, written or added to, where it is not null.
  static std::tuple<Tensor, Tensor> dgrad(const Tensor* d_b, const Tensor& s, const Tensor& dy,
                                          const Tensor& weight, const Tensor& lora_A,
                                          const Tensor& lora_B, double scale,
                                          at::IntArrayRef segments, bool accumulates) {
    const int64_t period = check(dy, "dy", weight, 0, lora_A, lora_B, segments);
    const at::AutoDispatchBelowADInplaceOrView no_autograd;
    const Tensor dx = at::empty(with_last(dy, weight.size(1)), dy.options());
    const Tensor ds = at::empty(with_last(dy, lora_A.size(0)), dy.options());
    const Tensor in = rows(dy), out = rows(dx), d_thin = rows(ds);
    Call expand, shrink, wgrad;
    expand.expand(in, d_thin, lora_B, segments, period, scale);
    shrink.shrink(out, d_thin, lora_A);
    const Linear linear{in, weight, out, expand.factor, shrink.factor};
    if (d_b == nullptr) {
      is_empty(linear, d_thin) ? base_alone(linear, d_thin) : Products::linear(linear);
      return {dx, ds};
    }
    check_thin(s, "s", dy, "dy", lora_B.size(1), segments);
    const Tensor thin = rows(s);
    wgrad.expand(in, thin, *d_b, segments, period, scale);
    wgrad.gradient(*d_b, accumulates);
    if (!is_empty(linear, d_thin)) {
      Products::linear_backward(linear, wgrad.factor);
      return {dx, ds};
    }
    base_alone(linear, d_thin);
    if (!accumulates) {
      d_b->zero_();
    }
    return {dx, ds};
  }

  static bool is_empty(const Linear& l, const Tensor& thin) {
    return l.in.numel() == 0 || l.out.numel() == 0 || thin.numel() == 0;
  }

  static void base_alone(const Linear& l, const Tensor& thin) {
    thin.zero_();
    Tensor out = l.out;
    at::mm_out(out, l.in, l.weight);
  }

  // axis: that of the weight along which the tokens are read.
  static int64_t check(const Tensor& tokens, const char* name, const Tensor& weight, int64_t axis,
                       const Tensor& lora_A, const Tensor& lora_B, at::IntArrayRef segments) {
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
