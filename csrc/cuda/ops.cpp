#include "../ops.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "../gemm.h"
#include "kernels.cuh"

namespace megalora::cuda {
namespace {

// cuBLAS with beta = 1 for what it can do in one call per projection; our kernels for experts,
// dropout, projections that are interleaved by query group, and sums into fp32.
bool gemm_is_faster(const Factor& f) {
  return f.offsets == nullptr && !f.drops() && f.columns == f.period && !f.weight_is_fp32;
}

struct Products {
  static constexpr const char* kDtypes = "float32, bfloat16, float16";
  static bool supports(at::ScalarType dtype) {
    return dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf;
  }

  static void project(const Factor& f) {
    const c10::cuda::CUDAGuard guard(f.device);
    if (gemm_is_faster(f)) {
      gemm::project(f);
      return;
    }
    cuda::project(f, c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }

  static void update(const Factor& f) {
    const c10::cuda::CUDAGuard guard(f.device);
    if (gemm_is_faster(f)) {
      gemm::update(f);
      return;
    }
    cuda::update(f, c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }

  static void outer(const Factor& f) {
    const c10::cuda::CUDAGuard guard(f.device);
    if (gemm_is_faster(f)) {
      gemm::outer(f);
      return;
    }
    const int64_t splits = outer_splits(f);
    const Tensor workspace = at::empty({splits > 1 ? splits * f.columns * f.rank : 0},
                                       at::TensorOptions().dtype(at::kFloat).device(f.device));
    cuda::outer(f, workspace.data_ptr<float>(), c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }

  static void backward(const Factor& dgrad, const Factor& wgrad) {
    if (!one_read_is_faster(dgrad)) {
      project(dgrad);
      outer(wgrad);
      return;
    }
    const c10::cuda::CUDAGuard guard(dgrad.device);
    const Tensor workspace = at::empty({backward_workspace(dgrad)},
                                       at::TensorOptions().dtype(at::kFloat).device(dgrad.device));
    cuda::backward(dgrad, wgrad, workspace.data_ptr<float>(), c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

}  // namespace
}  // namespace megalora::cuda

TORCH_LIBRARY_IMPL(megalora, CUDA, m) { megalora::implement<megalora::cuda::Products>(m); }
