#pragma once

#include "../linear.h"

// An adapted linear by the one launch of linear.cuh: where that can be, and what it needs of torch.
namespace megalora::cuda {

bool linear_supports(const Linear& l);
bool linear_supports(const LinearBackward& b);

// Whether l fills the GPU; where it does not, the smaller tiles of cuBLAS are faster.
bool linear_fills(const Linear& l);

void linear_forward(const Linear& l);
void linear_backward(const LinearBackward& b);

}  // namespace megalora::cuda
