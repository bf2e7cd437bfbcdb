#include "batch_norm.h"

#include "sweep.cuh"

namespace bcos::cuda {
namespace {

// ---- sums by channel

constexpr int kTwo = 2;  // sums at a time

// parts[k, slice, c] = the k-th sum of channel c over a slice of the pixels. A thread adds up V channels
// (channels-last) or V pixels of a channel (contiguous) in A, the block's threads then their sums in double.
template <bool BY_ROW, int V, class A, class Body>
__device__ __forceinline__ void sum_by_channel(const Layout& at, int64_t slices, int lanes, Body& body,
                                               double* p_parts) {
  constexpr int kWidth = BY_ROW ? V : 1;
  A sum[kTwo][kWidth] = {};
  const int64_t C = at.channels;
  int64_t channel, slice;
  if constexpr (BY_ROW) {
    const int64_t tiles = (C + lanes * V - 1) / (lanes * V), rows = at.images * at.pixels;
    const int step = kThreads / lanes;
    slice = blockIdx.x / tiles;
    channel = (blockIdx.x % tiles * lanes + threadIdx.x % lanes) * V;
    if (channel < C) {
      for (int64_t row = slice * step + threadIdx.x / lanes; row < rows; row += slices * step) {
        body.add(row * C + channel, channel, sum);
      }
    }
  } else {
    const int64_t pieces = at.pixels / V;
    slice = blockIdx.x / C;
    channel = blockIdx.x % C;
    for (int64_t i = slice * kThreads + threadIdx.x; i < at.images * pieces; i += slices * kThreads) {
      body.add((i / pieces * C + channel) * at.pixels + i % pieces * V, channel, sum);
    }
  }
  __shared__ A parts[kThreads];
  const int group = BY_ROW ? lanes : 1;  // threads that have channels of their own
#pragma unroll
  for (int k = 0; k < kTwo; ++k) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      parts[threadIdx.x] = sum[k][i];
      sync_block();
      if (static_cast<int>(threadIdx.x) < group && channel + i < C) {
        double total = 0;
        for (int t = threadIdx.x; t < kThreads; t += group) total += parts[t];
        p_parts[(k * slices + slice) * C + channel + i] = total;
      }
      sync_block();
    }
  }
}

template <class T, bool BY_ROW, int V>
struct Moments {
  using A = Acc<T>;
  const T* p_x;
  const A* p_pivot;

  template <int W>
  __device__ void add(int64_t at, int64_t channel, A (&sum)[kTwo][W]) const {
    const auto x = load<V>(p_x + at);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const int s = BY_ROW ? i : 0;
      const A d = static_cast<A>(x.of[i]) - p_pivot[channel + s];
      sum[0][s] += d;
      sum[1][s] += d * d;
    }
  }
};

template <class T, bool BY_ROW, int V>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    moments_kernel(Layout at, int64_t slices, int lanes, const T* p_x, const Acc<T>* p_pivot, double* p_parts) {
  Moments<T, BY_ROW, V> body{p_x, p_pivot};
  sum_by_channel<BY_ROW, V, Acc<T>>(at, slices, lanes, body, p_parts);
}

// What the ReLU let through of g. NaN counts as let through.
template <class T, class A>
__device__ __forceinline__ A masked(const Passed<T, A>& passed, A g, A x, T z, int64_t channel) {
  if (!passed.relu) return g;
  A value = static_cast<A>(z);
  if (passed.z == nullptr) {
    value = x * passed.gain[channel] + (passed.shift != nullptr ? passed.shift[channel] : A(0));
  }
  return value <= A(0) ? A(0) : g;
}

template <class T, bool BY_ROW, int V>
struct Dots {
  using A = Acc<T>;
  const T *p_g, *p_x;
  Passed<T, A> passed;
  T* p_masked;

