#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/accumulate.h>

#include <algorithm>
#include <vector>

#include "checks.h"
#include "factor.h"

// How an op lays its tensors out as a factor: the rows of its tokens, its weight, its segments.
namespace megalora {

// [..., c] as [tokens, c] with unit column stride: a view where one exists, a copy where none does.
inline Tensor rows(const Tensor& tokens) {
  if (tokens.dim() == 2 && tokens.stride(1) == 1) {
    return tokens;
  }
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

  explicit Call(const OptionalTensor& given = {}) : offsets(given) {}

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

  void shrink(const Tensor& wide, const Tensor& thin, const Tensor& lora_A) {
    weight(lora_A, Layout::rank_first);
    tokens(wide, thin);
    dropout(0.0, {});
  }

  void expand(const Tensor& wide, const Tensor& thin, const Tensor& lora_B, at::IntArrayRef sizes,
              int64_t period, double scale) {
    weight(lora_B, Layout::column_first);
    tokens(wide, thin);
    segments(sizes, period, scale);
  }

  // The weight is a gradient, contiguous, to be written or added to.
  void gradient(const Tensor& d_weight, bool accumulates) {
    factor.accumulates = accumulates;
    factor.weight_is_fp32 =
        d_weight.scalar_type() == at::kFloat && factor.dtype != c10::ScalarType::Float;
  }

  void dropout(double p, const OptionalTensor& seed) {
    segments({}, factor.columns, 1.0 / (1.0 - p));
    factor.threshold = static_cast<uint32_t>(p * 4294967296.0);
    factor.seed = p > 0.0 ? seed->data_ptr<int64_t>() : nullptr;
  }
};

// Runs body on a contiguous form of a gradient that is added to.
template <class Body>
void in_place_weight(const Tensor& target, Body body) {
  const Tensor contiguous = target.contiguous();
  body(contiguous);
  if (!contiguous.is_same(target)) {
    target.copy_(contiguous);
  }
}

}  // namespace megalora
