// Every instruction and runtime call that the kernels use and C++ does not have. With BCOS_EMULATE the same names come
// from tests/cuda_emulation/emulation.h, and the kernels run on the CPU.
#pragma once

#include <cstdint>

#include "stream.h"

#if defined(BCOS_EMULATE)
#include <emulation.h>
#else

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <type_traits>

namespace bcos::cuda {

inline void check(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(std::string("bcos_native: CUDA: ") + cudaGetErrorString(status));
}

template <class... P>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, int shared_bytes, Stream stream,
            std::type_identity_t<P>... arguments) {
  if (shared_bytes > 48 * 1024) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  }
  kernel<<<grid, block, shared_bytes, stream>>>(arguments...);
  check(cudaGetLastError());
}

__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}

template <class V>
__device__ __forceinline__ V shuffle_xor(V value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

__device__ __forceinline__ void sync_block() { __syncthreads(); }

__device__ __forceinline__ float bits_as_float(uint32_t bits) { return __uint_as_float(bits); }

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 16 bytes from global to shared memory, in the background; zeros where not `valid` (then nothing is read).
__device__ __forceinline__ void copy_async(void* p_shared, const void* p_global, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(p_shared)), "l"(p_global),
               "r"(bytes)
               : "memory");
}

// Closes a group of this thread's copies.
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most the last N of this thread's groups are under way.
template <int N>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Four 8x8 matrices of 2-byte elements: lane i gives the address of row i % 8 of matrix i / 8, and gets the elements
// (i / 4, 2 (i % 4)) and the next of each.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* p_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(p_row))
               : "memory");
}

// d[16, 8] += a[16, 16] b[16, 8], summed in float32, on a tensor core.
template <class T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

}  // namespace bcos::cuda

#endif

namespace bcos::cuda {

// V neighbouring elements that are read and written in one access: V * sizeof(T) is at most 16.
template <class T, int V>
struct alignas(V * sizeof(T)) Vector {
  T of[V];
};

template <int V, class T>
__device__ __forceinline__ Vector<T, V> load(const T* p) {
  return *reinterpret_cast<const Vector<T, V>*>(p);
}

template <int V, class T>
__device__ __forceinline__ void store(T* p, const Vector<T, V>& v) {
  *reinterpret_cast<Vector<T, V>*>(p) = v;
}

// The two elements of a register of a matrix fragment.
template <class T>
__device__ __forceinline__ float2 halves(uint32_t packed) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    return {bits_as_float(packed << 16), bits_as_float(packed & 0xffff0000u)};
  } else {
    const auto pair = load<2>(reinterpret_cast<const T*>(&packed));
    return {static_cast<float>(pair.of[0]), static_cast<float>(pair.of[1])};
  }
}

}  // namespace bcos::cuda
