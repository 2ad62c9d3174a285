#pragma once

#include <cstdint>

struct CUstream_st;

// A linear and its adapter in one launch each way, for Hopper: bf16, contiguous and aligned to 16
// bytes, i, o and r multiples of 8, segments of even sizes. n tokens, i and o features, r the
// columns of s: the ranks of all projections. The words are zero again when a launch has run.
namespace megalora::cuda {

using Stream = CUstream_st*;

struct Forward {
  const void* x;       // [n, i]
  const void* weight;  // [o, i]
  const void* lora_A;  // [r, i]
  const void* lora_B;  // [o, r]: zero where a column does not belong to the projection
  void* y;             // [n, o]
  void* s;             // [n, r], scaled
  int* words;          // [linear_words(n)], zero
  int64_t n, i, o, r;
  float scale;
};

// A gradient [rows of W or its transpose] to be written or added to.
struct Gradient {
  void* to = nullptr;  // null where it is not wanted
  bool is_fp32 = false;
  bool accumulates = false;
};

struct Backward {
  const void* dy;      // [n, o]
  const void* x;       // [n, i]
  const void* s;       // [n, r], scaled
  const void* weight;  // [o, i]
  const void* lora_A;  // [r, i]
  const void* lora_B;  // [o, r]: zero where a column does not belong to the projection
  void* dx;            // [n, i]
  void* ds;            // [n, r]
  int* words;          // [linear_words(n)], zero
  int64_t n, i, o, r;
  float scale;
  Gradient d_a;  // [r, i]
  Gradient d_b;  // [o, rank], rank of one projection
  int64_t rank, period;
  int num_segments;
  int64_t segment[8];
};

// Whether this build has the kernels' code, which is for sm_90a.
bool linear_is_built();

int64_t linear_words(int64_t n);
void linear_forward(const Forward& call, Stream stream);
void linear_backward(const Backward& call, Stream stream);

}  // namespace megalora::cuda
