// Which power of |cos| a layer takes.
#pragma once

#include "../bcos_math.h"

namespace bcos::cuda {

// `p_b` is B on the device where it is learned (no synchronisation to read it), else null and `b` holds.
template <class A>
struct Power {
  Form form;
  double b;
  const A* p_b;
};

}  // namespace bcos::cuda
