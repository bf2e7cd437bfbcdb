// The window of a convolution.
#pragma once

#include <cstdint>

namespace bcos {

struct Window {
  int64_t height, width;          // of x
  int64_t out_height, out_width;  // of y
  int64_t kernel[2], stride[2], padding[2], dilation[2];

  // 1x1 without padding or stride: the window is the pixel.
  bool is_pixel() const {
    return kernel[0] == 1 && kernel[1] == 1 && stride[0] == 1 && stride[1] == 1 && padding[0] == 0 && padding[1] == 0;
  }
};

}  // namespace bcos
