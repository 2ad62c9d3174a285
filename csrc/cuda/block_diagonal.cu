#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "kernels.cuh"

namespace megalora::cuda {
namespace {

constexpr int kSpreadThreads = 256, kVector = 8;  // elements that a thread writes at once

// A row of B belongs to one projection, whose columns it has; all others are zero.
__global__ __launch_bounds__(kSpreadThreads) void block_diagonal_kernel(
    const __grid_constant__ Factor f, int vectors, uint4* to) {
  const int at = static_cast<int>(blockIdx.x * kSpreadThreads + threadIdx.x);
  const int rank = static_cast<int>(f.rank), row = at / vectors;
  if (row >= static_cast<int>(f.experts * f.columns)) {
    return;
  }
  int inside = row % static_cast<int>(f.period), projection = 0;
  while (inside >= f.segment[projection]) {
    inside -= static_cast<int>(f.segment[projection++]);
  }
  const auto* const from =
      static_cast<const __nv_bfloat16*>(f.weight) + static_cast<int64_t>(row) * rank;
  const int first = at % vectors * kVector - projection * rank;
  union {
    __nv_bfloat16 elements[kVector];
    uint4 all;
  } v;
  v.all = make_uint4(0, 0, 0, 0);
#pragma unroll
  for (int k = 0; k < kVector; ++k) {
    const int column = first + k;
    if (column >= 0 && column < rank) {
      v.elements[k] = from[column];
    }
  }
  to[at] = v.all;
}

}  // namespace

void block_diagonal(const Factor& lora_B, int64_t pitch, void* to, Stream stream) {
  const int64_t vectors = pitch / kVector, count = lora_B.experts * lora_B.columns * vectors;
  const auto blocks = static_cast<unsigned>((count + kSpreadThreads - 1) / kSpreadThreads);
  block_diagonal_kernel<<<blocks, kSpreadThreads, 0, stream>>>(lora_B, static_cast<int>(vectors),
                                                               static_cast<uint4*>(to));
}

}  // namespace megalora::cuda
