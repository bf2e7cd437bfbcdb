#include "pointwise.h"

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "passes.h"

namespace bcos::cpu {
namespace {

// Columns of one panel of the packed weight. 64 is the widest that oneDNN's kernel keeps in registers: on a Zen 5 core
// 235 GFLOP/s, against 200 with an unpacked operand (1024 -> 256 channels, blocks of 128 rows).
constexpr int64_t kPanel = 64;
constexpr int64_t kWide = 256;  // columns at a time where the operand is not packed (gradient of the weight)
// Pixels that the gradient of the weight sums in one go. Rounding: 1.3 times the error of ATen's own at 256, 1.04 at
// 128; time: 64 costs 10 % on 512 -> 2048 channels, 128 about 4 %.
constexpr int64_t kSum = 128;
constexpr int64_t kMostRows = 256;  // rows of a block
constexpr int64_t kLeastRows = 64;

// Scratch memory from torch's allocator, so that its statistics tell all that a layer takes. Not initialised.
struct Buffer {
  at::DataPtr data;
  explicit Buffer(int64_t n) : data(c10::GetCPUAllocator()->allocate(std::max<int64_t>(n, 1) * sizeof(float))) {}
  float* get() const { return static_cast<float*>(data.get()); }
};

void multiply(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
              int64_t ldc, bool add) {
#if defined(CPUBLAS_BRGEMM_F32F32F32)
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, false);
#else
  (void)m, (void)n, (void)k, (void)a, (void)lda, (void)b, (void)ldb, (void)c, (void)ldc, (void)add;
  TORCH_CHECK(false, "native: this torch has no float32 brgemm");
#endif
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Splits [begin, end) into equal blocks of about `target` rows and calls f(first, count).
template <class F>
void for_blocks(int64_t begin, int64_t end, int64_t target, const F& f) {
  if (begin >= end) return;
  const int64_t blocks = divide_up(end - begin, target);
  const int64_t size = divide_up(end - begin, blocks);
  for (int64_t r = begin; r < end; r += size) f(r, std::min(size, end - r));
}

// Calls f(slot, begin, end) for about equal ranges of rows, one a thread.
template <class F>
void for_slots(int64_t slots, int64_t rows, const F& f) {
  at::parallel_for(0, slots, 1, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) f(s, rows * s / slots, rows * (s + 1) / slots);
  });
}

int64_t slots_for(int64_t rows) { return std::clamp<int64_t>(divide_up(rows, kLeastRows), 1, thread_slots()); }

void gather(const Pointwise& p, const float* x, int64_t first, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) std::memcpy(to + i * p.in, x + p.map(first + i) * p.in, p.in * sizeof(float));
}

}  // namespace

bool pointwise_available() {
  static const bool available = [] {
    if (!has_avx512()) return false;
    try {  // oneDNN may have been built without it
      std::vector<float> a(16 * 16, 1.f), c(16 * 16);
      multiply(16, 16, 16, a.data(), 16, a.data(), 16, c.data(), 16, false);
      return c[0] == 16.f;
    } catch (const std::exception&) {
      return false;
    }
  }();
  return available;
}

void Pointwise::forward(float* norm, float* y, float* linear) const {
  const auto& t = tiles<float>();
  const int64_t panels = divide_up(out, kPanel);
  Buffer packed(in * out);  // panel j: [C, columns], the transpose of its rows of the weight
  at::parallel_for(0, panels, std::max<int64_t>(1, 32768 / (in * kPanel)), [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      const int64_t n = std::min(kPanel, out - j * kPanel);
      t.transpose(weight + j * kPanel * in, in, packed.get() + j * kPanel * in, n, n, in);
    }
  });
  const int64_t block = std::clamp<int64_t>(65536 / in, kLeastRows, kMostRows);
  for_slots(slots_for(rows), rows, [&](int64_t, int64_t begin, int64_t end) {
    Buffer gathered(map.identity() ? 0 : block * in);
    for_blocks(begin, end, block, [&](int64_t first, int64_t count) {
      const float* a = x + first * in;
      if (!map.identity()) {
        gather(*this, x, first, count, gathered.get());
        a = gathered.get();
      }
      float* n = norm + first;
      t.square_sum(true, a, in, count, in, n);
      for (int64_t i = 0; i < count; ++i) {
        n[i] = patch_norm ? std::sqrt(n[i] + static_cast<float>(kPatchNormEps))
                          : std::sqrt(n[i]) + static_cast<float>(kRowNormEps);
      }
      float* l = (linear ? linear : y) + first * out;
      for (int64_t j = 0; j < panels; ++j) {
        const int64_t c0 = j * kPanel, width = std::min(kPanel, out - c0);
        multiply(count, width, in, a, in, packed.get() + c0 * in, width, l + c0, out, false);
        if (bias) {
          for (int64_t i = 0; i < count; ++i) {
            for (int64_t c = 0; c < width; ++c) l[i * out + c0 + c] += bias[c0 + c];
          }
        }
        t.scale(true, l + c0, out, y + first * out + c0, out, count, width, n, exponent);
      }
    });
  });
}

bool Pointwise::backward_fits() const {
  return slots_for(rows) * in * out * static_cast<int64_t>(sizeof(float)) <= (int64_t{64} << 20);
}

