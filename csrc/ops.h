#pragma once

#include <tuple>

#include "call.h"
#include "experts.h"
#include "gated.h"
#include "linear.h"
#include "schemas.h"

// The ops in terms of the three products of factor.h, for any device: Products has static functions
// project(Factor&), update(Factor&) and outer(Factor&) on rows with unit column stride,
// backward(Factor&, Factor&), which is project of the first and outer of the second on one wide,
// and those of linear.h.
namespace megalora {

// Runs body on rows of target that can be written in place; copies in and out only where no view of
// rows exists.
template <class Body>
void in_place(const Tensor& target, Body body) {
  const Tensor view = rows(target);
  body(view);
  if (view.data() != target.data()) {
    target.copy_(view.as_strided(target.sizes(), target.sizes().contiguous_strides()));
  }
}

template <class Products>
struct Ops {
  static Tensor shrink(const Tensor& x, const Tensor& lora_A, const OptionalTensor& offsets,
                       double p, const OptionalTensor& seed) {
    check_tokens(x, "x", offsets);
    check_dtype(lora_A, "lora_A", x, "x");
    check_shared(lora_A, "lora_A", x, offsets);
    check_dropout(p, seed, x);
    check_size(lora_A.size(-1), "lora_A's last size", x.size(-1), "that of x");
    Tensor s = empty(with_last(x, lora_A.size(-2)), x);
    Call call(offsets);
    call.weight(lora_A, Layout::rank_first);
    const Tensor wide = rows(x);
    const Tensor thin = rows(s);
    call.tokens(wide, thin);
    call.dropout(p, seed);
    project(call.factor, wide, thin);
    return s;
  }

  static void expand_(const Tensor& y, const Tensor& s, const Tensor& lora_B, double scale,
                      const OptionalTensor& offsets, const Segments& segments) {
    check_dtype(lora_B, "lora_B", y, "y");
    const int64_t period = check_expand(y, "y", lora_B, "lora_B", offsets, segments);
    check_thin(s, "s", y, "y", lora_B.size(-1), segments);
    Call call(offsets);
    const Tensor thin = rows(s);
    in_place(y, [&](const Tensor& wide) {
      call.expand(wide, thin, lora_B, segments, period, scale);
      if (wide.numel() > 0 && thin.numel() > 0) {
        Products::update(call.factor);
      }
    });
  }

  static Tensor expand_dgrad(const Tensor& dy, const Tensor& lora_B, double scale,
                             const OptionalTensor& offsets, const Segments& segments) {
    check_dtype(lora_B, "lora_B", dy, "dy");
    const int64_t period = check_expand(dy, "dy", lora_B, "lora_B", offsets, segments);
    const Tensor ds = like_s(dy, lora_B, segments);
    Call call(offsets);
    const Tensor wide = rows(dy);
    const Tensor thin = rows(ds);
    call.expand(wide, thin, lora_B, segments, period, scale);
    project(call.factor, wide, thin);
    return ds;
  }

  static Tensor expand_wgrad(const Tensor& dy, const Tensor& s, const Tensor& lora_B, double scale,
                             const OptionalTensor& offsets, const Segments& segments) {
    check_dtype(lora_B, "lora_B", dy, "dy");
    Tensor d_b = empty(lora_B.sizes(), lora_B);
    expand_outer(d_b, "lora_B", dy, s, scale, offsets, segments, false);
    return d_b;
  }

  static void expand_wgrad_(const Tensor& d_b, const Tensor& dy, const Tensor& s, double scale,
                            const OptionalTensor& offsets, const Segments& segments) {
    check_gradient(d_b, "d_b", dy, "dy");
    in_place_weight(d_b, [&](const Tensor& target) {
      expand_outer(target, "d_b", dy, s, scale, offsets, segments, true);
    });
  }

  static std::tuple<Tensor, Tensor> expand_backward(const Tensor& dy, const Tensor& s,
                                                    const Tensor& lora_B, double scale,
                                                    const OptionalTensor& offsets,
                                                    const Segments& segments) {
    Tensor d_b = empty(lora_B.sizes(), lora_B);
    Tensor ds = both(d_b, dy, s, lora_B, scale, offsets, segments, false);
    return {ds, d_b};
  }

