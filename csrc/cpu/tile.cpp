// The tile kernels. Compiled once per instruction set (setup.py), as ATen does with its own: CPU_CAPABILITY names
// which.
#include "tile.h"

#include <algorithm>
#include <type_traits>

#include "vector.h"

#define BCOS_CONCAT_(a, b) a##b
#define BCOS_CONCAT(a, b) BCOS_CONCAT_(a, b)

namespace bcos::cpu {
namespace {

constexpr int64_t kChunk = 256;  // columns whose per-pixel values stay in registers and L1

// Calls f(i, vector tag) on whole vectors of [0, n) and f(i, scalar tag) on the rest.
template <class T, class F>
BCOS_INLINE void along(int64_t n, const F& f) {
  constexpr int64_t W = Vec<T>::size();
  int64_t i = 0;
  for (; i + W <= n; i += W) f(i, Vec<T>(0));
  for (; i < n; ++i) f(i, Acc<T>(0));
}

template <class V, class T>
BCOS_INLINE V get(const T* p) {
  if constexpr (std::is_same_v<V, Acc<T>>) {
    return static_cast<V>(*p);
  } else {
    return load_wide<T>(p);
  }
}

template <class V, class T>
BCOS_INLINE void put(T* p, V v) {
  if constexpr (std::is_same_v<V, Acc<T>>) {
    *p = static_cast<T>(v);
  } else {
    store_narrow<T>(p, v);
  }
}

// Adds v to the scalar or the vector accumulator, whichever is of its kind.
template <class V, class S>
BCOS_INLINE void add_to(S& scalar, at::vec::Vectorized<S>& vector, V v) {
  if constexpr (std::is_same_v<V, S>) {
    scalar += v;
  } else {
    vector = vector + v;
  }
}

// ---- scale

template <class T, class F>
void scale_with(F f, bool by_row, const T* l, int64_t ldl, T* y, int64_t ldy, int64_t rows, int64_t cols,
                const Acc<T>* norm) {
  using A = Acc<T>;
  if (by_row) {
    for (int64_t r = 0; r < rows; ++r) {
      const A rn = A(1) / norm[r];
      along<T>(cols, [&](int64_t c, auto tag) {
        using V = decltype(tag);
        put<V>(y + r * ldy + c, f.forward(get<V>(l + r * ldl + c), V(rn)));
      });
    }
    return;
  }
  A rn[kChunk];
  for (int64_t c0 = 0; c0 < cols; c0 += kChunk) {
    const int64_t n = std::min(kChunk, cols - c0);
    for (int64_t c = 0; c < n; ++c) rn[c] = A(1) / norm[c0 + c];
    for (int64_t r = 0; r < rows; ++r) {
      along<T>(n, [&](int64_t c, auto tag) {
        using V = decltype(tag);
        put<V>(y + r * ldy + c0 + c, f.forward(get<V>(l + r * ldl + c0 + c), get<V>(rn + c)));
      });
    }
  }
}

template <class T>
void scale(bool by_row, const T* l, int64_t ldl, T* y, int64_t ldy, int64_t rows, int64_t cols, const Acc<T>* norm,
           Exponent e) {
  if (e.form == Form::kQuadratic) {
    scale_with(Quadratic<Acc<T>>(e, false), by_row, l, ldl, y, ldy, rows, cols, norm);
  } else {
    scale_with(General<Acc<T>>(e, false), by_row, l, ldl, y, ldy, rows, cols, norm);
  }
}

template <class T, class F>
void scale_backward_with(F f, bool by_row, const T* grad, int64_t ldg, const T* kept, int64_t ldk, T* dl, int64_t lddl,
                         int64_t rows, int64_t cols, const Acc<T>* norm, Acc<T>* pixel_sum, double* db) {
  using A = Acc<T>;
  if (by_row) {
    for (int64_t r = 0; r < rows; ++r) {
      const A rn = A(1) / norm[r];
      A sum = 0, b_sum = 0;
      Vec<T> sums(0), b_sums(0);
      along<T>(cols, [&](int64_t c, auto tag) {
        using V = decltype(tag);
        const auto s = f.backward(get<V>(grad + r * ldg + c), get<V>(kept + r * ldk + c), V(rn));
        put<V>(dl + r * lddl + c, s.linear);
        add_to<V, A>(sum, sums, s.norm);
        if (db) add_to<V, A>(b_sum, b_sums, s.b);
      });
      if (pixel_sum) pixel_sum[r] = sum + sum_of(sums);
      if (db) *db += b_sum + sum_of(b_sums);
    }
    return;
  }
  A rn[kChunk], sums[kChunk];
  for (int64_t c0 = 0; c0 < cols; c0 += kChunk) {
    const int64_t n = std::min(kChunk, cols - c0);
    for (int64_t c = 0; c < n; ++c) {
      rn[c] = A(1) / norm[c0 + c];
      sums[c] = 0;
    }
    for (int64_t r = 0; r < rows; ++r) {
      A b_sum = 0;
      Vec<T> b_sums(0);
      along<T>(n, [&](int64_t c, auto tag) {
        using V = decltype(tag);
        const auto s = f.backward(get<V>(grad + r * ldg + c0 + c), get<V>(kept + r * ldk + c0 + c), get<V>(rn + c));
        put<V>(dl + r * lddl + c0 + c, s.linear);
        if (pixel_sum) put<V>(sums + c, get<V>(sums + c) + s.norm);
        if (db) add_to<V, A>(b_sum, b_sums, s.b);
      });
      if (db) *db += b_sum + sum_of(b_sums);
    }
    if (pixel_sum) std::copy(sums, sums + n, pixel_sum + c0);
  }
}

template <class T>
void scale_backward(bool by_row, const T* grad, int64_t ldg, const T* kept, int64_t ldk, T* dl, int64_t lddl,
                    int64_t rows, int64_t cols, const Acc<T>* norm, Acc<T>* pixel_sum, double* db, Exponent e,
                    bool detach) {
  if (e.form == Form::kQuadratic) {
    scale_backward_with(Quadratic<Acc<T>>(e, detach), by_row, grad, ldg, kept, ldk, dl, lddl, rows, cols, norm,
                        pixel_sum, db);
  } else {
    scale_backward_with(General<Acc<T>>(e, detach), by_row, grad, ldg, kept, ldk, dl, lddl, rows, cols, norm, pixel_sum,
                        db);
  }
}

// ---- norm

// Rows of few channels (the first layer has 3 or 6) would be all tail: calls f(number of channels, at compile time).
template <class F>
BCOS_INLINE bool with_few(int64_t cols, const F& f) {
  switch (cols) {
    case 1:
      return f(std::integral_constant<int, 1>()), true;
    case 3:
      return f(std::integral_constant<int, 3>()), true;
    case 4:
      return f(std::integral_constant<int, 4>()), true;
    case 6:
      return f(std::integral_constant<int, 6>()), true;
    default:
      return false;
  }
}

template <class T>
void square_sum(bool by_row, const T* x, int64_t ldx, int64_t rows, int64_t cols, Acc<T>* out) {
  using A = Acc<T>;
  if (by_row) {
    const auto few = [&](auto n) {
      for (int64_t r = 0; r < rows; ++r) {
        A sum = 0;
        for (int c = 0; c < n; ++c) {
          const A v = static_cast<A>(x[r * ldx + c]);
          sum += v * v;
        }
        out[r] = sum;
      }
    };
    if (with_few(cols, few)) return;
    for (int64_t r = 0; r < rows; ++r) {
      A sum = 0;
      Vec<T> sums(0);
      along<T>(cols, [&](int64_t c, auto tag) {
        using V = decltype(tag);
        const V v = get<V>(x + r * ldx + c);
        add_to<V, A>(sum, sums, v * v);
      });
      out[r] = cols < Vec<T>::size() ? sum : sum + sum_of(sums);
    }
    return;
  }
  std::fill(out, out + cols, A(0));
  for (int64_t r = 0; r < rows; ++r) {
    along<T>(cols, [&](int64_t c, auto tag) {
      using V = decltype(tag);
      const V v = get<V>(x + r * ldx + c);
      put<V>(out + c, get<V>(out + c) + v * v);
    });
  }
}

template <class T>
void add_scaled(bool by_row, T* dx, int64_t lddx, const T* x, int64_t ldx, int64_t rows, int64_t cols,
                const Acc<T>* s) {
  const auto few = [&](auto n) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int c = 0; c < n; ++c) {
        T& d = dx[r * lddx + c];
        d = static_cast<T>(static_cast<Acc<T>>(d) + static_cast<Acc<T>>(x[r * ldx + c]) * s[r]);
      }
    }
  };
  if (by_row && with_few(cols, few)) return;
  for (int64_t r = 0; r < rows; ++r) {
    along<T>(cols, [&](int64_t c, auto tag) {
      using V = decltype(tag);
      const V factor = by_row ? V(s[r]) : get<V>(s + (by_row ? 0 : c));
      T* d = dx + r * lddx + c;
      put<V>(d, get<V>(d) + get<V>(x + r * ldx + c) * factor);
    });
  }
}

