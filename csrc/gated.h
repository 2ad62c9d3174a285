#pragma once

#include <tuple>

#include "gate.h"
#include "linear.h"
#include "schemas.h"

// A gated MLP with the adapters of both its linears in one op each way:
//   forward  [gate, up] = x · W1ᵀ + s1 · B1ᵀ   a = silu(gate) up p   z = a · W2ᵀ + s2 · B2ᵀ
// p: a weight of each token, for experts, or none. Between the two products with base weights there
// is one pass over the wide tensors (gate.h): it adds the low-rank term to what the first gives,
// makes a, and reads s2 off it; backward, it adds the term to da, makes the gradients of gate and
// up, and reads ds1 off them. a is not kept but made again, from y, which is gate and up or what
// they are made of.
// Products has gates(dtype, columns, rank), kGates, which says of what, gate_is_faster(weight2,
// rank), gate(Gate&) and gate_backward(GateBackward&).
namespace megalora {

// Checks what the pass is given; y [tokens, 2 columns], a [tokens, columns].
template <class Products>
void check_gate(const Tensor& y, const Tensor& a, const Tensor& lora_B1, const Tensor& lora_A2,
                const Segments& segments, const OptionalTensor& weights) {
  const int64_t columns = a.size(1), rank = std::max(lora_B1.size(-1), lora_A2.size(-2));
  check_value(Products::gates(a.dtype(), columns, rank), "dtype ", a.dtype(), ", ", columns,
              " columns of gate and rank ", rank, " are not computed by gated_mlp, expected ",
              Products::kGates);
  check_size(y.size(1), "the number of y's columns", 2 * columns, "gate and up of those of a");
  check_value(segments.empty() || segments == Segments{columns, columns}, "segments is ", segments,
              ", expected none or gate and up, ", Segments{columns, columns});
  if (weights) {
    check_gradient(*weights, "weights", a, "x");
    check_value(weights->sizes() == Shape{a.size(0)} && weights->is_contiguous(),
                "weights has shape ", weights->sizes(), ", expected one for each of ", a.size(0),
                " tokens, contiguous");
  }
}

inline bool are_fp32(const OptionalTensor& weights, const Tensor& tokens) {
  return weights && weights->dtype() != tokens.dtype();
}

inline const void* data(const OptionalTensor& weights) {
  return weights ? weights->data() : nullptr;
}

inline Tensor weights_gradient(const OptionalTensor& weights, const Tensor& like) {
  return weights ? empty(weights->sizes(), *weights) : empty({0}, like);
}

template <class Products>
struct GatedOps {
  // z, y, s1 and s2.
  static std::tuple<Tensor, Tensor, Tensor, Tensor> gated_mlp(
      const Tensor& x, const Tensor& weight1, const Tensor& lora_A1, const Tensor& lora_B1,
      double scale1, const Tensor& weight2, const Tensor& lora_A2, const Tensor& lora_B2,
      double scale2, const Segments& segments, const OptionalTensor& weights) {
    const LinearForward one = forward_of<Products>(x, weight1, lora_A1, lora_B1, scale1, segments);
    const Tensor a = empty(with_last(x, weight2.size(-1)), x);
    const LinearForward two = forward_of<Products>(a, weight2, lora_A2, lora_B2, scale2, {});
    check_gate<Products>(one.linear.out, two.linear.in, lora_B1, lora_A2, segments, weights);
    if (x.numel() > 0) {
      Products::project(one.linear.project);
      multiply(one.linear.out, one.linear.in, one.linear.weight);
      Products::gate({one.linear.update, two.linear.project, data(weights), are_fp32(weights, x)});
      Products::add_base(two.linear);
    }
    return {two.y, one.y, one.s, two.s};
  }

  // dx, dA1, dB1, dA2, dB2 and dp, which has no elements where there is no p.
  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gated_mlp_backward(
      const Tensor& dz, const Tensor& x, const Tensor& y, const Tensor& s1, const Tensor& s2,
      const Tensor& weight1, const Tensor& lora_A1, const Tensor& lora_B1, double scale1,
      const Tensor& weight2, const Tensor& lora_A2, const Tensor& lora_B2, double scale2,
      const Segments& segments, const OptionalTensor& weights) {
    const Tensor d_a1 = empty(lora_A1.sizes(), lora_A1), d_b1 = empty(lora_B1.sizes(), lora_B1);
    const Tensor d_a2 = empty(lora_A2.sizes(), lora_A2), d_b2 = empty(lora_B2.sizes(), lora_B2);
    const auto [dx, d_weights] =
        backward(d_a1, d_b1, d_a2, d_b2, false, dz, x, y, s1, s2, weight1, lora_A1, lora_B1, scale1,
                 weight2, lora_A2, lora_B2, scale2, segments, weights);
    return {dx, d_a1, d_b1, d_a2, d_b2, d_weights};
  }

