#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

// The instructions of Hopper (sm_90a) that a warp-specialised GEMM needs: barriers in shared memory
// that count bytes, tensor copies, and the matrix product of a group of four warps.
namespace megalora::cuda::hopper {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ uint32_t rank_in_cluster() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ void synchronize_cluster() {
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

// --- Barriers ---

__device__ __forceinline__ void initialize_barrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrives, and lets the phase end only once so many bytes have been copied.
__device__ __forceinline__ void expect_bytes(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void wait_for(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra finished;\nbra again;\nfinished:\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Arrives at the barrier of the same address in a block of the cluster.
// NOTE: without .release.cluster, which costs a fence of the whole GPU's memory: what it orders is
// shared memory that the tensor cores have read.
__device__ __forceinline__ void arrive_at(uint32_t barrier, uint32_t block) {
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(barrier),
      "r"(block)
      : "memory");
}

// Writes a word of a block of the cluster and counts its bytes at a barrier there.
__device__ __forceinline__ void send_to(uint32_t word, int value, uint32_t barrier,
                                        uint32_t block) {
  asm volatile(
      "{\n.reg .b32 to, counter;\nmapa.shared::cluster.u32 to, %0, %3;\n"
      "mapa.shared::cluster.u32 counter, %2, %3;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [to], %1, [counter];\n}" ::
          "r"(word),
      "r"(value), "r"(barrier), "r"(block)
      : "memory");
}

// Writes four floats likewise.
__device__ __forceinline__ void send_to(uint32_t to, const float* values, uint32_t barrier,
                                        uint32_t block) {
  asm volatile(
      "{\n.reg .b32 to, counter;\nmapa.shared::cluster.u32 to, %0, %6;\n"
      "mapa.shared::cluster.u32 counter, %5, %6;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [to], "
      "{%1, %2, %3, %4}, [counter];\n}" ::"r"(to),
      "f"(values[0]), "f"(values[1]), "f"(values[2]), "f"(values[3]), "r"(barrier), "r"(block)
      : "memory");
}

template <int NUMBER, int THREADS>
__device__ __forceinline__ void synchronize_threads() {
  asm volatile("bar.sync %0, %1;" ::"n"(NUMBER), "n"(THREADS) : "memory");
}

__device__ __forceinline__ void synchronize_threads(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// --- Copies of boxes of a tensor ---

__device__ __forceinline__ void load_box(uint32_t to, const CUtensorMap& map, int column, int row,
                                         uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}

// To the same address of both blocks of a cluster, and their barriers.
__device__ __forceinline__ void load_box_to_both(uint32_t to, const CUtensorMap& map, int column,
                                                 int row, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(barrier), "h"(static_cast<uint16_t>(3))
      : "memory");
}

__device__ __forceinline__ void store_box(const CUtensorMap& map, int column, int row,
                                          uint32_t from) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&map),
      "r"(column), "r"(row), "r"(from)
      : "memory");
}

__device__ __forceinline__ void commit_stores() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Until the stores have read shared memory.
__device__ __forceinline__ void wait_for_reads_of_stores() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

__device__ __forceinline__ void wait_for_stores() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

// Orders ordinary accesses to shared memory before those of tensor copies.
__device__ __forceinline__ void fence_shared_for_copies() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Orders ordinary accesses to any memory before those of tensor copies.
__device__ __forceinline__ void fence_for_copies() {
  asm volatile("fence.proxy.async;" ::: "memory");
}

// --- Words in global memory that tell other blocks what is done ---

__device__ __forceinline__ void add_and_publish(int* word) {
  asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(word) : "memory");
}

__device__ __forceinline__ void wait_until_at_least(const int* word, int wanted) {
  int found;
  do {
    asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(found) : "l"(word) : "memory");
  } while (found < wanted);
}

// --- Products of four warps: sums[64, N] += a[64, 16] b[16, N], fp32 sums of bf16 ---

// A matrix in shared memory with rows of 128 bytes in the order that a box of 64 columns has
// (128-byte swizzle). block: bytes between blocks of 64 columns, where columns are the side that is
// not summed over; group: bytes between groups of 8 rows.
__device__ __forceinline__ uint64_t matrix(uint32_t address, uint32_t block, uint32_t group) {
  constexpr uint64_t kSwizzle128 = 1ull << 62;
  return static_cast<uint64_t>((address & 0x3FFFF) >> 4) | static_cast<uint64_t>(block >> 4) << 16 |
         static_cast<uint64_t>(group >> 4) << 32 | kSwizzle128;
}

__device__ __forceinline__ void begin_products() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int PENDING>
__device__ __forceinline__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

#define MEGALORA_SUMS_16(i)                                                                  \
  "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3]), "+f"(sums[i + 4]), \
      "+f"(sums[i + 5]), "+f"(sums[i + 6]), "+f"(sums[i + 7]), "+f"(sums[i + 8]),            \
      "+f"(sums[i + 9]), "+f"(sums[i + 10]), "+f"(sums[i + 11]), "+f"(sums[i + 12]),         \
      "+f"(sums[i + 13]), "+f"(sums[i + 14]), "+f"(sums[i + 15])

// The first N / 2 of sums are those of sums[64, N]; they are only written where it does not add.
// A_BY_DEPTH, B_BY_DEPTH: rows of the matrix in shared memory are what is summed over.
// NOTE: one array for all N. Registers that an instruction reads before anything has written them
// would be kept for it through the whole kernel, for each N its own.
template <int N, bool A_BY_DEPTH, bool B_BY_DEPTH>
__device__ __forceinline__ void multiply(float (&sums)[128], uint64_t a, uint64_t b, bool adds) {
  if constexpr (N == 64) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
        "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
        "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
        "}, %32, %33, p, 1, 1, %35, %36;}"
        : MEGALORA_SUMS_16(0), MEGALORA_SUMS_16(16)
        : "l"(a), "l"(b), "r"(static_cast<int>(adds)), "n"(A_BY_DEPTH), "n"(B_BY_DEPTH));
  } else if constexpr (N == 256) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %130, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
        "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
        "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
        "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
        "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,"
        "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,"
        "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,"
        "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,"
        "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
        "}, %128, %129, p, 1, 1, %131, %132;}"
        : MEGALORA_SUMS_16(0), MEGALORA_SUMS_16(16), MEGALORA_SUMS_16(32), MEGALORA_SUMS_16(48),
          MEGALORA_SUMS_16(64), MEGALORA_SUMS_16(80), MEGALORA_SUMS_16(96), MEGALORA_SUMS_16(112)
        : "l"(a), "l"(b), "r"(static_cast<int>(adds)), "n"(A_BY_DEPTH), "n"(B_BY_DEPTH));
  }
}

#undef MEGALORA_SUMS_16

}  // namespace megalora::cuda::hopper
