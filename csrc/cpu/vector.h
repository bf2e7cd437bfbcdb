// at::vec for the tile kernels: loads and stores that widen to the accumulator, and the operations of bcos_math.h.
// Included by tile.cpp alone, once per instruction set; anonymous, so that no two of them share a symbol.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/util/BFloat16.h>

#include "tile.h"

namespace bcos {

template <class S>
struct Ops<at::vec::Vectorized<S>> {
  using V = at::vec::Vectorized<S>;
  static BCOS_INLINE V abs(V a) { return a.abs(); }
  static BCOS_INLINE V sqrt(V a) { return a.sqrt(); }
  static BCOS_INLINE V pow(V a, V b) { return a.pow(b); }
  static BCOS_INLINE V log(V a) { return a.log(); }
};

namespace cpu {
namespace {

template <class T>
using Vec = at::vec::Vectorized<Acc<T>>;

template <class T>
BCOS_INLINE Vec<T> load_wide(const T* p) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    Vec<T> v;
    at::vec::load_fp32_from_bf16(p, v);
    return v;
  } else {
    return Vec<T>::loadu(p);
  }
}

template <class T>
BCOS_INLINE void store_narrow(T* p, Vec<T> v) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    at::vec::convert_float_bfloat16(v, v).store(p, Vec<T>::size());
  } else {
    v.store(p);
  }
}

template <class S>
BCOS_INLINE S sum_of(at::vec::Vectorized<S> v) {
  return at::vec::vec_reduce_all<S>([](at::vec::Vectorized<S> a, at::vec::Vectorized<S> b) { return a + b; }, v);
}

}  // namespace
}  // namespace cpu
}  // namespace bcos
