// Sums over convolution windows on the per-pixel maps [images * groups, H, W]: tiny next to x.
#pragma once

#include <cstdint>

namespace bcos::cpu {

struct Window {
  int64_t height, width;          // of x
  int64_t out_height, out_width;  // of y
  int64_t kernel[2], stride[2], padding[2], dilation[2];

  // 1x1 without padding or stride: the window is the pixel.
  bool is_pixel() const {
    return kernel[0] == 1 && kernel[1] == 1 && stride[0] == 1 && stride[1] == 1 && padding[0] == 0 && padding[1] == 0;
  }
};

// norm = sqrt(sum over the window of squares + 1e-6). `norm` may be `squares` where the window is the pixel.
template <class A>
void patch_norm(const Window& w, int64_t maps, const A* squares, A* norm);

// The adjoint of the window sum, of pixel_sum / n^2: what `x` is to be multiplied by, [maps, H, W]. Spends `pixel_sum`.
template <class A>
void spread(const Window& w, int64_t maps, A* pixel_sum, const A* norm, A* out);

}  // namespace bcos::cpu
