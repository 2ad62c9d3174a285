#include "tensor.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "errors.h"

// Not in every torch: the products on GPUs only in one with CUDA, the last message since 2.13.
extern "C" {
__attribute__((weak)) AOTITorchError aoti_torch_cuda_mm_out(AtenTensorHandle out,
                                                            AtenTensorHandle a, AtenTensorHandle b);
__attribute__((weak)) AOTITorchError aoti_torch_cuda_addmm_out(AtenTensorHandle out,
                                                               AtenTensorHandle self,
                                                               AtenTensorHandle a,
                                                               AtenTensorHandle b, double beta,
                                                               double alpha);
__attribute__((weak)) const char* torch_exception_get_what_without_backtrace();
}

namespace megalora {
namespace {

// Torch hands no exception over, only that there was one, and writes it to stderr.
const char* last_error() {
  return torch_exception_get_what_without_backtrace == nullptr
             ? "its error is above, on stderr"
             : torch_exception_get_what_without_backtrace();
}

void check(AOTITorchError code, const char* what) {
  if (code != AOTI_TORCH_SUCCESS) {
    check_that(false, "torch could not ", what, ": ", last_error());
  }
}

// The dtypes that the ops know, by torch's numbers for them; asked for once.
using Code = std::pair<int32_t, ScalarType>;
const std::array<Code, 6>& codes() {
  static const std::array<Code, 6> known{{{aoti_torch_dtype_bfloat16(), ScalarType::BFloat16},
                                          {aoti_torch_dtype_float32(), ScalarType::Float},
                                          {aoti_torch_dtype_int64(), ScalarType::Long},
                                          {aoti_torch_dtype_int32(), ScalarType::Int},
                                          {aoti_torch_dtype_float16(), ScalarType::Half},
                                          {aoti_torch_dtype_float64(), ScalarType::Double}}};
  return known;
}

ScalarType dtype_of(int32_t code) {
  for (const auto& [known, dtype] : codes()) {
    if (known == code) {
      return dtype;
    }
  }
  return torch::stable::detail::to<ScalarType>(torch::stable::detail::from(code));
}

int32_t code_of(ScalarType dtype) {
  for (const auto& [code, known] : codes()) {
    if (known == dtype) {
      return code;
    }
  }
  throw std::logic_error("no tensor is made of this dtype");
}

int64_t element_size(ScalarType dtype) {
  return static_cast<int64_t>(aoti_torch_dtype_element_size(code_of(dtype)));
}

Device::Type device_type_of(int32_t code) {
  static const int32_t cpu = aoti_torch_device_type_cpu(), cuda = aoti_torch_device_type_cuda();
  return code == cpu ? Device::Type::cpu : code == cuda ? Device::Type::cuda : Device::Type::other;
}

int32_t code_of(Device::Type type) {
  static const int32_t cpu = aoti_torch_device_type_cpu(), cuda = aoti_torch_device_type_cuda();
  return type == Device::Type::cpu ? cpu : cuda;
}

int32_t index_of(Device device) { return device.is_cpu() ? 0 : device.index; }

std::shared_ptr<AtenTensorOpaque> owned(AtenTensorHandle handle) {
  return {handle, [](AtenTensorHandle held) { aoti_torch_delete_tensor_object(held); }};
}

}  // namespace

// A tensor as torch's functions take it: its own, or one of this call for a view.
class Borrowed {
 public:
  explicit Borrowed(const Tensor& tensor) : owner_(tensor.owner_) {
    if (owner_ != nullptr && !tensor.is_view_) {
      return;
    }
    const int64_t* const sizes = tensor.sizes_.begin();
    const int64_t* const strides = tensor.strides_.begin();
    AtenTensorHandle handle = nullptr;
    check(owner_ != nullptr
              ? aoti_torch__reinterpret_tensor(owner_.get(), tensor.dim(), sizes, strides,
                                               tensor.offset_, &handle)
              : aoti_torch_create_tensor_from_blob(
                    tensor.data_, tensor.dim(), sizes, strides, 0, code_of(tensor.dtype_),
                    code_of(tensor.device_.type), index_of(tensor.device_), &handle),
          "view memory");
    owner_ = owned(handle);
  }

  operator AtenTensorHandle() const { return owner_.get(); }

