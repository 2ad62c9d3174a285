#include "hopper.h"

#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "kernels.cuh"
#include "linear.cuh"
#include "runtime.h"

namespace megalora::cuda {
namespace {

constexpr int64_t kMostColumnsOfS = 256;
constexpr int64_t kMostOfAnySize = int64_t{1} << 19;  // the plan counts items in 16 bits
// Measured on an H200: 512 tokens of 4096 -> 4096, 32 tiles, take 47 us, and 27 by cuBLAS; 1024
// tokens take as long as by cuBLAS.
constexpr int64_t kTile = 256, kFewestTiles = 64;

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

bool is_multiple_of_eight(int64_t size) { return size % 8 == 0 && size <= kMostOfAnySize; }

bool is_hopper(Device device) {
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device.index));
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device.index));
  return major == 9 && minor == 0;
}

// Whether copies of boxes can read a matrix.
bool is_boxable(const Tensor& matrix) {
  return matrix.is_contiguous() && is_aligned(matrix.data());
}

// Tokens that copies of boxes can read: a copy where they are not.
Tensor boxable(const Tensor& tokens) {
  return is_boxable(tokens) ? tokens : tokens.to(tokens.dtype(), tokens.device());
}

// B with its columns in blocks, one for each projection, and zeros behind them; nothing where B is
// that already.
Tensor spread(const Factor& lora_B, int64_t columns_of_s, Stream stream) {
  if (lora_B.rank == columns_of_s) {
    return {};
  }
  Tensor blocks =
      empty({lora_B.experts * lora_B.columns, columns_of_s}, lora_B.dtype, lora_B.device);
  block_diagonal(lora_B, columns_of_s, blocks.data(), stream);
  check_launch();
  return blocks;
}

const void* pointer_to(const Tensor& blocks, const Factor& lora_B) {
  return blocks.defined() ? blocks.data() : lora_B.weight;
}

// Zero words, which a launch leaves zero: those of this stream, whose launches wait for each other,
// or own ones of a graph, which may be replayed on another.
Tensor words(const Sizes& sizes, Device device, Stream stream) {
  const auto zeros = [&](int64_t count) {
    const Tensor made = empty({count}, ScalarType::Int, device);
    made.zero_();
    return made;
  };
  if (is_capturing(stream)) {
    return zeros(linear_words(sizes.n, sizes.experts));
  }
  static std::mutex mutex;
  // Never freed: at the end of a process CUDA may be gone before it.
  static auto& kept = *new std::map<std::pair<int, Stream>, Tensor>;
  const std::lock_guard<std::mutex> lock(mutex);
  Tensor& own = kept[{device.index, stream}];
  if (!own.defined()) {
    own = zeros(linear_words(kMostOfAnySize, kMostExperts));
  }
  return own;
}

// The maps of experts' weights on the device, kept for the weights that they are made of: a weight
// that moves has another address.
Tensor maps(const ExpertsLinear& l, bool backward) {
  struct Kept {
    std::vector<const void*> weights;
    int64_t o, i;
    Tensor maps;
  };
  static std::mutex mutex;
  static auto& all = *new std::map<std::pair<const void*, bool>, Kept>;
  std::vector<const void*> weights;
  for (const Tensor& weight : l.weights) {
    weights.push_back(weight.data());
  }
  const int64_t experts = static_cast<int64_t>(weights.size());
  const int64_t o = l.weights[0].size(0), i = l.weights[0].size(1);
  const std::lock_guard<std::mutex> lock(mutex);
  Kept& kept = all[{weights[0], backward}];
  if (kept.weights != weights || kept.o != o || kept.i != i) {
    check_that(
        !is_capturing(current_stream()),
        "experts run for the first time while a CUDA graph is captured: run them once before");
    const Tensor host = empty({bytes_of_maps(experts) / 8 + 16}, ScalarType::Long, Device{});
    auto* const aligned =
        reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(host.data()) + 127) / 128 * 128);
    make_maps(aligned, weights.data(), experts, o, i, backward);
    const int64_t count = bytes_of_maps(experts) / 8;
    kept = {weights, o, i,
            strided(aligned, {count}, {1}, ScalarType::Long, Device{})
                .to(ScalarType::Long, l.in.device())};
  }
  return kept.maps;
}

// Offsets as int64, contiguous.
Tensor longs(const Tensor& offsets) {
  return offsets.dtype() == ScalarType::Long ? offsets.contiguous()
                                             : offsets.to(ScalarType::Long, offsets.device());
}

Gradient gradient_of(const Factor& f) {
  return {.to = f.weight, .is_fp32 = f.weight_is_fp32, .accumulates = f.accumulates};
}

bool is_even(int64_t size) { return size % 2 == 0; }

bool supports_weight(const Tensor& weight) {
  return linear_is_built() && weight.dtype() == ScalarType::BFloat16 &&
         is_hopper(weight.device()) && is_boxable(weight) && is_multiple_of_eight(weight.size(0)) &&
         is_multiple_of_eight(weight.size(1));
}

bool supports_factors(const Factor& lora_A, const Factor& lora_B, int64_t columns_of_s) {
  return lora_A.dtype == ScalarType::BFloat16 && columns_of_s % 8 == 0 &&
         columns_of_s <= kMostColumnsOfS && lora_A.tokens <= kMostOfAnySize &&
         std::all_of(lora_B.segment, lora_B.segment + lora_B.num_segments, is_even) &&
         is_aligned(lora_A.weight) && is_aligned(lora_B.weight);
}

