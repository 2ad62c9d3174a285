#pragma once

#include <algorithm>

#include "errors.h"
#include "factor.h"
#include "tensor.h"

// Checks of the ops' arguments: each message names the argument, what came and what was expected.
namespace megalora {

inline void check_dtype(const Tensor& got, const char* name, const Tensor& like,
                        const char* like_name) {
  check_value(got.dtype() == like.dtype(), name, " has dtype ", got.dtype(), ", expected that of ",
              like_name, ", ", like.dtype(), ": cast one of them");
  check_value(got.device() == like.device(), name, " is on ", got.device(),
              ", expected the device of ", like_name, ", ", like.device());
}

// A gradient that is added to: of the tokens' dtype, or fp32 where that is narrower.
inline void check_gradient(const Tensor& got, const char* name, const Tensor& like,
                           const char* like_name) {
  if (got.dtype() != ScalarType::Float || like.dtype() == ScalarType::Double) {
    check_dtype(got, name, like, like_name);
  }
  check_value(got.device() == like.device(), name, " is on ", got.device(),
              ", expected the device of ", like_name, ", ", like.device());
}

// The same, of the shape of its factor.
inline void check_sum(const Tensor& got, const char* name, const Tensor& factor,
                      const char* factor_name, const Tensor& like, const char* like_name) {
  check_gradient(got, name, like, like_name);
  check_value(got.sizes() == factor.sizes(), name, " has shape ", got.sizes(),
              ", expected that of ", factor_name, ", ", factor.sizes());
}

inline void check_size(int64_t got, const char* name, int64_t expected, const char* why) {
  check_value(got == expected, name, " is ", got, ", expected ", expected, ", ", why);
}

inline void check_tokens(const Tensor& tokens, const char* name, const OptionalTensor& offsets) {
  if (offsets) {
    check_value(tokens.dim() == 2, name, " has ", tokens.dim(),
                " dimensions, expected 2: grouped ops take [tokens, features]");
  } else {
    check_value(tokens.dim() >= 2 && tokens.dim() <= 4, name, " has ", tokens.dim(),
                " dimensions, expected 2 to 4");
  }
}

// Tokens of the same rows as others.
inline void check_rows(const Tensor& got, const char* name, const Tensor& like,
                       const char* like_name) {
  check_dtype(got, name, like, like_name);
  check_value(got.dim() == like.dim() &&
                  std::equal(got.sizes().begin(), got.sizes().end() - 1, like.sizes().begin()),
              name, " has shape ", got.sizes(), ", expected the leading sizes of ", like_name, ", ",
              like.sizes());
}

inline void check_thin(const Tensor& thin, const char* name, const Tensor& wide,
                       const char* wide_name, int64_t rank, const Segments& segments) {
  check_rows(thin, name, wide, wide_name);
  const int64_t blocks = segments.empty() ? 1 : static_cast<int64_t>(segments.size());
  check_size(thin.size(-1), "the last size of s or ds", blocks * rank,
             "one rank block for each segment");
}

inline void check_weight(const Tensor& weight, const char* name, const OptionalTensor& offsets) {
  const int64_t expected = offsets ? 3 : 2;
  check_value(weight.dim() == expected, name, " has ", weight.dim(), " dimensions, expected ",
              expected,
              offsets ? ": one matrix for each expert where offsets are given"
                      : ": one matrix where no offsets are given");
  if (offsets) {
    check_size(weight.size(0), name, offsets->numel(), "one matrix for each of the offsets");
  }
}

inline void check_offsets(const Tensor& offsets, const Tensor& tokens) {
  check_value(offsets.dim() == 1 && offsets.numel() >= 1, "offsets has shape ", offsets.sizes(),
              ", expected [experts] with at least one expert");
  check_value(offsets.dtype() == ScalarType::Long || offsets.dtype() == ScalarType::Int,
              "offsets has dtype ", offsets.dtype(), ", expected int32 or int64");
  check_value(offsets.device() == tokens.device(), "offsets is on ", offsets.device(),
              ", expected the device of the tokens, ", tokens.device());
}

inline void check_dropout(double p, const OptionalTensor& seed, const Tensor& tokens) {
  check_value(p >= 0.0 && p < 1.0, "p is ", p, ", expected a dropout probability in [0, 1)");
  check_value(p == 0.0 || seed, "seed is missing, expected an int64 tensor [1] because p is ", p);
  if (p > 0.0) {
    check_value(seed->dtype() == ScalarType::Long && seed->numel() == 1, "seed is ", seed->dtype(),
                " of shape ", seed->sizes(), ", expected int64 of shape [1]");
    check_value(seed->device() == tokens.device(), "seed is on ", seed->device(),
                ", expected the device of the tokens, ", tokens.device());
  }
}

template <class Products>
void check_supported(const Tensor& tokens) {
  check_value(Products::supports(tokens.dtype()), "dtype ", tokens.dtype(), " is not supported on ",
              tokens.device().type, ", expected one of ", Products::kDtypes);
}

inline int64_t check_segments(const Segments& segments, int64_t out_features) {
  if (segments.empty()) {
    return out_features;
  }
  check_value(segments.size() <= kMaxSegments, "segments has ", segments.size(),
              " entries, expected at most ", kMaxSegments);
  int64_t period = 0;
  for (const int64_t size : segments) {
    // A rank may own no columns of a projection: fewer query groups than tensor-parallel ranks.
    check_value(size >= 0, "segments is ", segments, ", expected sizes of at least 0");
    period += size;
  }
  check_value(period >= 1, "segments is ", segments, ", expected at least 1 column");
  check_value(out_features % period == 0, "segments ", segments, " has period ", period,
              ", expected a divisor of the output features, ", out_features);
  return period;
}

}  // namespace megalora