// ---- MaxOut

template <class T>
void pick(bool by_row, const T* u, int64_t ldu, T* l, int64_t ldl, uint8_t* winner, int64_t ldw, int64_t rows,
          int64_t cols, int64_t m) {
  const int64_t row_step = by_row ? ldu : m * ldu;
  const int64_t col_step = by_row ? m : 1;
  const int64_t step = by_row ? 1 : ldu;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; ++c) {
      const T* p = u + r * row_step + c * col_step;
      Acc<T> best = static_cast<Acc<T>>(*p);
      int64_t at = 0;
      for (int64_t i = 1; i < m; ++i) {
        const Acc<T> v = static_cast<Acc<T>>(p[i * step]);
        if (v > best || (v != v && best == best)) {
          best = v;
          at = i;
        }
      }
      l[r * ldl + c] = static_cast<T>(best);
      if (winner) winner[r * ldw + c] = static_cast<uint8_t>(at);
    }
  }
}

template <class T>
void scatter(bool by_row, const T* dl, int64_t lddl, const uint8_t* winner, int64_t ldw, T* du, int64_t lddu,
             int64_t rows, int64_t cols, int64_t m) {
  const int64_t row_step = by_row ? lddu : m * lddu;
  const int64_t col_step = by_row ? m : 1;
  const int64_t step = by_row ? 1 : lddu;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; ++c) {
      T* p = du + r * row_step + c * col_step;
      const int64_t at = winner[r * ldw + c];
      for (int64_t i = 0; i < m; ++i) p[i * step] = i == at ? dl[r * lddl + c] : T(0);
    }
  }
}

