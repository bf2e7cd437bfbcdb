#include "window.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "../bcos_math.h"

namespace bcos::cpu {
namespace {

// Runs f(map, row, scratch) for every row of every map, in parallel.
template <class A, class F>
void for_rows(int64_t maps, int64_t rows, int64_t cost, int64_t scratch, const F& f) {
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, cost));
  at::parallel_for(0, maps * rows, grain, [&](int64_t begin, int64_t end) {
    std::vector<A> buffer(scratch);
    for (int64_t i = begin; i < end; ++i) f(i / rows, i % rows, buffer.data());
  });
}

}  // namespace

template <class A>
void patch_norm(const Window& w, int64_t maps, const A* squares, A* norm) {
  const A eps = static_cast<A>(kPatchNormEps);
  if (w.is_pixel()) {
    const int64_t n = maps * w.height * w.width;
    at::parallel_for(0, n, 32768, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) norm[i] = std::sqrt(squares[i] + eps);
    });
    return;
  }
  const int64_t padded = w.width + 2 * w.padding[1];
  const int64_t cost = padded * w.kernel[0] + w.out_width * w.kernel[1];
  for_rows<A>(maps, w.out_height, cost, padded, [&](int64_t map, int64_t ho, A* row) {
    std::fill(row, row + padded, A(0));
    A* inner = row + w.padding[1];
    for (int64_t k = 0; k < w.kernel[0]; ++k) {
      const int64_t h = ho * w.stride[0] + k * w.dilation[0] - w.padding[0];
      if (h < 0 || h >= w.height) continue;
      const A* line = squares + (map * w.height + h) * w.width;
      for (int64_t i = 0; i < w.width; ++i) inner[i] += line[i];
    }
    A* out = norm + (map * w.out_height + ho) * w.out_width;
    std::fill(out, out + w.out_width, eps);
    for (int64_t k = 0; k < w.kernel[1]; ++k) {
      const A* taps = row + k * w.dilation[1];
      for (int64_t wo = 0; wo < w.out_width; ++wo) out[wo] += taps[wo * w.stride[1]];
    }
    for (int64_t wo = 0; wo < w.out_width; ++wo) out[wo] = std::sqrt(out[wo]);
  });
}

template <class A>
void spread(const Window& w, int64_t maps, A* pixel_sum, const A* norm, A* out) {
  const int64_t n = maps * w.out_height * w.out_width;
  A* s = w.is_pixel() ? out : pixel_sum;
  at::parallel_for(0, n, 32768, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) s[i] = pull_of(Root::kPatch, pixel_sum[i], norm[i]);
  });
  if (w.is_pixel()) return;
  const int64_t padded = w.width + 2 * w.padding[1];
  const int64_t cost = w.out_width * (w.kernel[0] + w.kernel[1]) + padded;
  for_rows<A>(maps, w.height, cost, w.out_width + padded, [&](int64_t map, int64_t h, A* row) {
    A* taps = row + w.out_width;
    std::fill(row, taps + padded, A(0));
    for (int64_t k = 0; k < w.kernel[0]; ++k) {
      const int64_t top = h + w.padding[0] - k * w.dilation[0];
      if (top < 0 || top % w.stride[0] != 0 || top / w.stride[0] >= w.out_height) continue;
      const A* line = s + (map * w.out_height + top / w.stride[0]) * w.out_width;
      for (int64_t i = 0; i < w.out_width; ++i) row[i] += line[i];
    }
    for (int64_t k = 0; k < w.kernel[1]; ++k) {
      A* target = taps + k * w.dilation[1];
      for (int64_t wo = 0; wo < w.out_width; ++wo) target[wo * w.stride[1]] += row[wo];
    }
    std::copy(taps + w.padding[1], taps + w.padding[1] + w.width, out + (map * w.height + h) * w.width);
  });
}

template void patch_norm<float>(const Window&, int64_t, const float*, float*);
template void patch_norm<double>(const Window&, int64_t, const double*, double*);
template void spread<float>(const Window&, int64_t, float*, const float*, float*);
template void spread<double>(const Window&, int64_t, double*, const double*, double*);

}  // namespace bcos::cpu