// The weights of all experts have the dtype, device and sizes of the first.
bool supports_experts(const ExpertsLinear& l, const Factor& lora_A, const Factor& lora_B) {
  return supports_weight(l.weights[0]) &&
         std::all_of(l.weights.begin(), l.weights.end(), is_boxable) &&
         supports_factors(lora_A, lora_B, l.thin.size(1)) && lora_A.experts <= kMostExperts;
}

// columns_of_s: the ranks of all projections and their padding.
Sizes sizes_of(const Factor& lora_A, const Factor& lora_B, int64_t columns_of_s) {
  return {.n = lora_A.tokens,
          .i = lora_A.columns,
          .o = lora_B.columns,
          .ranks = lora_A.rank,
          .r = columns_of_s,
          .experts = lora_A.experts};
}

Forward forward_of(const Sizes& sizes, const Tensor& x, const Factor& lora_A, const void* lora_B,
                   const Tensor& out, const Tensor& thin) {
  return {.sizes = sizes,
          .x = x.data(),
          .weight = nullptr,
          .lora_A = lora_A.weight,
          .lora_B = lora_B,
          .y = out.data(),
          .s = thin.data(),
          .words = nullptr,
          .scale = static_cast<float>(lora_A.scale)};
}

void run(Forward call, Device device) {
  const auto stream = current_stream();
  const Tensor zeros = words(call.sizes, device, stream);
  call.words = zeros.data<int>();
  linear_forward(call, stream);
  check_launch();
}

// What dense linears and experts have in common; weight: null where sizes have maps.
void run_backward(const Sizes& sizes, const void* weight, const Tensor& in, const Tensor& x_given,
                  const Tensor& s_given, const Tensor& out, const Tensor& thin,
                  const Factor& lora_A, const Factor& lora_B, const Factor& d_a,
                  const Factor& d_b) {
  const auto stream = current_stream();
  const Tensor dy = boxable(in), x = boxable(x_given), s = boxable(s_given);
  const Tensor blocks = spread(lora_B, sizes.r, stream);
  const Tensor zeros = words(sizes, dy.device(), stream);
  Backward call{.sizes = sizes,
                .dy = dy.data(),
                .x = x.data(),
                .s = s.data(),
                .weight = weight,
                .lora_A = lora_A.weight,
                .lora_B = pointer_to(blocks, lora_B),
                .dx = out.data(),
                .ds = thin.data(),
                .words = zeros.data<int>(),
                .scale = static_cast<float>(lora_B.scale),
                .d_a = gradient_of(d_a),
                .d_b = gradient_of(d_b),
                .rank = lora_B.rank,
                .period = lora_B.period,
                .num_segments = lora_B.num_segments,
                .segment = {}};
  std::copy_n(lora_B.segment, lora_B.num_segments, call.segment);
  linear_backward(call, stream);
  check_launch();
}

}  // namespace

bool linear_supports(const Linear& l) {
  return supports_weight(l.weight.t()) && supports_factors(l.project, l.update, l.thin.size(1));
}

bool linear_supports(const LinearBackward& b) {
  return supports_weight(b.dgrad.weight) &&
         supports_factors(b.dgrad.update, b.dgrad.project, b.dgrad.thin.size(1));
}

bool linear_fills(const Linear& l) {
  const auto tiles = [](int64_t size) { return (size + kTile - 1) / kTile; };
  return tiles(l.out.size(0)) * tiles(l.out.size(1)) >= kFewestTiles;
}

void linear_forward(const Linear& l) {
  const Sizes sizes = sizes_of(l.project, l.update, l.thin.size(1));
  const Tensor x = boxable(l.in);
  const Tensor blocks = spread(l.update, sizes.r, current_stream());
  Forward call = forward_of(sizes, x, l.project, pointer_to(blocks, l.update), l.out, l.thin);
  call.weight = l.weight.data();
  run(call, l.in.device());
}

void linear_backward(const LinearBackward& b) {
  const Linear& l = b.dgrad;
  run_backward(sizes_of(l.update, l.project, l.thin.size(1)), l.weight.data(), l.in, b.x, b.s,
               l.out, l.thin, l.update, l.project, b.d_a, b.d_b);
}

bool fuses_experts(const Tensor& weight, int64_t experts, int64_t ranks) {
  return supports_weight(weight) && experts <= kMostExperts && padded(ranks) <= kMostColumnsOfS;
}

bool experts_support(const ExpertsLinear& l) { return supports_experts(l, l.project, l.update); }

bool experts_support(const ExpertsBackward& b) {
  return supports_experts(b.dgrad, b.dgrad.update, b.dgrad.project);
}

void experts_forward(const ExpertsLinear& l) {
  const Tensor ends = longs(l.offsets), weights = maps(l, false);
  Sizes sizes = sizes_of(l.project, l.update, l.thin.size(1));
  sizes.ends = ends.data<int64_t>();
  sizes.maps = weights.data();
  const Tensor x = boxable(l.in);
  const Tensor blocks = spread(l.update, sizes.r, current_stream());
  run(forward_of(sizes, x, l.project, pointer_to(blocks, l.update), l.out, l.thin), l.in.device());
}

void experts_backward(const ExpertsBackward& b) {
  const ExpertsLinear& l = b.dgrad;
  const Tensor ends = longs(l.offsets), weights = maps(l, true);
  Sizes sizes = sizes_of(l.update, l.project, l.thin.size(1));
  sizes.ends = ends.data<int64_t>();
  sizes.maps = weights.data();
  run_backward(sizes, nullptr, l.in, b.x, b.s, l.out, l.thin, l.update, l.project, b.d_a, b.d_b);
}

}  // namespace megalora::cuda