template <class T>
void transpose(const T* src, int64_t lds, T* dst, int64_t ldd, int64_t rows, int64_t cols) {
  constexpr int64_t B = 16;
  for (int64_t r = 0; r < rows; r += B) {
    for (int64_t c = 0; c < cols; c += B) {
      const int64_t m = std::min(B, rows - r), n = std::min(B, cols - c);
#if defined(CPU_CAPABILITY_AVX512)
      if constexpr (std::is_same_v<T, float>) {
        if (m == B && n == B) {
          at::vec::transpose_mxn<float, 16, 16>(src + r * lds + c, lds, dst + c * ldd + r, ldd);
          continue;
        }
      }
#endif
      for (int64_t i = 0; i < m; ++i) {
        for (int64_t j = 0; j < n; ++j) dst[(c + j) * ldd + r + i] = src[(r + i) * lds + c + j];
      }
    }
  }
}

// ---- batch norm

// Sums in the accumulator's precision over at most this many pixels; everything longer adds up in double.
constexpr int64_t kBlock = 128;

BCOS_INLINE void merge_moments(double count, double& mean, double& m2, double n, double block_mean, double block_m2) {
  const double total = count + n;
  const double delta = block_mean - mean;
  mean += delta * (n / total);
  m2 += block_m2 + delta * delta * (count * n / total);
}

