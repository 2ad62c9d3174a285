#include "runtime.h"

#include <torch/csrc/stable/c/shim.h>

#include "../errors.h"

// Not in a torch without CUDA.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace megalora::cuda {

void check(cudaError_t code) {
  check_that(code == cudaSuccess, "CUDA error: ", cudaGetErrorString(code));
}

int current_device() {
  int device = 0;
  check(cudaGetDevice(&device));
  return device;
}

Stream current_stream() {
  void* stream = nullptr;
  check_that(aoti_torch_get_current_cuda_stream(current_device(), &stream) == AOTI_TORCH_SUCCESS,
             "torch could not say its CUDA stream: its error is above, on stderr");
  return static_cast<Stream>(stream);
}

bool is_capturing(Stream stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

}  // namespace megalora::cuda
