// The kernels of elementwise.h; elementwise_*.cu instantiate them, one dtype each.
#pragma once

#include "elementwise.h"
#include "scale.cuh"
#include "sweep.cuh"

namespace bcos::cuda {

// ---- norm

// sum[i] = sum over c of x[c]^2, map = root(sum)
template <class T, bool BY_ROW, int V>
struct SquareSums {
  using A = Acc<T>;
  static constexpr int kWidth = BY_ROW ? 1 : V;
  static constexpr bool kSums = true;
  const T* p_x;
  A* p_map;
  Root root;
  A sum[kWidth];

  __device__ void clear() {
#pragma unroll
    for (A& s : sum) s = 0;
  }
  __device__ void begin(int64_t) {}
  __device__ void chunk(int64_t row, int64_t col, int64_t ld, int64_t) {
    const auto x = load<V>(p_x + row * ld + col);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const A value = static_cast<A>(x.of[i]);
      sum[BY_ROW ? 0 : i] += value * value;
    }
  }
  __device__ void end(int64_t map) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) p_map[map + i] = norm_of(root, sum[i]);
  }
};

template <class T, bool BY_ROW, int V>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    square_sums_kernel(Layout at, int lanes, const T* p_x, Acc<T>* p_map, Root root) {
  SquareSums<T, BY_ROW, V> body{p_x, p_map, root, {}};
  sweep<BY_ROW, V>(at, lanes, body);
}

// norm[m, p, q] = sqrt(sum over the taps (i, j) of squares[m, p s_h - p_h + i d_h, q s_w - p_w + j d_w] + 1e-6)
template <class A>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    window_root_kernel(Window w, int64_t total, const A* p_squares, A* p_norm) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t o = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; o < total; o += stride) {
    const int64_t q = o % w.out_width, row = o / w.out_width, p = row % w.out_height;
    const A* p_map = p_squares + row / w.out_height * w.height * w.width;
    const int64_t top = p * w.stride[0] - w.padding[0], left = q * w.stride[1] - w.padding[1];
    A sum = 0;
    for (int64_t i = 0; i < w.kernel[0]; ++i) {
      const int64_t h = top + i * w.dilation[0];
      if (h < 0 || h >= w.height) continue;
      for (int64_t j = 0; j < w.kernel[1]; ++j) {
        const int64_t v = left + j * w.dilation[1];
        if (v >= 0 && v < w.width) sum += p_map[h * w.width + v];
      }
    }
    p_norm[o] = norm_of(Root::kPatch, sum);
  }
}

// out[m, h, v] = sum of pull[m, p, q] over the windows (p, q) that contain (h, v)
template <class A>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    window_spread_kernel(Window w, int64_t total, const A* p_pull, A* p_out) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t o = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; o < total; o += stride) {
    const int64_t v = o % w.width, row = o / w.width, h = row % w.height;
    const A* p_map = p_pull + row / w.height * w.out_height * w.out_width;
    A sum = 0;
    for (int64_t i = 0; i < w.kernel[0]; ++i) {
      const int64_t top = h + w.padding[0] - i * w.dilation[0], p = top / w.stride[0];
      if (top < 0 || top % w.stride[0] != 0 || p >= w.out_height) continue;
      for (int64_t j = 0; j < w.kernel[1]; ++j) {
        const int64_t left = v + w.padding[1] - j * w.dilation[1], q = left / w.stride[1];
        if (left >= 0 && left % w.stride[1] == 0 && q < w.out_width) sum += p_map[p * w.out_width + q];
      }
    }
    p_out[o] = sum;
  }
}

// ---- the scale

// Row k of the m that MaxOut chooses from, of V channels (channels-last: m elements apart) or V pixels.
template <bool BY_ROW, int V, class T>
__device__ __forceinline__ Vector<T, V> load_rows(const T* p_first, int k, int64_t ld, int64_t m) {
  if constexpr (!BY_ROW) {
    return load<V>(p_first + k * ld);
  } else {
    Vector<T, V> u;
#pragma unroll
    for (int i = 0; i < V; ++i) u.of[i] = p_first[i * m + k];
    return u;
  }
}

