#pragma once

#include "tensor.h"

namespace megalora {

using Library = torch::stable::detail::StableLibrary;

// Dense without offsets, grouped over experts with them; linear and its backward are dense. Python
// calls these, so names and defaults are those of megalora/ops/protocol.py;
// megalora/ops/reference.py says what each op computes.
inline void define_ops(Library& m) {
  m.def(
      "shrink(Tensor x, Tensor lora_A, Tensor? offsets=None, float p=0.0, Tensor? seed=None) "
      "-> Tensor");
  m.def(
      "expand_(Tensor(a!) y, Tensor s, Tensor lora_B, float scale, Tensor? offsets=None, "
      "int[] segments=[]) -> ()");
  m.def(
      "expand_dgrad(Tensor dy, Tensor lora_B, float scale, Tensor? offsets=None, "
      "int[] segments=[]) -> Tensor");
  m.def(
      "expand_wgrad(Tensor dy, Tensor s, Tensor lora_B, float scale, Tensor? offsets=None, "
      "int[] segments=[]) -> Tensor");
  m.def(
      "expand_backward(Tensor dy, Tensor s, Tensor lora_B, float scale, Tensor? offsets=None, "
      "int[] segments=[]) -> (Tensor, Tensor)");
  m.def(
      "shrink_dgrad_(Tensor(a!) dx, Tensor ds, Tensor lora_A, Tensor? offsets=None, "
      "float p=0.0, Tensor? seed=None) -> ()");
  m.def(
      "shrink_wgrad(Tensor ds, Tensor x, Tensor? offsets=None, float p=0.0, Tensor? seed=None) "
      "-> Tensor");
  m.def(
      "expand_wgrad_(Tensor(a!) d_b, Tensor dy, Tensor s, float scale, Tensor? offsets=None, "
      "int[] segments=[]) -> ()");
  m.def(
      "expand_backward_(Tensor(a!) d_b, Tensor dy, Tensor s, Tensor lora_B, float scale, "
      "Tensor? offsets=None, int[] segments=[]) -> Tensor");
  m.def(
      "shrink_wgrad_(Tensor(a!) d_a, Tensor ds, Tensor x, Tensor? offsets=None, float p=0.0, "
      "Tensor? seed=None) -> ()");
  m.def(
      "linear(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, float scale, "
      "int[] segments=[]) -> (Tensor, Tensor)");
  m.def(
      "linear_backward(Tensor dy, Tensor x, Tensor s, Tensor weight, Tensor lora_A, "
      "Tensor lora_B, float scale, int[] segments=[]) -> (Tensor, Tensor, Tensor)");
  m.def(
      "linear_backward_(Tensor(a!) d_a, Tensor(b!) d_b, Tensor dy, Tensor x, Tensor s, "
      "Tensor weight, Tensor lora_A, Tensor lora_B, float scale, int[] segments=[]) -> Tensor");
  m.def(
      "experts_linear(Tensor x, Tensor[] weights, Tensor lora_A, Tensor lora_B, float scale, "
      "Tensor offsets, int[] segments=[]) -> (Tensor, Tensor)");
  m.def(
      "experts_linear_backward(Tensor dy, Tensor x, Tensor s, Tensor[] weights, Tensor lora_A, "
      "Tensor lora_B, float scale, Tensor offsets, int[] segments=[]) -> (Tensor, Tensor, Tensor)");
  m.def(
      "experts_linear_backward_(Tensor(a!) d_a, Tensor(b!) d_b, Tensor dy, Tensor x, Tensor s, "
      "Tensor[] weights, Tensor lora_A, Tensor lora_B, float scale, Tensor offsets, "
      "int[] segments=[]) -> Tensor");
  m.def("experts_linear_is_fused(Tensor weight, int experts, int ranks) -> bool");
  m.def(
      "gated_mlp(Tensor x, Tensor weight1, Tensor lora_A1, Tensor lora_B1, float scale1, "
      "Tensor weight2, Tensor lora_A2, Tensor lora_B2, float scale2, int[] segments=[], "
      "Tensor? weights=None) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "gate_(Tensor(a!) y, Tensor s1, Tensor lora_B1, float scale, Tensor lora_A2, "
      "Tensor? offsets=None, int[] segments=[], Tensor? weights=None) -> (Tensor, Tensor)");
  m.def(
      "gate_backward_(Tensor(a!) da, Tensor ds2, Tensor y, Tensor s1, Tensor lora_B1, "
      "float scale, Tensor lora_A2, Tensor? offsets=None, int[] segments=[], "
      "Tensor? weights=None) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("gated_mlp_is_fused(Tensor weight2, int rank1, int rank2) -> bool");
  m.def(
      "gated_mlp_backward(Tensor dz, Tensor x, Tensor y, Tensor s1, Tensor s2, Tensor weight1, "
      "Tensor lora_A1, Tensor lora_B1, float scale1, Tensor weight2, Tensor lora_A2, "
      "Tensor lora_B2, float scale2, int[] segments=[], Tensor? weights=None) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "gated_mlp_backward_(Tensor(a!) d_a1, Tensor(b!) d_b1, Tensor(c!) d_a2, Tensor(d!) d_b2, "
      "Tensor dz, Tensor x, Tensor y, Tensor s1, Tensor s2, Tensor weight1, Tensor lora_A1, "
      "Tensor lora_B1, float scale1, Tensor weight2, Tensor lora_A2, Tensor lora_B2, "
      "float scale2, int[] segments=[], Tensor? weights=None) -> (Tensor, Tensor)");
}

}  // namespace megalora