// Deviations from the block's first pixel: no cancellation, however far from zero the mean is.
template <class T>
void moments(bool by_row, const T* x, int64_t ldx, int64_t rows, int64_t cols, double count, double* mean, double* m2) {
  using A = Acc<T>;
  const auto merge = [&](double before, double n, int64_t channel, A first, A sum, A square) {
    const double s = static_cast<double>(sum);
    merge_moments(before, mean[channel], m2[channel], n, static_cast<double>(first) + s / n,
                  std::max(0.0, static_cast<double>(square) - s * s / n));
  };
  if (by_row) {
    A first[kChunk], sum[kChunk], square[kChunk];
    for (int64_t r0 = 0; r0 < rows; r0 += kBlock) {
      const int64_t nr = std::min(kBlock, rows - r0);
      for (int64_t c0 = 0; c0 < cols; c0 += kChunk) {
        const int64_t n = std::min(kChunk, cols - c0);
        const T* p = x + r0 * ldx + c0;
        for (int64_t c = 0; c < n; ++c) {
          first[c] = static_cast<A>(p[c]);
          sum[c] = square[c] = 0;
        }
        along<T>(n, [&](int64_t c, auto tag) {
          using V = decltype(tag);
          const V f = get<V>(first + c);
          V s(0), q(0);
          for (int64_t r = 1; r < nr; ++r) {
            const V d = get<V>(p + r * ldx + c) - f;
            s = s + d;
            q = q + d * d;
          }
          put<V>(sum + c, s);
          put<V>(square + c, q);
        });
        for (int64_t c = 0; c < n; ++c) {
          merge(count + static_cast<double>(r0), static_cast<double>(nr), c0 + c, first[c], sum[c], square[c]);
        }
      }
    }
    return;
  }
  constexpr int64_t kRun = kBlock * Vec<T>::size();
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c0 = 0; c0 < cols; c0 += kRun) {
      const int64_t n = std::min(kRun, cols - c0);
      const T* p = x + r * ldx + c0;
      const A first = static_cast<A>(*p);
      A sum = 0, square = 0;
      Vec<T> sums(0), squares(0);
      along<T>(n, [&](int64_t c, auto tag) {
        using V = decltype(tag);
        const V d = get<V>(p + c) - V(first);
        add_to<V, A>(sum, sums, d);
        add_to<V, A>(square, squares, d * d);
      });
      merge(count + static_cast<double>(c0), static_cast<double>(n), r, first, sum + sum_of(sums),
            square + sum_of(squares));
    }
  }
}

// The channel's value of `a`, or 0 where `a` is null.
template <class V, class A>
BCOS_INLINE V channel(bool by_row, const A* a, int64_t r, int64_t c) {
  if (!a) return V(0);
  if (!by_row) return V(a[r]);
  return get<V>(a + c);
}

// `v` where `sign` is positive or NaN, else 0.
template <class T, class V>
BCOS_INLINE V where_positive(V v, V sign) {
  if constexpr (std::is_same_v<V, Acc<T>>) {
    return sign <= V(0) ? V(0) : v;
  } else {
    return V::blendv(v, V(0), sign <= V(0));
  }
}

// Calls f(mask), with mask(g, i, r, c) the part of the gradient g at element i = r * ld + c that passed the ReLU.
template <class T, class F>
void with_mask(bool by_row, const T* x, const Passed<T>& passed, const F& f) {
  using A = Acc<T>;
  if (!passed.relu) {
    f([](auto g, int64_t, int64_t, int64_t) { return g; });
  } else if (passed.z) {
    f([z = passed.z](auto g, int64_t i, int64_t, int64_t) {
      return where_positive<T>(g, get<decltype(g)>(z + i));
    });
  } else {
    f([=, gain = passed.gain, shift = passed.shift](auto g, int64_t i, int64_t r, int64_t c) {
      using V = decltype(g);
      V z = get<V>(x + i) * channel<V, A>(by_row, gain, r, c);
      if (shift) z = z + channel<V, A>(by_row, shift, r, c);
      return where_positive<T>(g, z);
    });
  }
}

template <class T, class M>
void dot_with(const M& mask, bool by_row, const T* g, const T* x, T* masked, int64_t ld, int64_t rows, int64_t cols,
              double* sum_g, double* sum_gx) {
  using A = Acc<T>;
  if (by_row) {
    A sum[kChunk], product[kChunk];
    for (int64_t r0 = 0; r0 < rows; r0 += kBlock) {
      const int64_t nr = std::min(kBlock, rows - r0);
      for (int64_t c0 = 0; c0 < cols; c0 += kChunk) {
        const int64_t n = std::min(kChunk, cols - c0);
        along<T>(n, [&](int64_t c, auto tag) {
          using V = decltype(tag);
          V s(0), q(0);
          for (int64_t r = r0; r < r0 + nr; ++r) {
            const int64_t i = r * ld + c0 + c;
            const V v = mask(get<V>(g + i), i, r, c0 + c);
            if (masked) put<V>(masked + i, v);
            s = s + v;
            q = q + v * get<V>(x + i);
          }
          put<V>(sum + c, s);
          put<V>(product + c, q);
        });
        for (int64_t c = 0; c < n; ++c) {
          sum_g[c0 + c] += static_cast<double>(sum[c]);
          sum_gx[c0 + c] += static_cast<double>(product[c]);
        }
      }
    }
    return;
  }
  constexpr int64_t kRun = kBlock * Vec<T>::size();
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c0 = 0; c0 < cols; c0 += kRun) {
      A sum = 0, product = 0;
      Vec<T> sums(0), products(0);
      along<T>(std::min(kRun, cols - c0), [&](int64_t c, auto tag) {
        using V = decltype(tag);
        const int64_t i = r * ld + c0 + c;
        const V v = mask(get<V>(g + i), i, r, c0 + c);
        if (masked) put<V>(masked + i, v);
        add_to<V, A>(sum, sums, v);
        add_to<V, A>(product, products, v * get<V>(x + i));
      });
      sum_g[r] += static_cast<double>(sum + sum_of(sums));
      sum_gx[r] += static_cast<double>(product + sum_of(products));
    }
  }
}