  static Tensor expand_backward_(const Tensor& d_b, const Tensor& dy, const Tensor& s,
                                 const Tensor& lora_B, double scale, const OptionalTensor& offsets,
                                 const Segments& segments) {
    check_sum(d_b, "d_b", lora_B, "lora_B", dy, "dy");
    Tensor ds;
    in_place_weight(d_b, [&](const Tensor& target) {
      ds = both(target, dy, s, lora_B, scale, offsets, segments, true);
    });
    return ds;
  }

  static void shrink_dgrad_(const Tensor& dx, const Tensor& ds, const Tensor& lora_A,
                            const OptionalTensor& offsets, double p, const OptionalTensor& seed) {
    check_tokens(dx, "dx", offsets);
    check_dtype(lora_A, "lora_A", dx, "dx");
    check_shared(lora_A, "lora_A", dx, offsets);
    check_dropout(p, seed, dx);
    check_size(lora_A.size(-1), "lora_A's last size", dx.size(-1), "that of dx");
    check_thin(ds, "ds", dx, "dx", lora_A.size(-2), {});
    Call call(offsets);
    call.weight(lora_A, Layout::rank_first);
    const Tensor thin = rows(ds);
    in_place(dx, [&](const Tensor& wide) {
      call.tokens(wide, thin);
      call.dropout(p, seed);
      if (wide.numel() > 0 && thin.numel() > 0) {
        Products::update(call.factor);
      }
    });
  }

  static Tensor shrink_wgrad(const Tensor& ds, const Tensor& x, const OptionalTensor& offsets,
                             double p, const OptionalTensor& seed) {
    if (offsets) {
      check_offsets(*offsets, x);
    }
    check_tokens(x, "x", offsets);
    check_tokens(ds, "ds", offsets);
    const Shape shape =
        offsets ? Shape{offsets->numel(), ds.size(-1), x.size(-1)} : Shape{ds.size(-1), x.size(-1)};
    const Tensor d_a = empty(shape, x);
    shrink_outer(d_a, ds, x, offsets, p, seed, false);
    return d_a;
  }

  static void shrink_wgrad_(const Tensor& d_a, const Tensor& ds, const Tensor& x,
                            const OptionalTensor& offsets, double p, const OptionalTensor& seed) {
    check_gradient(d_a, "d_a", x, "x");
    in_place_weight(
        d_a, [&](const Tensor& target) { shrink_outer(target, ds, x, offsets, p, seed, true); });
  }

 private:
  static Tensor like_s(const Tensor& dy, const Tensor& lora_B, const Segments& segments) {
    const int64_t blocks = segments.empty() ? 1 : static_cast<int64_t>(segments.size());
    return empty(with_last(dy, blocks * lora_B.size(-1)), dy);
  }

  // d_b = (or +=) scale * dyᵀ s.
  static void expand_outer(const Tensor& d_b, const char* name, const Tensor& dy, const Tensor& s,
                           double scale, const OptionalTensor& offsets, const Segments& segments,
                           bool accumulates) {
    const int64_t period = check_expand(dy, "dy", d_b, name, offsets, segments);
    check_thin(s, "s", dy, "dy", d_b.size(-1), segments);
    Call call(offsets);
    const Tensor wide = rows(dy);
    const Tensor thin = rows(s);
    call.expand(wide, thin, d_b, segments, period, scale);
    call.gradient(d_b, accumulates);
    if (d_b.numel() > 0) {
      Products::outer(call.factor);
    }
  }

  // ds = scale * dy B, and d_b = (or +=) scale * dyᵀ s.
  static Tensor both(const Tensor& d_b, const Tensor& dy, const Tensor& s, const Tensor& lora_B,
                     double scale, const OptionalTensor& offsets, const Segments& segments,
                     bool accumulates) {
    check_dtype(lora_B, "lora_B", dy, "dy");
    const int64_t period = check_expand(dy, "dy", lora_B, "lora_B", offsets, segments);
    check_thin(s, "s", dy, "dy", lora_B.size(-1), segments);
    Tensor ds = like_s(dy, lora_B, segments);
    const Tensor wide = rows(dy);
    const Tensor thin = rows(s);
    const Tensor d_thin = rows(ds);
    Call dgrad(offsets), wgrad(offsets);
    dgrad.expand(wide, d_thin, lora_B, segments, period, scale);
    wgrad.expand(wide, thin, d_b, segments, period, scale);
    wgrad.gradient(d_b, accumulates);
    if (wide.numel() > 0 && thin.numel() > 0) {
      Products::backward(dgrad.factor, wgrad.factor);
      return ds;
    }
    ds.zero_();
    if (!accumulates) {
      d_b.zero_();
    }
    return ds;
  }