  template <int W>
  __device__ void add(int64_t at, int64_t channel, A (&sum)[kTwo][W]) const {
    const auto g = load<V>(p_g + at), x = load<V>(p_x + at);
    Vector<T, V> z = x, h;
    if (passed.z != nullptr) z = load<V>(passed.z + at);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const int s = BY_ROW ? i : 0;
      const A value = static_cast<A>(x.of[i]);
      const A grad = masked(passed, static_cast<A>(g.of[i]), value, z.of[i], channel + s);
      h.of[i] = static_cast<T>(grad);
      sum[0][s] += grad;
      sum[1][s] += grad * value;
    }
    if (p_masked != nullptr) store<V>(p_masked + at, h);
  }
};

template <class T, bool BY_ROW, int V>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    dots_kernel(Layout at, int64_t slices, int lanes, Dots<T, BY_ROW, V> body, double* p_parts) {
  sum_by_channel<BY_ROW, V, Acc<T>>(at, slices, lanes, body, p_parts);
}

// ---- passes over all elements

template <class T, bool BY_ROW, int V, bool SQUARES>
struct AffineBody {
  using A = Acc<T>;
  static constexpr int kWidth = BY_ROW ? 1 : V;
  static constexpr bool kSums = SQUARES;
  Affine<T, A> a;
  A sum[kWidth];

  __device__ void clear() {
#pragma unroll
    for (A& s : sum) s = 0;
  }
  __device__ void begin(int64_t) {}
  __device__ void chunk(int64_t row, int64_t col, int64_t ld, int64_t channel) {
    const int64_t o = row * ld + col;
    const auto x = load<V>(a.x + o);
    Vector<T, V> more = x, z;
    if (a.residual != nullptr) more = load<V>(a.residual + o);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const int64_t c = BY_ROW ? channel + i : channel;
      A value = static_cast<A>(x.of[i]) * a.gain[c];
      if (a.shift != nullptr) value += a.shift[c];
      if (a.residual != nullptr) value += static_cast<A>(more.of[i]);
      if (a.relu && value <= A(0)) value = 0;
      z.of[i] = static_cast<T>(value);
      if constexpr (SQUARES) sum[BY_ROW ? 0 : i] += static_cast<A>(z.of[i]) * static_cast<A>(z.of[i]);
    }
    store<V>(a.z + o, z);
  }
  __device__ void end(int64_t map) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) a.squares[map + i] = sum[i];
  }
};

template <class T, bool BY_ROW, int V, bool SQUARES>
__global__ void __launch_bounds__(kThreads, kMinBlocks) affine_kernel(Layout at, int lanes, Affine<T, Acc<T>> a) {
  AffineBody<T, BY_ROW, V, SQUARES> body{a, {}};
  sweep<BY_ROW, V>(at, lanes, body);
}

template <class T, bool BY_ROW, int V>
struct AffineBackwardBody {
  using A = Acc<T>;
  static constexpr bool kSums = false;
  AffineBackward<T, A> a;

  __device__ void clear() {}
  __device__ void begin(int64_t) {}
  __device__ void chunk(int64_t row, int64_t col, int64_t ld, int64_t channel) {
    const int64_t o = row * ld + col;
    const auto g = load<V>(a.g + o), x = load<V>(a.x + o);
    Vector<T, V> z = x, dx;
    if (a.passed.z != nullptr) z = load<V>(a.passed.z + o);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const int64_t c = BY_ROW ? channel + i : channel;
      const A value = static_cast<A>(x.of[i]);
      A grad = masked(a.passed, static_cast<A>(g.of[i]), value, z.of[i], c) * a.gain[c];
      if (a.pull != nullptr) grad += (value - a.mean[c]) * a.pull[c];
      dx.of[i] = static_cast<T>(grad);
    }
    store<V>(a.dx + o, dx);
  }
};

template <class T, bool BY_ROW, int V>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    affine_backward_kernel(Layout at, int lanes, AffineBackward<T, Acc<T>> a) {
  AffineBackwardBody<T, BY_ROW, V> body{a};
  sweep<BY_ROW, V>(at, lanes, body);
}

