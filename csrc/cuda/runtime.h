#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

// What the host side needs of CUDA and of torch's part for it.
namespace megalora::cuda {

using Stream = cudaStream_t;

constexpr int kMostGpus = 64;

// std::runtime_error where a call of CUDA's failed, or the launch before.
void check(cudaError_t code);
inline void check_launch() { check(cudaGetLastError()); }

int current_device();
// The stream of torch on the current device.
Stream current_stream();
// Whether a graph is captured on it.
bool is_capturing(Stream stream);

}  // namespace megalora::cuda
