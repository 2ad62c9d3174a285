#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zero.h>
#include <c10/util/accumulate.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "checks.h"
#include "factor.h"
#include "schemas.h"

// The seven ops in terms of the three products of factor.h, for any device: Products has static
// functions project(Factor&), update(Factor&) and outer(Factor&) on rows with unit column stride.
namespace megalora {

// [..., c] as [tokens, c] with unit column stride: a view where one exists, a copy where none does.
inline Tensor rows(const Tensor& tokens) {
  const int64_t features = tokens.size(-1);
  const int64_t count = c10::multiply_integers(tokens.sizes().slice(0, tokens.dim() - 1));
  Tensor flat = tokens.reshape({count, features});
  return flat.stride(1) == 1 || features <= 1 ? flat : flat.contiguous();
}

inline std::vector<int64_t> with_last(const Tensor& tokens, int64_t features) {
  std::vector<int64_t> shape = tokens.sizes().vec();
  shape.back() = features;
  return shape;
}

enum class Layout { rank_first, column_first };  // lora_A [P*r, in], lora_B [out, r]

struct Call {
  OptionalTensor offsets;
  Tensor contiguous_offsets;
  Tensor contiguous_weight;
  Factor factor{.dtype = c10::ScalarType::Undefined, .device = c10::kCPU};

  explicit Call(const OptionalTensor& given) : offsets(given) {}

  void weight(const Tensor& given, Layout layout) {
    contiguous_weight = given.contiguous();
    const Tensor& w = contiguous_weight;
    const int64_t rank_axis = layout == Layout::rank_first ? -2 : -1;
    const int64_t column_axis = layout == Layout::rank_first ? -1 : -2;
    factor.weight = w.data_ptr();
    factor.rank = w.size(rank_axis);
    factor.rank_stride = w.stride(rank_axis);
    factor.columns = w.size(column_axis);
    factor.column_stride = w.stride(column_axis);
    factor.experts = offsets ? w.size(0) : 1;
    factor.expert_stride = offsets ? w.stride(0) : 0;
    if (offsets) {
      contiguous_offsets = offsets->contiguous();
      factor.offsets = contiguous_offsets.data_ptr();
      factor.offsets_are_int64 = offsets->scalar_type() == at::kLong;
    }
  }

  void tokens(const Tensor& wide, const Tensor& thin) {
    factor.dtype = wide.scalar_type();
    factor.device = wide.device();
    factor.wide = wide.data_ptr();
    factor.wide_stride = wide.stride(0);
    factor.thin = thin.data_ptr();
    factor.thin_stride = thin.stride(0);
    factor.tokens = wide.size(0);
  }

  void segments(at::IntArrayRef sizes, int64_t period, double scale) {
    factor.num_segments = sizes.empty() ? 1 : static_cast<int>(sizes.size());
    factor.segment[0] = factor.columns;
    std::copy(sizes.begin(), sizes.end(), factor.segment);
    factor.period = period;
    factor.scale = scale;
  }

