#pragma once

#include <algorithm>

#include "checks.h"
#include "factor.h"
#include "tensor.h"

// How an op lays its tensors out as a factor: the rows of its tokens, its weight, its segments.
namespace megalora {

// [..., c] as [tokens, c] with unit column stride: a view where one exists, a copy where none does.
inline Tensor rows(const Tensor& tokens) {
  const int64_t last = tokens.dim() - 1, features = tokens.size(last);
  if (last == 1 && tokens.stride(1) == 1) {
    return tokens;
  }
  int64_t count = 1, row_stride = features;
  bool is_view = tokens.stride(last) == 1 || features <= 1;
  for (int64_t axis = last - 1; axis >= 0; --axis) {
    if (tokens.size(axis) != 1) {
      row_stride = count == 1 ? tokens.stride(axis) : row_stride;
      is_view = is_view && tokens.stride(axis) == count * row_stride;
      count *= tokens.size(axis);
    }
  }
  if (is_view || tokens.numel() == 0) {
    return tokens.as_strided({count, features}, {row_stride, 1});
  }
  return tokens.contiguous().as_strided({count, features}, {features, 1});
}

inline Shape with_last(const Tensor& tokens, int64_t features) {
  Shape sizes = tokens.sizes();
  sizes[-1] = features;
  return sizes;
}

enum class Layout { rank_first, column_first };  // lora_A [P*r, in], lora_B [out, r]

struct Call {
  OptionalTensor offsets;
  Tensor contiguous_offsets;
  Tensor contiguous_weight;
  Factor factor{.dtype = ScalarType::Undefined, .device = {}};

  explicit Call(const OptionalTensor& given = {}) : offsets(given) {}

  void weight(const Tensor& given, Layout layout) {
    contiguous_weight = given.contiguous();
    const Tensor& w = contiguous_weight;
    const int64_t rank_axis = layout == Layout::rank_first ? -2 : -1;
    const int64_t column_axis = layout == Layout::rank_first ? -1 : -2;
    factor.weight = w.data();
    factor.rank = w.size(rank_axis);
    factor.rank_stride = w.stride(rank_axis);
    factor.columns = w.size(column_axis);
    factor.column_stride = w.stride(column_axis);
    factor.experts = offsets ? w.size(0) : 1;
    factor.expert_stride = offsets ? w.stride(0) : 0;
    if (offsets) {
      contiguous_offsets = offsets->contiguous();
      factor.offsets = contiguous_offsets.data();
      factor.offsets_are_int64 = offsets->dtype() == ScalarType::Long;
    }
  }

  void tokens(const Tensor& wide, const Tensor& thin) {
    factor.dtype = wide.dtype();
    factor.device = wide.device();
    factor.wide = wide.data();
    factor.wide_stride = wide.stride(0);
    factor.thin = thin.data();
    factor.thin_stride = thin.stride(0);
    factor.tokens = wide.size(0);
  }

  void segments(const Segments& sizes, int64_t period, double scale) {
    factor.num_segments = sizes.empty() ? 1 : static_cast<int>(sizes.size());
    factor.segment[0] = factor.columns;
    std::copy(sizes.begin(), sizes.end(), factor.segment);
    factor.period = period;
    factor.scale = scale;
  }

  // Without dropout.
  void shrink(const Tensor& wide, const Tensor& thin, const Tensor& lora_A, double scale) {
    weight(lora_A, Layout::rank_first);
    tokens(wide, thin);
    segments({}, factor.columns, scale);
  }

  void expand(const Tensor& wide, const Tensor& thin, const Tensor& lora_B, const Segments& sizes,
              int64_t period, double scale) {
    weight(lora_B, Layout::column_first);
    tokens(wide, thin);
    segments(sizes, period, scale);
  }

  // The weight is a gradient, contiguous, to be written or added to.
  void gradient(const Tensor& d_weight, bool accumulates) {
    factor.accumulates = accumulates;
    factor.weight_is_fp32 =
        d_weight.dtype() == ScalarType::Float && factor.dtype != ScalarType::Float;
  }

  void dropout(double p, const OptionalTensor& seed) {
    segments({}, factor.columns, 1.0 / (1.0 - p));
    factor.threshold = static_cast<uint32_t>(p * 65536.0);
    factor.seed = p > 0.0 ? seed->data<int64_t>() : nullptr;
  }
};

// Runs body on a contiguous form of a gradient that is added to.
template <class Body>
void in_place_weight(const Tensor& target, Body body) {
  const Tensor contiguous = target.contiguous();
  body(contiguous);
  if (contiguous.data() != target.data()) {
    target.copy_(contiguous);
  }
}

}  // namespace megalora
