// The operators on CUDA tensors.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>

#include <array>
#include <optional>

#include "../layer.h"
#include "elementwise.h"

// Runs the lambda with `scalar_t`.
#define BCOS_DISPATCH_CUDA(TYPE, NAME, ...) \
  AT_DISPATCH_FLOATING_TYPES_AND2(at::ScalarType::Half, at::ScalarType::BFloat16, TYPE, NAME, __VA_ARGS__)

namespace bcos::cuda {

// The contract of the operators: see bcos_kernels/contract.py. (y, norm, linear, winner)
Four conv2d(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias, double b,
            const std::optional<at::Tensor>& learned_b, int64_t form, at::IntArrayRef stride, at::IntArrayRef padding,
            at::IntArrayRef dilation, int64_t groups, int64_t max_out, bool normalize_weight, bool keep_linear,
            bool keep_winner, const std::optional<at::Tensor>& squares);
// (dx, dweight, dbias, db)
Four conv2d_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight,
                     const std::optional<at::Tensor>& bias, const at::Tensor& kept, const at::Tensor& norm,
                     const at::Tensor& winner, std::array<bool, 4> needs, double b,
                     const std::optional<at::Tensor>& learned_b, int64_t form, at::IntArrayRef stride,
                     at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, int64_t max_out,
                     bool normalize_weight, bool detach);
Four linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias, double b,
            const std::optional<at::Tensor>& learned_b, int64_t form, int64_t max_out, bool normalize_weight,
            bool keep_linear, bool keep_winner);
Four linear_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight,
                     const std::optional<at::Tensor>& bias, const at::Tensor& kept, const at::Tensor& norm,
                     const at::Tensor& winner, std::array<bool, 4> needs, double b,
                     const std::optional<at::Tensor>& learned_b, int64_t form, int64_t max_out, bool normalize_weight,
                     bool detach);

// (z, mean, batch_var, squares)
Four batch_norm(const at::Tensor& x, const std::optional<at::Tensor>& var, const std::optional<at::Tensor>& weight,
                const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& residual, double eps, bool relu,
                bool squares);
// (dx, dweight, dbias, dresidual)
Four batch_norm_backward(const at::Tensor& grad, const at::Tensor& x, const std::optional<at::Tensor>& z,
                         const at::Tensor& mean, const at::Tensor& var, const std::optional<at::Tensor>& weight,
                         const std::optional<at::Tensor>& bias, double eps, bool relu, bool detach_var,
                         std::array<bool, 4> needs);

// For tests and benchmarks: the fused convolution wherever it can run (true), nowhere (false), or as the table says.
void force_fused(std::optional<bool> fused);

// ---- shared by the convolution and the linear layer

// B, and the tensor on the device that `power` points to where it is learned.
struct Exponents {
  Form form;
  double b;
  at::Tensor learned;

  Exponents(const at::Tensor& x, double b, const std::optional<at::Tensor>& learned_b, int64_t form)
      : form(static_cast<Form>(form)), b(b) {
    if (learned_b) learned = learned_b->detach().to(x.options().dtype(accumulator(x.scalar_type())));
  }
  bool scaled() const { return form != Form::kLinear; }
  template <class A>
  Power<A> power() const {
    return {form, b, learned.defined() ? learned.const_data_ptr<A>() : nullptr};
  }
};

// What a layer's operator is told about its sizes: `at` is y's layout. Tensors of y's shape have their channels in
// dimension 1 and the memory format `format`.
struct Sizes {
  Layout at;
  int64_t max_out;
  at::MemoryFormat format;
  Root root;

  at::Tensor like_y(const at::Tensor& u, at::ScalarType type) const;
};

struct Scaled {
  at::Tensor y, linear, winner;
};
// What stands behind the linear part. `u` belongs to nobody else: it becomes y or linear where it can.
Scaled scale(const Sizes& sizes, const Exponents& e, const at::Tensor& u, const at::Tensor& norm, bool keep_linear,
             bool keep_winner, Stream stream);

struct Unscaled {
  at::Tensor du, pull, db;  // undefined, or of no elements, where not wanted
};
Unscaled scale_backward(const Sizes& sizes, const Exponents& e, const at::Tensor& grad, const at::Tensor& kept,
                        const at::Tensor& norm, const at::Tensor& winner, std::array<bool, 4> needs, bool detach,
                        Stream stream);

// Whether a sum over `depth` inputs is fused: no MaxOut, the dtype, sizes and addresses that the kernels need, and that
// it pays.
bool fuses(const at::Tensor& x, const at::Tensor& weight, Form form, int64_t max_out, int64_t channels, int64_t depth);
// 1 / ||w|| where wanted, for the fused kernels: unlike rounded w / ||w|| it costs no precision.
at::Tensor gain(const at::Tensor& weight, bool normalize);

template <class T>
const T* in(const at::Tensor& t) {
  return t.defined() && t.numel() ? t.const_data_ptr<T>() : nullptr;
}

template <class T>
T* out(const at::Tensor& t) {
  return t.defined() && t.numel() ? t.mutable_data_ptr<T>() : nullptr;
}

}  // namespace bcos::cuda
