#pragma once

#include "factor.h"

// The three products by the BLAS of torch, block by block: for dense factors without dropout whose
// weight has the dtype of the tokens, on any device. write is update of a wide that is nothing yet.
namespace megalora::gemm {

void project(const Factor& factor);
void update(const Factor& factor);
void write(const Factor& factor);
void outer(const Factor& factor);

}  // namespace megalora::gemm