void Pointwise::backward(const float* grad, const float* kept, const float* norm, bool detach,
                         const Wanted& wanted) const {
  const auto& t = tiles<float>();
  const int64_t slots = slots_for(rows);
  const int64_t panels = divide_up(in, kPanel);
  Buffer packed(wanted.dx ? in * out : 0);  // panel j: [O, columns]
  if (wanted.dx) {
    at::parallel_for(0, panels, std::max<int64_t>(1, 32768 / (out * kPanel)), [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) {
        const int64_t n = std::min(kPanel, in - j * kPanel);
        float* panel = packed.get() + j * kPanel * out;
        for (int64_t o = 0; o < out; ++o) std::memcpy(panel + o * n, weight + o * in + j * kPanel, n * sizeof(float));
      }
    });
  }

  // dweight = dl^T x. The product wants its left operand transposed: that of the narrower, into sums of either layout.
  const bool direct = out <= in;  // sums [O, C], else [C, O]
  const int64_t narrow = direct ? out : in, wide = direct ? in : out;
  const int64_t sum_slots = wanted.dweight ? slots - (direct ? 1 : 0) : 0;
  Buffer sums(sum_slots * in * out);
  const auto sum_of = [&](int64_t slot) {
    return direct ? (slot == 0 ? wanted.dweight : sums.get() + (slot - 1) * in * out) : sums.get() + slot * in * out;
  };
  std::vector<double> db(slots * 8, 0.0);
  std::vector<std::vector<double>> dbias(slots);
  const bool pull_norm = wanted.dx && !detach;

  // The smaller the block, the more of it stays in the cache; the larger, the fewer times the sums travel, which
  // decides where they are too large for the cache themselves (512 -> 2048 channels: 4 MiB).
  const bool sums_travel = wanted.dweight && in * out > 262144;
  const int64_t block =
      sums_travel ? kMostRows : std::clamp<int64_t>(131072 / std::max(in, out), kLeastRows, kMostRows);
  for_slots(slots, rows, [&](int64_t slot, int64_t begin, int64_t end) {
    Buffer dl(block * out), pixel_sum(block), turned(wanted.dweight ? block * narrow : 0);
    Buffer gathered(map.identity() ? 0 : block * in), scattered(map.identity() ? 0 : block * in);
    if (wanted.dbias) dbias[slot].assign(out, 0.0);
    for_blocks(begin, end, block, [&](int64_t first, int64_t count) {
      const float* a = x + first * in;
      float* da = wanted.dx ? wanted.dx + first * in : nullptr;
      if (!map.identity()) {
        gather(*this, x, first, count, gathered.get());
        a = gathered.get();
        da = wanted.dx ? scattered.get() : nullptr;
      }
      const float* n = norm + first;
      float* s = pixel_sum.get();
      t.scale_backward(true, grad + first * out, out, kept + first * out, out, dl.get(), out, count, out, n,
                       pull_norm ? s : nullptr, wanted.db ? &db[slot * 8] : nullptr, exponent, detach);
      if (pull_norm) {
        const Root root = patch_norm ? Root::kPatch : Root::kRow;
        for (int64_t i = 0; i < count; ++i) s[i] = pull_of(root, s[i], n[i]);
      }
      if (wanted.dbias) {
        for (int64_t i = 0; i < count; ++i) {
          for (int64_t c = 0; c < out; ++c) dbias[slot][c] += dl.get()[i * out + c];
        }
      }
      if (da) {
        for (int64_t j = 0; j < panels; ++j) {
          const int64_t c0 = j * kPanel, width = std::min(kPanel, in - c0);
          multiply(count, width, out, dl.get(), out, packed.get() + c0 * out, width, da + c0, in, false);
          if (pull_norm) t.add_scaled(true, da + c0, in, a + c0, in, count, width, s);
        }
        if (!map.identity()) {
          for (int64_t i = 0; i < count; ++i) {
            std::memcpy(wanted.dx + map(first + i) * in, da + i * in, in * sizeof(float));
          }
        }
      }
      if (wanted.dweight) {
        const float* b = direct ? a : dl.get();
        if (direct) {
          t.transpose(dl.get(), out, turned.get(), count, count, out);
        } else {
          t.transpose(a, in, turned.get(), count, count, in);
        }
        for (int64_t k = 0; k < count; k += kSum) {
          for (int64_t m = 0; m < narrow; m += kWide) {
            for (int64_t c = 0; c < wide; c += kWide) {
              multiply(std::min(kWide, narrow - m), std::min(kWide, wide - c), std::min(kSum, count - k),
                       turned.get() + m * count + k, count, b + k * wide + c, wide, sum_of(slot) + m * wide + c, wide,
                       first > begin || k > 0);
            }
          }
        }
      }
    });
  });

  if (wanted.dweight) {
    at::parallel_for(0, narrow, std::max<int64_t>(1, 32768 / wide), [&](int64_t begin, int64_t end) {
      float* total = sum_of(0);
      for (int64_t slot = 1; slot < slots; ++slot) {
        const float* part = sum_of(slot);
        for (int64_t i = begin * wide; i < end * wide; ++i) total[i] += part[i];
      }
      if (!direct) t.transpose(total + begin * wide, wide, wanted.dweight + begin, in, end - begin, wide);
    });
  }
  for (int64_t slot = 0; slot < slots; ++slot) {
    if (wanted.db) *wanted.db += db[slot * 8];
    if (wanted.dbias) {
      for (int64_t c = 0; c < out; ++c)
        wanted.dbias[c] = static_cast<float>(dbias[slot][c] + (slot ? wanted.dbias[c] : 0));
    }
  }
}

}  // namespace bcos::cpu
