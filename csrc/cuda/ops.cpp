#include "../ops.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <cstdlib>
#include <string_view>

#include "../gemm.h"
#include "kernels.cuh"

namespace megalora::cuda {
namespace {

// Who computes a product of a dense factor, where both can. MEGALORA_CUDA_ROUTE overrides the
// choice for tuning: "gemm" or "kernels" for all, or a list as in "project:kernels,update:gemm",
// where "backward:gemm" means two products instead of our one read. It is looked up at every call,
// so that one process can measure both.
enum class Route { automatic, gemm, kernels };

void check_product(std::string_view name) {
  TORCH_CHECK_VALUE(
      name == "project" || name == "update" || name == "outer" || name == "backward",
      "MEGALORA_CUDA_ROUTE names the product \"", name,
      "\": use project, update, outer or backward");
}

Route route_named(std::string_view name) {
  TORCH_CHECK_VALUE(name == "auto" || name == "gemm" || name == "kernels",
                    "MEGALORA_CUDA_ROUTE names the route \"", name,
                    "\": use auto, gemm or kernels, alone or as in project:kernels,update:gemm");
  return name == "gemm"      ? Route::gemm
         : name == "kernels" ? Route::kernels
                             : Route::automatic;
}

Route route_of(std::string_view product) {
  const char* const variable = std::getenv("MEGALORA_CUDA_ROUTE");
  std::string_view rest = variable == nullptr ? "" : variable;
  Route route = Route::automatic;
  while (!rest.empty()) {
    const std::string_view entry = rest.substr(0, rest.find(','));
    rest.remove_prefix(std::min(entry.size() + 1, rest.size()));
    const size_t colon = entry.find(':');
    const bool for_all = colon == std::string_view::npos;
    const std::string_view chosen_for = for_all ? product : entry.substr(0, colon);
    check_product(chosen_for);
    const Route named = route_named(for_all ? entry : entry.substr(colon + 1));
    if (chosen_for == product) {
      route = named;
    }
  }
  return route;
}

// cuBLAS with beta = 1 for what it can do in one call per projection; our kernels for experts,
// dropout, projections that are interleaved by query group, and sums into fp32.
bool gemm_can(const Factor& f) {
  return f.offsets == nullptr && !f.drops() && f.columns == f.period && !f.weight_is_fp32;
}

bool gemm_is_faster(const Factor& f, std::string_view product) {
  return gemm_can(f) && route_of(product) != Route::kernels;
}

// Measured on an H200 (benchmarks/results): cuBLAS makes a pass over y for each projection and is
// slow at ranks that are no whole vector; our kernel is the slower one at larger ranks.
bool gemm_updates_faster(const Factor& f) {
  const bool prefers_kernel = f.rank <= 16 && (f.num_segments > 1 || f.rank % 8 != 0);
  return route_of("update") == Route::gemm ? gemm_can(f)
                                           : gemm_is_faster(f, "update") && !prefers_kernel;
}

// Measured likewise: for one projection one read of dY wins up to rank 16, over two products that
// cuBLAS can make; where it cannot, one read wins as far as it goes.
bool one_read_is_faster(const Factor& dgrad, const Factor& wgrad) {
  const Route route = route_of("backward");
  if (!backward_supports(dgrad) || route == Route::gemm) {
    return false;
  }
  return route == Route::kernels || dgrad.rank <= 16 || !gemm_can(dgrad) || !gemm_can(wgrad);
}

Tensor floats(const Factor& f, int64_t count) {
  return at::empty({count}, at::TensorOptions().dtype(at::kFloat).device(f.device));
}

struct Products {
  static constexpr const char* kDtypes = "float32, bfloat16, float16";
  static bool supports(at::ScalarType dtype) {
    return dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf;
  }

  static void project(const Factor& f) {
    const c10::cuda::CUDAGuard guard(f.device);
    if (gemm_is_faster(f, "project")) {
      gemm::project(f);
      return;
    }
    const int64_t splits = project_splits(f);
    const int64_t part = f.tokens * f.num_segments * f.rank;
    const Tensor workspace = floats(f, splits > 1 ? splits * part : 0);
    cuda::project(f, workspace.data_ptr<float>(), c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }

  static void update(const Factor& f) {
    const c10::cuda::CUDAGuard guard(f.device);
    if (gemm_updates_faster(f)) {
      gemm::update(f);
      return;
    }
    cuda::update(f, c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }

  static void outer(const Factor& f) {
    const c10::cuda::CUDAGuard guard(f.device);
    if (gemm_is_faster(f, "outer")) {
      gemm::outer(f);
      return;
    }
    const int64_t splits = outer_splits(f);
    const Tensor workspace = floats(f, splits > 1 ? splits * f.columns * f.rank : 0);
    cuda::outer(f, workspace.data_ptr<float>(), c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }

  static void backward(const Factor& dgrad, const Factor& wgrad) {
    if (!one_read_is_faster(dgrad, wgrad)) {
      project(dgrad);
      outer(wgrad);
      return;
    }
    const c10::cuda::CUDAGuard guard(dgrad.device);
    const Tensor workspace = floats(dgrad, backward_workspace(dgrad));
    cuda::backward(dgrad, wgrad, workspace.data_ptr<float>(), c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }

  // An adapted linear as a whole, forward or dgrad.
  static void linear(const Linear& l) {
    project(l.project);
    add_base(l);
  }

  static void linear_backward(const Linear& l, const Factor& wgrad) {
    backward(l.project, wgrad);
    add_base(l);
  }

 private:
  // Measured likewise: cuBLAS that adds to the low-rank term in its epilogue saves one pass over y.
  static void add_base(const Linear& l) {
    const c10::cuda::CUDAGuard guard(l.update.device);
    if (gemm_updates_faster(l.update)) {
      low_rank_first(l);
    } else {
      base_first<Products>(l);
    }
  }
};

}  // namespace
}  // namespace megalora::cuda

TORCH_LIBRARY_IMPL(megalora, CUDA, m) { megalora::implement<megalora::cuda::Products>(m); }