  void dropout(double p, const OptionalTensor& seed) {
    segments({}, factor.columns, 1.0 / (1.0 - p));
    factor.threshold = static_cast<uint32_t>(p * 4294967296.0);
    factor.seed = p > 0.0 ? seed->data_ptr<int64_t>() : nullptr;
  }
};

// Runs body on rows of target that can be written in place; copies in and out only where no view of
// rows exists.
template <class Body>
void in_place(const Tensor& target, Body body) {
  Tensor view = rows(target);
  body(view);
  if (view.data_ptr() != target.data_ptr()) {
    target.copy_(view.view(target.sizes()));
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
    Tensor s = at::empty(with_last(x, lora_A.size(-2)), x.options());
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
                      const OptionalTensor& offsets, at::IntArrayRef segments) {
    const int64_t period = check_expand(y, "y", lora_B, offsets, segments);
    check_thin(s, "s", y, "y", lora_B.size(-1), segments);
    Call call(offsets);
    call.weight(lora_B, Layout::column_first);
    const Tensor thin = rows(s);
    in_place(y, [&](const Tensor& wide) {
      call.tokens(wide, thin);
      call.segments(segments, period, scale);
      if (wide.numel() > 0 && thin.numel() > 0) {
        Products::update(call.factor);
      }
    });
  }

  static Tensor expand_dgrad(const Tensor& dy, const Tensor& lora_B, double scale,
                             const OptionalTensor& offsets, at::IntArrayRef segments) {
    const int64_t period = check_expand(dy, "dy", lora_B, offsets, segments);
    const int64_t blocks = segments.empty() ? 1 : static_cast<int64_t>(segments.size());
    Tensor ds = at::empty(with_last(dy, blocks * lora_B.size(-1)), dy.options());
    Call call(offsets);
    call.weight(lora_B, Layout::column_first);
    const Tensor wide = rows(dy);
    const Tensor thin = rows(ds);
    call.tokens(wide, thin);
    call.segments(segments, period, scale);
    project(call.factor, wide, thin);
    return ds;
  }

  static Tensor expand_wgrad(const Tensor& dy, const Tensor& s, const Tensor& lora_B, double scale,
                             const OptionalTensor& offsets, at::IntArrayRef segments) {
    const int64_t period = check_expand(dy, "dy", lora_B, offsets, segments);
    check_thin(s, "s", dy, "dy", lora_B.size(-1), segments);
    Tensor d_b = at::empty(lora_B.sizes(), lora_B.options());
    Call call(offsets);
    call.weight(d_b, Layout::column_first);
    const Tensor wide = rows(dy);
    const Tensor thin = rows(s);
    call.tokens(wide, thin);
    call.segments(segments, period, scale);
    if (d_b.numel() > 0) {
      Products::outer(call.factor);
    }
    return d_b;
  }

  static std::tuple<Tensor, Tensor> expand_backward(const Tensor& dy, const Tensor& s,
                                                    const Tensor& lora_B, double scale,
                                                    const OptionalTensor& offsets,
                                                    at::IntArrayRef segments) {
    return {expand_dgrad(dy, lora_B, scale, offsets, segments),
            expand_wgrad(dy, s, lora_B, scale, offsets, segments)};
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
    check_tokens(x, "x", offsets);
    check_dropout(p, seed, x);
    check_thin(ds, "ds", x, "x", ds.dim() > 0 ? ds.size(-1) : 0, {});
    if (offsets) {
      check_offsets(*offsets, x);
    }
    std::vector<int64_t> shape{ds.size(-1), x.size(-1)};
    if (offsets) {
      shape.insert(shape.begin(), offsets->numel());
    }
    Tensor d_a = at::empty(shape, x.options());
    Call call(offsets);
    call.weight(d_a, Layout::rank_first);
    const Tensor wide = rows(x);
    const Tensor thin = rows(ds);
    call.tokens(wide, thin);
    call.dropout(p, seed);
    if (d_a.numel() > 0) {
      Products::outer(call.factor);
    }
    return d_a;
  }

 private:
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
    TORCH_CHECK_VALUE(Products::supports(tokens.scalar_type()), "dtype ", tokens.scalar_type(),
                      " is not supported on ", tokens.device().type(), ", expected one of ",
                      Products::kDtypes);
  }

  static int64_t check_expand(const Tensor& wide, const char* name, const Tensor& lora_B,
                              const OptionalTensor& offsets, at::IntArrayRef segments) {
    check_tokens(wide, name, offsets);
    check_dtype(lora_B, "lora_B", wide, name);
    check_shared(lora_B, "lora_B", wide, offsets);
    check_size(lora_B.size(-2), "lora_B's number of rows", wide.size(-1), "the output features");
    return check_segments(segments, wide.size(-1));
  }

  static void check_thin(const Tensor& thin, const char* name, const Tensor& wide,
                         const char* wide_name, int64_t rank, at::IntArrayRef segments) {
    check_dtype(thin, name, wide, wide_name);
    TORCH_CHECK_VALUE(thin.dim() == wide.dim() && thin.sizes().slice(0, thin.dim() - 1) ==
                                                      wide.sizes().slice(0, wide.dim() - 1),
                      name, " has shape ", thin.sizes(), ", expected the leading sizes of ",
                      wide_name, ", ", wide.sizes());
    const int64_t blocks = segments.empty() ? 1 : static_cast<int64_t>(segments.size());
    check_size(thin.size(-1), "the last size of s or ds", blocks * rank,
               "one rank block for each segment");
  }
};

template <class Products>
void implement(torch::Library& m) {
  m.impl("shrink", &Ops<Products>::shrink);
  m.impl("expand_", &Ops<Products>::expand_);
  m.impl("expand_dgrad", &Ops<Products>::expand_dgrad);
  m.impl("expand_wgrad", &Ops<Products>::expand_wgrad);
  m.impl("expand_backward", &Ops<Products>::expand_backward);
  m.impl("shrink_dgrad_", &Ops<Products>::shrink_dgrad_);
  m.impl("shrink_wgrad", &Ops<Products>::shrink_wgrad);
}

}  // namespace megalora
