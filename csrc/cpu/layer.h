// What the convolution and the linear layer share around their linear part.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "../bcos_math.h"

namespace bcos::cpu {

using Four = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

inline at::ScalarType accumulator(at::ScalarType type) { return type == at::kDouble ? at::kDouble : at::kFloat; }

inline Exponent exponent(double b, int64_t form) { return {static_cast<Form>(form), b}; }

// w / ||w|| per row where wanted, else w.
at::Tensor unit_rows(const at::Tensor& weight, bool normalize);
// The gradient of that: what is orthogonal to the unit row, divided by its length.
at::Tensor unit_rows_backward(const at::Tensor& dunit, const at::Tensor& weight, bool normalize);

at::Tensor nothing(const at::Tensor& like);
at::Tensor nothing(const at::Tensor& like, at::ScalarType type);
// dB as a tensor of one element, or nothing.
at::Tensor scalar_or_nothing(const at::Tensor& like, bool wanted, double value);

// The contract of the operators: see bcos_kernels/contract.py. `form` is a Form; (y, norm, linear, winner).
Four conv2d(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias, double b,
            int64_t form, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
            int64_t max_out, bool normalize_weight, bool keep_linear, bool keep_winner);
// (dx, dweight, dbias, db)
Four conv2d_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight,
                     const std::optional<at::Tensor>& bias, const at::Tensor& kept, const at::Tensor& norm,
                     const at::Tensor& winner, std::array<bool, 4> needs, double b, int64_t form,
                     at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                     int64_t max_out, bool normalize_weight, bool detach);
Four linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias, double b,
            int64_t form, int64_t max_out, bool normalize_weight, bool keep_linear, bool keep_winner);
Four linear_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight,
                     const std::optional<at::Tensor>& bias, const at::Tensor& kept, const at::Tensor& norm,
                     const at::Tensor& winner, std::array<bool, 4> needs, double b, int64_t form, int64_t max_out,
                     bool normalize_weight, bool detach);

std::tuple<at::Tensor, at::Tensor, at::Tensor> batch_norm(const at::Tensor& x, const std::optional<at::Tensor>& var,
                                                          const std::optional<at::Tensor>& weight,
                                                          const std::optional<at::Tensor>& bias, double eps);
std::tuple<at::Tensor, at::Tensor, at::Tensor> batch_norm_backward(const at::Tensor& grad, const at::Tensor& x,
                                                                   const at::Tensor& mean, const at::Tensor& var,
                                                                   const std::optional<at::Tensor>& weight, double eps,
                                                                   bool batch_stats, bool detach_var, bool needs_x,
                                                                   bool needs_weight, bool needs_bias);

}  // namespace bcos::cpu
