#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>

#include "factor.h"

// Checks of the ops' arguments: each message names the argument, what came and what was expected.
namespace megalora {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline void check_dtype(const Tensor& got, const char* name, const Tensor& like,
                        const char* like_name) {
  TORCH_CHECK_VALUE(got.scalar_type() == like.scalar_type(), name, " has dtype ", got.scalar_type(),
                    ", expected that of ", like_name, ", ", like.scalar_type(),
                    ": cast one of them");
  TORCH_CHECK_VALUE(got.device() == like.device(), name, " is on ", got.device(),
                    ", expected the device of ", like_name, ", ", like.device());
}

// A gradient that is added to: of the tokens' dtype, or fp32 where that is narrower.
inline void check_gradient(const Tensor& got, const char* name, const Tensor& like,
                           const char* like_name) {
  if (got.scalar_type() != at::kFloat || like.scalar_type() == at::kDouble) {
    check_dtype(got, name, like, like_name);
  }
  TORCH_CHECK_VALUE(got.device() == like.device(), name, " is on ", got.device(),
                    ", expected the device of ", like_name, ", ", like.device());
}

inline void check_size(int64_t got, const char* name, int64_t expected, const char* why) {
  TORCH_CHECK_VALUE(got == expected, name, " is ", got, ", expected ", expected, ", ", why);
}

inline void check_tokens(const Tensor& tokens, const char* name, const OptionalTensor& offsets) {
  if (offsets) {
    TORCH_CHECK_VALUE(tokens.dim() == 2, name, " has ", tokens.dim(),
                      " dimensions, expected 2: grouped ops take [tokens, features]");
  } else {
    TORCH_CHECK_VALUE(tokens.dim() >= 2 && tokens.dim() <= 4, name, " has ", tokens.dim(),
                      " dimensions, expected 2 to 4");
  }
}

inline void check_thin(const Tensor& thin, const char* name, const Tensor& wide,
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

inline void check_weight(const Tensor& weight, const char* name, const OptionalTensor& offsets) {
  const int64_t expected = offsets ? 3 : 2;
  TORCH_CHECK_VALUE(weight.dim() == expected, name, " has ", weight.dim(), " dimensions, expected ",
                    expected,
                    offsets ? ": one matrix for each expert where offsets are given"
                            : ": one matrix where no offsets are given");
  if (offsets) {
    check_size(weight.size(0), name, offsets->numel(), "one matrix for each of the offsets");
  }
}

inline void check_offsets(const Tensor& offsets, const Tensor& tokens) {
  TORCH_CHECK_VALUE(offsets.dim() == 1 && offsets.numel() >= 1, "offsets has shape ",
                    offsets.sizes(), ", expected [experts] with at least one expert");
  TORCH_CHECK_VALUE(offsets.scalar_type() == at::kLong || offsets.scalar_type() == at::kInt,
                    "offsets has dtype ", offsets.scalar_type(), ", expected int32 or int64");
  TORCH_CHECK_VALUE(offsets.device() == tokens.device(), "offsets is on ", offsets.device(),
                    ", expected the device of the tokens, ", tokens.device());
}

inline void check_dropout(double p, const OptionalTensor& seed, const Tensor& tokens) {
  TORCH_CHECK_VALUE(p >= 0.0 && p < 1.0, "p is ", p, ", expected a dropout probability in [0, 1)");
  TORCH_CHECK_VALUE(p == 0.0 || seed, "seed is missing, expected an int64 tensor [1] because p is ",
                    p);
  if (p > 0.0) {
    TORCH_CHECK_VALUE(seed->scalar_type() == at::kLong && seed->numel() == 1, "seed is ",
                      seed->scalar_type(), " of shape ", seed->sizes(),
                      ", expected int64 of shape [1]");
    TORCH_CHECK_VALUE(seed->device() == tokens.device(), "seed is on ", seed->device(),
                      ", expected the device of the tokens, ", tokens.device());
  }
}

template <class Products>
void check_supported(const Tensor& tokens) {
  TORCH_CHECK_VALUE(Products::supports(tokens.scalar_type()), "dtype ", tokens.scalar_type(),
                    " is not supported on ", tokens.device().type(), ", expected one of ",
                    Products::kDtypes);
}

inline int64_t check_segments(at::IntArrayRef segments, int64_t out_features) {
  if (segments.empty()) {
    return out_features;
  }
  TORCH_CHECK_VALUE(segments.size() <= kMaxSegments, "segments has ", segments.size(),
                    " entries, expected at most ", kMaxSegments);
  int64_t period = 0;
  for (const int64_t size : segments) {
    // A rank may own no columns of a projection: fewer query groups than tensor-parallel ranks.
    TORCH_CHECK_VALUE(size >= 0, "segments is ", segments, ", expected sizes of at least 0");
    period += size;
  }
  TORCH_CHECK_VALUE(period >= 1, "segments is ", segments, ", expected at least 1 column");
  TORCH_CHECK_VALUE(out_features % period == 0, "segments ", segments, " has period ", period,
                    ", expected a divisor of the output features, ", out_features);
  return period;
}

}  // namespace megalora
