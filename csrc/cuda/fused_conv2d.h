// The fused convolution forward on the tensor cores: bfloat16 and float16, channels-last, one group, no MaxOut.
#pragma once

#include <cstdint>

#include "../window.h"
#include "power.h"
#include "stream.h"

namespace bcos::cuda {

// x [images, H, W, C], weight [O, Kh, Kw, C], gain [O] (1 / ||w||, or null), bias [O] (or null), y and linear (or null)
// [images, P, Q, O], norm [images, P, Q]. C is a multiple of 8; x, weight, y and linear begin at multiples of 16 bytes.
template <class T>
struct Conv2d {
  Window window;
  int64_t images;
  int channels, out_channels;
  Root root;
  Power<float> power;
  const T *x, *weight;
  const float* gain;
  const T* bias;
  T *y, *linear;
  float* norm;

  int64_t pixels() const { return images * window.out_height * window.out_width; }
};

// Any window: an implicit matrix product.
template <class T>
void implicit_conv2d(const Conv2d<T>& a, Stream stream);

// 3x3 with stride and dilation 1 and 64 or 128 channels: x is read once, not once a tap.
template <class T>
void halo_conv2d(const Conv2d<T>& a, Stream stream);

}  // namespace bcos::cuda
