#pragma once

#include <cstdint>

struct CUstream_st;

// A linear and its adapter in one launch each way, for Hopper: bf16, contiguous and aligned to 16
// bytes, i, o and r multiples of 8, segments of even sizes. Dense, or grouped over experts, whose
// factors lie one behind another. The words are zero again when a launch has run.
namespace megalora::cuda {

using Stream = CUstream_st*;

// n tokens, i and o features. ranks: those of all projections; r: the columns of s, ranks and
// zeros. Of experts: the maps of their weights and the inclusive sums of their tokens [experts],
// both on the device; null and one where the linear is dense.
struct Sizes {
  int64_t n, i, o, ranks, r;
  int64_t experts = 1;
  const int64_t* ends = nullptr;
  const void* maps = nullptr;
};

struct Forward {
  Sizes sizes;
  const void* x;       // [n, i]
  const void* weight;  // [o, i], null where there are maps
  const void* lora_A;  // [ranks, i]
  const void* lora_B;  // [o, r]: zero where a column does not belong to the projection
  void* y;             // [n, o]
  void* s;             // [n, r], scaled
  int* words;          // [linear_words], zero
  float scale;
};

// A gradient, to be written or added to.
struct Gradient {
  void* to;
  bool is_fp32;
  bool accumulates;
};

struct Backward {
  Sizes sizes;
  const void* dy;      // [n, o]
  const void* x;       // [n, i]
  const void* s;       // [n, r], scaled
  const void* weight;  // [o, i], null where there are maps
  const void* lora_A;  // [ranks, i]
  const void* lora_B;  // [o, r]: zero where a column does not belong to the projection
  void* dx;            // [n, i]
  void* ds;            // [n, r]
  int* words;          // [linear_words], zero
  float scale;
  Gradient d_a;  // [ranks, i]
  Gradient d_b;  // [o, rank], rank of one projection
  int64_t rank, period;
  int num_segments;
  int64_t segment[8];
};

// Whether this build has the kernels' code, which is for sm_90a.
bool linear_is_built();

int64_t linear_words(int64_t n, int64_t experts);
void linear_forward(const Forward& call, Stream stream);
void linear_backward(const Backward& call, Stream stream);

// Maps of the weight [o, i] of each expert, made on the host for the device.
int64_t bytes_of_maps(int64_t experts);
void make_maps(void* maps, const void* const* weights, int64_t experts, int64_t o, int64_t i,
               bool backward);

constexpr int64_t kMostExperts = 256;

}  // namespace megalora::cuda
