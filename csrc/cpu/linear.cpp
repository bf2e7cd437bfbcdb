// B-cos linear layer: one row a pixel, the norm is the row's own length.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linear.h>

#include "layer.h"
#include "passes.h"
#include "pointwise.h"
#include "types.h"

namespace bcos::cpu {
namespace {

std::vector<int64_t> with_last(at::IntArrayRef sizes, int64_t last) {
  std::vector<int64_t> shape = sizes.vec();
  shape.back() = last;
  return shape;
}

// [rows, last], contiguous; works for no rows and no columns too.
at::Tensor as_rows(const at::Tensor& t, int64_t rows) { return t.reshape({rows, t.size(-1)}).contiguous(); }

struct Sizes {
  int64_t rows, in, out, max_out;

  Sizes(const at::Tensor& x, const at::Tensor& weight, int64_t max_out)
      : rows(1), in(x.size(-1)), out(weight.size(0) / max_out), max_out(max_out) {
    for (int64_t i = 0; i + 1 < x.dim(); ++i) rows *= x.size(i);
  }

  Layout layout() const { return {true, 1, rows, 1}; }
  bool fuses(const at::Tensor& x, Form form) const {
    return form != Form::kLinear && x.scalar_type() == at::kFloat && max_out == 1 && rows * in > 0 &&
           pointwise_available();
  }
  Pointwise pointwise(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, Exponent e) const {
    return {{1, 1, 1, 1, 1, 1},
            rows,
            in,
            out,
            false,
            e,
            x.const_data_ptr<float>(),
            weight.const_data_ptr<float>(),
            bias.defined() ? bias.const_data_ptr<float>() : nullptr};
  }
};

template <class T>
void row_norms(const Sizes& s, const at::Tensor& x, at::Tensor& norm) {
  using A = Acc<T>;
  if (s.rows == 0) return;
  if (s.in == 0) {
    norm.zero_();
  } else {
    square_sums<T>(s.layout(), s.in, x.const_data_ptr<T>(), norm.mutable_data_ptr<A>());
  }
  norm.sqrt_().add_(kRowNormEps);
}

// dx += x * (dL/dn) / ||x||, from pixel_sum = dL/dn.
template <class T>
void pull_norm(const Sizes& s, const at::Tensor& x, at::Tensor& pixel_sum, const at::Tensor& norm, at::Tensor& dx) {
  using A = Acc<T>;
  if (x.numel() == 0) return;
  A* q = pixel_sum.mutable_data_ptr<A>();
  const A* n = norm.const_data_ptr<A>();
  for (int64_t r = 0; r < s.rows; ++r) q[r] = pull_of(Root::kRow, q[r], n[r]);
  add_scaled<T>(s.layout(), s.in, dx.mutable_data_ptr<T>(), x.const_data_ptr<T>(), q);
}

}  // namespace

Four linear(const at::Tensor& x_, const at::Tensor& weight, const std::optional<at::Tensor>& bias, double b,
            const std::optional<at::Tensor>& learned_b, int64_t form, int64_t max_out, bool normalize_weight,
            bool keep_linear, bool keep_winner) {
  const Exponent e = exponent(b, learned_b, form);
  const Sizes s(x_, weight, max_out);
  const at::Tensor x = as_rows(x_, s.rows);
  const at::Tensor w = unit_rows(weight, normalize_weight).contiguous();
  const auto acc = accumulator(x.scalar_type());
  const std::vector<int64_t> shape = with_last(x_.sizes(), s.out);
  at::Tensor norm = nothing(x, acc), linear = nothing(x), winner = nothing(x, at::kByte);
  if (e.form != Form::kLinear) norm = at::empty(with_last(x_.sizes(), 1), x.options().dtype(acc));
  if (s.fuses(x, e.form)) {
    const at::Tensor y = at::empty(shape, x.options());
    if (keep_linear) linear = at::empty(shape, x.options());
    const at::Tensor shift = bias ? bias->contiguous() : at::Tensor();
    s.pointwise(x, w, shift, e)
        .forward(norm.mutable_data_ptr<float>(), y.mutable_data_ptr<float>(),
                 keep_linear ? linear.mutable_data_ptr<float>() : nullptr);
    return {y, norm, linear, winner};
  }
  const at::Tensor u = at::linear(x, w, bias).contiguous();
  if (e.form != Form::kLinear) {
    BCOS_DISPATCH(x.scalar_type(), "bcos_native: row_norm", [&] { row_norms<scalar_t>(s, x, norm); });
  } else if (max_out == 1) {
    return {u.view(shape), norm, linear, winner};
  }
  if (keep_winner) winner = at::empty(shape, x.options().dtype(at::kByte));
  if (keep_linear) linear = max_out == 1 ? u.view(shape) : at::empty(shape, x.options());
  const at::Tensor y = max_out == 1 && !keep_linear ? u.view(shape) : at::empty(shape, x.options());
  ScaleForward{s.layout(), s.out, max_out, e, u, norm, y, linear, winner}.run();
  return {y, norm, linear, winner};
}

Four linear_backward(const at::Tensor& grad_, const at::Tensor& x_, const at::Tensor& weight,
                     const std::optional<at::Tensor>& bias, const at::Tensor& kept_, const at::Tensor& norm_,
                     const at::Tensor& winner_, std::array<bool, 4> needs, double b,
                     const std::optional<at::Tensor>& learned_b, int64_t form, int64_t max_out, bool normalize_weight,
                     bool detach) {
  const Exponent e = exponent(b, learned_b, form);
  const Sizes s(x_, weight, max_out);
  const bool scaled = e.form != Form::kLinear;
  const at::Tensor x = as_rows(x_, s.rows), grad = as_rows(grad_, s.rows);
  const at::Tensor w = unit_rows(weight, normalize_weight).contiguous();
  const at::Tensor kept = scaled ? as_rows(kept_, s.rows) : at::Tensor();
  const at::Tensor norm = norm_.contiguous();
  const at::Tensor winner = max_out > 1 ? as_rows(winner_, s.rows) : at::Tensor();
  at::Tensor dx = nothing(grad), dweight = nothing(grad), dbias = nothing(grad);
  const bool needs_bias = needs[2] && bias.has_value();
  double db = 0;

  if (s.fuses(x, e.form)) {
    const Pointwise p = s.pointwise(x, w, at::Tensor(), e);
    if (p.backward_fits()) {
      if (needs[0]) dx = at::empty(x_.sizes(), x.options());
      if (needs[1]) dweight = at::empty(w.sizes(), w.options());
      if (needs_bias) dbias = at::empty({s.out}, w.options());
      const auto data = [](const at::Tensor& t, bool wanted) { return wanted ? t.mutable_data_ptr<float>() : nullptr; };
      p.backward(grad.const_data_ptr<float>(), kept.const_data_ptr<float>(), norm.const_data_ptr<float>(), detach,
                 {data(dx, needs[0]), data(dweight, needs[1]), data(dbias, needs_bias), needs[3] ? &db : nullptr});
      if (needs[1]) dweight = unit_rows_backward(dweight, weight, normalize_weight);
      return {dx, dweight, dbias, scalar_or_nothing(x, needs[3], db)};
    }
  }

  at::Tensor du = grad, pixel_sum;
  if (scaled || max_out > 1) {
    du = scratch({s.rows, s.out * max_out}, x.options(), at::MemoryFormat::Contiguous);
    if (scaled && needs[0] && !detach) pixel_sum = at::empty({s.rows}, norm.options());
    db = ScaleBackward{s.layout(), s.out, max_out, e, detach, needs[3], grad, kept, norm, winner, du, pixel_sum}.run();
  }
  if (needs[0]) dx = du.matmul(w);
  if (needs[1]) dweight = unit_rows_backward(du.t().matmul(x), weight, normalize_weight);
  if (needs_bias) dbias = du.sum(at::IntArrayRef{0});
  if (pixel_sum.defined()) {
    BCOS_DISPATCH(x.scalar_type(), "bcos_native: pull_norm", [&] { pull_norm<scalar_t>(s, x, pixel_sum, norm, dx); });
  }
  if (needs[0]) dx = dx.view(x_.sizes());
  return {dx, dweight, dbias, scalar_or_nothing(x, needs[3], db)};
}

}  // namespace bcos::cpu