 private:
  std::shared_ptr<AtenTensorOpaque> owner_;
};

int64_t Shape::product() const {
  int64_t count = 1;
  for (const int64_t size : *this) {
    count *= size;
  }
  return count;
}

Shape Shape::contiguous_strides() const {
  Shape strides = *this;
  int64_t stride = 1;
  for (int64_t axis = dims - 1; axis >= 0; --axis) {
    strides[axis] = stride;
    stride *= std::max<int64_t>(values[axis], 1);
  }
  return strides;
}

std::ostream& operator<<(std::ostream& stream, const Shape& shape) {
  stream << '[';
  for (int64_t axis = 0; axis < shape.dims; ++axis) {
    stream << (axis == 0 ? "" : ", ") << shape[axis];
  }
  return stream << ']';
}

Tensor::Tensor(AtenTensorHandle handle) : owner_(owned(handle)) {
  int64_t *sizes = nullptr, *strides = nullptr;
  int32_t dtype = 0, type = 0, index = 0;
  check(aoti_torch_get_dim(handle, &sizes_.dims), "say a tensor's dimensions");
  check_value(sizes_.dims <= Shape::kMostDims, "a tensor has ", sizes_.dims,
              " dimensions, expected 1 to 4");
  strides_.dims = sizes_.dims;
  check(aoti_torch_get_sizes(handle, &sizes), "say a tensor's sizes");
  check(aoti_torch_get_strides(handle, &strides), "say a tensor's strides");
  std::copy_n(sizes, sizes_.dims, sizes_.values.begin());
  std::copy_n(strides, sizes_.dims, strides_.values.begin());
  check(aoti_torch_get_dtype(handle, &dtype), "say a tensor's dtype");
  check(aoti_torch_get_device_type(handle, &type), "say a tensor's device");
  check(aoti_torch_get_device_index(handle, &index), "say a tensor's device");
  check(aoti_torch_get_data_ptr(handle, &data_), "say where a tensor's data is");
  dtype_ = dtype_of(dtype);
  device_.type = device_type_of(type);
  if (device_.type == Device::Type::cuda) {
    device_.index = static_cast<int8_t>(index);
  }
}

bool Tensor::is_contiguous() const {
  int64_t expected = 1;
  for (int64_t axis = dim() - 1; axis >= 0; --axis) {
    if (size(axis) == 0) {
      return true;
    }
    if (size(axis) != 1 && stride(axis) != expected) {
      return false;
    }
    expected *= size(axis);
  }
  return true;
}

Tensor Tensor::narrow(int64_t axis, int64_t start, int64_t size) const {
  if (size == sizes_[axis]) {
    return *this;
  }
  Shape sizes = sizes_;
  sizes[axis] = size;
  Tensor part = as_strided(sizes, strides_);
  part.offset_ += start * strides_[axis];
  part.data_ = static_cast<char*>(data_) + start * strides_[axis] * element_size(dtype_);
  return part;
}

Tensor Tensor::t() const { return as_strided({sizes_[1], sizes_[0]}, {strides_[1], strides_[0]}); }

Tensor Tensor::as_strided(const Shape& sizes, const Shape& strides) const {
  Tensor view = *this;
  view.sizes_ = sizes;
  view.strides_ = strides;
  view.is_view_ = true;
  return view;
}

Tensor Tensor::contiguous() const { return is_contiguous() ? *this : to(dtype_, device_); }

Tensor Tensor::to(ScalarType dtype, Device device) const {
  const Tensor copy = empty(sizes_, dtype, device);
  copy.copy_(*this);
  return copy;
}

void Tensor::copy_(const Tensor& from) const {
  check(aoti_torch_copy_(Borrowed(*this), Borrowed(from), 0), "copy a tensor");
}

void Tensor::zero_() const { check(aoti_torch_zero_(Borrowed(*this)), "zero a tensor"); }

AtenTensorHandle Tensor::release() const {
  AtenTensorHandle handle = nullptr;
  check(aoti_torch_new_tensor_handle(owner_.get(), &handle), "refer to a tensor");
  return handle;
}

Tensor empty(const Shape& sizes, ScalarType dtype, Device device) {
  AtenTensorHandle handle = nullptr;
  const Shape strides = sizes.contiguous_strides();
  const AOTITorchError code =
      aoti_torch_empty_strided(sizes.dims, sizes.begin(), strides.begin(), code_of(dtype),
                               code_of(device.type), index_of(device), &handle);
  if (code != AOTI_TORCH_SUCCESS) {
    check_that(false, "no memory for ", sizes, " of ", dtype, " on ", device, ": ", last_error());
  }
  return Tensor(handle);
}

Tensor strided(void* data, const Shape& sizes, const Shape& strides, ScalarType dtype,
               Device device) {
  Tensor view;
  view.data_ = data;
  view.sizes_ = sizes;
  view.strides_ = strides;
  view.dtype_ = dtype;
  view.device_ = device;
  view.is_view_ = true;
  return view;
}

void multiply(const Tensor& out, const Tensor& a, const Tensor& b) {
  const auto mm = out.device().is_cpu() ? aoti_torch_cpu_mm_out : aoti_torch_cuda_mm_out;
  check(mm(Borrowed(out), Borrowed(a), Borrowed(b)), "multiply matrices");
}

void multiply(const Tensor& out, const Tensor& a, const Tensor& b, double beta, double scale) {
  const auto addmm = out.device().is_cpu() ? aoti_torch_cpu_addmm_out : aoti_torch_cuda_addmm_out;
  const Borrowed sum(out);
  check(addmm(sum, sum, Borrowed(a), Borrowed(b), beta, scale), "multiply matrices");
}

}  // namespace megalora
