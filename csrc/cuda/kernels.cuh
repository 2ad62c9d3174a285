#pragma once

#include "../factor.h"
#include "../gate.h"

struct CUstream_st;

namespace megalora::cuda {

using Stream = CUstream_st*;  // cudaStream_t, named without the CUDA headers

// thin = scale * wide · W. workspace: fp32 [project_splits(factor), tokens, projections * rank],
// unused for one split.
int project_splits(const Factor& factor);
void project(const Factor& factor, float* workspace, Stream stream);

// wide += scale * thin · Wᵀ
void update(const Factor& factor, Stream stream);

// W = (or +=) scale * wideᵀ · thin. workspace: fp32 [outer_splits(factor), columns, rank], unused
// for one split.
int outer_splits(const Factor& factor);
void outer(const Factor& factor, float* workspace, Stream stream);

// project of dgrad and outer of wgrad, which have the same wide, in one read of it: 16-bit
// elements, ranks up to 32, no dropout. workspace: fp32 [backward_workspace(dgrad)].
bool backward_supports(const Factor& dgrad);
int64_t backward_workspace(const Factor& dgrad);
void backward(const Factor& dgrad, const Factor& wgrad, float* workspace, Stream stream);

// B as bf16 [experts, columns, pitch]: a block of ranks for each projection, zero where a column is
// not of that projection and behind the blocks.
void block_diagonal(const Factor& lora_B, int64_t pitch, void* to, Stream stream);

// The pass between the two base products of a gated MLP: 16-bit elements, ranks up to 32, columns
// in eights. workspace: fp32 [gate_workspace(g)].
bool gate_supports(ScalarType dtype, int64_t columns, int64_t rank);
int64_t gate_workspace(const Gate& g);
int64_t gate_workspace(const GateBackward& g);
void gate(const Gate& g, float* workspace, Stream stream);
void gate_backward(const GateBackward& g, float* workspace, Stream stream);

// What the products leave where several blocks share a result: fp32 parts to add in their order.
struct ThinParts {
  const float* parts;       // [most parts, tokens, projections * rank]
  int count[kMaxSegments];  // parts of each projection
};
struct WeightParts {
  const float* parts;  // [token slot, columns * rank in the order of W's memory]
  int64_t tokens;      // of one part
};

// thin = scale * the sum of its parts, W = (or +=) scale * the sum of its own; null parts leave
// their result alone.
void add_parts(const Factor& thin, const ThinParts& thin_parts, const Factor& weight,
               const WeightParts& weight_parts, Stream stream);

}  // namespace megalora::cuda
