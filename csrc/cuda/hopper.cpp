#include "hopper.h"

#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>
#include <utility>

#include "kernels.cuh"
#include "linear.cuh"

namespace megalora::cuda {
namespace {

constexpr int64_t kMostColumnsOfS = 256;
constexpr int64_t kMostOfAnySize = int64_t{1} << 20;  // the plan counts items in 16 bits
// Measured on an H200: 512 tokens of 4096 -> 4096, 32 tiles, take 47 us, and 27 by cuBLAS; 1024
// tokens take as long as by cuBLAS.
constexpr int64_t kTile = 256, kFewestTiles = 64;

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

bool is_multiple_of_eight(int64_t size) { return size % 8 == 0 && size <= kMostOfAnySize; }

bool is_hopper(c10::Device device) {
  int major = 0, minor = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device.index()));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device.index()));
  return major == 9 && minor == 0;
}

// Tokens that copies of boxes can read: a copy where they are not.
Tensor boxable(const Tensor& tokens) {
  return tokens.is_contiguous() && is_aligned(tokens.data_ptr())
             ? tokens
             : tokens.clone(at::MemoryFormat::Contiguous);
}

// The blocks of B where several projections have columns; nothing where B is its one block.
Tensor spread(const Factor& lora_B, const at::TensorOptions& options, Stream stream) {
  if (lora_B.num_segments == 1) {
    return {};
  }
  Tensor blocks = at::empty({lora_B.columns, lora_B.num_segments * lora_B.rank}, options);
  block_diagonal(lora_B, blocks.data_ptr(), stream);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return blocks;
}

const void* pointer_to(const Tensor& blocks, const Factor& lora_B) {
  return blocks.defined() ? blocks.data_ptr() : lora_B.weight;
}

// Zero words, which a launch leaves zero: those of this stream, whose launches wait for each other,
// or own ones of a graph, which may be replayed on another.
Tensor words(int64_t tokens, const at::TensorOptions& options, c10::cuda::CUDAStream stream) {
  const auto ints = options.dtype(at::kInt);
  if (c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None) {
    return at::zeros({linear_words(tokens)}, ints);
  }
  static std::mutex mutex;
  // Never freed: at the end of a process CUDA may be gone before it.
  static auto& kept = *new std::map<std::pair<c10::DeviceIndex, c10::StreamId>, Tensor>;
  const std::lock_guard<std::mutex> lock(mutex);
  Tensor& own = kept[{stream.device_index(), stream.id()}];
  if (!own.defined()) {
    own = at::zeros({linear_words(kMostOfAnySize)}, ints);
  }
  return own;
}

Gradient gradient_of(const Factor& f) {
  return {.to = f.weight, .is_fp32 = f.weight_is_fp32, .accumulates = f.accumulates};
}

// weight: [out, in]
bool supports(const Tensor& weight, const Factor& lora_A, const Factor& lora_B) {
  const auto is_even = [](int64_t size) { return size % 2 == 0; };
  return linear_is_built() && lora_A.dtype == at::kBFloat16 && is_hopper(lora_A.device) &&
         is_multiple_of_eight(lora_A.columns) && is_multiple_of_eight(lora_B.columns) &&
         is_multiple_of_eight(lora_A.rank) && lora_A.rank <= kMostColumnsOfS &&
         lora_A.tokens <= kMostOfAnySize &&
         std::all_of(lora_B.segment, lora_B.segment + lora_B.num_segments, is_even) &&
         weight.is_contiguous() && is_aligned(weight.data_ptr()) && is_aligned(lora_A.weight) &&
         (lora_B.num_segments > 1 || is_aligned(lora_B.weight));
}

}  // namespace

bool linear_supports(const Linear& l) { return supports(l.weight.t(), l.project, l.update); }

bool linear_supports(const LinearBackward& b) {
  return supports(b.dgrad.weight, b.dgrad.update, b.dgrad.project);
}

bool linear_fills(const Linear& l) {
  const auto tiles = [](int64_t size) { return (size + kTile - 1) / kTile; };
  return tiles(l.out.size(0)) * tiles(l.out.size(1)) >= kFewestTiles;
}

void linear_forward(const Linear& l) {
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const Factor &lora_A = l.project, &lora_B = l.update;
  const Tensor x = boxable(l.in), blocks = spread(lora_B, l.in.options(), stream);
  const Tensor zeros = words(lora_A.tokens, l.in.options(), stream);
  linear_forward(Forward{.x = x.data_ptr(),
                         .weight = l.weight.data_ptr(),
                         .lora_A = lora_A.weight,
                         .lora_B = pointer_to(blocks, lora_B),
                         .y = l.out.data_ptr(),
                         .s = l.thin.data_ptr(),
                         .words = zeros.data_ptr<int>(),
                         .n = lora_A.tokens,
                         .i = lora_A.columns,
                         .o = lora_B.columns,
                         .r = lora_A.rank,
                         .scale = static_cast<float>(lora_A.scale)},
                 stream);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void linear_backward(const LinearBackward& b) {
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const Factor &lora_A = b.dgrad.update, &lora_B = b.dgrad.project;
  const Tensor dy = boxable(b.dgrad.in), x = boxable(b.x), s = boxable(b.s);
  const Tensor blocks = spread(lora_B, dy.options(), stream);
  const Tensor zeros = words(lora_A.tokens, dy.options(), stream);
  Backward call{.dy = dy.data_ptr(),
                .x = x.data_ptr(),
                .s = s.data_ptr(),
                .weight = b.dgrad.weight.data_ptr(),
                .lora_A = lora_A.weight,
                .lora_B = pointer_to(blocks, lora_B),
                .dx = b.dgrad.out.data_ptr(),
                .ds = b.dgrad.thin.data_ptr(),
                .words = zeros.data_ptr<int>(),
                .n = lora_A.tokens,
                .i = lora_A.columns,
                .o = lora_B.columns,
                .r = lora_A.rank,
                .scale = static_cast<float>(lora_B.scale),
                .d_a = gradient_of(b.d_a),
                .d_b = gradient_of(b.d_b),
                .rank = lora_B.rank,
                .period = lora_B.period,
                .num_segments = lora_B.num_segments,
                .segment = {}};
  std::copy_n(lora_B.segment, lora_B.num_segments, call.segment);
  linear_backward(call, stream);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace megalora::cuda