  // d_a = (or +=) dsᵀ dropout(x).
  static void shrink_outer(const Tensor& d_a, const Tensor& ds, const Tensor& x,
                           const OptionalTensor& offsets, double p, const OptionalTensor& seed,
                           bool accumulates) {
    check_tokens(x, "x", offsets);
    check_shared(d_a, "d_a", x, offsets);
    check_dropout(p, seed, x);
    check_size(d_a.size(-1), "d_a's last size", x.size(-1), "that of x");
    check_thin(ds, "ds", x, "x", d_a.size(-2), {});
    Call call(offsets);
    call.weight(d_a, Layout::rank_first);
    const Tensor wide = rows(x);
    const Tensor thin = rows(ds);
    call.tokens(wide, thin);
    call.dropout(p, seed);
    call.gradient(d_a, accumulates);
    if (d_a.numel() > 0) {
      Products::outer(call.factor);
    }
  }

  static void project(const Factor& factor, const Tensor& wide, const Tensor& thin) {
    if (wide.numel() == 0) {
      thin.zero_();
    } else if (thin.numel() > 0) {
      Products::project(factor);
    }
  }

  static void check_shared(const Tensor& weight, const char* name, const Tensor& tokens,
                           const OptionalTensor& offsets) {
    if (offsets) {
      check_offsets(*offsets, tokens);
    }
    check_weight(weight, name, offsets);
    check_supported<Products>(tokens);
  }

  static int64_t check_expand(const Tensor& wide, const char* name, const Tensor& weight,
                              const char* weight_name, const OptionalTensor& offsets,
                              const Segments& segments) {
    check_tokens(wide, name, offsets);
    check_shared(weight, weight_name, wide, offsets);
    check_size(weight.size(-2), "lora_B's number of rows", wide.size(-1), "the output features");
    return check_segments(segments, wide.size(-1));
  }
};

template <class Products>
void implement(Library& m) {
  m.impl("shrink", TORCH_BOX(&Ops<Products>::shrink));
  m.impl("expand_", TORCH_BOX(&Ops<Products>::expand_));
  m.impl("expand_dgrad", TORCH_BOX(&Ops<Products>::expand_dgrad));
  m.impl("expand_wgrad", TORCH_BOX(&Ops<Products>::expand_wgrad));
  m.impl("expand_backward", TORCH_BOX(&Ops<Products>::expand_backward));
  m.impl("shrink_dgrad_", TORCH_BOX(&Ops<Products>::shrink_dgrad_));
  m.impl("shrink_wgrad", TORCH_BOX(&Ops<Products>::shrink_wgrad));
  m.impl("expand_wgrad_", TORCH_BOX(&Ops<Products>::expand_wgrad_));
  m.impl("expand_backward_", TORCH_BOX(&Ops<Products>::expand_backward_));
  m.impl("shrink_wgrad_", TORCH_BOX(&Ops<Products>::shrink_wgrad_));
  m.impl("linear", TORCH_BOX(&LinearOps<Products>::linear));
  m.impl("linear_backward", TORCH_BOX(&LinearOps<Products>::linear_backward));
  m.impl("linear_backward_", TORCH_BOX(&LinearOps<Products>::linear_backward_));
  m.impl("experts_linear", TORCH_BOX(&ExpertsOps<Products>::experts_linear));
  m.impl("experts_linear_backward", TORCH_BOX(&ExpertsOps<Products>::experts_linear_backward));
  m.impl("experts_linear_backward_", TORCH_BOX(&ExpertsOps<Products>::experts_linear_backward_));
  m.impl("experts_linear_is_fused", TORCH_BOX(&ExpertsOps<Products>::experts_linear_is_fused));
}

}  // namespace megalora