template <class T>
void dot(bool by_row, const T* g, const T* x, T* masked, int64_t ld, int64_t rows, int64_t cols,
         const Passed<T>& passed, double* sum_g, double* sum_gx) {
  with_mask(by_row, x, passed,
            [&](const auto& mask) { dot_with<T>(mask, by_row, g, x, masked, ld, rows, cols, sum_g, sum_gx); });
}

template <class T>
void affine(bool by_row, const T* x, const T* residual, T* z, int64_t ld, int64_t rows, int64_t cols,
            const Acc<T>* gain, const Acc<T>* shift, bool relu, Acc<T>* squares) {
  using A = Acc<T>;
  for (int64_t r = 0; r < rows; ++r) {
    A sum = 0;
    Vec<T> sums(0);
    along<T>(cols, [&](int64_t c, auto tag) {
      using V = decltype(tag);
      const int64_t i = r * ld + c;
      V v = get<V>(x + i) * channel<V, A>(by_row, gain, r, c);
      if (shift) v = v + channel<V, A>(by_row, shift, r, c);
      if (residual) v = v + get<V>(residual + i);
      if (relu) v = where_positive<T>(v, v);
      put<V>(z + i, v);
      if (squares) {
        if constexpr (!std::is_same_v<T, A>) v = get<V>(z + i);
        add_to<V, A>(sum, sums, v * v);
      }
    });
    if (squares) squares[r] = cols < Vec<T>::size() ? sum : sum + sum_of(sums);
  }
}

template <class T>
void affine_backward(bool by_row, const T* g, const T* x, T* dx, int64_t ld, int64_t rows, int64_t cols,
                     const Passed<T>& passed, const Acc<T>* gain, const Acc<T>* mean, const Acc<T>* pull) {
  using A = Acc<T>;
  with_mask(by_row, x, passed, [&](const auto& mask) {
    for (int64_t r = 0; r < rows; ++r) {
      along<T>(cols, [&](int64_t c, auto tag) {
        using V = decltype(tag);
        const int64_t i = r * ld + c;
        V v = mask(get<V>(g + i), i, r, c) * channel<V, A>(by_row, gain, r, c);
        if (pull) {
          const V centred = get<V>(x + i) - channel<V, A>(by_row, mean, r, c);
          v = v + centred * channel<V, A>(by_row, pull, r, c);
        }
        put<V>(dx + i, v);
      });
    }
  });
}

template <class T>
constexpr Tiles<T> kTable{scale<T>,     scale_backward<T>, square_sum<T>, add_scaled<T>, pick<T>,           scatter<T>,
                          transpose<T>, moments<T>,        dot<T>,        affine<T>,     affine_backward<T>};

}  // namespace

// Found by tile_table.cpp under the instruction set's name.
#define BCOS_TABLE(suffix, T)                                                        \
  extern const Tiles<T> BCOS_CONCAT(BCOS_CONCAT(tiles_##suffix, _), CPU_CAPABILITY); \
  const Tiles<T> BCOS_CONCAT(BCOS_CONCAT(tiles_##suffix, _), CPU_CAPABILITY) = kTable<T>;

BCOS_TABLE(float, float)
BCOS_TABLE(double, double)
BCOS_TABLE(bfloat16, c10::BFloat16)

}  // namespace bcos::cpu
