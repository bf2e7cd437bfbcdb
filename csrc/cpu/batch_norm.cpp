// Uncentered batch norm, with what may follow it (a residual, ReLU): statistics in one pass, application in one;
// backward likewise, one reduction and one application.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include <cmath>
#include <vector>

#include "layer.h"
#include "passes.h"
#include "types.h"

namespace bcos::cpu {
namespace {

bool is_channels_last(const at::Tensor& x) {
  return x.is_contiguous(at::MemoryFormat::ChannelsLast) && !x.is_contiguous();
}

struct Shape {
  at::MemoryFormat format;
  bool by_row;
  int64_t images, channels, pixels;

  explicit Shape(const at::Tensor& x)
      : format(is_channels_last(x) ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous),
        by_row(is_channels_last(x) || x.size(2) * x.size(3) == 1),
        images(x.size(0)),
        channels(x.size(1)),
        pixels(x.size(2) * x.size(3)) {}

  bool empty() const { return images * channels * pixels == 0; }

  // Calls f(slot, offset, rows, cols, first channel) in parallel. Channels-last: blocks of all pixels; contiguous:
  // planes, those of one image and some channels at a time. Slots are the same for the same number of threads.
  template <class F>
  void for_tiles(int64_t slots, const F& f) const {
    if (empty()) return;
    const int64_t items = by_row ? images * pixels : images;
    slots = std::min(slots, std::max<int64_t>(1, images * pixels * channels / 32768));
    at::parallel_for(0, slots, 1, [&](int64_t begin, int64_t end) {
      for (int64_t slot = begin; slot < end; ++slot) {
        if (by_row) {
          const int64_t first = items * slot / slots, last = items * (slot + 1) / slots;
          if (first < last) f(slot, first * channels, last - first, channels, int64_t{0});
        } else {
          const int64_t first = channels * slot / slots, last = channels * (slot + 1) / slots;
          for (int64_t n = 0; first < last && n < images; ++n) {
            f(slot, (n * channels + first) * pixels, last - first, pixels, first);
          }
        }
      }
    });
  }
  int64_t ld() const { return by_row ? channels : pixels; }
};

template <class A>
std::vector<A> values(const std::optional<at::Tensor>& t) {
  if (!t) return {};
  const at::Tensor wide = t->to(c10::CppTypeToScalarType<A>::value).contiguous();
  return std::vector<A>(wide.const_data_ptr<A>(), wide.const_data_ptr<A>() + wide.numel());
}

template <class T>
void statistics(const Shape& s, const T* x, Acc<T>* mean, Acc<T>* var) {
  const int64_t slots = thread_slots(), C = s.channels;
  std::vector<double> means(slots * C, 0.0), m2s(slots * C, 0.0), counts(slots, 0.0);
  s.for_tiles(slots, [&](int64_t slot, int64_t offset, int64_t rows, int64_t cols, int64_t first) {
    tiles<T>().moments(s.by_row, x + offset, s.ld(), rows, cols, counts[slot], &means[slot * C + first],
                       &m2s[slot * C + first]);
    counts[slot] += static_cast<double>(s.by_row ? rows : cols);
  });
  const double total = static_cast<double>(s.images * s.pixels);
  for (int64_t c = 0; c < C; ++c) {
    double m = 0, m2 = 0, count = 0;
    for (int64_t slot = 0; slot < slots; ++slot) {
      // Contiguous: a channel has all its pixels in one slot, and the others know nothing of it.
      const bool own = s.by_row ? counts[slot] > 0 : m2s[slot * C + c] != 0 || means[slot * C + c] != 0;
      if (!own) continue;
      const double delta = means[slot * C + c] - m, sum = count + counts[slot];
      m += delta * counts[slot] / sum;
      m2 += m2s[slot * C + c] + delta * delta * count * counts[slot] / sum;
      count = sum;
    }
    mean[c] = static_cast<Acc<T>>(m);
    var[c] = static_cast<Acc<T>>(m2 / total);
  }
}

template <class A>
std::vector<A> inverse_deviations(const std::vector<A>& var, double eps) {
  std::vector<A> r(var.size());
  for (size_t c = 0; c < var.size(); ++c) r[c] = A(1) / std::sqrt(var[c] + static_cast<A>(eps));
  return r;
}

template <class T>
const T* in(const at::Tensor& t) {
  return t.numel() ? t.const_data_ptr<T>() : nullptr;
}

template <class T>
T* out(const at::Tensor& t) {
  return t.numel() ? t.mutable_data_ptr<T>() : nullptr;
}

template <class A>
void scale_by(std::vector<A>& a, const std::vector<A>& b) {
  for (size_t c = 0; c < b.size(); ++c) a[c] *= b[c];
}

}  // namespace

Four batch_norm(const at::Tensor& x_, const std::optional<at::Tensor>& var, const std::optional<at::Tensor>& weight,
                const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& residual_, double eps,
                bool relu, bool wants_squares) {
  const Shape s(x_);
  const at::Tensor x = x_.contiguous(s.format), residual = residual_ ? residual_->contiguous(s.format) : at::Tensor();
  const auto options = x.options().dtype(accumulator(x.scalar_type()));
  const int64_t stats = var ? 0 : s.channels;
  const at::Tensor z = at::empty(x.sizes(), x.options().memory_format(s.format));
  // An empty batch has variance 0, so that its gradients are 0 rather than NaN.
  const at::Tensor mean = at::zeros({stats}, options), batch_var = at::zeros({stats}, options);
  at::Tensor squares = nothing(x, accumulator(x.scalar_type()));
  if (wants_squares) squares = at::empty({x.size(0), 1, x.size(2), x.size(3)}, options);
  BCOS_DISPATCH(x.scalar_type(), "bcos_native: batch_norm", [&] {
    using A = Acc<scalar_t>;
    if (!var && !s.empty()) statistics<scalar_t>(s, in<scalar_t>(x), out<A>(mean), out<A>(batch_var));
    std::vector<A> gain = inverse_deviations(values<A>(var ? var : batch_var), eps);
    scale_by(gain, values<A>(weight));
    const std::vector<A> shift = values<A>(bias);
    const scalar_t *px = in<scalar_t>(x), *more = residual.defined() ? in<scalar_t>(residual) : nullptr;
    scalar_t* pz = out<scalar_t>(z);
    A* sums = wants_squares ? out<A>(squares) : nullptr;
    s.for_tiles(thread_slots(), [&](int64_t, int64_t offset, int64_t rows, int64_t cols, int64_t first) {
      tiles<scalar_t>().affine(s.by_row, px + offset, more ? more + offset : nullptr, pz + offset, s.ld(), rows, cols,
                               gain.data() + first, shift.empty() ? nullptr : shift.data() + first, relu,
                               sums && s.by_row ? sums + offset / s.channels : nullptr);
    });
    // A plane holds one channel of many pixels: their sums are another pass.
    if (sums && !s.by_row) square_sums<scalar_t>({false, s.images, s.pixels, 1}, s.channels, pz, sums);
  });
  return {z, mean, batch_var, squares};
}

Four batch_norm_backward(const at::Tensor& grad_, const at::Tensor& x_, const std::optional<at::Tensor>& z_,
                         const at::Tensor& mean, const at::Tensor& var, const std::optional<at::Tensor>& weight,
                         const std::optional<at::Tensor>& bias, double eps, bool relu, bool detach_var,
                         std::array<bool, 4> needs) {
  const Shape s(x_);
  const at::Tensor x = x_.contiguous(s.format), grad = grad_.contiguous(s.format);
  const at::Tensor z = z_ ? z_->contiguous(s.format) : at::Tensor();
  at::Tensor dx = nothing(grad), dweight = nothing(grad), dbias = nothing(grad), dresidual = nothing(grad);
  const bool needs_x = needs[0], needs_weight = needs[1] && weight.has_value(), needs_bias = needs[2];
  const bool needs_residual = needs[3], through_var = needs_x && mean.numel() > 0 && !detach_var;
  const auto options = x.options().memory_format(s.format);
  if (needs_x) dx = at::empty(x.sizes(), options);
  if (needs_residual) dresidual = at::empty(x.sizes(), options);
  BCOS_DISPATCH(x.scalar_type(), "bcos_native: batch_norm_backward", [&] {
    using A = Acc<scalar_t>;
    const scalar_t *g = in<scalar_t>(grad), *px = in<scalar_t>(x);
    const scalar_t* pz = z.defined() ? in<scalar_t>(z) : nullptr;
    const int64_t C = s.channels, slots = thread_slots();
    const std::vector<A> inv_std = inverse_deviations(values<A>(var), eps), shift = values<A>(bias);
    std::vector<A> gain = inv_std;
    scale_by(gain, values<A>(weight));
    const auto passed = [&](int64_t offset, int64_t first) {
      return Passed<scalar_t>{relu, pz ? pz + offset : nullptr, gain.data() + first,
                              shift.empty() ? nullptr : shift.data() + first};
    };
    std::vector<double> sums(C, 0.0), dots(C, 0.0);
    if (needs_weight || needs_bias || needs_residual || through_var) {
      scalar_t* masked = needs_residual ? out<scalar_t>(dresidual) : nullptr;
      std::vector<double> part_sums(slots * C, 0.0), part_dots(slots * C, 0.0);
      s.for_tiles(slots, [&](int64_t slot, int64_t offset, int64_t rows, int64_t cols, int64_t first) {
        tiles<scalar_t>().dot(s.by_row, g + offset, px + offset, masked ? masked + offset : nullptr, s.ld(), rows, cols,
                              passed(offset, first), &part_sums[slot * C + first], &part_dots[slot * C + first]);
      });
      for (int64_t i = 0; i < slots * C; ++i) {
        sums[i % C] += part_sums[i];
        dots[i % C] += part_dots[i];
      }
    }
    const auto vector_of = [&](const auto& value, const at::Tensor& like) {
      const at::Tensor t = at::empty({C}, like.options().dtype(c10::CppTypeToScalarType<A>::value));
      for (int64_t c = 0; c < C; ++c) t.mutable_data_ptr<A>()[c] = static_cast<A>(value(c));
      return t;
    };
    if (needs_weight) {
      dweight = vector_of([&](int64_t c) { return dots[c] * inv_std[c]; }, x).to(weight->scalar_type());
    }
    if (needs_bias) dbias = vector_of([&](int64_t c) { return sums[c]; }, x);
    if (!needs_x) return;
    std::vector<A> centre, pull;
    if (through_var) {
      // dL/dvar = -dot * gain * inv_std^2 / 2, and dvar/dx = 2 (x - mean) / count
      centre = values<A>(mean);
      pull.resize(C);
      const double count = static_cast<double>(s.images * s.pixels);
      for (int64_t c = 0; c < C; ++c) {
        pull[c] = static_cast<A>(-dots[c] * gain[c] * inv_std[c] * inv_std[c] / count);
      }
    }
    scalar_t* d = out<scalar_t>(dx);
    // The residual's gradient is what the ReLU let through: the first pass wrote it, this one need not mask again.
    if (needs_residual) g = in<scalar_t>(dresidual);
    s.for_tiles(slots, [&](int64_t, int64_t offset, int64_t rows, int64_t cols, int64_t first) {
      const auto of = [&](const std::vector<A>& v) { return v.empty() ? nullptr : v.data() + first; };
      tiles<scalar_t>().affine_backward(s.by_row, g + offset, px + offset, d + offset, s.ld(), rows, cols,
                                        needs_residual ? Passed<scalar_t>{} : passed(offset, first), of(gain),
                                        of(centre), of(pull));
    });
  });
  return {dx, dweight, dbias, dresidual};
}

}  // namespace bcos::cpu