  // dx and dp; the factors' gradients are added to d_a1 and so on.
  static std::tuple<Tensor, Tensor> gated_mlp_backward_(
      const Tensor& d_a1, const Tensor& d_b1, const Tensor& d_a2, const Tensor& d_b2,
      const Tensor& dz, const Tensor& x, const Tensor& y, const Tensor& s1, const Tensor& s2,
      const Tensor& weight1, const Tensor& lora_A1, const Tensor& lora_B1, double scale1,
      const Tensor& weight2, const Tensor& lora_A2, const Tensor& lora_B2, double scale2,
      const Segments& segments, const OptionalTensor& weights) {
    check_sum(d_a1, "d_a1", lora_A1, "lora_A1", x, "x");
    check_sum(d_b1, "d_b1", lora_B1, "lora_B1", x, "x");
    check_sum(d_a2, "d_a2", lora_A2, "lora_A2", x, "x");
    check_sum(d_b2, "d_b2", lora_B2, "lora_B2", x, "x");
    std::tuple<Tensor, Tensor> found;
    in_place_weight(d_a1, [&](const Tensor& a1) {
      in_place_weight(d_b1, [&](const Tensor& b1) {
        in_place_weight(d_a2, [&](const Tensor& a2) {
          in_place_weight(d_b2, [&](const Tensor& b2) {
            found = backward(a1, b1, a2, b2, true, dz, x, y, s1, s2, weight1, lora_A1, lora_B1,
                             scale1, weight2, lora_A2, lora_B2, scale2, segments, weights);
          });
        });
      });
    });
    return found;
  }

  // Whether the op is the fastest way for weight2 and such ranks, and not only possible.
  static bool gated_mlp_is_fused(const Tensor& weight2, int64_t rank1, int64_t rank2) {
    const int64_t rank = std::max(rank1, rank2);
    return Products::gates(weight2.dtype(), weight2.size(-1), rank) &&
           Products::gate_is_faster(weight2, rank);
  }

 private:
  static std::tuple<Tensor, Tensor> backward(
      const Tensor& d_a1, const Tensor& d_b1, const Tensor& d_a2, const Tensor& d_b2,
      bool accumulates, const Tensor& dz, const Tensor& x, const Tensor& y, const Tensor& s1,
      const Tensor& s2, const Tensor& weight1, const Tensor& lora_A1, const Tensor& lora_B1,
      double scale1, const Tensor& weight2, const Tensor& lora_A2, const Tensor& lora_B2,
      double scale2, const Segments& segments, const OptionalTensor& weights) {
    const Tensor a = empty(with_last(dz, weight2.size(-1)), dz);
    const Tensor dy = empty(with_last(dz, weight1.size(0)), dz);
    const LinearGradients two = gradients_of<Products>(d_a2, d_b2, accumulates, dz, a, s2, weight2,
                                                       lora_A2, lora_B2, scale2, {});
    const LinearGradients one = gradients_of<Products>(d_a1, d_b1, accumulates, dy, x, s1, weight1,
                                                       lora_A1, lora_B1, scale1, segments);
    const Linear& da = two.backward.dgrad;
    const Linear& dx = one.backward.dgrad;
    check_rows(y, "y", dz, "dz");
    check_size(y.size(-1), "the last size of y", dy.size(-1), "weight1's first size");
    check_gate<Products>(dx.in, da.out, lora_B1, lora_A2, segments, weights);
    const Tensor d_weights = weights_gradient(weights, dz);
    if (dz.numel() > 0) {
      const Tensor contiguous = y.contiguous();
      Call gates;
      gates.expand(rows(contiguous), one.backward.s, lora_B1, segments, y.size(-1), 1.0);
      Products::backward(da.project, two.backward.d_b);
      multiply(da.out, da.in, da.weight);
      Products::gate_backward({gates.factor, da.update, dx.project, a.data(), data(weights),
                               weights ? d_weights.data() : nullptr, are_fp32(weights, dz)});
      Products::outer(two.backward.d_a);
      Products::outer(one.backward.d_b);
      Products::add_base(dx);
      Products::outer(one.backward.d_a);
    } else if (!accumulates) {
      for (const Tensor& gradient : {d_a1, d_b1, d_a2, d_b2}) {
        gradient.zero_();
      }
    }
    return {one.dx, d_weights};
  }
};

// The pass alone, for linears whose bases stay closed, of experts too: tokens sorted by expert.
template <class Products>
struct GateOps {
  // a and s2. y, contiguous, is what the base gives; what is left in it is for gate_backward_.
  static std::tuple<Tensor, Tensor> gate_(const Tensor& y, const Tensor& s1, const Tensor& lora_B1,
                                          double scale, const Tensor& lora_A2,
                                          const OptionalTensor& offsets, const Segments& segments,
                                          const OptionalTensor& weights) {
    check(y, s1, lora_B1, lora_A2, offsets, segments);
    const Tensor a = empty(with_last(y, lora_A2.size(-1)), y);
    const Tensor s2 = empty(with_last(y, lora_A2.size(-2)), y);
    const Tensor all_y = rows(y), all_a = rows(a), thin = rows(s1);
    check_gate<Products>(all_y, all_a, lora_B1, lora_A2, segments, weights);
    Call update(offsets), project(offsets);
    update.expand(all_y, thin, lora_B1, segments, y.size(-1), scale);
    project.shrink(all_a, rows(s2), lora_A2, 1.0);
    if (y.numel() > 0) {
      Products::gate({update.factor, project.factor, data(weights), are_fp32(weights, y)});
    }
    return {a, s2};
  }