template <bool BY_ROW, int V, class T>
__device__ __forceinline__ void store_rows(T* p_first, int k, int64_t ld, int64_t m, const Vector<T, V>& du) {
  if constexpr (!BY_ROW) {
    store<V>(p_first + k * ld, du);
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) p_first[i * m + k] = du.of[i];
  }
}

// y = l * scale(l, n), l = max of u[c m + k] over k < m: the first of equal values wins, and NaN wins over all.
template <class T, bool BY_ROW, int V, template <class> class Scale>
struct ScaleForwardBody {
  using A = Acc<T>;
  static constexpr bool kSums = false;
  ScaleForward<T, A> a;
  Scale<A> scale;
  A rn[BY_ROW ? 1 : V];

  __device__ void clear() {}
  __device__ void begin(int64_t map) {
    if (a.norm == nullptr) return;
#pragma unroll
    for (int i = 0; i < (BY_ROW ? 1 : V); ++i) rn[i] = A(1) / a.norm[map + i];
  }
  __device__ void chunk(int64_t row, int64_t col, int64_t ld, int64_t) {
    const int64_t at = row * ld + col;
    Vector<T, V> linear, y;
    Vector<uint8_t, V> winner;
    if (a.max_out == 1) {
      linear = load<V>(a.u + at);
    } else {
      pick(row, col, ld, linear, winner);
    }
#pragma unroll
    for (int i = 0; i < V; ++i) {
      y.of[i] = static_cast<T>(scale.forward(static_cast<A>(linear.of[i]), rn[BY_ROW ? 0 : i]));
    }
    store<V>(a.y + at, y);
    if (a.linear != nullptr && a.linear != a.u) store<V>(a.linear + at, linear);
    if (a.winner != nullptr) store<V>(a.winner + at, winner);
  }
  __device__ void pick(int64_t row, int64_t col, int64_t ld, Vector<T, V>& best, Vector<uint8_t, V>& winner) const {
    const T* p_u = a.u + (BY_ROW ? (row * ld + col) * a.max_out : row * ld * a.max_out + col);
    A largest[V];
    for (int k = 0; k < a.max_out; ++k) {
      const auto u = load_rows<BY_ROW, V>(p_u, k, ld, a.max_out);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const A value = static_cast<A>(u.of[i]);
        if (k == 0 || (!(value <= largest[i]) && largest[i] == largest[i])) {
          largest[i] = value;
          best.of[i] = u.of[i];
          winner.of[i] = static_cast<uint8_t>(k);
        }
      }
    }
  }
};

template <class T, bool BY_ROW, int V, template <class> class Scale>
__global__ void __launch_bounds__(kThreads, kMinBlocks) scale_kernel(ScaleForward<T, Acc<T>> a, int lanes) {
  ScaleForwardBody<T, BY_ROW, V, Scale> body{a, make_scale<Scale>(a.power, false), {}};
  sweep<BY_ROW, V>(a.at, lanes, body);
}

// du[c m + k] = dl at k = winner, else 0; pull = dL/dn / ||x|| from the sum over c of n dL/dn; db = the sum of dL/dB
template <class T, bool BY_ROW, int V, template <class> class Scale>
struct ScaleBackwardBody {
  using A = Acc<T>;
  static constexpr int kWidth = BY_ROW ? 1 : V;
  static constexpr bool kSums = true;
  ScaleBackward<T, A> a;
  Scale<A> scale;
  A rn[kWidth], sum[kWidth];
  A db;