// How the blocks of a sum by channel lie over a tensor.
struct ChannelPlan {
  unsigned blocks;
  int lanes;
};

ChannelPlan channel_plan(const Layout& at, int width) {
  const int64_t slices = channel_slices(at);
  if (!at.by_row) return {static_cast<unsigned>(slices * at.channels), 1};
  int lanes = 1;
  while (lanes < kWarp && lanes * width < at.channels) lanes *= 2;
  const int64_t tile = static_cast<int64_t>(lanes) * width;
  return {static_cast<unsigned>(slices * ((at.channels + tile - 1) / tile)), lanes};
}

}  // namespace

int64_t channel_slices(const Layout& at) {
  // About 64 Ki elements a block, and no more than 256 parts to be added up for a channel.
  const int64_t elements = at.images * at.pixels * (at.by_row ? kWarp : 1);
  return std::clamp<int64_t>(elements / 65536, 1, 256);
}

template <class T, class A>
void moments(const Layout& at, const T* x, const A* pivot, double* parts, Stream stream) {
  by_layout<T>(at, takes_vectors<T>(at, x), [&]<bool BY_ROW, int V>() {
    const ChannelPlan p = channel_plan(at, V);
    launch(moments_kernel<T, BY_ROW, V>, p.blocks, kThreads, 0, stream, at, channel_slices(at), p.lanes, x, pivot,
           parts);
  });
}

template <class T, class A>
void dots(const Layout& at, const T* g, const T* x, const Passed<T, A>& passed, T* masked, double* parts,
          Stream stream) {
  by_layout<T>(at, takes_vectors<T>(at, g, x, passed.z, masked), [&]<bool BY_ROW, int V>() {
    const ChannelPlan p = channel_plan(at, V);
    launch(dots_kernel<T, BY_ROW, V>, p.blocks, kThreads, 0, stream, at, channel_slices(at), p.lanes,
           Dots<T, BY_ROW, V>{g, x, passed, masked}, parts);
  });
}

template <class T, class A>
void affine(const Layout& at, const Affine<T, A>& a, Stream stream) {
  by_layout<T>(at, takes_vectors<T>(at, a.x, a.residual, a.z), [&]<bool BY_ROW, int V>() {
    const Plan p = plan(at, V);
    if (a.squares != nullptr) {
      launch(affine_kernel<T, BY_ROW, V, true>, p.blocks, kThreads, 0, stream, at, p.lanes, a);
    } else {
      launch(affine_kernel<T, BY_ROW, V, false>, p.blocks, kThreads, 0, stream, at, p.lanes, a);
    }
  });
}

template <class T, class A>
void affine_backward(const Layout& at, const AffineBackward<T, A>& a, Stream stream) {
  by_layout<T>(at, takes_vectors<T>(at, a.g, a.x, a.passed.z, a.dx), [&]<bool BY_ROW, int V>() {
    const Plan p = plan(at, V);
    launch(affine_backward_kernel<T, BY_ROW, V>, p.blocks, kThreads, 0, stream, at, p.lanes, a);
  });
}

#define BCOS_INSTANTIATE(T, A)                                                                                 \
  template void moments<T, A>(const Layout&, const T*, const A*, double*, Stream);                             \
  template void dots<T, A>(const Layout&, const T*, const T*, const Passed<T, A>&, T*, double*, Stream);       \
  template void affine<T, A>(const Layout&, const Affine<T, A>&, Stream);                                      \
  template void affine_backward<T, A>(const Layout&, const AffineBackward<T, A>&, Stream)

BCOS_INSTANTIATE(c10::BFloat16, float);
BCOS_INSTANTIATE(c10::Half, float);
BCOS_INSTANTIATE(float, float);
BCOS_INSTANTIATE(double, double);

}  // namespace bcos::cuda
