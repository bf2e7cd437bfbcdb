// What the operators share on every device, around their linear part: ATen alone.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

#include "window.h"

namespace bcos {

using Three = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using Four = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

inline at::ScalarType accumulator(at::ScalarType type) { return type == at::kDouble ? at::kDouble : at::kFloat; }

// Channels-last as soon as one of the two prefers it: PyTorch's own rule.
at::MemoryFormat conv_format(const at::Tensor& x, const at::Tensor& weight);
Window conv_window(const at::Tensor& x, const at::Tensor& weight, at::IntArrayRef stride, at::IntArrayRef padding,
                   at::IntArrayRef dilation);

// at::convolution and its derivative, around what they do wrong on a CPU: see bcos_kernels/convolution.py, which does the
// same for the backends in Python.
at::Tensor convolution(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                       at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups);
Three convolution_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight,
                           const std::optional<at::Tensor>& bias, at::IntArrayRef stride, at::IntArrayRef padding,
                           at::IntArrayRef dilation, int64_t groups, std::array<bool, 3> needs);

// ||w|| of each row, in the accumulator's type, however long or short.
at::Tensor row_lengths(const at::Tensor& weight);
// w / ||w|| per row where wanted, else w.
at::Tensor unit_rows(const at::Tensor& weight, bool normalize);
// The gradient of that: what is orthogonal to the unit row, divided by its length.
at::Tensor unit_rows_backward(const at::Tensor& dunit, const at::Tensor& weight, bool normalize);

at::Tensor nothing(const at::Tensor& like);
at::Tensor nothing(const at::Tensor& like, at::ScalarType type);

}  // namespace bcos
