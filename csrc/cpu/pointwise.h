// The fused layer: 1x1 convolutions on channels-last float32 and linear layers, as a matrix product over blocks of
// pixels.
//
// A block's product is scaled while it is in the cache, and backward neither stores the gradient of the linear output
// nor reads x a second time. The product is oneDNN's batch-reduce kernel through ATen (`cpublas::brgemm`), which needs
// AVX-512.
#pragma once

#include <ATen/core/Tensor.h>

#include "tile.h"

namespace bcos::cpu {

// Whether this machine and this torch have the matrix product.
bool pointwise_available();

// Rows of x that are read: all, or those of a strided 1x1 convolution over images of height x width.
struct RowMap {
  int64_t height, width, out_height, out_width, stride_h, stride_w;

  bool identity() const { return stride_h == 1 && stride_w == 1; }
  int64_t operator()(int64_t row) const {
    const int64_t wo = row % out_width, rest = row / out_width;
    return (rest / out_height * height + rest % out_height * stride_h) * width + wo * stride_w;
  }
};

struct Pointwise {
  RowMap map;
  int64_t rows, in, out;  // rows of y; C; O
  bool patch_norm;        // sqrt(sum + 1e-6) of the convolution, or sqrt(sum) + 1e-12 of the linear layer
  Exponent exponent;
  const float* x;
  const float* weight;  // [O, C]
  const float* bias;    // or null

  // norm [rows], y [rows, O]; linear [rows, O] where it is kept, else null.
  void forward(float* norm, float* y, float* linear) const;

  struct Wanted {
    float* dx;  // null where not wanted; zeros where `map` leaves rows out
    float* dweight;
    float* dbias;
    double* db;
  };
  void backward(const float* grad, const float* kept, const float* norm, bool detach, const Wanted& wanted) const;

  // Every thread sums its own gradient of the weight; above this it would cost memory that the plain layer does not.
  bool backward_fits() const;
};

}  // namespace bcos::cpu
