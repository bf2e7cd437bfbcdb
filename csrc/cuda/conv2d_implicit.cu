// y[m, o] = l * scale(l, n[m]),  l[m, o] = gain[o] * sum over k of a[m, k] w[o, k] + bias[o],
// n[m] = root(sum over k of a[m, k]^2).
//
// m = (image, p, q) counts output pixels and k = (i, j, c) the window's taps and channels: a[m, k] is
// x[image, p s_h - p_h + i d_h, q s_w - p_w + j d_w, c], or 0 outside. Nothing is unfolded: background copies bring
// tiles of a and w to shared memory, kStages ahead of the tensor cores, and the squares are summed from the same
// fragments. A linear layer is the window of one pixel on images of one pixel.
#include <algorithm>

#include "fused_conv2d.cuh"

namespace bcos::cuda {
namespace {

constexpr int kDepth = 32;            // inputs k of a stage
constexpr int kChunks = kDepth / 8;   // of 16 bytes, in a row of a stage
constexpr int kStages = 4;
constexpr int kOutside = -(1 << 30);  // no tap of a window there is inside an image

// Where chunk c of a row stands: eight neighbouring rows have theirs in different banks.
__device__ __forceinline__ int swizzled(int row, int chunk) {
  return (row * kChunks + (chunk ^ (row / 2 % kChunks))) * 8;
}

// 128 x 128: 68.5 KiB of shared memory and 128 registers, two blocks a multiprocessor from sm_80 on.
using Wide = Tile<128, 128, 64, 32>;
using Narrow = Tile<128, 64, 32, 32>;
using Small = Tile<64, 64, 32, 32>;

template <class Tile>
constexpr int stage_bytes() {
  return (Tile::M + Tile::N) * kDepth * 2;
}

// The norms, and behind them the stages, or the output on its way.
template <class Tile>
constexpr int shared_bytes() {
  return Tile::M * 4 + std::max(kStages * stage_bytes<Tile>(), Tile::staged_bytes());
}

template <class T, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 2) implicit_conv2d_kernel(const Conv2d<T> a) {
  float* s_norm = reinterpret_cast<float*>(dynamic_shared());
  float* s_tile = s_norm + Tile::M;
  T* s_a = reinterpret_cast<T*>(s_tile);
  T* s_b = s_a + kStages * Tile::M * kDepth;
  const int height = a.window.height, width = a.window.width, kernel_w = a.window.kernel[1];
  const int dilation_h = a.window.dilation[0], dilation_w = a.window.dilation[1];
  const int64_t depth = a.window.kernel[0] * a.window.kernel[1] * a.channels;
  const int64_t pixels = a.images * a.window.out_height * a.window.out_width;
  // Neighbouring blocks share their pixels, which are the larger operand.
  const int tiles_n = (a.out_channels + Tile::N - 1) / Tile::N;
  const int64_t first_pixel = static_cast<int64_t>(blockIdx.x / tiles_n) * Tile::M;
  const int first_channel = blockIdx.x % tiles_n * Tile::N;
  const Lane at;

  // This thread copies chunk `chunk` of every kStep-th row.
  constexpr int kStep = Tile::kThreads / kChunks;
  constexpr int kCopiesA = Tile::M / kStep, kCopiesB = Tile::N / kStep;
  const int chunk = threadIdx.x % kChunks, row = threadIdx.x / kChunks;
  const T* p_image[kCopiesA];
  int top[kCopiesA], left[kCopiesA];
#pragma unroll
  for (int i = 0; i < kCopiesA; ++i) {
    const int64_t m = first_pixel + row + i * kStep, q = m % a.window.out_width, rest = m / a.window.out_width;
    const int64_t p = rest % a.window.out_height, image = rest / a.window.out_height;
    p_image[i] = a.x + image * height * width * a.channels;
    top[i] = m < pixels ? static_cast<int>(p * a.window.stride[0] - a.window.padding[0]) : kOutside;
    left[i] = static_cast<int>(q * a.window.stride[1] - a.window.padding[1]);
  }
  const T* p_weight[kCopiesB];
#pragma unroll
  for (int i = 0; i < kCopiesB; ++i) {
    const int o = first_channel + row + i * kStep;
    p_weight[i] = o < a.out_channels ? a.weight + o * depth : nullptr;
  }

  // The chunk's place k = (tap_h, tap_w, c) in the stage that is copied next.
  int64_t k = chunk * 8;
  int c = chunk * 8, tap_h = 0, tap_w = 0;
  const auto settle = [&] {
    while (c >= a.channels) {
      c -= a.channels;
      if (++tap_w == kernel_w) {
        tap_w = 0;
        ++tap_h;
      }
    }
  };
  settle();
  const auto copy_stage = [&](int slot) {
    T* p_a = s_a + slot * Tile::M * kDepth;
    T* p_b = s_b + slot * Tile::N * kDepth;
#pragma unroll
    for (int i = 0; i < kCopiesA; ++i) {
      const int h = top[i] + tap_h * dilation_h, w = left[i] + tap_w * dilation_w;
      const bool inside = k < depth && 0 <= h && h < height && 0 <= w && w < width;
      const T* p = inside ? p_image[i] + (static_cast<int64_t>(h) * width + w) * a.channels + c : a.x;
      copy_async(p_a + swizzled(row + i * kStep, chunk), p, inside);
    }
#pragma unroll
    for (int i = 0; i < kCopiesB; ++i) {
      const bool inside = k < depth && p_weight[i] != nullptr;
      copy_async(p_b + swizzled(row + i * kStep, chunk), inside ? p_weight[i] + k : a.weight, inside);
    }
    k += kDepth;
    c += kDepth;
    settle();
  };

  const int stages = static_cast<int>((depth + kDepth - 1) / kDepth);
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < stages) copy_stage(s);
    copy_async_commit();
  }

  const int warp_m = at.warp / Tile::kWarpsN, warp_n = at.warp % Tile::kWarpsN;
  const int a_row = warp_m * Tile::kWarpM + at.a_row(), b_row = warp_n * Tile::kWarpN + at.b_row();
  typename Tile::Accumulators acc = {};
  // The warps beside each other have the same fragments of a: each sums the squares of its share.
  constexpr int kShare = (Tile::kRows + Tile::kWarpsN - 1) / Tile::kWarpsN;
  float squares[kShare][2] = {};
  for (int s = 0; s < stages; ++s) {
    copy_async_wait<kStages - 2>();
    sync_block();
    // Into the slot that all warps have left since the barrier before.
    if (s + kStages - 1 < stages) copy_stage((s + kStages - 1) % kStages);
    copy_async_commit();
    const T* p_a = s_a + s % kStages * Tile::M * kDepth;
    const T* p_b = s_b + s % kStages * Tile::N * kDepth;
#pragma unroll
    for (int step = 0; step < kDepth / 16; ++step) {
      uint32_t fragment_a[Tile::kRows][4], fragment_b[Tile::kColumns / 2][4];
#pragma unroll
      for (int i = 0; i < Tile::kRows; ++i) {
        load_matrices(fragment_a[i], p_a + swizzled(a_row + i * 16, step * 2 + at.a_chunk()));
      }
#pragma unroll
      for (int j = 0; j < Tile::kColumns / 2; ++j) {
        load_matrices(fragment_b[j], p_b + swizzled(b_row + j * 16, step * 2 + at.b_chunk()));
      }
      multiply<Tile, T>(acc, fragment_a, fragment_b);
#pragma unroll
      for (int i = 0; i < Tile::kRows; ++i) {
        if (i % Tile::kWarpsN == warp_n) {
          squares[i / Tile::kWarpsN][0] += square<T>(fragment_a[i][0]) + square<T>(fragment_a[i][2]);
          squares[i / Tile::kWarpsN][1] += square<T>(fragment_a[i][1]) + square<T>(fragment_a[i][3]);
        }
      }
    }
  }

