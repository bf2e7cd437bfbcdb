// What the convolution and the linear layer share around their linear part.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>

#include "../bcos_math.h"
#include "../layer.h"

namespace bcos::cpu {

inline Exponent exponent(double b, const std::optional<at::Tensor>& learned_b, int64_t form) {
  return {static_cast<Form>(form), learned_b ? learned_b->item<double>() : b};
}

// Memory for a tensor that is gone when the operation returns. Large blocks that are freed may go back to the operating
// system and come back page by page (docs/performance.md), so a thread keeps one, of at most 16 MiB.
at::Tensor scratch(at::IntArrayRef sizes, const at::TensorOptions& options, at::MemoryFormat format);

// dB as a tensor of one element, or nothing.
at::Tensor scalar_or_nothing(const at::Tensor& like, bool wanted, double value);

// The contract of the operators: see bcos_kernels/contract.py. `form` is a Form; (y, norm, linear, winner).
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

}  // namespace bcos::cpu
