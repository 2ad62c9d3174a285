#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <optional>

// Under autocast shrink computes in the autocast dtype, as the base linear does, and expand_ in the
// dtype of the y that the base gave it. The backward pieces see what forward saved.
namespace megalora {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <c10::DeviceType DEVICE>
struct Autocast {
  static constexpr c10::DispatchKey kKey =
      DEVICE == c10::kCPU ? c10::DispatchKey::AutocastCPU : c10::DispatchKey::AutocastCUDA;

  static Tensor shrink(const Tensor& x, const Tensor& lora_A, const OptionalTensor& offsets,
                       double p, const OptionalTensor& seed) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(kKey);
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("megalora::shrink", "")
                               .typed<decltype(shrink)>();
    const auto dtype = at::autocast::get_autocast_dtype(DEVICE);
    return op.call(at::autocast::cached_cast(dtype, x, DEVICE),
                   at::autocast::cached_cast(dtype, lora_A, DEVICE), offsets, p, seed);
  }

  static void expand_(const Tensor& y, const Tensor& s, const Tensor& lora_B, double scale,
                      const OptionalTensor& offsets, at::IntArrayRef segments) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(kKey);
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("megalora::expand_", "")
                               .typed<decltype(expand_)>();
    op.call(y, s.to(y.scalar_type()), lora_B.to(y.scalar_type()), scale, offsets, segments);
  }
};

template <c10::DeviceType DEVICE>
void implement(torch::Library& m) {
  m.impl("shrink", &Autocast<DEVICE>::shrink);
  m.impl("expand_", &Autocast<DEVICE>::expand_);
}

}  // namespace
}  // namespace megalora

TORCH_LIBRARY_IMPL(megalora, AutocastCPU, m) { megalora::implement<c10::kCPU>(m); }
TORCH_LIBRARY_IMPL(megalora, AutocastCUDA, m) { megalora::implement<c10::kCUDA>(m); }