  __device__ void clear() {
#pragma unroll
    for (A& s : sum) s = 0;
  }
  __device__ void begin(int64_t map) {
    if (a.norm == nullptr) return;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) rn[i] = A(1) / a.norm[map + i];
  }
  __device__ void chunk(int64_t row, int64_t col, int64_t ld, int64_t) {
    const int64_t at = row * ld + col;
    const auto grad = load<V>(a.grad + at);
    Vector<T, V> kept, dl;
    if (a.kept != nullptr) kept = load<V>(a.kept + at);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const int pixel = BY_ROW ? 0 : i;
      const A value = a.kept != nullptr ? static_cast<A>(kept.of[i]) : A(0);
      const Slopes<A> slopes = scale.backward(static_cast<A>(grad.of[i]), value, rn[pixel]);
      dl.of[i] = static_cast<T>(slopes.linear);
      sum[pixel] += slopes.norm;
      db += slopes.b;
    }
    if (a.du == nullptr) return;
    if (a.max_out == 1) {
      store<V>(a.du + at, dl);
    } else {
      scatter(row, col, ld, dl, load<V>(a.winner + at));
    }
  }
  __device__ void scatter(int64_t row, int64_t col, int64_t ld, const Vector<T, V>& dl,
                          const Vector<uint8_t, V>& winner) const {
    T* p_du = a.du + (BY_ROW ? (row * ld + col) * a.max_out : row * ld * a.max_out + col);
    for (int k = 0; k < a.max_out; ++k) {
      Vector<T, V> du;
#pragma unroll
      for (int i = 0; i < V; ++i) du.of[i] = k == winner.of[i] ? dl.of[i] : static_cast<T>(0.f);
      store_rows<BY_ROW, V>(p_du, k, ld, a.max_out, du);
    }
  }
  __device__ void end(int64_t map) {
    if (a.pull == nullptr) return;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) a.pull[map + i] = pull_of(a.root, sum[i], a.norm[map + i]);
  }
};

// The block's sum, in a fixed order; thread 0 gets it.
__device__ __forceinline__ double sum_over_block(double value) {
  double sum[1] = {value};
  sum_over_lanes(sum, kWarp);
  __shared__ double parts[kSlices];
  if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = sum[0];
  sync_block();
  if (threadIdx.x == 0) {
    for (int i = 1; i < kSlices; ++i) sum[0] += parts[i];
  }
  return sum[0];
}

template <class T, bool BY_ROW, int V, template <class> class Scale>
__global__ void __launch_bounds__(kThreads, kMinBlocks) scale_backward_kernel(ScaleBackward<T, Acc<T>> a, int lanes) {
  ScaleBackwardBody<T, BY_ROW, V, Scale> body{a, make_scale<Scale>(a.power, a.detach), {}, {}, 0};
  sweep<BY_ROW, V>(a.at, lanes, body);
  if (a.db != nullptr) {
    const double sum = sum_over_block(static_cast<double>(body.db));
    if (threadIdx.x == 0) a.db_parts[blockIdx.x] = sum;
  }
}

// out = the sum of `count` parts; one block, so that the order never changes
template <class A>
__global__ void __launch_bounds__(kThreads, kMinBlocks) sum_parts_kernel(const double* p_parts, int count, A* p_out) {
  double sum = 0;
  for (int i = threadIdx.x; i < count; i += kThreads) sum += p_parts[i];
  sum = sum_over_block(sum);
  if (threadIdx.x == 0) *p_out = static_cast<A>(sum);
}

// dx += x * pull
template <class T, bool BY_ROW, int V>
struct AddPull {
  using A = Acc<T>;
  static constexpr bool kSums = false;
  T* p_dx;
  const T* p_x;
  const A* p_pull;
  A pull[BY_ROW ? 1 : V];

  __device__ void clear() {}
  __device__ void begin(int64_t map) {
#pragma unroll
    for (int i = 0; i < (BY_ROW ? 1 : V); ++i) pull[i] = p_pull[map + i];
  }
  __device__ void chunk(int64_t row, int64_t col, int64_t ld, int64_t) {
    const int64_t at = row * ld + col;
    const auto x = load<V>(p_x + at);
    auto dx = load<V>(p_dx + at);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      dx.of[i] = static_cast<T>(static_cast<A>(dx.of[i]) + static_cast<A>(x.of[i]) * pull[BY_ROW ? 0 : i]);
    }
    store<V>(p_dx + at, dx);
  }
};

template <class T, bool BY_ROW, int V>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    add_pull_kernel(Layout at, int lanes, T* p_dx, const T* p_x, const Acc<T>* p_pull) {
  AddPull<T, BY_ROW, V> body{p_dx, p_x, p_pull, {}};
  sweep<BY_ROW, V>(at, lanes, body);
}

