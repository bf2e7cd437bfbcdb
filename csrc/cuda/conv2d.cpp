// B-cos convolution on CUDA: one fused kernel, or cuDNN's convolution (through ATen) with passes around it.
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "device.h"
#include "fused_conv2d.h"
#include "layer.h"

namespace bcos::cuda {
namespace {

// Shapes and formats that forward and backward share.
struct Geometry {
  Window window;
  Layout of_x, of_y;
  Sizes sizes;

  Geometry(const at::Tensor& x, const at::Tensor& weight, at::IntArrayRef stride, at::IntArrayRef padding,
           at::IntArrayRef dilation, int64_t groups, int64_t max_out)
      : window(conv_window(x, weight, stride, padding, dilation)) {
    const at::MemoryFormat format = conv_format(x, weight);
    const int64_t in_pixels = window.height * window.width, out_pixels = window.out_height * window.out_width;
    // One pixel an image: both formats are the same, and rows of channels are the faster view.
    const bool by_row = format == at::MemoryFormat::ChannelsLast || (in_pixels == 1 && out_pixels == 1);
    of_x = {by_row, x.size(0), in_pixels, groups, x.size(1)};
    of_y = {by_row, x.size(0), out_pixels, groups, weight.size(0) / max_out};
    sizes = {of_y, max_out, format, Root::kPatch};
  }

  int64_t maps() const { return of_y.images * of_y.groups; }
  at::Tensor new_norm(const at::Tensor& x) const {
    return at::empty({of_y.images, of_y.groups, window.out_height, window.out_width},
                     x.options().dtype(accumulator(x.scalar_type())));
  }

