// The schemas of the compiled operations. `bcos::` belongs to bcos_kernels/ops.py, which differentiates and dispatches;
// these are what bcos_kernels/native.py calls. No Python here: any Python with the same torch can load the library.
#include <torch/library.h>

#include "cpu/layer.h"
#include "cpu/pointwise.h"
#include "cpu/tile.h"

#if defined(BCOS_WITH_CUDA)
#include "cuda/layer.h"
#endif

TORCH_LIBRARY(bcos_native, m) {
  m.def(
      "conv2d(Tensor x, Tensor weight, Tensor? bias, float b, Tensor? learned_b, int form, int[] stride, int[] padding,"
      " int[] dilation, int groups, int max_out, bool normalize_weight, bool keep_linear, bool keep_winner,"
      " Tensor? squares) -> (Tensor y, Tensor norm, Tensor linear, Tensor winner)");
  m.def(
      "conv2d_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor kept, Tensor norm, Tensor winner,"
      " bool[4] needs, float b, Tensor? learned_b, int form, int[] stride, int[] padding, int[] dilation, int groups,"
      " int max_out, bool normalize_weight, bool detach) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor db)");
  m.def(
      "linear(Tensor x, Tensor weight, Tensor? bias, float b, Tensor? learned_b, int form, int max_out,"
      " bool normalize_weight, bool keep_linear, bool keep_winner)"
      " -> (Tensor y, Tensor norm, Tensor linear, Tensor winner)");
  m.def(
      "linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor kept, Tensor norm, Tensor winner,"
      " bool[4] needs, float b, Tensor? learned_b, int form, int max_out, bool normalize_weight, bool detach)"
      " -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor db)");
  m.def(
      "batch_norm(Tensor x, Tensor? var, Tensor? weight, Tensor? bias, Tensor? residual, float eps, bool relu,"
      " bool squares) -> (Tensor z, Tensor mean, Tensor batch_var, Tensor squares)");
  m.def(
      "batch_norm_backward(Tensor grad, Tensor x, Tensor? z, Tensor mean, Tensor var, Tensor? weight, Tensor? bias,"
      " float eps, bool relu, bool detach_var, bool[4] needs)"
      " -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)");
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

#if defined(BCOS_WITH_CUDA)
TORCH_LIBRARY_FRAGMENT(bcos_native, m) { m.def("force_fused(bool? fused) -> ()", &bcos::cuda::force_fused); }

TORCH_LIBRARY_IMPL(bcos_native, CUDA, m) {
  m.impl("conv2d", &bcos::cuda::conv2d);
  m.impl("conv2d_backward", &bcos::cuda::conv2d_backward);
  m.impl("linear", &bcos::cuda::linear);
  m.impl("linear_backward", &bcos::cuda::linear_backward);
  m.impl("batch_norm", &bcos::cuda::batch_norm);
  m.impl("batch_norm_backward", &bcos::cuda::batch_norm_backward);
}
#endif
