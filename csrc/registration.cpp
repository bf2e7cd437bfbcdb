// The schemas of the compiled operations. `bcos::` belongs to bcos_kernels/ops.py, which differentiates and dispatches;
// these are what bcos_kernels/native.py calls. No Python here: any Python with the same torch can load the library.
#include <torch/library.h>

#include "cpu/layer.h"
#include "cpu/pointwise.h"
#include "cpu/tile.h"

TORCH_LIBRARY(bcos_native, m) {
  m.def(
      "conv2d(Tensor x, Tensor weight, Tensor? bias, float b, int form, int[] stride, int[] padding, int[] dilation,"
      " int groups, int max_out, bool normalize_weight, bool keep_linear, bool keep_winner)"
      " -> (Tensor y, Tensor norm, Tensor linear, Tensor winner)");
  m.def(
      "conv2d_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor kept, Tensor norm, Tensor winner,"
      " bool[4] needs, float b, int form, int[] stride, int[] padding, int[] dilation, int groups, int max_out,"
      " bool normalize_weight, bool detach) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor db)");
  m.def(
      "linear(Tensor x, Tensor weight, Tensor? bias, float b, int form, int max_out, bool normalize_weight,"
      " bool keep_linear, bool keep_winner) -> (Tensor y, Tensor norm, Tensor linear, Tensor winner)");
  m.def(
      "linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor kept, Tensor norm, Tensor winner,"
      " bool[4] needs, float b, int form, int max_out, bool normalize_weight, bool detach)"
      " -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor db)");
  m.def(
      "batch_norm(Tensor x, Tensor? var, Tensor? weight, Tensor? bias, float eps)"
      " -> (Tensor z, Tensor mean, Tensor batch_var)");
  m.def(
      "batch_norm_backward(Tensor grad, Tensor x, Tensor mean, Tensor var, Tensor? weight, float eps, bool batch_stats,"
      " bool detach_var, bool needs_x, bool needs_weight, bool needs_bias)"
      " -> (Tensor dx, Tensor dweight, Tensor dbias)");
  m.def("has_avx512() -> bool", &bcos::cpu::has_avx512);
  m.def("fuses_pointwise() -> bool", &bcos::cpu::pointwise_available);
}

TORCH_LIBRARY_IMPL(bcos_native, CPU, m) {
  m.impl("conv2d", &bcos::cpu::conv2d);
  m.impl("conv2d_backward", &bcos::cpu::conv2d_backward);
  m.impl("linear", &bcos::cpu::linear);
  m.impl("linear_backward", &bcos::cpu::linear_backward);
  m.impl("batch_norm", &bcos::cpu::batch_norm);
  m.impl("batch_norm_backward", &bcos::cpu::batch_norm_backward);
}