// ---- launches

template <class T, class A>
void square_sums(const Layout& at, const T* x, A* map, Root root, Stream stream) {
  by_layout<T>(at, takes_vectors<T>(at, x), [&]<bool BY_ROW, int V>() {
    const Plan p = plan(at, V);
    launch(square_sums_kernel<T, BY_ROW, V>, p.blocks, kThreads, 0, stream, at, p.lanes, x, map, root);
  });
}

template <class A>
void window_root(const Window& window, int64_t maps, const A* squares, A* norm, Stream stream) {
  const int64_t total = maps * window.out_height * window.out_width;
  launch(window_root_kernel<A>, blocks_for((total + kThreads - 1) / kThreads), kThreads, 0, stream, window, total,
         squares, norm);
}

template <class A>
void window_spread(const Window& window, int64_t maps, const A* pull, A* out, Stream stream) {
  const int64_t total = maps * window.height * window.width;
  launch(window_spread_kernel<A>, blocks_for((total + kThreads - 1) / kThreads), kThreads, 0, stream, window, total,
         pull, out);
}

template <template <class> class Scale, class T, class A>
void scale_with(const ScaleForward<T, A>& a, Stream stream) {
  by_layout<T>(a.at, takes_vectors<T>(a.at, a.u, a.y, a.linear, a.winner), [&]<bool BY_ROW, int V>() {
    const Plan p = plan(a.at, V);
    launch(scale_kernel<T, BY_ROW, V, Scale>, p.blocks, kThreads, 0, stream, a, p.lanes);
  });
}

template <class T, class A>
void scale(const ScaleForward<T, A>& a, Stream stream) {
  switch (a.power.form) {
    case Form::kLinear:
      return scale_with<Linear>(a, stream);
    case Form::kQuadratic:
      return scale_with<Quadratic>(a, stream);
    case Form::kGeneral:
      return scale_with<General>(a, stream);
  }
}

template <template <class> class Scale, class T, class A>
void scale_backward_with(const ScaleBackward<T, A>& a, Stream stream) {
  by_layout<T>(a.at, takes_vectors<T>(a.at, a.grad, a.kept, a.du, a.winner), [&]<bool BY_ROW, int V>() {
    const Plan p = plan(a.at, V);
    launch(scale_backward_kernel<T, BY_ROW, V, Scale>, p.blocks, kThreads, 0, stream, a, p.lanes);
    if (a.db != nullptr) {
      launch(sum_parts_kernel<A>, 1, kThreads, 0, stream, a.db_parts, static_cast<int>(p.blocks), a.db);
    }
  });
}

template <class T, class A>
void scale_backward(const ScaleBackward<T, A>& a, Stream stream) {
  switch (a.power.form) {
    case Form::kLinear:
      return scale_backward_with<Linear>(a, stream);
    case Form::kQuadratic:
      if (a.kept_linear) return scale_backward_with<QuadraticOfLinear>(a, stream);
      return scale_backward_with<Quadratic>(a, stream);
    case Form::kGeneral:
      return scale_backward_with<General>(a, stream);
  }
}

template <class T, class A>
void add_pull(const Layout& at, T* dx, const T* x, const A* pull, Stream stream) {
  by_layout<T>(at, takes_vectors<T>(at, dx, x), [&]<bool BY_ROW, int V>() {
    const Plan p = plan(at, V);
    launch(add_pull_kernel<T, BY_ROW, V>, p.blocks, kThreads, 0, stream, at, p.lanes, dx, x, pull);
  });
}

#define BCOS_INSTANTIATE(T)                                                                            \
  template void square_sums<T, Acc<T>>(const Layout&, const T*, Acc<T>*, Root, Stream);                \
  template void scale<T, Acc<T>>(const ScaleForward<T, Acc<T>>&, Stream);                              \
  template void scale_backward<T, Acc<T>>(const ScaleBackward<T, Acc<T>>&, Stream);                    \
  template void add_pull<T, Acc<T>>(const Layout&, T*, const T*, const Acc<T>*, Stream)

}  // namespace bcos::cuda
