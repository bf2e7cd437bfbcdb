// The scale |cos|^(B-1) and its derivative, for the host and for CUDA: the only copy in C++.
//
//   y = l * scale,  cos = |l| / n          B = 1: scale 1.   B = 2: scale cos.   else: scale (cos + 1e-6)^(B-1).
//
// Everything is a template over the value type V: float, double, or a vector type for which `Ops<V>` is specialised.
// `rn` is 1 / n throughout. Powers are taken of non-negative bases only.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define BCOS_INLINE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
// always_inline: the CPU kernels are compiled once per instruction set, and an out-of-line copy that the linker shares
// between them could hold instructions that the machine lacks.
#define BCOS_INLINE inline __attribute__((always_inline))
#else
#define BCOS_INLINE inline
#endif

namespace bcos {

constexpr double kPatchNormEps = 1e-6;  // inside the root of the convolution's patch norm
constexpr double kRowNormEps = 1e-12;   // added to the linear layer's norm, outside the root
constexpr double kCosEps = 1e-6;        // added to |cos| where B is neither 1 nor 2

enum class Form : int { kLinear = 0, kQuadratic = 1, kGeneral = 2 };

// What B is. A B that is learned is always kGeneral, whatever its value.
struct Exponent {
  Form form;
  double b;
};

template <class V>
struct Ops {
  static BCOS_INLINE V abs(V a) { return a < V(0) ? -a : a; }
  static BCOS_INLINE V sqrt(V a) { return std::sqrt(a); }
  static BCOS_INLINE V pow(V a, V b) { return std::pow(a, b); }
  static BCOS_INLINE V log(V a) { return std::log(a); }
};

// What becomes of a sum of squares, and, from q = dL/dn, what x is multiplied by in its gradient.
// kPatch: n = sqrt(sum + 1e-6), q / n.  kRow: n = sqrt(sum) + 1e-12, q / ||x||, and 0 at the origin, as for torch's norm.
enum class Root : int { kNone = 0, kPatch = 1, kRow = 2 };

template <class S>
BCOS_INLINE S norm_of(Root root, S squares) {
  if (root == Root::kPatch) return Ops<S>::sqrt(squares + S(kPatchNormEps));
  return root == Root::kRow ? Ops<S>::sqrt(squares) + S(kRowNormEps) : squares;
}

template <class S>
BCOS_INLINE S pull_of(Root root, S q, S norm) {
  if (root == Root::kPatch) return q / norm;
  const S length = norm - S(kRowNormEps);
  return length > S(0) ? q / length : S(0);
}

// Per element: dL/dl; dL/dn (what it adds to the sum over the group's channels); dL/dB. Products are of g and cosines, which
// overflow later than those of l, y or n.
template <class V>
struct Slopes {
  V linear;
  V norm;
  V b;
};

// B = 1: only MaxOut is left.
template <class S>
struct Linear {
  BCOS_INLINE Linear(Exponent, bool) {}

  template <class V>
  BCOS_INLINE V forward(V l, V) const {
    return l;
  }

  template <class V>
  BCOS_INLINE Slopes<V> backward(V g, V, V) const {
    return {g, V(0), V(0)};
  }
};

// B = 2. Backward works from y, which the next layer keeps anyway: |cos| = sqrt(|y| / n).
template <class S>
struct Quadratic {
  S gain;  // d(l * |l|)/dl = 2 |l|; 1 |l| where the scale is a constant (explanation mode)

  BCOS_INLINE Quadratic(Exponent, bool detach) : gain(detach ? S(1) : S(2)) {}

  template <class V>
  BCOS_INLINE V forward(V l, V rn) const {
    return l * (Ops<V>::abs(l) * rn);
  }

  template <class V>
  BCOS_INLINE Slopes<V> backward(V g, V y, V rn) const {
    const V square = y * rn;  // cos^2, with the sign of y
    const V cos = Ops<V>::sqrt(Ops<V>::abs(square));
    return {g * (cos * V(gain)), V(0) - g * square, V(0)};
  }
};

// B = 2 where l was kept, since y underflows where l does not (float16).
template <class S>
struct QuadraticOfLinear : Quadratic<S> {
  using Quadratic<S>::Quadratic;

  template <class V>
  BCOS_INLINE Slopes<V> backward(V g, V l, V rn) const {
    const V signed_cos = l * rn, cos = Ops<V>::abs(signed_cos);
    return {g * (cos * V(this->gain)), V(0) - g * (signed_cos * cos), V(0)};
  }
};

// Any B >= 1. Backward works from l.
template <class S>
struct General {
  S power;  // B - 1
  S pull;   // 0 where the scale is a constant

  BCOS_INLINE General(Exponent e, bool detach) : power(static_cast<S>(e.b - 1)), pull(detach ? S(0) : S(1)) {}

  template <class V>
  BCOS_INLINE V forward(V l, V rn) const {
    return l * Ops<V>::pow(Ops<V>::abs(l) * rn + V(S(kCosEps)), V(power));
  }

  template <class V>
  BCOS_INLINE Slopes<V> backward(V g, V l, V rn) const {
    const V cos = Ops<V>::abs(l) * rn;
    const V base = cos + V(S(kCosEps));  // never below 1e-6: the logarithm and the quotient are safe
    const V factor = Ops<V>::pow(base, V(power));
    const V slope = V(power) * factor / base * cos;
    return {g * (factor + V(pull) * slope), V(0) - g * slope * (l * rn), g * l * factor * Ops<V>::log(base)};
  }
};

}  // namespace bcos
