// The kernels of csrc/cuda as ordinary ops of a namespace of their own, on CPU tensors.

#include "../../csrc/cuda/add.cu"
#include "../../csrc/cuda/backward.cu"
#include "../../csrc/cuda/gated.cu"
#include "../../csrc/cuda/outer.cu"
#include "../../csrc/cuda/project.cu"
#include "../../csrc/cuda/update.cu"

#include "../../csrc/ops.h"

namespace megalora {
namespace {

struct Emulated {
  static constexpr const char* kDtypes = "float32, bfloat16, float16";
  static bool supports(ScalarType dtype) {
    return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
  }
  static void project(const Factor& f) {
    std::vector<float> workspace(cuda::project_splits(f) * f.tokens * f.num_segments * f.rank,
                                 1e30f);
    cuda::project(f, workspace.data(), nullptr);
  }
  static void update(const Factor& f) { cuda::update(f, nullptr); }
  static void outer(const Factor& f) {
    std::vector<float> workspace(cuda::outer_splits(f) * f.columns * f.rank, 1e30f);
    cuda::outer(f, workspace.data(), nullptr);
  }
  static void backward(const Factor& dgrad, const Factor& wgrad) {
    if (!cuda::backward_supports(dgrad)) {
      project(dgrad);
      outer(wgrad);
      return;
    }
    std::vector<float> workspace(cuda::backward_workspace(dgrad), 1e30f);
    cuda::backward(dgrad, wgrad, workspace.data(), nullptr);
  }
  static constexpr const char* kGates = "what the kernels support";
  static bool gates(ScalarType dtype, int64_t columns, int64_t rank) {
    return cuda::gate_supports(dtype, columns, rank);
  }
  static bool gate_is_faster(const Tensor&, int64_t) { return true; }
  static void gate(const Gate& g) {
    std::vector<float> workspace(cuda::gate_workspace(g), 1e30f);
    cuda::gate(g, workspace.data(), nullptr);
  }
  static void gate_backward(const GateBackward& g) {
    std::vector<float> workspace(cuda::gate_workspace(g), 1e30f);
    cuda::gate_backward(g, workspace.data(), nullptr);
  }
  static void add_base(const Linear& l) { base_first<Emulated>(l); }
  static void linear(const Linear& l) { compose<Emulated>(l); }
  static void linear_backward(const LinearBackward& b) { compose<Emulated>(b); }
  static bool fuses_experts(const Tensor&, int64_t, int64_t) { return false; }
  static void experts_linear(const ExpertsLinear& l) { compose_experts<Emulated>(l); }
  static void experts_backward(const ExpertsBackward& b) { compose_experts<Emulated>(b); }
};

}  // namespace
}  // namespace megalora

STABLE_TORCH_LIBRARY(megalora_emulated, m) { megalora::define_ops(m); }
STABLE_TORCH_LIBRARY_IMPL(megalora_emulated, CPU, m) {
  megalora::implement<megalora::Emulated>(m);
  megalora::implement_gated<megalora::Emulated>(m);
}
