#include "kernels.cuh"
#include "tile.cuh"

namespace megalora::cuda {
namespace {

template <class T, int N>
struct alignas(N * sizeof(T)) Pack {
  T element[N];
};

// sums = the sum of N elements of each part, always in the same order.
template <int N>
__device__ __forceinline__ void sum_parts(float (&sums)[N], const float* part, int64_t part_size,
                                          int parts) {
#pragma unroll 8
  for (int i = 0; i < parts; ++i) {
    const Pack<float, N> added = *reinterpret_cast<const Pack<float, N>*>(part);
    part += part_size;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      sums[k] += added.element[k];
    }
  }
}

// to = (or +=) scale * sums.
template <int N, class T>
__device__ __forceinline__ void store_sums(T* to, const float (&sums)[N], float scale,
                                           bool accumulates) {
  Pack<T, N>* const target = reinterpret_cast<Pack<T, N>*>(to);
  Pack<T, N> result{};
  if (accumulates) {
    result = *target;
  }
#pragma unroll
  for (int k = 0; k < N; ++k) {
    result.element[k] = static_cast<T>(static_cast<float>(result.element[k]) + sums[k] * scale);
  }
  *target = result;
}

// Vector `index` of thin, row-major.
template <class T, int N>
__device__ __forceinline__ void add_thin(const Factor& f, const ThinParts& given, uint32_t index) {
  const uint32_t width = static_cast<uint32_t>(f.num_segments * f.rank);
  const uint32_t token = index / (width / N);
  const uint32_t column = index % (width / N) * N;
  const int projection = static_cast<int>(column / static_cast<uint32_t>(f.rank));
  float sums[N] = {};
  sum_parts<N>(sums, given.parts + static_cast<int64_t>(index) * N, f.tokens * width,
               given.count[projection]);
  store_sums<N>(thin_at<T>(f, token, 0, column), sums, static_cast<float>(f.scale), false);
}

// Vector `index` of W, in the order of its memory.
template <class T, int N>
__device__ __forceinline__ void add_weight(const Factor& f, const WeightParts& given,
                                           uint32_t index) {
  const int64_t size = f.columns * f.rank;
  const int64_t expert = divide(index, size / N);
  const int64_t inside = (index - expert * (size / N)) * N;
  const bool grouped = f.offsets != nullptr;
  const int64_t begin = grouped ? expert_end(f, expert - 1) : 0;
  const int64_t end = grouped ? expert_end(f, expert) : f.tokens;
  const int64_t first_part = divide(begin, given.tokens) + expert;
  float sums[N] = {};
  sum_parts<N>(sums, given.parts + first_part * size + inside, size,
               static_cast<int>(ceil_divide(end - begin, given.tokens)));
  const float scale = static_cast<float>(f.scale);
  const int64_t element = expert * size + inside;
  if (f.weight_is_fp32) {
    store_sums<N>(static_cast<float*>(f.weight) + element, sums, scale, f.accumulates);
  } else {
    store_sums<N>(static_cast<T*>(f.weight) + element, sums, scale, f.accumulates);
  }
}

// One thread for N elements of thin, then of W.
template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    add_kernel(const __grid_constant__ Factor thin, const __grid_constant__ ThinParts thin_parts,
               uint32_t thin_vectors, const __grid_constant__ Factor weight,
               const __grid_constant__ WeightParts weight_parts, uint32_t weight_vectors) {
  const uint32_t index = blockIdx.x * kThreads + threadIdx.x;
  if (index < thin_vectors) {
    add_thin<T, N>(thin, thin_parts, index);
  } else if (index - thin_vectors < weight_vectors) {
    add_weight<T, N>(weight, weight_parts, index - thin_vectors);
  }
}

bool aligned(const void* address, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(address) % bytes == 0;
}

// Whether both can be written four elements at a time.
template <class T>
bool in_fours(const Factor& thin, const Factor& weight) {
  return thin.rank % 4 == 0 && thin.thin_stride % 4 == 0 && aligned(thin.thin, 4 * sizeof(T)) &&
         aligned(weight.weight, 4 * (weight.weight_is_fp32 ? sizeof(float) : sizeof(T)));
}

template <class T, int N>
void start(const Factor& thin, const ThinParts& thin_parts, const Factor& weight,
           const WeightParts& weight_parts, Stream stream) {
  const int64_t thin_vectors =
      thin_parts.parts == nullptr ? 0 : thin.tokens * thin.num_segments * thin.rank / N;
  const int64_t weight_vectors =
      weight_parts.parts == nullptr ? 0 : weight.experts * weight.columns * weight.rank / N;
  const dim3 grid((thin_vectors + weight_vectors + kThreads - 1) / kThreads);
  launch(add_kernel<T, N>, grid, 0, stream, thin, thin_parts, static_cast<uint32_t>(thin_vectors),
         weight, weight_parts, static_cast<uint32_t>(weight_vectors));
}

template <class T>
void start(const Factor& thin, const ThinParts& thin_parts, const Factor& weight,
           const WeightParts& weight_parts, Stream stream) {
  if (in_fours<T>(thin, weight)) {
    start<T, 4>(thin, thin_parts, weight, weight_parts, stream);
  } else {
    start<T, 1>(thin, thin_parts, weight, weight_parts, stream);
  }
}

}  // namespace

void add_parts(const Factor& thin, const ThinParts& thin_parts, const Factor& weight,
               const WeightParts& weight_parts, Stream stream) {
  if (thin.dtype == ScalarType::BFloat16) {
    start<BFloat16>(thin, thin_parts, weight, weight_parts, stream);
  } else if (thin.dtype == ScalarType::Half) {
    start<Half>(thin, thin_parts, weight, weight_parts, stream);
  } else {
    start<float>(thin, thin_parts, weight, weight_parts, stream);
  }
}

}  // namespace megalora::cuda