  bool fuses(const at::Tensor& x, const at::Tensor& w, Form form) const {
    constexpr int64_t most = 1 << 28;  // a coordinate and its padding are 32-bit numbers in the kernels
    const bool small = window.height < most && window.width < most && window.padding[0] < most &&
                       window.padding[1] < most && of_x.channels < most && of_y.channels < most;
    // The weights are rows of (tap, channel), which for one tap they are in both formats.
    const bool rows = sizes.format == at::MemoryFormat::ChannelsLast || (of_x.by_row && window.is_pixel());
    return small && rows && of_x.groups == 1 && of_y.map_size() > 0 && x.numel() > 0 && of_y.channels > 0 &&
           cuda::fuses(x, w, form, sizes.max_out, of_x.channels,
                       of_x.channels * window.kernel[0] * window.kernel[1]);
  }
  bool fits_halo() const {
    const Window& w = window;
    return w.kernel[0] == 3 && w.kernel[1] == 3 && w.stride[0] == 1 && w.stride[1] == 1 && w.dilation[0] == 1 &&
           w.dilation[1] == 1 && (of_x.channels == 64 || of_x.channels == 128);
  }
};

// `known`: the squares of x, summed by pixel, where somebody has them.
at::Tensor patch_norm(const Geometry& g, const at::Tensor& x, const std::optional<at::Tensor>& known, Stream stream) {
  const at::Tensor norm = g.new_norm(x);
  if (norm.numel() == 0) return norm;
  BCOS_DISPATCH_CUDA(x.scalar_type(), "bcos_native: patch_norm", [&] {
    using A = Acc<scalar_t>;
    if (g.window.is_pixel() && !known) {
      square_sums(g.of_x, in<scalar_t>(x), out<A>(norm), Root::kPatch, stream);
    } else {
      const at::Tensor squares = known ? known->contiguous() : at::empty({g.of_x.map_size()}, norm.options());
      if (!known) square_sums(g.of_x, in<scalar_t>(x), out<A>(squares), Root::kNone, stream);
      window_root(g.window, g.maps(), in<A>(squares), out<A>(norm), stream);
    }
  });
  return norm;
}

// dx += x * the windows' pull
void add_pull(const Geometry& g, const at::Tensor& dx, const at::Tensor& x, const at::Tensor& pull, Stream stream) {
  if (x.numel() == 0 || pull.numel() == 0) return;
  BCOS_DISPATCH_CUDA(x.scalar_type(), "bcos_native: add_pull", [&] {
    using A = Acc<scalar_t>;
    at::Tensor spread = pull;
    if (!g.window.is_pixel()) {
      spread = at::empty({g.of_x.map_size()}, pull.options());
      window_spread(g.window, g.maps(), in<A>(pull), out<A>(spread), stream);
    }
    add_pull(g.of_x, out<scalar_t>(dx), in<scalar_t>(x), in<A>(spread), stream);
  });
}

}  // namespace

Four conv2d(const at::Tensor& x_, const at::Tensor& weight, const std::optional<at::Tensor>& bias, double b,
            const std::optional<at::Tensor>& learned_b, int64_t form, at::IntArrayRef stride, at::IntArrayRef padding,
            at::IntArrayRef dilation, int64_t groups, int64_t max_out, bool normalize_weight, bool keep_linear,
            bool keep_winner, const std::optional<at::Tensor>& squares) {
  const OnDevice device(x_);
  const Stream stream = device.stream();
  const Exponents e(x_, b, learned_b, form);
  const Geometry g(x_, weight, stride, padding, dilation, groups, max_out);
  const at::Tensor x = x_.contiguous(g.sizes.format);
  const at::Tensor fused_weight = weight.contiguous(g.sizes.format);
  if (g.fuses(x, fused_weight, e.form)) {
    const at::Tensor y = at::empty({x.size(0), g.of_y.channels, g.window.out_height, g.window.out_width},
                                   x.options().memory_format(g.sizes.format));
    const at::Tensor linear = keep_linear ? at::empty_like(y) : nothing(x), norm = g.new_norm(x);
    const at::Tensor factor = gain(weight, normalize_weight), shift = bias ? bias->contiguous() : at::Tensor();
    AT_DISPATCH_REDUCED_FLOATING_TYPES(x.scalar_type(), "bcos_native: conv2d", [&] {
      const Conv2d<scalar_t> a{g.window,
                               x.size(0),
                               static_cast<int>(g.of_x.channels),
                               static_cast<int>(g.of_y.channels),
                               Root::kPatch,
                               e.power<float>(),
                               in<scalar_t>(x),
                               in<scalar_t>(fused_weight),
                               in<float>(factor),
                               in<scalar_t>(shift),
                               out<scalar_t>(y),
                               out<scalar_t>(linear),
                               out<float>(norm)};
      g.fits_halo() ? halo_conv2d(a, stream) : implicit_conv2d(a, stream);
    });
    return {y, norm, linear, nothing(x, at::kByte)};
  }
  const at::Tensor w = unit_rows(weight, normalize_weight);
  const at::Tensor u =
      at::convolution(x, w, bias, stride, padding, dilation, false, {0, 0}, groups).contiguous(g.sizes.format);
  const at::Tensor norm = e.scaled() ? patch_norm(g, x, squares, stream) : nothing(x, accumulator(x.scalar_type()));
  const Scaled s = scale(g.sizes, e, u, norm, keep_linear, keep_winner, stream);
  return {s.y, norm, s.linear, s.winner};
}

Four conv2d_backward(const at::Tensor& grad, const at::Tensor& x_, const at::Tensor& weight,
                     const std::optional<at::Tensor>& bias, const at::Tensor& kept, const at::Tensor& norm,
                     const at::Tensor& winner, std::array<bool, 4> needs, double b,
                     const std::optional<at::Tensor>& learned_b, int64_t form, at::IntArrayRef stride,
                     at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, int64_t max_out,
                     bool normalize_weight, bool detach) {
  const OnDevice device(x_);
  const Stream stream = device.stream();
  const Exponents e(x_, b, learned_b, form);
  const Geometry g(x_, weight, stride, padding, dilation, groups, max_out);
  const auto in_format = [&](const at::Tensor& t) { return t.dim() == 4 ? t.contiguous(g.sizes.format) : t; };
  const at::Tensor x = in_format(x_), w = unit_rows(weight, normalize_weight);
  const Unscaled s = scale_backward(g.sizes, e, in_format(grad), in_format(kept), norm.contiguous(), in_format(winner),
                                    needs, detach, stream);
  at::Tensor dx = nothing(grad), dweight = nothing(grad), dbias = nothing(grad);
  if (needs[0] || needs[1] || needs[2]) {
    const at::OptionalIntArrayRef bias_sizes = bias ? at::OptionalIntArrayRef(bias->sizes()) : std::nullopt;
    const auto grads = at::convolution_backward(s.du, x, w, bias_sizes, stride, padding, dilation, false, {0, 0},
                                                groups, {needs[0], needs[1], needs[2]});
    if (needs[0]) dx = std::get<0>(grads).contiguous(g.sizes.format);
    if (needs[1]) dweight = unit_rows_backward(std::get<1>(grads), weight, normalize_weight);
    if (needs[2]) dbias = std::get<2>(grads);
  }
  if (s.pull.defined()) add_pull(g, dx, x, s.pull, stream);
  return {dx, dweight, dbias, s.db};
}

}  // namespace bcos::cuda
