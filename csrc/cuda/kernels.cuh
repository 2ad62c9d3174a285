#pragma once

#include "../factor.h"

struct CUstream_st;

namespace megalora::cuda {

using Stream = CUstream_st*;  // cudaStream_t, named without the CUDA headers

// thin = scale * wide · W
void project(const Factor& factor, Stream stream);

// wide += scale * thin · Wᵀ
void update(const Factor& factor, Stream stream);

// W = scale * wideᵀ · thin. workspace: fp32 [outer_splits(factor), columns, rank], unused for one
// split.
int64_t outer_splits(const Factor& factor);
void outer(const Factor& factor, float* workspace, Stream stream);

}  // namespace megalora::cuda
