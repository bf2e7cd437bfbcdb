// Sums over convolution windows on the per-pixel maps [images * groups, H, W]: tiny next to x.
#pragma once

#include <cstdint>

#include "../window.h"

namespace bcos::cpu {

// norm = sqrt(sum over the window of squares + 1e-6). `norm` may be `squares` where the window is the pixel.
template <class A>
void patch_norm(const Window& w, int64_t maps, const A* squares, A* norm);

// The adjoint of the window sum, of pixel_sum / n: what `x` is to be multiplied by, [maps, H, W]. Spends `pixel_sum`.
template <class A>
void spread(const Window& w, int64_t maps, A* pixel_sum, const A* norm, A* out);

}  // namespace bcos::cpu
