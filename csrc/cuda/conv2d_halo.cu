// The same as conv2d_implicit.cu, for 3x3 windows with stride and dilation 1 over C = 64 or 128 channels.
//
// A block computes 8 x 16 pixels. The 10 x 18 pixels that their windows cover are copied to shared memory once, where
// the implicit product reads 9 x 8 x 16 of them from L2: 6.4 times as many. Weights are streamed, 64 inputs a stage.
// The squares are summed once a pixel, and the windows' sums taken from those.
#include "fused_conv2d.cuh"

namespace bcos::cuda {
namespace {

constexpr int kHeight = 8, kWidth = 16;  // 16: a fragment is a row of pixels
constexpr int kHaloWidth = kWidth + 2, kHalo = (kHeight + 2) * kHaloWidth;
constexpr int kDepth = 64;  // inputs of a stage of weights
constexpr int kStages = 3;

template <int C>
using HaloTile = Tile<kHeight * kWidth, C, 32, C / 2>;

// C = 64: 47.7 KiB; C = 128: 94.2 KiB, two blocks a multiprocessor on sm_90.
template <int C>
constexpr int shared_bytes() {
  constexpr int inputs = kHalo * C * 2 + kStages * HaloTile<C>::N * kDepth * 2;
  static_assert(HaloTile<C>::staged_bytes() <= inputs);
  return inputs + (kHalo + HaloTile<C>::M) * 4;
}

// Where chunk c of a row of C elements stands: eight neighbouring rows have theirs in different banks.
template <int C>
__device__ __forceinline__ int swizzled(int row, int chunk) {
  return row * C + (chunk ^ (row % 8)) * 8;
}

template <class T, int C>
__global__ void __launch_bounds__(HaloTile<C>::kThreads, 2) halo_conv2d_kernel(const Conv2d<T> a) {
  using Tile = HaloTile<C>;
  T* s_x = reinterpret_cast<T*>(dynamic_shared());
  T* s_w = s_x + kHalo * C;
  float* s_squares = reinterpret_cast<float*>(s_w + kStages * Tile::N * kDepth);
  float* s_norm = s_squares + kHalo;
  const int height = a.window.height, width = a.window.width;
  const int out_height = a.window.out_height, out_width = a.window.out_width;
  const int tiles_n = (a.out_channels + Tile::N - 1) / Tile::N;
  const int tiles_w = (out_width + kWidth - 1) / kWidth, tiles_h = (out_height + kHeight - 1) / kHeight;
  const int first_channel = blockIdx.x % tiles_n * Tile::N;
  const unsigned tile = blockIdx.x / tiles_n, row_of_tiles = tile / tiles_w;
  const int first_q = tile % tiles_w * kWidth, first_p = row_of_tiles % tiles_h * kHeight;
  const int64_t image = row_of_tiles / tiles_h;
  const Lane at;

  constexpr int kChunks = C / 8;
  const T* p_image = a.x + image * height * width * C;
  for (int id = threadIdx.x; id < kHalo * kChunks; id += Tile::kThreads) {
    const int pixel = id / kChunks, chunk = id % kChunks;
    const int h = first_p - static_cast<int>(a.window.padding[0]) + pixel / kHaloWidth;
    const int w = first_q - static_cast<int>(a.window.padding[1]) + pixel % kHaloWidth;
    const bool inside = 0 <= h && h < height && 0 <= w && w < width;
    const T* p = inside ? p_image + (static_cast<int64_t>(h) * width + w) * C + chunk * 8 : a.x;
    copy_async(s_x + swizzled<C>(pixel, chunk), p, inside);
  }
  // Of the weights, this thread copies one chunk of every kStep-th row.
  constexpr int kStep = Tile::kThreads / (kDepth / 8);
  const int w_row = threadIdx.x / (kDepth / 8), w_chunk = threadIdx.x % (kDepth / 8);
  const int w_rows = a.out_channels - first_channel;
  const T* p_weight = a.weight + static_cast<int64_t>(first_channel + w_row) * 9 * C + w_chunk * 8;
  const auto copy_weights = [&](int stage) {
    T* p_w = s_w + stage % kStages * Tile::N * kDepth + swizzled<kDepth>(w_row, w_chunk);
#pragma unroll
    for (int i = 0; i < Tile::N; i += kStep) {
      const bool inside = w_row + i < w_rows;
      copy_async(p_w + i * kDepth, inside ? p_weight + i * 9 * C + stage * kDepth : a.weight, inside);
    }
  };
  constexpr int kAll = 9 * C / kDepth;
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    copy_weights(s);  // the first group has the pixels too
    copy_async_commit();
  }

