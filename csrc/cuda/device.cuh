#pragma once

#include <cstdint>

#include "../factor.h"

// The few instructions that the kernels need beyond C++. tests/emulator has the same ones for a
// CPU.
#ifdef MEGALORA_EMULATE
#include "emulator.h"
#else
#include <cuda_runtime.h>

namespace megalora::cuda {

constexpr int kThreads = 128;

// The shared memory that launch asked for.
template <class Shared>
__device__ __forceinline__ Shared& shared_memory() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return *reinterpret_cast<Shared*>(bytes);
}

// Starts a copy of BYTES (4, 8 or 16) to shared memory; both addresses are multiples of it.
template <int BYTES>
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  if constexpr (BYTES == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(global), "n"(BYTES)
                 : "memory");
  }
}

__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most PENDING of this thread's committed groups are under way.
template <int PENDING>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Loads 8x8 matrices of 16-bit elements: lane 8 i + j gives the address of row j of matrix i.
template <bool TRANSPOSED>
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* row) {
  const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (TRANSPOSED) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
  }
}

template <bool TRANSPOSED>
__device__ __forceinline__ void load_matrices(uint32_t (&to)[2], const void* row) {
  const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (TRANSPOSED) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1])
                 : "r"(from)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1])
                 : "r"(from)
                 : "memory");
  }
}

// sums[16, 8] += a[16, 16] b[16, 8] on the tensor cores, fp32 accumulation.
__device__ __forceinline__ void tensor_core(BFloat16, float (&sums)[4], const uint32_t (&a)[4],
                                            const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void tensor_core(Half, float (&sums)[4], const uint32_t (&a)[4],
                                            const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The sum of value over the lanes of a warp, in each of them.
__device__ __forceinline__ int warp_sum(int value) { return __reduce_add_sync(0xFFFFFFFFu, value); }

// The sum of value over the lanes of a warp that are alike modulo 4, in each of them.
__device__ __forceinline__ float sum_of_groups(float value) {
#pragma unroll
  for (int lanes = 4; lanes < 32; lanes *= 2) {
    value += __shfl_xor_sync(0xFFFFFFFFu, value, lanes);
  }
  return value;
}

// Writes 16 bytes to shared memory, which other lanes may read behind sync_warp.
__device__ __forceinline__ void store_shared(void* shared, const void* from) {
  *static_cast<uint4*>(shared) = *static_cast<const uint4*>(from);
}

// Lets what the lanes of a warp wrote to shared memory be read by the others.
__device__ __forceinline__ void sync_warp() { __syncwarp(); }

// To some units of the last place of fp32, without the calls of a division.
__device__ __forceinline__ float exponential(float x) { return __expf(x); }
__device__ __forceinline__ float reciprocal(float x) { return __fdividef(1.0f, x); }

// Reads 16 bytes of global memory at a multiple of 16, in the order of these calls.
__device__ __forceinline__ void load_vector(void* to, const void* global) {
  uint4 words;
  asm volatile("ld.global.v4.b32 {%0,%1,%2,%3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "l"(__cvta_generic_to_global(global))
               : "memory");
  *static_cast<uint4*>(to) = words;
}

// Writes 16 bytes of global memory at a multiple of 16.
// NOTE: in assembly, because nvcc 13.0 splits the plain store into four.
__device__ __forceinline__ void store_vector(void* global, const void* from) {
  const uint4 words = *static_cast<const uint4*>(from);
  asm volatile("st.global.v4.b32 [%0], {%1,%2,%3,%4};" ::"l"(__cvta_generic_to_global(global)),
               "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w)
               : "memory");
}

// Starts kernel on grid blocks of kThreads threads with shared_bytes of shared memory each.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, int shared_bytes, cudaStream_t stream,
            Arguments... arguments) {
  constexpr int kAllowedUnasked = 48 * 1024;
  if (shared_bytes > kAllowedUnasked) {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  }
  // clang-format off
  kernel<<<grid, kThreads, shared_bytes, stream>>>(arguments...);
  // clang-format on
}

}  // namespace megalora::cuda

#endif
