#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "kernels.cuh"

namespace megalora::cuda {
namespace {

constexpr int kSpreadThreads = 256;

__global__ __launch_bounds__(kSpreadThreads) void block_diagonal_kernel(
    const __grid_constant__ Factor f, int pitch, __nv_bfloat16* to) {
  const int rank = static_cast<int>(f.rank), rows = static_cast<int>(f.experts * f.columns);
  const int at = static_cast<int>(blockIdx.x * kSpreadThreads + threadIdx.x);
  const int row = at / pitch, projection = at % pitch / rank;
  if (row >= rows) {
    return;
  }
  bool owns = projection < f.num_segments;
  if (owns) {
    int64_t begin = 0;
    for (int p = 0; p < projection; ++p) {
      begin += f.segment[p];
    }
    const int64_t inside = row % static_cast<int>(f.period) - begin;
    owns = inside >= 0 && inside < f.segment[projection];
  }
  const auto* const from = static_cast<const __nv_bfloat16*>(f.weight);
  to[at] = owns ? from[static_cast<int64_t>(row) * rank + at % pitch % rank] : __nv_bfloat16();
}

}  // namespace

void block_diagonal(const Factor& lora_B, int64_t pitch, void* to, Stream stream) {
  const int64_t elements = lora_B.experts * lora_B.columns * pitch;
  const auto blocks = static_cast<unsigned>((elements + kSpreadThreads - 1) / kSpreadThreads);
  block_diagonal_kernel<<<blocks, kSpreadThreads, 0, stream>>>(lora_B, static_cast<int>(pitch),
                                                               static_cast<__nv_bfloat16*>(to));
}

}  // namespace megalora::cuda
