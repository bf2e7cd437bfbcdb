// How tensors lie in device memory.
#pragma once

#include <cstdint>
#include <type_traits>

namespace bcos::cuda {

// How a tensor [images, channels, pixels] lies in memory: channels-last rows of pixels (`by_row`), or contiguous planes
// of channels. A linear layer is one image whose pixels are its rows. What belongs to a pixel and group is a map
// [images, groups, pixels] of the accumulator's type A.
struct Layout {
  bool by_row;
  int64_t images, pixels, groups, channels;

  int64_t own() const { return channels / groups; }
  int64_t map_size() const { return images * groups * pixels; }
};

// Norms, scales and sums: float, or double for double.
template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

}  // namespace bcos::cuda
