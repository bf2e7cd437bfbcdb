// Whole-tensor passes: the tile kernels over images, groups and pixels, in parallel.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>

#include "tile.h"

namespace bcos::cpu {

// How a tensor [images, channels, pixels] lies in memory: channels-last rows of pixels, or contiguous planes of
// channels. A linear layer is one image whose pixels are its rows.
struct Layout {
  bool by_row;
  int64_t images;
  int64_t pixels;
  int64_t groups;

  int64_t norms() const { return images * groups * pixels; }
};

// A tile of a tensor: where it begins, and the distance between its rows.
struct Place {
  int64_t offset;
  int64_t ld;
};

// One group's channels over some neighbouring pixels of one image.
struct Span {
  Layout layout;
  int64_t image, group, first, count;

  // In a tensor with `channels` channels in all.
  Place in(int64_t channels) const {
    const int64_t own = channels / layout.groups;
    if (layout.by_row) return {(image * layout.pixels + first) * channels + group * own, channels};
    return {(image * channels + group * own) * layout.pixels + first, layout.pixels};
  }
  int64_t rows(int64_t channels) const { return layout.by_row ? count : channels / layout.groups; }
  int64_t cols(int64_t channels) const { return layout.by_row ? channels / layout.groups : count; }
  // In a map with one value by image, group and pixel.
  int64_t map() const { return (image * layout.groups + group) * layout.pixels + first; }
};

// Calls f(span, slot) for every span; `slot` (below `slots`) tells concurrent calls apart. About 16K elements a span: a
// tile and its companions stay in a 1 MiB L2 cache.
template <class F>
void for_spans(const Layout& layout, int64_t channels, int64_t slots, const F& f) {
  if (layout.norms() == 0 || channels == 0) return;
  const int64_t wanted = layout.by_row ? 16384 / channels : 256;
  const int64_t chunk = std::min(layout.pixels, std::max<int64_t>(wanted, 1));
  const int64_t chunks = (layout.pixels + chunk - 1) / chunk;
  const int64_t items = layout.images * chunks * layout.groups;
  // A thread takes on at least 32K elements: below, waking it costs more than it saves.
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, chunk * (channels / layout.groups)));
  slots = std::min(slots, (items + grain - 1) / grain);
  at::parallel_for(0, slots, 1, [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; ++slot) {
      for (int64_t i = items * slot / slots; i < items * (slot + 1) / slots; ++i) {
        const int64_t block = i / layout.groups;
        const int64_t first = block % chunks * chunk;
        f(Span{layout, block / chunks, i % layout.groups, first, std::min(chunk, layout.pixels - first)}, slot);
      }
    }
  });
}

inline int64_t thread_slots() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

// Calls f(first, count) for ranges of images: one a thread where that divides them fairly, so that all of f's passes
// over an image run in one parallel region and find it in the cache; else once for all, and f's passes are parallel
// themselves.
template <class F>
void for_images(int64_t images, const F& f) {
  const int64_t threads = thread_slots();
  if (threads == 1 || (images % threads != 0 && images < 4 * threads)) {
    f(int64_t{0}, images);
  } else {
    at::parallel_for(0, images, 1, [&](int64_t begin, int64_t end) { f(begin, end - begin); });
  }
}

// Sum of squares over each group's channels: [images, groups, pixels].
template <class T>
void square_sums(const Layout& layout, int64_t channels, const T* x, Acc<T>* out) {
  for_spans(layout, channels, thread_slots(), [&](const Span& s, int64_t) {
    const Place p = s.in(channels);
    tiles<T>().square_sum(layout.by_row, x + p.offset, p.ld, s.rows(channels), s.cols(channels), out + s.map());
  });
}

// dx += x * s.
template <class T>
void add_scaled(const Layout& layout, int64_t channels, T* dx, const T* x, const Acc<T>* s) {
  for_spans(layout, channels, thread_slots(), [&](const Span& span, int64_t) {
    const Place p = span.in(channels);
    tiles<T>().add_scaled(layout.by_row, dx + p.offset, p.ld, x + p.offset, p.ld, span.rows(channels),
                          span.cols(channels), s + span.map());
  });
}

// What stands behind the linear part of a layer, forward. `u` has channels * max_out channels; `linear`, where it is
// kept, `y` and `winner` have `channels`. Without MaxOut `linear` is `u` itself and `y` may be.
struct ScaleForward {
  Layout layout;
  int64_t channels, max_out;
  Exponent exponent;
  at::Tensor u, norm, y, linear, winner;
  int64_t first = 0;  // image of the tensors that `layout` begins with

  void run() const;
};

// The same backward: du from grad, and, where defined, pixel_sum [images, groups, pixels] = dL/dn. Returns dL/dB,
// which is 0 unless `needs_b`.
struct ScaleBackward {
  Layout layout;
  int64_t channels, max_out;
  Exponent exponent;
  bool detach, needs_b;
  at::Tensor grad, kept, norm, winner, du, pixel_sum;

  double run() const;
};

}  // namespace bcos::cpu
