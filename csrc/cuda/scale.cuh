// bcos_math.h's scales, as a kernel gets them.
#pragma once

#include "power.h"
#include "primitives.cuh"

namespace bcos::cuda {

template <template <class> class Scale, class A>
__device__ __forceinline__ Scale<A> make_scale(const Power<A>& power, bool detach) {
  const double b = power.p_b ? static_cast<double>(*power.p_b) : power.b;
  return Scale<A>(Exponent{power.form, b}, detach);
}

}  // namespace bcos::cuda
