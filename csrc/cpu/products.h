#pragma once

#include "../factor.h"

namespace megalora {
class Tensor;
struct ExpertsBackward;
struct ExpertsLinear;
struct Gate;
struct GateBackward;
struct Linear;
struct LinearBackward;
}  // namespace megalora

namespace megalora::cpu {

struct Products {
  static constexpr const char* kDtypes = "float64, float32, bfloat16, float16";
  static bool supports(ScalarType dtype) {
    return dtype == ScalarType::Double || dtype == ScalarType::Float ||
           dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
  }
  static void project(const Factor& factor);
  static void update(const Factor& factor);
  static void outer(const Factor& factor);
  static void backward(const Factor& dgrad, const Factor& wgrad);
  static void add_base(const Linear& linear);
  static void linear(const Linear& linear);
  static void linear_backward(const LinearBackward& backward);
  static bool fuses_experts(const Tensor&, int64_t, int64_t) { return false; }
  static constexpr const char* kGates = "float64 or float32";
  static bool gates(ScalarType dtype, int64_t, int64_t) {
    return dtype == ScalarType::Double || dtype == ScalarType::Float;
  }
  static bool gate_is_faster(const Tensor&, int64_t) { return true; }
  static void gate(const Gate& gate);
  static void gate_backward(const GateBackward& gate);
  static void experts_linear(const ExpertsLinear& linear);
  static void experts_backward(const ExpertsBackward& backward);
};

}  // namespace megalora::cpu
