#pragma once

#include <c10/core/ScalarType.h>

#include "../factor.h"

namespace megalora {
struct Linear;
}

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
  static void linear(const Linear& linear);
  static void linear_backward(const Linear& linear, const Factor& wgrad);
};

}  // namespace megalora::cpu
