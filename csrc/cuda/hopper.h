#pragma once

#include "../experts.h"
#include "../linear.h"

// An adapted linear, or those of experts, by the one launch of linear.cuh: where that can be, and
// what it needs of torch.
namespace megalora::cuda {

bool linear_supports(const Linear& l);
bool linear_supports(const LinearBackward& b);

// Whether l fills the GPU; where it does not, the smaller tiles of cuBLAS are faster.
bool linear_fills(const Linear& l);

void linear_forward(const Linear& l);
void linear_backward(const LinearBackward& b);

// The same for experts; weight: one like those of all of them.
bool fuses_experts(const Tensor& weight, int64_t experts, int64_t ranks);
bool experts_support(const ExpertsLinear& l);
bool experts_support(const ExpertsBackward& b);
void experts_forward(const ExpertsLinear& l);
void experts_backward(const ExpertsBackward& b);

}  // namespace megalora::cuda
