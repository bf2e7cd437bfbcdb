// What csrc/cuda/primitives.cuh offers, on the CPU: the kernels' sources are compiled by g++ with BCOS_EMULATE and run
// thread by thread. A thread of a block is a fiber; where it has to wait for others (barrier, shuffle, matrix
// instruction), the next one runs.
//
// To bring out missing barriers and waits, a warp runs as far ahead of the others as the barriers allow; the order of
// the warps, and whether a background copy lands at its start or only where it is waited for, are set by `Schedule`.
// Shared memory is filled with NaNs before each block, and addresses of ldmatrix are checked for bank conflicts.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __align__(n) alignas(n)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct float2 {
  float x, y;
};

namespace bcos::emulation {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};
inline Index thread_index, block_index, block_size, grid_size;

struct Schedule {
  bool last_warp_first = false, copies_land_late = false;
};
inline Schedule schedule;

// Counted over all launches since the counters were last set to 0.
struct Counts {
  int64_t launches = 0, matrix_products = 0, bank_conflicts = 0;
};
inline Counts counts;

unsigned char* shared_memory();
void run(unsigned blocks, unsigned threads, int shared_bytes, const std::function<void()>& kernel);
void wait_for_block();
// Every lane of the warp calls this with the same `name`; `execute` runs once, on the arguments of all lanes.
void with_warp(const char* name, void* argument, void (*execute)(void* const* arguments));
void start_copy(void* to, const void* from);  // `from` null: zeros
void close_copies();
void wait_for_copies(int pending);

template <class V>
struct Exchange {
  V value, result;
  int mask;
};

}  // namespace bcos::emulation

#define threadIdx ::bcos::emulation::thread_index
#define blockIdx ::bcos::emulation::block_index
#define blockDim ::bcos::emulation::block_size
#define gridDim ::bcos::emulation::grid_size

namespace bcos::cuda {

using std::isnan;

template <class... P>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, int shared_bytes, Stream,
            std::type_identity_t<P>... arguments) {
  emulation::run(grid.x, block.x, shared_bytes, [&] { kernel(arguments...); });
}

inline unsigned char* dynamic_shared() { return emulation::shared_memory(); }

inline void sync_block() { emulation::wait_for_block(); }

inline float bits_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class V>
V shuffle_xor(V value, int mask) {
  emulation::Exchange<V> mine{value, value, mask};
  emulation::with_warp("shuffle", &mine, [](void* const* lanes) {
    for (int i = 0; i < 32; ++i) {
      auto* lane = static_cast<emulation::Exchange<V>*>(lanes[i]);
      lane->result = static_cast<emulation::Exchange<V>*>(lanes[i ^ lane->mask])->value;
    }
  });
  return mine.result;
}

inline void copy_async(void* p_shared, const void* p_global, bool valid) {
  if ((reinterpret_cast<uintptr_t>(p_shared) | reinterpret_cast<uintptr_t>(p_global)) % 16) {
    throw std::runtime_error("emulation: cp.async of 16 bytes at an address that is no multiple of 16");
  }
  emulation::start_copy(p_shared, valid ? p_global : nullptr);
}

inline void copy_async_commit() { emulation::close_copies(); }

template <int N>
void copy_async_wait() {
  emulation::wait_for_copies(N);
}

struct MatrixLoad {
  const void* row;
  uint32_t result[4];
};

inline void load_matrices(uint32_t (&r)[4], const void* p_row) {
  MatrixLoad mine{p_row, {}};
  emulation::with_warp("ldmatrix", &mine, [](void* const* lanes) {
    const auto lane = [&](int i) { return static_cast<MatrixLoad*>(lanes[i]); };
    for (int matrix = 0; matrix < 4; ++matrix) {
      unsigned banks = 0;  // of 16 bytes
      for (int row = 0; row < 8; ++row) {
        const auto address = reinterpret_cast<uintptr_t>(lane(matrix * 8 + row)->row);
        if (address % 16) throw std::runtime_error("emulation: ldmatrix at an address that is no multiple of 16");
        banks |= 1u << (address / 16 % 8);
      }
      if (banks != 0xff) ++emulation::counts.bank_conflicts;
      for (int i = 0; i < 32; ++i) {
        std::memcpy(&lane(i)->result[matrix],
                    static_cast<const unsigned char*>(lane(matrix * 8 + i / 4)->row) + i % 4 * 4, 4);
      }
    }
  });
  std::memcpy(r, mine.result, sizeof r);
}

template <class T>
struct Product {
  float* d;
  uint32_t a[4], b[2];

  static float element(uint32_t packed, int which) {
    T value;
    const uint16_t bits = static_cast<uint16_t>(packed >> (16 * which));
    std::memcpy(&value, &bits, sizeof value);
    return static_cast<float>(value);
  }
};

template <class T>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Product<T> mine{d, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  emulation::with_warp("mma", &mine, [](void* const* lanes) {
    ++emulation::counts.matrix_products;
    float a[16][16], b[8][16];
    for (int i = 0; i < 32; ++i) {
      const auto* lane = static_cast<const Product<T>*>(lanes[i]);
      for (int e = 0; e < 2; ++e) {
        const int k = i % 4 * 2 + e;
        for (int r = 0; r < 4; ++r) a[i / 4 + r % 2 * 8][k + r / 2 * 8] = Product<T>::element(lane->a[r], e);
        for (int r = 0; r < 2; ++r) b[i / 4][k + r * 8] = Product<T>::element(lane->b[r], e);
      }
    }
    for (int i = 0; i < 32; ++i) {
      float* p_d = static_cast<Product<T>*>(lanes[i])->d;
      for (int r = 0; r < 4; ++r) {
        const float *row = a[i / 4 + r / 2 * 8], *column = b[i % 4 * 2 + r % 2];
        for (int k = 0; k < 16; ++k) p_d[r] += row[k] * column[k];
      }
    }
  });
}

}  // namespace bcos::cuda
