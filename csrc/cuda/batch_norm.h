// The passes of the uncentered batch norm, with what may follow it: a residual, ReLU. Layouts have one group; what
// belongs to a channel is an array of the accumulator's type A.
#pragma once

#include "layout.h"
#include "stream.h"

namespace bcos::cuda {

// Sums by channel are two-stage: parts [2, channel_slices(), channels], to be added along the second axis.
int64_t channel_slices(const Layout& at);

// parts = the sums of x - pivot and of (x - pivot)^2.
template <class T, class A>
void moments(const Layout& at, const T* x, const A* pivot, double* parts, Stream stream);

// Which gradients a ReLU lets through: all without one; where z > 0; or, without z, where x * gain + shift > 0.
template <class T, class A>
struct Passed {
  bool relu;
  const T* z;
  const A *gain, *shift;  // `shift` may be null
};

// parts = the sums of h and of h * x, where h is g where it passed, else 0; h itself goes to `masked` unless that is
// null.
template <class T, class A>
void dots(const Layout& at, const T* g, const T* x, const Passed<T, A>& passed, T* masked, double* parts,
          Stream stream);

// z = x * gain (+ shift) (+ residual) (then ReLU); squares = the sum of z^2, as z is rounded, by pixel. `shift`,
// `residual` and `squares` may be null.
template <class T, class A>
struct Affine {
  const T* x;
  const A *gain, *shift;
  const T* residual;
  bool relu;
  T* z;
  A* squares;
};
template <class T, class A>
void affine(const Layout& at, const Affine<T, A>& a, Stream stream);

// dx = h * gain + (x - mean) * pull, h as above; without the second term where `pull` is null.
template <class T, class A>
struct AffineBackward {
  const T *g, *x;
  Passed<T, A> passed;
  const A *gain, *mean, *pull;
  T* dx;
};
template <class T, class A>
void affine_backward(const Layout& at, const AffineBackward<T, A>& a, Stream stream);

}  // namespace bcos::cuda
