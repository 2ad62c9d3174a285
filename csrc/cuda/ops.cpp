#include "../ops.h"

#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <mutex>
#include <string_view>

#include "../gemm.h"
#include "choices.h"
#include "hopper.h"
#include "kernels.cuh"
#include "runtime.h"

namespace megalora::cuda {
namespace {

using torch::stable::accelerator::DeviceGuard;

// choices.h has who computes a product of a dense factor, where both can. MEGALORA_CUDA_ROUTE
// overrides it for tuning: "gemm" or "kernels" for all, or a list as in
// "project:kernels,update:gemm", where "backward:gemm" means two products instead of our one read,
// "linear:gemm" the products one after another instead of our one launch, and "gate:kernels" our
// one pass between the two linears of a gated MLP instead of one linear after the other. It is
// looked up at every call, so that one process can measure both.
void check_product(std::string_view name) {
  check_value(name == "project" || name == "update" || name == "outer" || name == "backward" ||
                  name == "linear" || name == "gate",
              "MEGALORA_CUDA_ROUTE names the product \"", name,
              "\": use project, update, outer, backward, linear or gate");
}

Route route_named(std::string_view name) {
  check_value(name == "auto" || name == "gemm" || name == "kernels",
              "MEGALORA_CUDA_ROUTE names the route \"", name,
              "\": use auto, gemm or kernels, alone or as in project:kernels,update:gemm");
  return name == "gemm" ? Route::gemm : name == "kernels" ? Route::kernels : Route::automatic;
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

// The device whose measurements stand for a GPU: asked for once, which takes a millisecond.
std::string_view measured_as(int index) {
  static std::array<std::once_flag, kMostGpus> asked;
  static std::array<std::string_view, kMostGpus> found;
  std::call_once(asked.at(index), [index] {
    cudaDeviceProp gpu;
    check(cudaGetDeviceProperties(&gpu, index));
    found.at(index) = measured_as(kChoices, gpu.name, 10 * gpu.major + gpu.minor);
  });
  return found.at(index);
}

// What the variable names, else what was measured to be the fastest on such a device.
Route chosen(std::string_view product, Device device, bool several, int64_t rank) {
  const Route named = route_of(product);
  return named != Route::automatic
             ? named
             : fastest(kChoices, measured_as(device.index), product, several, rank);
}
Route chosen(const Factor& f, std::string_view product) {
  return chosen(product, f.device, f.num_segments > 1, f.rank);
}

// cuBLAS where nothing was measured.
bool gemm_is_faster(const Factor& f, std::string_view product) {
  return gemm_can(f) && chosen(f, product) != Route::kernels;
}

// Where cuBLAS cannot make the two products, one read wins as far as it goes.
bool one_read_is_faster(const Factor& dgrad, const Factor& wgrad) {
  if (!backward_supports(dgrad)) {
    return false;
  }
  const Route route = chosen(dgrad, "backward");
  const bool gemms_can = gemm_can(dgrad) && gemm_can(wgrad);
  return route == Route::kernels || (!gemms_can && route_of("backward") != Route::gemm);
}

// cuBLAS that adds the base's product to the low-rank term in its epilogue saves a pass over y,
// which was faster than any update of y afterwards (benchmarks/results, `low rank first`); it is
// slow where it has to write that term for each projection, or at ranks that fill no vector.
bool low_rank_first_is_faster(const Factor& f) {
  return gemm_can(f) && f.num_segments == 1 && f.rank % 8 == 0 &&
         route_of("update") != Route::kernels;
}

// call: forward or backward, whose GEMM is l.
template <class LinearCall>
bool one_launch_is_faster(const LinearCall& call, const Linear& l) {
  const Route route = route_of("linear");
  return route != Route::gemm && (route == Route::kernels || linear_fills(l)) &&
         linear_supports(call);
}

// The pass of a gated MLP reads and writes whole vectors.
void check_aligned(const Factor& f, const char* name) {
  check_value(reinterpret_cast<uintptr_t>(f.wide) % 16 == 0, name,
              " is a view that begins at no multiple of 16 bytes: give a copy of it");
}

Tensor floats(const Factor& f, int64_t count) {
  return empty({count}, ScalarType::Float, f.device);
}

struct Products {
  static constexpr const char* kDtypes = "float32, bfloat16, float16";
  static bool supports(ScalarType dtype) {
    return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
  }

  static void project(const Factor& f) {
    const DeviceGuard guard(f.device.index);
    if (gemm_is_faster(f, "project")) {
      gemm::project(f);
      return;
    }
    const int64_t splits = project_splits(f);
    const int64_t part = f.tokens * f.num_segments * f.rank;
    const Tensor workspace = floats(f, splits > 1 ? splits * part : 0);
    cuda::project(f, workspace.data<float>(), current_stream());
    check_launch();
  }

  static void update(const Factor& f) {
    const DeviceGuard guard(f.device.index);
    if (gemm_is_faster(f, "update")) {
      gemm::update(f);
      return;
    }
    cuda::update(f, current_stream());
    check_launch();
  }

  static void outer(const Factor& f) {
    const DeviceGuard guard(f.device.index);
    if (gemm_is_faster(f, "outer")) {
      gemm::outer(f);
      return;
    }
    const int64_t splits = outer_splits(f);
    const Tensor workspace = floats(f, splits > 1 ? splits * f.columns * f.rank : 0);
    cuda::outer(f, workspace.data<float>(), current_stream());
    check_launch();
  }

  static void backward(const Factor& dgrad, const Factor& wgrad) {
    if (!one_read_is_faster(dgrad, wgrad)) {
      project(dgrad);
      outer(wgrad);
      return;
    }
    const DeviceGuard guard(dgrad.device.index);
    const Tensor workspace = floats(dgrad, backward_workspace(dgrad));
    cuda::backward(dgrad, wgrad, workspace.data<float>(), current_stream());
    check_launch();
  }

  static void linear(const Linear& l) {
    const DeviceGuard guard(l.update.device.index);
    if (one_launch_is_faster(l, l)) {
      linear_forward(l);
    } else {
      compose<Products>(l);
    }
  }

  static void linear_backward(const LinearBackward& b) {
    const DeviceGuard guard(b.d_a.device.index);
    if (one_launch_is_faster(b, b.dgrad)) {
      cuda::linear_backward(b);
    } else {
      compose<Products>(b);
    }
  }

  static bool fuses_experts(const Tensor& weight, int64_t experts, int64_t ranks) {
    return route_of("linear") != Route::gemm && cuda::fuses_experts(weight, experts, ranks);
  }

  static void experts_linear(const ExpertsLinear& l) {
    const DeviceGuard guard(l.update.device.index);
    if (route_of("linear") != Route::gemm && experts_support(l)) {
      experts_forward(l);
    } else {
      compose_experts<Products>(l);
    }
  }

  static void experts_backward(const ExpertsBackward& b) {
    const DeviceGuard guard(b.d_a.device.index);
    if (route_of("linear") != Route::gemm && experts_support(b)) {
      cuda::experts_backward(b);
    } else {
      compose_experts<Products>(b);
    }
  }

  static constexpr const char* kGates =
      "bfloat16 or float16, columns of gate in eights and ranks up to 32";
  static bool gates(ScalarType dtype, int64_t columns, int64_t rank) {
    return gate_supports(dtype, columns, rank);
  }
  static bool gate_is_faster(const Tensor& weight, int64_t rank) {
    return chosen("gate", weight.device(), true, rank) == Route::kernels;
  }
  static void gate(const Gate& g) {
    const DeviceGuard guard(g.update.device.index);
    check_aligned(g.update, "y");
    const Tensor workspace = floats(g.update, gate_workspace(g));
    cuda::gate(g, workspace.data<float>(), current_stream());
    check_launch();
  }
  static void gate_backward(const GateBackward& g) {
    const DeviceGuard guard(g.update.device.index);
    check_aligned(g.gates, "y");
    check_aligned(g.update, "da");
    const Tensor workspace = floats(g.update, gate_workspace(g));
    cuda::gate_backward(g, workspace.data<float>(), current_stream());
    check_launch();
  }

  static void add_base(const Linear& l) {
    const DeviceGuard guard(l.update.device.index);
    if (low_rank_first_is_faster(l.update)) {
      low_rank_first(l);
    } else {
      base_first<Products>(l);
    }
  }
};

}  // namespace
}  // namespace megalora::cuda

STABLE_TORCH_LIBRARY_IMPL(megalora, CUDA, m) {
  megalora::implement<megalora::cuda::Products>(m);
  megalora::implement_gated<megalora::cuda::Products>(m);
}