  // dy, ds1, a and p's gradient, which has no elements where there is no p. What is left in da is
  // nobody's.
  static std::tuple<Tensor, Tensor, Tensor, Tensor> gate_backward_(
      const Tensor& da, const Tensor& ds2, const Tensor& y, const Tensor& s1, const Tensor& lora_B1,
      double scale, const Tensor& lora_A2, const OptionalTensor& offsets, const Segments& segments,
      const OptionalTensor& weights) {
    check(y, s1, lora_B1, lora_A2, offsets, segments);
    check_rows(da, "da", y, "y");
    check_size(da.size(-1), "the last size of da", lora_A2.size(-1), "lora_A2's last size");
    check_thin(ds2, "ds2", y, "y", lora_A2.size(-2), {});
    const Tensor wide = da.contiguous(), a = empty(da.sizes(), da);
    const Tensor dy = empty(y.sizes(), y), ds1 = empty(s1.sizes(), s1);
    const Tensor d_weights = weights_gradient(weights, y);
    const Tensor all_y = rows(y), all_da = rows(wide), thin = rows(s1), d_thin = rows(ds2);
    check_gate<Products>(all_y, all_da, lora_B1, lora_A2, segments, weights);
    Call gates(offsets), update(offsets), project(offsets);
    gates.expand(all_y, thin, lora_B1, segments, y.size(-1), scale);
    update.shrink(all_da, d_thin, lora_A2, 1.0);
    project.expand(rows(dy), rows(ds1), lora_B1, segments, y.size(-1), scale);
    if (y.numel() > 0) {
      Products::gate_backward({gates.factor, update.factor, project.factor, a.data(), data(weights),
                               weights ? d_weights.data() : nullptr, are_fp32(weights, y)});
    }
    return {dy, ds1, a, d_weights};
  }

 private:
  static void check(const Tensor& y, const Tensor& s1, const Tensor& lora_B1, const Tensor& lora_A2,
                    const OptionalTensor& offsets, const Segments& segments) {
    check_tokens(y, "y", offsets);
    check_supported<Products>(y);
    check_value(y.is_contiguous(), "y has strides, expected a contiguous tensor");
    check_dtype(lora_B1, "lora_B1", y, "y");
    check_dtype(lora_A2, "lora_A2", y, "y");
    check_weight(lora_B1, "lora_B1", offsets);
    check_weight(lora_A2, "lora_A2", offsets);
    if (offsets) {
      check_offsets(*offsets, y);
    }
    check_size(lora_B1.size(-2), "lora_B1's number of rows", y.size(-1), "the output features");
    check_thin(s1, "s1", y, "y", lora_B1.size(-1), segments);
  }
};

template <class Products>
void implement_gated(Library& m) {
  m.impl("gated_mlp", TORCH_BOX(&GatedOps<Products>::gated_mlp));
  m.impl("gated_mlp_backward", TORCH_BOX(&GatedOps<Products>::gated_mlp_backward));
  m.impl("gate_", TORCH_BOX(&GateOps<Products>::gate_));
  m.impl("gate_backward_", TORCH_BOX(&GateOps<Products>::gate_backward_));
  m.impl("gated_mlp_is_fused", TORCH_BOX(&GatedOps<Products>::gated_mlp_is_fused));
  m.impl("gated_mlp_backward_", TORCH_BOX(&GatedOps<Products>::gated_mlp_backward_));
}

}  // namespace megalora
