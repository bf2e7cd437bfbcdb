// B-cos linear layer on CUDA: the fused convolution on images of one pixel, or cuBLAS (through ATen) with passes.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linear.h>

#include <vector>

#include "device.h"
#include "fused_conv2d.h"
#include "layer.h"

namespace bcos::cuda {
namespace {

std::vector<int64_t> with_last(at::IntArrayRef sizes, int64_t last) {
  std::vector<int64_t> shape = sizes.vec();
  shape.back() = last;
  return shape;
}

int64_t count_rows(const at::Tensor& x) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) rows *= x.size(i);
  return rows;
}

// [rows, last], contiguous; works for no rows and no columns too.
at::Tensor as_rows(const at::Tensor& t, int64_t rows) {
  return t.numel() ? t.reshape({rows, t.size(-1)}).contiguous() : t.new_empty({rows, t.size(-1)});
}

Layout layout(int64_t rows, int64_t channels) { return {true, 1, rows, 1, channels}; }

Sizes sizes(int64_t rows, const at::Tensor& weight, int64_t max_out) {
  return {layout(rows, weight.size(0) / max_out), max_out, at::MemoryFormat::Contiguous, Root::kRow};
}

}  // namespace

Four linear(const at::Tensor& x_, const at::Tensor& weight, const std::optional<at::Tensor>& bias, double b,
            const std::optional<at::Tensor>& learned_b, int64_t form, int64_t max_out, bool normalize_weight,
            bool keep_linear, bool keep_winner) {
  const OnDevice device(x_);
  const Stream stream = device.stream();
  const Exponents e(x_, b, learned_b, form);
  const int64_t rows = count_rows(x_);
  const at::Tensor x = as_rows(x_, rows), flat_weight = weight.contiguous();
  const Sizes s = sizes(rows, weight, max_out);
  const std::vector<int64_t> shape = with_last(x_.sizes(), s.at.channels);
  const auto shaped = [&](const at::Tensor& t) { return t.dim() == 2 ? t.view(shape) : t; };
  at::Tensor norm = nothing(x, accumulator(x.scalar_type()));
  if (e.scaled()) norm = at::empty(with_last(x_.sizes(), 1), norm.options());
  if (rows * s.at.channels > 0 && fuses(x, flat_weight, e.form, max_out, x.size(1), x.size(1))) {
    const at::Tensor y = at::empty(shape, x.options()), linear = keep_linear ? at::empty_like(y) : nothing(x);
    const at::Tensor factor = gain(weight, normalize_weight), shift = bias ? bias->contiguous() : at::Tensor();
    AT_DISPATCH_REDUCED_FLOATING_TYPES(x.scalar_type(), "bcos_native: linear", [&] {
      implicit_conv2d(Conv2d<scalar_t>{{1, 1, 1, 1, {1, 1}, {1, 1}, {0, 0}, {1, 1}},
                                       rows,
                                       static_cast<int>(x.size(1)),
                                       static_cast<int>(s.at.channels),
                                       Root::kRow,
                                       e.power<float>(),
                                       in<scalar_t>(x),
                                       in<scalar_t>(flat_weight),
                                       in<float>(factor),
                                       in<scalar_t>(shift),
                                       out<scalar_t>(y),
                                       out<scalar_t>(linear),
                                       out<float>(norm)},
                      stream);
    });
    return {y, norm, linear, nothing(x, at::kByte)};
  }
  const at::Tensor u = at::linear(x, unit_rows(weight, normalize_weight), bias).contiguous();
  if (norm.numel() > 0) {
    BCOS_DISPATCH_CUDA(x.scalar_type(), "bcos_native: row_norm", [&] {
      square_sums(layout(rows, x.size(1)), in<scalar_t>(x), out<Acc<scalar_t>>(norm), Root::kRow, stream);
    });
  }
  const Scaled scaled = scale(s, e, u, norm, keep_linear, keep_winner, stream);
  return {shaped(scaled.y), norm, shaped(scaled.linear), shaped(scaled.winner)};
}

Four linear_backward(const at::Tensor& grad_, const at::Tensor& x_, const at::Tensor& weight,
                     const std::optional<at::Tensor>& bias, const at::Tensor& kept, const at::Tensor& norm,
                     const at::Tensor& winner, std::array<bool, 4> needs, double b,
                     const std::optional<at::Tensor>& learned_b, int64_t form, int64_t max_out, bool normalize_weight,
                     bool detach) {
  const OnDevice device(x_);
  const Stream stream = device.stream();
  const Exponents e(x_, b, learned_b, form);
  const int64_t rows = count_rows(x_);
  const at::Tensor x = as_rows(x_, rows), grad = as_rows(grad_, rows);
  const auto kept_rows = [&](const at::Tensor& t) { return t.numel() ? as_rows(t, rows) : t; };
  const Unscaled s = scale_backward(sizes(rows, weight, max_out), e, grad, kept_rows(kept), norm.contiguous(),
                                    kept_rows(winner), needs, detach, stream);
  at::Tensor dx = nothing(grad), dweight = nothing(grad), dbias = nothing(grad);
  if (needs[0]) dx = s.du.matmul(unit_rows(weight, normalize_weight)).contiguous();
  if (needs[1]) dweight = unit_rows_backward(s.du.t().matmul(x), weight, normalize_weight);
  if (needs[2] && bias) dbias = s.du.sum(at::IntArrayRef{0});
  if (s.pull.defined() && x.numel() > 0) {
    BCOS_DISPATCH_CUDA(x.scalar_type(), "bcos_native: add_pull", [&] {
      add_pull(layout(rows, x.size(1)), out<scalar_t>(dx), in<scalar_t>(x), in<Acc<scalar_t>>(s.pull), stream);
    });
  }
  if (needs[0]) dx = dx.view(x_.sizes());
  return {dx, dweight, dbias, s.db};
}

}  // namespace bcos::cuda
