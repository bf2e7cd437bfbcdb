// The element-wise kernels, each on one two-dimensional tile: a table of functions per instruction set.
//
// A tile has `rows` rows of `cols` neighbouring elements, `ld*` elements from one row to the next. What belongs to a
// pixel (norm, pixel sums) has one value by row of a channels-last tile, `by_row`, and one by column of a contiguous
// tile, whose rows are channels; what belongs to a channel (batch norm) the other way round.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../bcos_math.h"

namespace bcos::cpu {

// Norms, scales and sums: float, or double for double.
template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Where the ReLU behind a batch norm let a gradient through: where its output `z` is positive; where `z` is null, where
// x * gain (+ shift) is, found again from what is read anyway. Without ReLU everywhere.
template <class T>
struct Passed {
  bool relu;
  const T* z;
  const Acc<T>* gain;  // by channel, as `shift`, which may be null
  const Acc<T>* shift;
};

template <class T>
struct Tiles {
  using A = Acc<T>;

  // y = l * scale. `y` may be `l`.
  void (*scale)(bool by_row, const T* l, int64_t ldl, T* y, int64_t ldy, int64_t rows, int64_t cols, const A* norm,
                Exponent e);

  // dl from g and `kept` (y for B = 2, else l). Where wanted (not null): pixel_sum = dL/dn, summed over the tile's
  // channels (overwritten), and db += the sum of dL/dB. B = 1 is not for this function.
  void (*scale_backward)(bool by_row, const T* grad, int64_t ldg, const T* kept, int64_t ldk, T* dl, int64_t lddl,
                         int64_t rows, int64_t cols, const A* norm, A* pixel_sum, double* db, Exponent e, bool detach);

  // out = sum of x^2 over the tile's channels, by pixel.
  void (*square_sum)(bool by_row, const T* x, int64_t ldx, int64_t rows, int64_t cols, A* out);

  // dx += x * s, with s by pixel.
  void (*add_scaled)(bool by_row, T* dx, int64_t lddx, const T* x, int64_t ldx, int64_t rows, int64_t cols, const A* s);

  // MaxOut. `rows` and `cols` are those of `l`; `u` has `m` neighbouring columns (by_row) or rows for each of l's.
  // The first of equal values wins, and NaN wins over all: torch.max's rules. `winner` may be null.
  void (*pick)(bool by_row, const T* u, int64_t ldu, T* l, int64_t ldl, uint8_t* winner, int64_t ldw, int64_t rows,
               int64_t cols, int64_t m);
  // The gradient of that: du = dl at the winner, else 0.
  void (*scatter)(bool by_row, const T* dl, int64_t lddl, const uint8_t* winner, int64_t ldw, T* du, int64_t lddu,
                  int64_t rows, int64_t cols, int64_t m);

  // dst = src^T, `rows` x `cols` being src's.
  void (*transpose)(const T* src, int64_t lds, T* dst, int64_t ldd, int64_t rows, int64_t cols);

  // Batch norm: by_row means here too that rows are pixels, so that channels are columns.
  // Adds the tile to the running (mean, sum of squared deviations) of `count` pixels before it.
  void (*moments)(bool by_row, const T* x, int64_t ldx, int64_t rows, int64_t cols, double count, double* mean,
                  double* m2);
  // With h = g where it passed the ReLU, else 0: sum_g += sum of h, sum_gx += sum of h * x, by channel; h itself goes
  // to `masked` where that is not null.
  void (*dot)(bool by_row, const T* g, const T* x, T* masked, int64_t ld, int64_t rows, int64_t cols,
              const Passed<T>& passed, double* sum_g, double* sum_gx);
  // z = x * gain (+ shift) (+ residual) (then ReLU); gain and shift by channel. Where not null, squares = the sum of
  // z^2, as z is rounded, by pixel: of tiles by_row only. `shift` and `residual` may be null.
  void (*affine)(bool by_row, const T* x, const T* residual, T* z, int64_t ld, int64_t rows, int64_t cols,
                 const A* gain, const A* shift, bool relu, A* squares);
  // dx = h * gain + (x - mean) * pull, by channel; without the second term where `pull` is null.
  void (*affine_backward)(bool by_row, const T* g, const T* x, T* dx, int64_t ld, int64_t rows, int64_t cols,
                          const Passed<T>& passed, const A* gain, const A* mean, const A* pull);
};

// The table for the best instruction set of this machine (ATEN_CPU_CAPABILITY is obeyed).
template <class T>
const Tiles<T>& tiles();

// Whether that is AVX-512: oneDNN's small float32 matrix product, which the fused layers use, needs it.
bool has_avx512();

}  // namespace bcos::cpu
