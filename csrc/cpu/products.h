#pragma once

#include <c10/core/ScalarType.h>

#include "../factor.h"

namespace at {
class Tensor;
}  // namespace at

namespace megalora {
struct ExpertsBackward;
struct ExpertsLinear;
struct Linear;
struct LinearBackward;
}  // namespace megalora

namespace megalora::cpu {

struct Products {
  static constexpr const char* kDtypes = "float64, float32, bfloat16, float16";
  static bool supports(at::ScalarType dtype) {
    return dtype == at::kDouble || dtype == at::kFloat || dtype == at::kBFloat16 ||
           dtype == at::kHalf;
  }
  static void project(const Factor& factor);
  static void update(const Factor& factor);
  static void outer(const Factor& factor);
  static void backward(const Factor& dgrad, const Factor& wgrad);
  static void add_base(const Linear& linear);
  static void linear(const Linear& linear);
  static void linear_backward(const LinearBackward& backward);
  static bool fuses_experts(const at::Tensor&, int64_t, int64_t) { return false; }
  static void experts_linear(const ExpertsLinear& linear);
  static void experts_backward(const ExpertsBackward& backward);
};

}  // namespace megalora::cpu
