#include "layer.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_vector_norm.h>

#include <vector>

namespace bcos {
namespace {

bool prefers_channels_last(const at::Tensor& t) {
  return t.is_contiguous(at::MemoryFormat::ChannelsLast) && !t.is_contiguous();
}

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

at::Tensor row_lengths(const at::Tensor& weight) {
  return at::linalg_vector_norm(weight.to(accumulator(weight.scalar_type())).flatten(1), 2, at::IntArrayRef{1}, true);
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
