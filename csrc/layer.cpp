#include "layer.h"

#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_vector_norm.h>

#include <vector>

namespace bcos {
namespace {

bool prefers_channels_last(const at::Tensor& t) {
  return t.is_contiguous(at::MemoryFormat::ChannelsLast) && !t.is_contiguous();
}

// `t` with the strides of its memory format, also along axes of size 1.
at::Tensor plain(const at::Tensor& t) {
  const int64_t c = t.size(1), h = t.size(2), w = t.size(3);
  if (!t.is_cpu() || t.strides().equals({c * h * w, h * w, w, 1}) || t.strides().equals({c * h * w, 1, w * c, c})) {
    return t;
  }
  for (const auto format : {at::MemoryFormat::Contiguous, at::MemoryFormat::ChannelsLast}) {
    if (t.is_contiguous(format)) return t.clone(format);
  }
  return t;
}

// A convolution with the same result that oneDNN does right.
struct Safe {
  at::Tensor x, weight;
  std::array<int64_t, 2> stride, padding;
  int64_t left = 0, right = 0;  // columns put beside x: of the padding that windows see, or less than none

  Safe(const at::Tensor& x_, const at::Tensor& weight_, at::IntArrayRef stride_, at::IntArrayRef padding_,
       at::IntArrayRef dilation)
      : x(plain(x_)),
        weight(plain(weight_)),
        stride{stride_[0], stride_[1]},
        padding{padding_[0], padding_[1]} {
    if (!x.is_cpu() || x.numel() == 0) return;
    const int64_t width = x.size(3), seen = dilation[1] * (weight.size(3) - 1) + 1;
    const int64_t columns = (width + 2 * padding[1] - seen) / stride[1] + 1;
    if (width <= padding[1] || width < stride[1] || (columns == 1 && stride[1] > 1)) {
      left = padding[1];
      right = (columns - 1) * stride[1] + seen - width - left;
      x = plain(at::constant_pad_nd(x, {left, right}));
      padding[1] = 0;
      if (columns == 1) stride[1] = 1;
    } else if (x.scalar_type() == at::kBFloat16 && weight.size(2) == 1 && weight.size(3) == 1 && stride[1] > 1 &&
               weight.size(1) <= 4) {
      x = x.contiguous();
      weight = weight.clone(at::MemoryFormat::Contiguous);
    }
  }
};

}  // namespace

at::MemoryFormat conv_format(const at::Tensor& x, const at::Tensor& weight) {
  return prefers_channels_last(x) || prefers_channels_last(weight) ? at::MemoryFormat::ChannelsLast
                                                                   : at::MemoryFormat::Contiguous;
}

Window conv_window(const at::Tensor& x, const at::Tensor& weight, at::IntArrayRef stride, at::IntArrayRef padding,
                   at::IntArrayRef dilation) {
  Window w;
  w.height = x.size(2);
  w.width = x.size(3);
  int64_t* size[2] = {&w.out_height, &w.out_width};
  for (int i = 0; i < 2; ++i) {
    w.kernel[i] = weight.size(2 + i);
    w.stride[i] = stride[i];
    w.padding[i] = padding[i];
    w.dilation[i] = dilation[i];
    *size[i] = (x.size(2 + i) + 2 * padding[i] - dilation[i] * (weight.size(2 + i) - 1) - 1) / stride[i] + 1;
  }
  return w;
}

at::Tensor convolution(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                       at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  const Safe s(x, weight, stride, padding, dilation);
  return at::convolution(s.x, s.weight, bias, s.stride, s.padding, dilation, false, {0, 0}, groups);
}

Three convolution_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight,
                           const std::optional<at::Tensor>& bias, at::IntArrayRef stride, at::IntArrayRef padding,
                           at::IntArrayRef dilation, int64_t groups, std::array<bool, 3> needs) {
  const Safe s(x, weight, stride, padding, dilation);
  const at::OptionalIntArrayRef bias_sizes = bias ? at::OptionalIntArrayRef(bias->sizes()) : std::nullopt;
  auto [dx, dweight, dbias] = at::convolution_backward(plain(grad), s.x, s.weight, bias_sizes, s.stride, s.padding,
                                                       dilation, false, {0, 0}, groups, needs);
  if (needs[0] && (s.left != 0 || s.right != 0)) dx = at::constant_pad_nd(dx, {-s.left, -s.right});
  return {dx, dweight, dbias};
}

// Squares of a row's entries over its largest one neither over- nor underflow.
at::Tensor row_lengths(const at::Tensor& weight) {
  const at::Tensor rows = weight.to(accumulator(weight.scalar_type())).flatten(1);
  if (rows.size(1) == 0) return rows.new_zeros({rows.size(0), 1});
  const at::Tensor largest = rows.abs().amax(at::IntArrayRef{1}, true);
  const at::Tensor divisor = largest.masked_fill(largest.le(0), 1);
  return at::linalg_vector_norm(rows.div(divisor), 2, at::IntArrayRef{1}, true).mul_(divisor);
}

at::Tensor unit_rows(const at::Tensor& weight, bool normalize) {
  if (!normalize) return weight;
  std::vector<int64_t> shape(weight.dim(), 1);
  shape[0] = weight.size(0);
  return weight.to(accumulator(weight.scalar_type())).div(row_lengths(weight).view(shape)).to(weight.scalar_type());
}

at::Tensor unit_rows_backward(const at::Tensor& dunit, const at::Tensor& weight, bool normalize) {
  if (!normalize) return dunit;
  const auto type = accumulator(weight.scalar_type());
  const at::Tensor rows = weight.to(type).flatten(1), drows = dunit.to(type).flatten(1);
  const at::Tensor length = row_lengths(weight), unit = rows.div(length);
  const at::Tensor along = drows.mul(unit).sum(at::IntArrayRef{1}, true);
  return drows.sub(unit.mul(along)).div(length).view(weight.sizes()).to(weight.scalar_type());
}

at::Tensor nothing(const at::Tensor& like) { return at::empty({0}, like.options()); }

at::Tensor nothing(const at::Tensor& like, at::ScalarType type) { return at::empty({0}, like.options().dtype(type)); }

}  // namespace bcos
