#include "runtime.h"

#include <torch/csrc/stable/c/shim.h>

#include <stdexcept>
#include <string>

// Not in a torch without CUDA.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(
    int32_t device_index, void** ret_stream);

namespace megalora::cuda {

void check(cudaError_t code) {
  if (code != cudaSuccess) {
    throw std::runtime_error(std::string("megalora: CUDA error: ") + cudaGetErrorString(code));
  }
}

int current_device() {
  int device = 0;
  check(cudaGetDevice(&device));
  return device;
}

Stream current_stream() {
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream(current_device(), &stream) != AOTI_TORCH_SUCCESS) {
    throw std::runtime_error("megalora: torch could not say its CUDA stream: see stderr");
  }
  return static_cast<Stream>(stream);
}

bool is_capturing(Stream stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

}  // namespace megalora::cuda