  const int warp_m = at.warp / Tile::kWarpsN, warp_n = at.warp % Tile::kWarpsN;
  const int b_row = warp_n * Tile::kWarpN + at.b_row();
  typename Tile::Accumulators acc = {};
  for (int s = 0; s < kAll; ++s) {
    copy_async_wait<kStages - 2>();
    sync_block();
    if (s + kStages - 1 < kAll) copy_weights(s + kStages - 1);
    copy_async_commit();
    const T* p_w = s_w + s % kStages * Tile::N * kDepth;
    const int tap = s / (C / kDepth), first = s % (C / kDepth) * (kDepth / 8);
    const int origin = (warp_m * Tile::kRows + tap / 3) * kHaloWidth + at.a_row() + tap % 3;
#pragma unroll
    for (int step = 0; step < kDepth / 16; ++step) {
      uint32_t fragment_a[Tile::kRows][4], fragment_b[Tile::kColumns / 2][4];
#pragma unroll
      for (int i = 0; i < Tile::kRows; ++i) {
        load_matrices(fragment_a[i], s_x + swizzled<C>(origin + i * kHaloWidth, first + step * 2 + at.a_chunk()));
      }
#pragma unroll
      for (int j = 0; j < Tile::kColumns / 2; ++j) {
        load_matrices(fragment_b[j], p_w + swizzled<kDepth>(b_row + j * 16, step * 2 + at.b_chunk()));
      }
      multiply<Tile, T>(acc, fragment_a, fragment_b);
    }
  }
  if (threadIdx.x < kHalo) {
    float sum = 0;
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const auto x = load<8>(s_x + swizzled<C>(threadIdx.x, chunk));
#pragma unroll
      for (int e = 0; e < 8; ++e) sum += static_cast<float>(x.of[e]) * static_cast<float>(x.of[e]);
    }
    s_squares[threadIdx.x] = sum;
  }
  sync_block();
  const auto row_of = [&](int i) -> int64_t {
    const int p = first_p + i / kWidth, q = first_q + i % kWidth;
    return p < out_height && q < out_width ? (image * out_height + p) * out_width + q : -1;
  };
  if (threadIdx.x < Tile::M) {
    const float* p_first = s_squares + threadIdx.x / kWidth * kHaloWidth + threadIdx.x % kWidth;
    float sum = 0;
#pragma unroll
    for (int tap = 0; tap < 9; ++tap) sum += p_first[tap / 3 * kHaloWidth + tap % 3];
    const float norm = norm_of(a.root, sum);
    s_norm[threadIdx.x] = norm;
    const int64_t to = row_of(threadIdx.x);
    if (first_channel == 0 && to >= 0) a.norm[to] = norm;
  }
  // finish() has a barrier before it reads the norms
  finish<Tile>(a, acc, s_norm, reinterpret_cast<float*>(s_x), first_channel, row_of);
}

template <int C, class T>
void run(const Conv2d<T>& a, Stream stream) {
  const int64_t tiles = (a.window.out_height + kHeight - 1) / kHeight * ((a.window.out_width + kWidth - 1) / kWidth);
  const int64_t blocks = a.images * tiles * ((a.out_channels + C - 1) / C);
  launch(halo_conv2d_kernel<T, C>, static_cast<unsigned>(blocks), HaloTile<C>::kThreads, shared_bytes<C>(), stream, a);
}

}  // namespace

template <class T>
void halo_conv2d(const Conv2d<T>& a, Stream stream) {
  a.channels == 64 ? run<64>(a, stream) : run<128>(a, stream);
}

template void halo_conv2d<c10::BFloat16>(const Conv2d<c10::BFloat16>&, Stream);
template void halo_conv2d<c10::Half>(const Conv2d<c10::Half>&, Stream);

}  // namespace bcos::cuda
