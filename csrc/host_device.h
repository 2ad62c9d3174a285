#pragma once

// Marks functions that both CPU code and CUDA kernels call.
#ifdef __CUDACC__
#define MEGALORA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MEGALORA_HOST_DEVICE inline __attribute__((always_inline))
#endif
