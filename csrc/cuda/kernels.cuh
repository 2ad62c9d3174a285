#pragma once

#include "../factor.h"

struct CUstream_st;

namespace megalora::cuda {

using Stream = CUstream_st*;  // cudaStream_t, named without the CUDA headers

// thin = scale * wide · W
void project(const Factor& factor, Stream stream);

// wide += scale * thin · Wᵀ
void update(const Factor& factor, Stream stream);

// W = (or +=) scale * wideᵀ · thin. workspace: fp32 [outer_splits(factor), columns, rank], unused
// for one split.
int64_t outer_splits(const Factor& factor);
void outer(const Factor& factor, float* workspace, Stream stream);

// project of dgrad and outer of wgrad, which have the same wide, in one read of it: 16-bit
// elements, ranks up to 32, no dropout. workspace: fp32 [backward_workspace(dgrad)].
bool one_read_is_faster(const Factor& dgrad);
int64_t backward_workspace(const Factor& dgrad);
void backward(const Factor& dgrad, const Factor& wgrad, float* workspace, Stream stream);

}  // namespace megalora::cuda
