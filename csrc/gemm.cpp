#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include "gemm.h"

namespace megalora::gemm {
namespace {

using at::Tensor;

Tensor matrix(const Factor& f, void* data, int64_t rows, int64_t columns, int64_t row_stride,
              int64_t column_stride) {
  const auto options = at::TensorOptions().dtype(f.dtype).device(f.device);
  return at::from_blob(data, {rows, columns}, {row_stride, column_stride}, nullptr, options,
                       f.device);
}

Tensor wide(const Factor& f) { return matrix(f, f.wide, f.tokens, f.columns, f.wide_stride, 1); }
Tensor thin(const Factor& f) {
  return matrix(f, f.thin, f.tokens, f.num_segments * f.rank, f.thin_stride, 1);
}
Tensor weight(const Factor& f) {
  return matrix(f, f.weight, f.columns, f.rank, f.column_stride, f.rank_stride);
}

// The whole itself where the part is all of it: a view takes the host time.
Tensor part(const Tensor& whole, int64_t axis, int64_t start, int64_t size) {
  return size == whole.size(axis) ? whole : whole.narrow(axis, start, size);
}

// body(columns [start, start + size), first rank column, whether no earlier block has this
// projection)
template <class Body>
void for_each_block(const Factor& f, Body body) {
  for (int64_t start = 0; start < f.columns;) {
    const bool first_period = start < f.period;
    for (int64_t p = 0; p < f.num_segments; start += f.segment[p++]) {
      body(start, f.segment[p], p * f.rank, first_period);
    }
  }
}

// a · b of scale, written (beta 0) or added (beta 1) to out.
// NOTE: cuBLAS may add its splits of the sum in the 16-bit dtype, as in all GEMMs of torch;
// torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction forbids it. It is left as the
// user set it, because it is one switch for all threads.
void multiply(Tensor out, const Tensor& a, const Tensor& b, double beta, double scale) {
  at::addmm_out(out, out, a, b, beta, scale);
}

// wide = beta * wide + scale * thin · Wᵀ.
void add_to_wide(const Factor& f, double beta) {
  const Tensor y = wide(f), s = thin(f), w = weight(f);
  for_each_block(f, [&](int64_t start, int64_t size, int64_t rank_start, bool) {
    multiply(part(y, 1, start, size), part(s, 1, rank_start, f.rank),
             part(w, 0, start, size).t(), beta, f.scale);
  });
}

}  // namespace

void project(const Factor& f) {
  const Tensor x = wide(f), s = thin(f), w = weight(f);
  for_each_block(f, [&](int64_t start, int64_t size, int64_t rank_start, bool first) {
    multiply(part(s, 1, rank_start, f.rank), part(x, 1, start, size), part(w, 0, start, size),
             first ? 0 : 1, f.scale);
  });
}

void update(const Factor& f) { add_to_wide(f, 1); }

void write(const Factor& f) { add_to_wide(f, 0); }

void outer(const Factor& f) {
  const Tensor x = wide(f), s = thin(f), d_w = weight(f);
  for_each_block(f, [&](int64_t start, int64_t size, int64_t rank_start, bool) {
    const Tensor x_block = part(x, 1, start, size), s_block = part(s, 1, rank_start, f.rank);
    if (!f.device.is_cpu()) {
      multiply(part(d_w, 0, start, size), x_block.t(), s_block, f.accumulates ? 1 : 0, f.scale);
      return;
    }
    // thinᵀ wide, then a transposing copy: up to five times as fast in MKL as wideᵀ thin.
    const Tensor product = at::empty({f.rank, size}, x.options());
    multiply(product, s_block.t(), x_block, 0, f.scale);
    Tensor block = part(d_w, 0, start, size);
    f.accumulates ? block.add_(product.t()) : block.copy_(product.t());
  });
}

}  // namespace megalora::gemm
