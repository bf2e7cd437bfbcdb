// How passes over a tensor are divided among threads.
//
// A team of threads takes one group's channels at one pixel (channels-last) or at V neighbouring pixels (contiguous), V
// elements at a time: 16 bytes where sizes and addresses allow, else one.
#pragma once

#include <algorithm>

#include "layout.h"
#include "primitives.cuh"

namespace bcos::cuda {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kSlices = kThreads / kWarp;  // of a group's channels in the contiguous layout: one a warp
constexpr int kMinBlocks = 3;              // 80 registers, 24 warps: ptxas spills where it is left to choose
constexpr int64_t kMaxBlocks = 4096;       // 31 a multiprocessor of an H100; more would only be queued

// Sums over the team, whose first thread gets the result; every thread of the block has to call it.
template <class A, int W>
__device__ __forceinline__ void sum_over_lanes(A (&sum)[W], int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) {
#pragma unroll
    for (int i = 0; i < W; ++i) sum[i] += shuffle_xor(sum[i], offset);
  }
}

template <class A, int W>
__device__ __forceinline__ void sum_over_slices(A (&sum)[W]) {
  __shared__ A parts[kSlices][W][kWarp];
  const int slice = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll
  for (int i = 0; i < W; ++i) parts[slice][i][lane] = sum[i];
  sync_block();
  if (slice == 0) {
    for (int s = 1; s < kSlices; ++s) {
#pragma unroll
      for (int i = 0; i < W; ++i) sum[i] += parts[s][i][lane];
    }
  }
  sync_block();
}

// What a pass does is its Body:
//   clear()                before everything
//   begin(map)             before the channels; `map` is where the (first) pixel stands in a map
//   chunk(row, col, ld, c) V elements, from row * ld + col on: channels c, c + 1, ..., or pixels of channel c
//   end(map)               after them, by the team's first thread; only with kSums, when Body::sum was summed
// A body holds what belongs to a pixel once (channels-last) or V times (contiguous).
template <bool BY_ROW, int V, class Body>
__device__ __forceinline__ void sweep(const Layout& at, int lanes, Body& body) {
  const int64_t own = at.channels / at.groups;
  if constexpr (BY_ROW) {
    const int64_t segments = at.images * at.pixels * at.groups;
    const int64_t stride = static_cast<int64_t>(gridDim.x) * (kThreads / lanes);
    const int in_block = threadIdx.x / lanes, in_warp = threadIdx.x % kWarp / lanes, lane = threadIdx.x % lanes;
    // By the warp's first segment: all its lanes make the same number of rounds, as the shuffles need.
    for (int64_t s = static_cast<int64_t>(blockIdx.x) * (kThreads / lanes) + in_block; s - in_warp < segments;
         s += stride) {
      const bool active = s < segments;
      int64_t map = s;
      if (at.groups > 1) {
        const int64_t pixel = s / at.groups, image = pixel / at.pixels;
        map = (image * at.groups + s % at.groups) * at.pixels + pixel % at.pixels;
      }
      body.clear();
      if (active) {
        body.begin(map);
        for (int64_t c = lane * V; c < own; c += lanes * V) body.chunk(s, c, own, c);
      }
      if constexpr (Body::kSums) {
        sum_over_lanes(body.sum, lanes);
        if (active && lane == 0) body.end(map);
      }
    }
  } else {
    const int64_t tiles = (at.pixels + kWarp * V - 1) / (kWarp * V);
    const int64_t items = at.images * at.groups * tiles;
    const int slice = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
      const int64_t plane = item / tiles, pixel = (item % tiles * kWarp + lane) * V;
      const bool active = pixel < at.pixels;
      body.clear();
      if (active) {
        body.begin(plane * at.pixels + pixel);
        // Unrolled, it spills on sm_100 and sm_120.
#pragma unroll 1
        for (int64_t c = slice; c < own; c += kSlices) body.chunk(plane * own + c, pixel, at.pixels, c);
      }
      if constexpr (Body::kSums) {
        sum_over_slices(body.sum);
        if (active && slice == 0) body.end(plane * at.pixels + pixel);
      }
    }
  }
}

inline unsigned blocks_for(int64_t items) {
  return static_cast<unsigned>(std::clamp<int64_t>(items, 1, kMaxBlocks));
}

// How the teams of a sweep lie over a tensor.
struct Plan {
  unsigned blocks;
  int lanes;
};

inline Plan plan(const Layout& at, int width) {
  if (!at.by_row) {
    const int64_t tile = kWarp * width;
    return {blocks_for(at.images * at.groups * ((at.pixels + tile - 1) / tile)), kWarp};
  }
  int lanes = 1;
  while (lanes < kWarp && lanes * width < at.own()) lanes *= 2;
  return {blocks_for((at.map_size() * lanes + kThreads - 1) / kThreads), lanes};
}

// Whether V elements can be taken at once: V divides a row, and every row begins at a multiple of 16 bytes.
template <class T, class... P>
bool takes_vectors(const Layout& at, const P*... pointers) {
  const int64_t row = at.by_row ? at.own() : at.pixels;
  return row % (16 / sizeof(T)) == 0 && (... && (reinterpret_cast<uintptr_t>(pointers) % 16 == 0));
}

// Calls f.operator()<BY_ROW, V>() for the layout.
template <class T, class F>
void by_layout(const Layout& at, bool vectors, const F& f) {
  constexpr int V = 16 / sizeof(T);
  if (at.by_row) {
    vectors ? f.template operator()<true, V>() : f.template operator()<true, 1>();
  } else {
    vectors ? f.template operator()<false, V>() : f.template operator()<false, 1>();
  }
}

}  // namespace bcos::cuda
