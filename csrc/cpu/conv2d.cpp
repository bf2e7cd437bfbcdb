// B-cos convolution: ATen's convolution, the patch norm from one pass over x, the scale in one pass over the output.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>

#include "layer.h"
#include "passes.h"
#include "pointwise.h"
#include "types.h"
#include "window.h"

namespace bcos::cpu {
namespace {

// Shapes and formats that forward and backward share.
struct Geometry {
  Window window;
  at::MemoryFormat format;
  bool by_row;
  int64_t images, in, out, groups, max_out;

  Geometry(const at::Tensor& x, const at::Tensor& weight, at::IntArrayRef stride, at::IntArrayRef padding,
           at::IntArrayRef dilation, int64_t groups, int64_t max_out)
      : window(conv_window(x, weight, stride, padding, dilation)),
        format(conv_format(x, weight)),
        images(x.size(0)),
        in(x.size(1)),
        out(weight.size(0) / max_out),
        groups(groups),
        max_out(max_out) {
    // One pixel an image: both formats are the same, and rows of channels are the faster view.
    by_row = format == at::MemoryFormat::ChannelsLast || (pixels() == 1 && window.height * window.width == 1);
  }

  int64_t pixels() const { return window.out_height * window.out_width; }
  Layout of_x() const { return {by_row, images, window.height * window.width, groups}; }
  Layout of_y() const { return {by_row, images, pixels(), groups}; }

  at::Tensor make_y(const at::Tensor& x, at::ScalarType type) const {
    return at::empty({images, out, window.out_height, window.out_width}, x.options().dtype(type).memory_format(format));
  }

  bool fuses(const at::Tensor& x, Form form) const {
    return form != Form::kLinear && x.scalar_type() == at::kFloat && by_row && groups == 1 && max_out == 1 &&
           window.kernel[0] == 1 && window.kernel[1] == 1 && window.padding[0] == 0 && window.padding[1] == 0 &&
           images * pixels() * in > 0 && pointwise_available();
  }

