#pragma once

#ifndef TORCH_TARGET_VERSION
#error "setup.py says by TORCH_TARGET_VERSION which torch is the oldest that the library loads in"
#endif

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <ostream>
#include <vector>

#include "device.h"

// Tensors by torch's stable ABI, so that one library loads in every torch since the oldest. What an
// op reads of a tensor is asked for once, and views are made without torch.
namespace megalora {

using torch::headeronly::ScalarType;

// Sizes or strides.
struct Shape {
  static constexpr int64_t kMostDims = 8;

  std::array<int64_t, kMostDims> values{};
  int64_t dims = 0;

  Shape() = default;
  Shape(std::initializer_list<int64_t> given) {
    for (const int64_t value : given) {
      values[dims++] = value;
    }
  }

  const int64_t* begin() const { return values.data(); }
  const int64_t* end() const { return begin() + dims; }
  // axis: counted from the end where it is negative.
  int64_t& operator[](int64_t axis) { return values[axis < 0 ? axis + dims : axis]; }
  int64_t operator[](int64_t axis) const { return values[axis < 0 ? axis + dims : axis]; }
  bool operator==(const Shape&) const = default;

  int64_t product() const;
  // The strides of a contiguous tensor of these sizes.
  Shape contiguous_strides() const;
};

std::ostream& operator<<(std::ostream& stream, const Shape& shape);

class Tensor {
 public:
  Tensor() = default;
  // Takes what torch hands over.
  explicit Tensor(AtenTensorHandle handle);

  bool defined() const { return data_ != nullptr || owner_ != nullptr; }
  int64_t dim() const { return sizes_.dims; }
  int64_t size(int64_t axis) const { return sizes_[axis]; }
  int64_t stride(int64_t axis) const { return strides_[axis]; }
  const Shape& sizes() const { return sizes_; }
  int64_t numel() const { return sizes_.product(); }
  ScalarType dtype() const { return dtype_; }
  Device device() const { return device_; }
  void* data() const { return data_; }
  template <class T>
  T* data() const {
    return static_cast<T*>(data_);
  }
  bool is_contiguous() const;

  // Views.
  Tensor narrow(int64_t axis, int64_t start, int64_t size) const;
  Tensor t() const;  // of a matrix
  Tensor as_strided(const Shape& sizes, const Shape& strides) const;

  // Itself where it is contiguous, else a copy.
  Tensor contiguous() const;
  // A copy of another dtype or on another device.
  Tensor to(ScalarType dtype, Device device) const;
  void copy_(const Tensor& from) const;
  void zero_() const;

  // A reference of its own to the tensor that torch knows, which must not be a view of this class.
  AtenTensorHandle release() const;

 private:
  friend class Borrowed;
  friend Tensor strided(void*, const Shape&, const Shape&, ScalarType, Device);

  std::shared_ptr<AtenTensorOpaque> owner_;
  void* data_ = nullptr;
  int64_t offset_ = 0;  // of a view's first element from its owner's
  Shape sizes_, strides_;
  ScalarType dtype_ = ScalarType::Undefined;
  Device device_;
  bool is_view_ = false;
};

using OptionalTensor = std::optional<Tensor>;
using Segments = std::vector<int64_t>;

Tensor empty(const Shape& sizes, ScalarType dtype, Device device);
inline Tensor empty(const Shape& sizes, const Tensor& like) {
  return empty(sizes, like.dtype(), like.device());
}
// A view of memory that somebody else keeps.
Tensor strided(void* data, const Shape& sizes, const Shape& strides, ScalarType dtype,
               Device device);

// NOTE: cuBLAS may add its splits of the sum in the 16-bit dtype, as in all GEMMs of torch;
// torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction forbids it. It is left as the
// user set it, because it is one switch for all threads.
// out = a · b
void multiply(const Tensor& out, const Tensor& a, const Tensor& b);
// out = beta * out + scale * a · b
void multiply(const Tensor& out, const Tensor& a, const Tensor& b, double beta, double scale);

}  // namespace megalora

// How the arguments and results of ops cross the ABI.
namespace torch::stable::detail {

template <>
struct ToImpl<megalora::Tensor> {
  static megalora::Tensor call(StableIValue value, uint64_t, bool) {
    return megalora::Tensor(torch::stable::detail::to<AtenTensorHandle>(value));
  }
};

template <>
struct FromImpl<megalora::Tensor> {
  static StableIValue call(const megalora::Tensor& tensor, uint64_t, bool) {
    return torch::stable::detail::from(tensor.release());
  }
};

}  // namespace torch::stable::detail
