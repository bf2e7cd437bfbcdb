// The passes around a convolution or matrix product. Pointers are to device memory; launches go to `stream`.
#pragma once

#include <cstdint>

#include "../window.h"
#include "layout.h"
#include "power.h"
#include "stream.h"

namespace bcos::cuda {

// map = root(sum over the group's channels of x^2).
template <class T, class A>
void square_sums(const Layout& at, const T* x, A* map, Root root, Stream stream);

// norm [maps, P, Q] = sqrt(window sums of squares [maps, H, W] + 1e-6).
template <class A>
void window_root(const Window& window, int64_t maps, const A* squares, A* norm, Stream stream);

// The adjoint of the window sum: pull [maps, P, Q] spread over its windows, out [maps, H, W].
template <class A>
void window_spread(const Window& window, int64_t maps, const A* pull, A* out, Stream stream);

// l = max over `max_out` neighbouring channels of u, y = l * scale(l, norm). `at` is y's; `y` or `linear` may be `u`
// where max_out is 1; `linear` and `winner` may be null.
template <class T, class A>
struct ScaleForward {
  Layout at;
  int64_t max_out;
  Power<A> power;
  const T* u;
  const A* norm;
  T* y;
  T* linear;
  uint8_t* winner;
};
template <class T, class A>
void scale(const ScaleForward<T, A>& a, Stream stream);

// du from grad and `kept` (y, or l where `kept_linear`), 0 but at the winners; where not null, pull = dL/dn / ||x||, by
// which x is multiplied in dx, and db = dL/dB. `db_parts` has room for scale_backward_blocks() sums.
template <class T, class A>
struct ScaleBackward {
  Layout at;
  int64_t max_out;
  Power<A> power;
  bool detach, kept_linear;
  Root root;
  const T *grad, *kept;
  const A* norm;
  const uint8_t* winner;
  T* du;
  A *pull, *db;
  double* db_parts;
};
template <class T, class A>
void scale_backward(const ScaleBackward<T, A>& a, Stream stream);
int64_t scale_backward_blocks();

// dx += x * pull.
template <class T, class A>
void add_pull(const Layout& at, T* dx, const T* x, const A* pull, Stream stream);

}  // namespace bcos::cuda
