#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

#include "device.h"
#include "host_device.h"

namespace megalora {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;

constexpr int kMaxSegments = 8;

// One low-rank factor between a wide token tensor (x, y and their gradients) and a thin one (s,
// ds). All ops are three products of it, the last of them written or added:
//   project  thin = scale * wide · W      shrink, expand_dgrad
//   update   wide += scale * thin · Wᵀ    expand_, shrink_dgrad_
//   outer    W = scale * wideᵀ · thin     expand_wgrad, shrink_wgrad
//            W += scale * wideᵀ · thin    expand_wgrad_, shrink_wgrad_
// W is lora_A read as [columns, rank] or lora_B as it is: its strides say which.
struct Factor {
  ScalarType dtype;
  Device device;
  void* wide;    // [tokens, columns], unit column stride
  void* thin;    // [tokens, num_segments * rank], unit column stride
  void* weight;  // [experts, columns, rank] by the strides below
  int64_t wide_stride, thin_stride;
  int64_t column_stride, rank_stride, expert_stride;
  int64_t tokens, columns, rank, experts;

  // Inclusive cumulative tokens per expert, on the device of the tokens; null where W is one for
  // all.
  const void* offsets;
  bool offsets_are_int64;

  // Columns come in periods of sum(segment) columns; block p of each reads rank block p of thin.
  int num_segments;
  int64_t segment[kMaxSegments];
  int64_t period;

  double scale;

  // Of outer: W is added to; W is fp32 although the tokens are not.
  bool accumulates;
  bool weight_is_fp32;

  // Dropout of wide: element e of its row-major order is kept where its 16 bits of Philox are at
  // least threshold.
  uint32_t threshold;
  const int64_t* seed;

  MEGALORA_HOST_DEVICE bool drops() const { return threshold != 0; }
};

}  // namespace megalora
