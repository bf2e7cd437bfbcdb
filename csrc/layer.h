// What the operators share on every device, around their linear part: ATen alone.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

#include "window.h"

namespace bcos {

using Four = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

inline at::ScalarType accumulator(at::ScalarType type) { return type == at::kDouble ? at::kDouble : at::kFloat; }

// Channels-last as soon as one of the two prefers it: PyTorch's own rule.
at::MemoryFormat conv_format(const at::Tensor& x, const at::Tensor& weight);
Window conv_window(const at::Tensor& x, const at::Tensor& weight, at::IntArrayRef stride, at::IntArrayRef padding,
                   at::IntArrayRef dilation);

// ||w|| of each row, in the accumulator's type.
at::Tensor row_lengths(const at::Tensor& weight);
// w / ||w|| per row where wanted, else w.
at::Tensor unit_rows(const at::Tensor& weight, bool normalize);
// The gradient of that: what is orthogonal to the unit row, divided by its length.
at::Tensor unit_rows_backward(const at::Tensor& dunit, const at::Tensor& weight, bool normalize);

at::Tensor nothing(const at::Tensor& like);
at::Tensor nothing(const at::Tensor& like, at::ScalarType type);

}  // namespace bcos
