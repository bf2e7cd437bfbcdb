// Uncentered batch norm on CUDA: statistics in one pass, application in one; backward one reduction, one application.
#include "batch_norm.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include "device.h"
#include "layer.h"

namespace bcos::cuda {
namespace {

struct Shape {
  at::MemoryFormat format;
  Layout at;
  at::TensorOptions channels;  // of arrays with one number a channel
  at::TensorOptions parts;

  explicit Shape(const at::Tensor& x)
      : format(conv_format(x, x)),
        channels(x.options().dtype(accumulator(x.scalar_type()))),
        parts(x.options().dtype(at::kDouble)) {
    const int64_t pixels = x.size(2) * x.size(3);
    at = {format == at::MemoryFormat::ChannelsLast || pixels == 1, x.size(0), pixels, 1, x.size(1)};
  }

  int64_t count() const { return at.images * at.pixels; }
  bool empty() const { return count() * at.channels == 0; }
  at::Tensor new_parts() const { return at::empty({2, channel_slices(at), at.channels}, parts); }
  at::Tensor by_channel(const std::optional<at::Tensor>& t) const {
    return t ? t->detach().to(channels).contiguous() : at::Tensor();
  }
};

// 1 / deviation, and what x is multiplied by.
struct Gains {
  at::Tensor inverse, gain;

  Gains(const Shape& s, const at::Tensor& var, const std::optional<at::Tensor>& weight, double eps)
      : inverse(s.by_channel(var).add(eps).rsqrt()), gain(weight ? inverse.mul(s.by_channel(weight)) : inverse) {}
};

}  // namespace

Four batch_norm(const at::Tensor& x_, const std::optional<at::Tensor>& var, const std::optional<at::Tensor>& weight,
                const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& residual_, double eps,
                bool relu, bool wants_squares) {
  const OnDevice device(x_);
  const Stream stream = device.stream();
  const Shape s(x_);
  const at::Tensor x = x_.contiguous(s.format), residual = residual_ ? residual_->contiguous(s.format) : at::Tensor();
  const at::Tensor z = at::empty(x.sizes(), x.options().memory_format(s.format));
  at::Tensor mean = at::empty({0}, s.channels), batch_var = at::empty({0}, s.channels);
  at::Tensor squares = at::empty({0}, s.channels);
  if (!var) {
    // An empty batch has variance 0, so that its gradients are 0 rather than NaN.
    mean = at::zeros({s.at.channels}, s.channels);
    batch_var = at::zeros({s.at.channels}, s.channels);
  }
  if (wants_squares) squares = at::empty({x.size(0), 1, x.size(2), x.size(3)}, s.channels);
  if (s.empty()) return {z, mean, batch_var, wants_squares ? squares.zero_() : squares};
  BCOS_DISPATCH_CUDA(x.scalar_type(), "bcos_native: batch_norm", [&] {
    using A = Acc<scalar_t>;
    if (!var) {
      // Deviations from a pixel of the channel: sums of squares would lose the variance where the mean is large.
      const at::Tensor pivot = x.select(0, 0).select(1, 0).select(1, 0).to(s.channels).contiguous();
      const at::Tensor parts = s.new_parts();
      moments(s.at, in<scalar_t>(x), in<A>(pivot), out<double>(parts), stream);
      const at::Tensor sums = parts.sum(at::IntArrayRef{1}).div_(static_cast<double>(s.count()));
      mean = sums.select(0, 0).add(pivot).to(s.channels);
      batch_var = sums.select(0, 1).sub(sums.select(0, 0).square()).clamp_min_(0).to(s.channels);
    }
    const Gains gains(s, var ? *var : batch_var, weight, eps);
    const at::Tensor shift = s.by_channel(bias);
    affine<scalar_t, A>(s.at,
                        {in<scalar_t>(x), in<A>(gains.gain), in<A>(shift), in<scalar_t>(residual), relu,
                         out<scalar_t>(z), out<A>(squares)},
                        stream);
  });
  return {z, mean, batch_var, squares};
}

Four batch_norm_backward(const at::Tensor& grad_, const at::Tensor& x_, const std::optional<at::Tensor>& z_,
                         const at::Tensor& mean, const at::Tensor& var, const std::optional<at::Tensor>& weight,
                         const std::optional<at::Tensor>& bias, double eps, bool relu, bool detach_var,
                         std::array<bool, 4> needs) {
  const OnDevice device(x_);
  const Stream stream = device.stream();
  const Shape s(x_);
  const at::Tensor x = x_.contiguous(s.format), z = z_ ? z_->contiguous(s.format) : at::Tensor();
  at::Tensor grad = grad_.contiguous(s.format);
  at::Tensor dx = nothing(grad), dweight = nothing(grad), dbias = nothing(grad), dresidual = nothing(grad);
  const bool needs_x = needs[0], needs_weight = needs[1] && weight.has_value(), needs_bias = needs[2];
  const bool needs_residual = needs[3], through_var = needs_x && mean.numel() > 0 && !detach_var;
  const auto options = x.options().memory_format(s.format);
  if (needs_x) dx = at::empty(x.sizes(), options);
  if (needs_residual) dresidual = at::empty(x.sizes(), options);
  at::Tensor sums = at::zeros({2, s.at.channels}, s.parts);
  const Gains gains(s, var, weight, eps);
  const at::Tensor shift = s.by_channel(bias);
  BCOS_DISPATCH_CUDA(x.scalar_type(), "bcos_native: batch_norm_backward", [&] {
    using A = Acc<scalar_t>;
    Passed<scalar_t, A> passed{relu, in<scalar_t>(z), in<A>(gains.gain), in<A>(shift)};
    if (!s.empty() && (needs_weight || needs_bias || needs_residual || through_var)) {
      const at::Tensor parts = s.new_parts();
      dots(s.at, in<scalar_t>(grad), in<scalar_t>(x), passed, needs_residual ? out<scalar_t>(dresidual) : nullptr,
           out<double>(parts), stream);
      sums = parts.sum(at::IntArrayRef{1});
    }
    const at::Tensor dot = sums.select(0, 1);
    if (needs_weight) dweight = dot.mul(gains.inverse).to(weight->scalar_type());
    if (needs_bias) dbias = sums.select(0, 0).to(s.channels);
    if (!needs_x || s.empty()) return;
    at::Tensor centre, pull;
    if (through_var) {
      // dL/dvar = -dot * gain * inverse^2 / 2, and dvar/dx = 2 (x - mean) / count
      centre = s.by_channel(mean);
      pull = dot.mul(gains.gain).mul_(gains.inverse.square()).div_(-static_cast<double>(s.count())).to(s.channels);
    }
    if (needs_residual) {
      // What the ReLU let through was written by the pass above.
      grad = dresidual;
      passed = {};
    }
    affine_backward<scalar_t, A>(s.at,
                                 {in<scalar_t>(grad), in<scalar_t>(x), passed, in<A>(gains.gain), in<A>(centre),
                                  in<A>(pull), out<scalar_t>(dx)},
                                 stream);
  });
  return {dx, dweight, dbias, dresidual};
}

}  // namespace bcos::cuda