#pragma unroll
  for (int i = 0; i < Tile::kRows; ++i) {
    if (i % Tile::kWarpsN != warp_n) continue;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = squares[i / Tile::kWarpsN][half];
      sum += shuffle_xor(sum, 1);
      sum += shuffle_xor(sum, 2);
      const int pixel = warp_m * Tile::kWarpM + i * 16 + half * 8 + at.pixel();
      if (at.lane % 4 == 0) s_norm[pixel] = norm_of(a.root, sum);
    }
  }
  sync_block();
  if (first_channel == 0) {
    for (int i = threadIdx.x; i < Tile::M; i += Tile::kThreads) {
      if (first_pixel + i < pixels) a.norm[first_pixel + i] = s_norm[i];
    }
  }
  finish<Tile>(a, acc, s_norm, s_tile, first_channel, [&](int i) -> int64_t {
    return first_pixel + i < pixels ? first_pixel + i : -1;
  });
}

template <class Tile, class T>
int64_t blocks(const Conv2d<T>& a) {
  return (a.pixels() + Tile::M - 1) / Tile::M * ((a.out_channels + Tile::N - 1) / Tile::N);
}

template <class Tile, class T>
void run(const Conv2d<T>& a, Stream stream) {
  launch(implicit_conv2d_kernel<T, Tile>, static_cast<unsigned>(blocks<Tile>(a)), Tile::kThreads, shared_bytes<Tile>(),
         stream, a);
}

}  // namespace

template <class T>
void implicit_conv2d(const Conv2d<T>& a, Stream stream) {
  constexpr int64_t kFull = 132;  // multiprocessors of an H100: with fewer blocks, smaller ones keep more of them busy
  if (a.out_channels > Narrow::N && blocks<Wide>(a) >= kFull) return run<Wide>(a, stream);
  if (blocks<Narrow>(a) >= kFull) return run<Narrow>(a, stream);
  run<Small>(a, stream);
}

template void implicit_conv2d<c10::BFloat16>(const Conv2d<c10::BFloat16>&, Stream);
template void implicit_conv2d<c10::Half>(const Conv2d<c10::Half>&, Stream);

}  // namespace bcos::cuda
