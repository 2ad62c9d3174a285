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
namespace megalora {

// thin = project of in; out = in · weight + update by thin.
struct Linear {
  Tensor in;       // x or dy: [tokens, columns], unit column stride
  Tensor weight;   // Wᵀ or W: [columns of in, columns of out]
  Tensor out;      // y or dx: [tokens, columns], contiguous, nothing in it yet
  Factor project;  // its wide is in
  Factor update;   // its wide is out
};

template <class Products>
void base_first(const Linear& l) {
  Products::project(l.project);
  Tensor out = l.out;
  at::mm_out(out, l.in, l.weight);
  Products::update(l.update);
}

// Where the BLAS can update: its epilogue adds the base's product to what is there.
template <class Products>
void low_rank_first(const Linear& l) {
  Products::project(l.project);
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
    run({in, weight.t(), out, shrink.factor, expand.factor}, thin);
    return {y, s};
  }

  static std::tuple<Tensor, Tensor> linear_dgrad(const Tensor& dy, const Tensor& weight,
                                                 const Tensor& lora_A, const Tensor& lora_B,
                                                 double scale, at::IntArrayRef segments) {
    const int64_t period = check(dy, "dy", weight, 0, lora_A, lora_B, segments);
    const at::AutoDispatchBelowADInplaceOrView no_autograd;
    const Tensor dx = at::empty(with_last(dy, weight.size(1)), dy.options());
    const Tensor ds = at::empty(with_last(dy, lora_A.size(0)), dy.options());
    const Tensor in = rows(dy), out = rows(dx), thin = rows(ds);
    Call expand, shrink;
    expand.expand(in, thin, lora_B, segments, period, scale);
    shrink.shrink(out, thin, lora_A);
    run({in, weight, out, expand.factor, shrink.factor}, thin);
    return {dx, ds};
  }

 private:
  static void run(const Linear& l, const Tensor& thin) {
    if (l.in.numel() > 0 && l.out.numel() > 0 && thin.numel() > 0) {
      Products::linear(l);
      return;
    }
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
