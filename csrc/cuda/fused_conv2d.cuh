// What the two fused convolutions share: the matrix product of a block, and what follows it.
#pragma once

#include "fused_conv2d.h"
#include "primitives.cuh"
#include "scale.cuh"

namespace bcos::cuda {

// A block computes M pixels x N channels, a warp WM x WN of them in fragments of 16 x 8.
template <int M_, int N_, int WM, int WN>
struct Tile {
  static constexpr int M = M_, N = N_;
  static constexpr int kWarpM = WM, kWarpN = WN;
  static constexpr int kWarpsN = N / WN;
  static constexpr int kThreads = 32 * (M / WM) * kWarpsN;
  static constexpr int kRows = WM / 16, kColumns = WN / 8;  // fragments
  static constexpr int kPitch = N + 8;                      // of the staged output: four rows have their own banks

  // In lane i: pixels i / 4 and i / 4 + 8, channels 2 (i % 4) and the next, of every fragment.
  using Accumulators = float[kRows][kColumns][4];

  static constexpr int staged_bytes() { return M * kPitch * 4; }
};

struct Lane {
  int warp, lane;
  __device__ Lane() : warp(threadIdx.x / 32), lane(threadIdx.x % 32) {}

  // The row and the 16-byte chunk whose address this lane gives to load_matrices: of a[16 pixels, 16], and of
  // b[16 channels, 16].
  __device__ int a_row() const { return lane % 16; }
  __device__ int a_chunk() const { return lane / 16; }
  __device__ int b_row() const { return lane % 8 + lane / 16 * 8; }
  __device__ int b_chunk() const { return lane / 8 % 2; }
  // The pixel of the accumulators' first two elements; the other two belong to the one 8 further.
  __device__ int pixel() const { return lane / 4; }
  __device__ int channel() const { return lane % 4 * 2; }
};

// acc += a b over 16 inputs; b holds two fragments an entry.
template <class Tile, class T>
__device__ __forceinline__ void multiply(typename Tile::Accumulators& acc, const uint32_t (&a)[Tile::kRows][4],
                                         const uint32_t (&b)[Tile::kColumns / 2][4]) {
#pragma unroll
  for (int i = 0; i < Tile::kRows; ++i) {
#pragma unroll
    for (int j = 0; j < Tile::kColumns; ++j) {
      multiply_add<T>(acc[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
    }
  }
}

template <class T>
__device__ __forceinline__ float square(uint32_t packed) {
  const float2 pair = halves<T>(packed);
  return pair.x * pair.x + pair.y * pair.y;
}

// l = acc * gain + bias, y = l * scale(l, n). By way of shared memory, in float32, so that a thread has 8 channels of a
// pixel: 16 bytes to write, and the accumulators' registers are free. `s_norm` has the tile's norms, `row_of(pixel of
// the tile)` is the pixel's row in y, or -1; `first` is the tile's first channel.
template <class Tile, class T, class RowOf>
__device__ __forceinline__ void finish(const Conv2d<T>& a, const typename Tile::Accumulators& acc, const float* s_norm,
                                       float* s_tile, int first, const RowOf& row_of) {
  const Lane at;
  const int to = (at.warp / Tile::kWarpsN * Tile::kWarpM + at.pixel()) * Tile::kPitch +
                 at.warp % Tile::kWarpsN * Tile::kWarpN + at.channel();
#pragma unroll
  for (int i = 0; i < Tile::kRows; ++i) {
#pragma unroll
    for (int j = 0; j < Tile::kColumns; ++j) {
      store<2>(s_tile + to + i * 16 * Tile::kPitch + j * 8, Vector<float, 2>{acc[i][j][0], acc[i][j][1]});
      store<2>(s_tile + to + (i * 16 + 8) * Tile::kPitch + j * 8, Vector<float, 2>{acc[i][j][2], acc[i][j][3]});
    }
  }
  sync_block();

  constexpr int kPieces = Tile::N / 8, kStep = Tile::kThreads / kPieces;
  const int piece = threadIdx.x % kPieces * 8, o = first + piece;
  float gain[8], bias[8];
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    const bool has = o + e < a.out_channels;
    gain[e] = has && a.gain != nullptr ? a.gain[o + e] : 1.f;
    bias[e] = has && a.bias != nullptr ? static_cast<float>(a.bias[o + e]) : 0.f;
  }
  const auto write = [&](T* p, const Vector<T, 8>& values) {
    if (a.out_channels % 8 == 0) {
      store<8>(p, values);
    } else {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        if (o + e < a.out_channels) p[e] = values.of[e];
      }
    }
  };
  const auto run = [&](const auto& scale) {
    for (int i = threadIdx.x / kPieces; i < Tile::M; i += kStep) {
      const int64_t row = row_of(i);
      if (row < 0 || o >= a.out_channels) continue;
      const float rn = 1.f / s_norm[i];
      const float* p_row = s_tile + i * Tile::kPitch + piece;
      const auto low = load<4>(p_row), high = load<4>(p_row + 4);
      Vector<T, 8> linear, y;
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const float l = (e < 4 ? low.of[e % 4] : high.of[e % 4]) * gain[e] + bias[e];
        linear.of[e] = static_cast<T>(l);
        y.of[e] = static_cast<T>(scale.forward(l, rn));
      }
      write(a.y + row * a.out_channels + o, y);
      if (a.linear != nullptr) write(a.linear + row * a.out_channels + o, linear);
    }
  };
  if (a.power.form == Form::kQuadratic) {
    run(make_scale<Quadratic>(a.power, false));
  } else {
    run(make_scale<General>(a.power, false));
  }
}

}  // namespace bcos::cuda