  Pointwise pointwise(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, Exponent e) const {
    return {{window.height, window.width, window.out_height, window.out_width, window.stride[0], window.stride[1]},
            images * pixels(),
            in,
            out,
            true,
            e,
            x.const_data_ptr<float>(),
            weight.const_data_ptr<float>(),
            bias.defined() ? bias.const_data_ptr<float>() : nullptr};
  }
};

// Of the images [first, first + count). `squares` is a map like x's, or `norm` itself where the window is the pixel;
// it is filled here unless it is known.
template <class T>
void patch_norms(const Geometry& g, const at::Tensor& x, const at::Tensor& squares, bool known, const at::Tensor& norm,
                 int64_t first, int64_t count) {
  using A = Acc<T>;
  if (norm.numel() == 0) return;
  Layout layout = g.of_x();
  layout.images = count;
  const int64_t map = first * g.groups * layout.pixels;
  if (!known) {
    const T* data = x.numel() ? x.const_data_ptr<T>() + first * g.in * layout.pixels : nullptr;
    square_sums<T>(layout, g.in, data, squares.mutable_data_ptr<A>() + map);
  }
  const A* s = squares.const_data_ptr<A>() + map;
  patch_norm<A>(g.window, count * g.groups, s, norm.mutable_data_ptr<A>() + first * g.groups * g.pixels());
}

// dx += x * the windows' pull; spends `pixel_sum`.
template <class T>
void pull_norm(const Geometry& g, const at::Tensor& x, at::Tensor& pixel_sum, const at::Tensor& norm, at::Tensor& dx) {
  using A = Acc<T>;
  if (x.numel() == 0 || norm.numel() == 0) return;
  const at::Tensor s = at::empty({g.of_x().norms()}, norm.options());
  A *spread_to = s.mutable_data_ptr<A>(), *sums = pixel_sum.mutable_data_ptr<A>();
  const A* n = norm.const_data_ptr<A>();
  const T* data = x.const_data_ptr<T>();
  T* d = dx.mutable_data_ptr<T>();
  for_images(g.images, [&](int64_t first, int64_t count) {
    Layout layout = g.of_x();
    layout.images = count;
    const int64_t map = first * g.groups * layout.pixels, out_map = first * g.groups * g.pixels();
    const int64_t at = first * g.in * layout.pixels;
    spread<A>(g.window, count * g.groups, sums + out_map, n + out_map, spread_to + map);
    add_scaled<T>(layout, g.in, d + at, data + at, spread_to + map);
  });
}

}  // namespace

Four conv2d(const at::Tensor& x_, const at::Tensor& weight, const std::optional<at::Tensor>& bias, double b,
            const std::optional<at::Tensor>& learned_b, int64_t form, at::IntArrayRef stride, at::IntArrayRef padding,
            at::IntArrayRef dilation, int64_t groups, int64_t max_out, bool normalize_weight, bool keep_linear,
            bool keep_winner, const std::optional<at::Tensor>& known) {
  const Exponent e = exponent(b, learned_b, form);
  const Geometry g(x_, weight, stride, padding, dilation, groups, max_out);
  const at::Tensor x = x_.contiguous(g.format);
  const at::Tensor w = unit_rows(weight, normalize_weight);
  const auto acc = accumulator(x.scalar_type());
  at::Tensor norm = nothing(x, acc), linear = nothing(x), winner = nothing(x, at::kByte);
  if (e.form != Form::kLinear) {
    norm = at::empty({g.images, groups, g.window.out_height, g.window.out_width}, x.options().dtype(acc));
  }
  if (g.fuses(x, e.form)) {
    at::Tensor y = g.make_y(x, x.scalar_type());
    if (keep_linear) linear = g.make_y(x, x.scalar_type());
    const at::Tensor flat = w.contiguous(), shift = bias ? bias->contiguous() : at::Tensor();
    g.pointwise(x, flat, shift, e)
        .forward(norm.mutable_data_ptr<float>(), y.mutable_data_ptr<float>(),
                 keep_linear ? linear.mutable_data_ptr<float>() : nullptr);
    return {y, norm, linear, winner};
  }
  const at::Tensor u = convolution(x, w, bias, stride, padding, dilation, groups).contiguous(g.format);
  if (e.form == Form::kLinear && max_out == 1) return {u, norm, linear, winner};
  if (keep_winner) winner = g.make_y(x, at::kByte);
  if (keep_linear) linear = max_out == 1 ? u : g.make_y(x, x.scalar_type());
  const at::Tensor y = max_out == 1 && !keep_linear ? u : g.make_y(x, x.scalar_type());
  at::Tensor squares = known ? known->contiguous() : norm;
  if (e.form != Form::kLinear && !g.window.is_pixel() && !known) {
    squares = at::empty({g.of_x().norms()}, norm.options());
  }
  for_images(g.images, [&](int64_t first, int64_t count) {
    if (e.form != Form::kLinear) {
      BCOS_DISPATCH(x.scalar_type(), "bcos_native: patch_norm",
                    [&] { patch_norms<scalar_t>(g, x, squares, known.has_value(), norm, first, count); });
    }
    Layout part = g.of_y();
    part.images = count;
    ScaleForward{part, g.out, max_out, e, u, norm, y, linear, winner, first}.run();
  });
  return {y, norm, linear, winner};
}

Four conv2d_backward(const at::Tensor& grad_, const at::Tensor& x_, const at::Tensor& weight,
                     const std::optional<at::Tensor>& bias, const at::Tensor& kept_, const at::Tensor& norm_,
                     const at::Tensor& winner_, std::array<bool, 4> needs, double b,
                     const std::optional<at::Tensor>& learned_b, int64_t form, at::IntArrayRef stride,
                     at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, int64_t max_out,
                     bool normalize_weight, bool detach) {
  const Exponent e = exponent(b, learned_b, form);
  const Geometry g(x_, weight, stride, padding, dilation, groups, max_out);
  const bool scaled = e.form != Form::kLinear;
  const at::Tensor x = x_.contiguous(g.format), grad = grad_.contiguous(g.format);
  const at::Tensor w = unit_rows(weight, normalize_weight);
  const at::Tensor kept = scaled ? kept_.contiguous(g.format) : at::Tensor();
  const at::Tensor norm = norm_.contiguous();
  const at::Tensor winner = max_out > 1 ? winner_.contiguous(g.format) : at::Tensor();
  at::Tensor dx = nothing(grad), dweight = nothing(grad), dbias = nothing(grad);

  if (g.fuses(x, e.form)) {
    const at::Tensor flat = w.contiguous();
    const Pointwise p = g.pointwise(x, flat, at::Tensor(), e);
    if (p.backward_fits()) {
      if (needs[0]) {
        dx = p.map.identity() ? at::empty(x.sizes(), x.options().memory_format(g.format)) : at::zeros_like(x);
      }
      if (needs[1]) dweight = at::empty(w.sizes(), w.options());
      if (needs[2]) dbias = at::empty({g.out}, w.options());
      double db = 0;
      const auto data = [](const at::Tensor& t, bool wanted) { return wanted ? t.mutable_data_ptr<float>() : nullptr; };
      p.backward(grad.const_data_ptr<float>(), kept.const_data_ptr<float>(), norm.const_data_ptr<float>(), detach,
                 {data(dx, needs[0]), data(dweight, needs[1]), data(dbias, needs[2]), needs[3] ? &db : nullptr});
      if (needs[1]) dweight = unit_rows_backward(dweight, weight, normalize_weight);
      return {dx, dweight, dbias, scalar_or_nothing(x, needs[3], db)};
    }
  }

  at::Tensor du = grad, pixel_sum;
  double db = 0;
  if (scaled || max_out > 1) {
    du = scratch({g.images, g.out * max_out, g.window.out_height, g.window.out_width}, x.options(), g.format);
    if (scaled && needs[0] && !detach) pixel_sum = at::empty_like(norm);
    db = ScaleBackward{g.of_y(), g.out, max_out, e, detach, needs[3], grad, kept, norm, winner, du, pixel_sum}.run();
  }
  const auto differentiate = [&](bool by_x, bool by_weight, bool by_bias) {
    return convolution_backward(du, x, w, bias, stride, padding, dilation, groups, {by_x, by_weight, by_bias});
  };
  // dx first, and finished: it is still in the cache when x is added to it, and x when dweight is computed.
  if (needs[0]) dx = std::get<0>(differentiate(true, false, false)).contiguous(g.format);
  if (pixel_sum.defined()) {
    BCOS_DISPATCH(x.scalar_type(), "bcos_native: pull_norm", [&] { pull_norm<scalar_t>(g, x, pixel_sum, norm, dx); });
  }
  if (needs[1] || needs[2]) {
    const auto grads = differentiate(false, needs[1], needs[2]);
    if (needs[1]) dweight = unit_rows_backward(std::get<1>(grads), weight, normalize_weight);
    if (needs[2]) dbias = std::get<2>(grads);
  }
  return {dx, dweight, dbias, scalar_or_nothing(x, needs[3], db)};
}

}  // namespace bcos::cpu
