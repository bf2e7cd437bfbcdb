// Which instruction set's table of tile kernels this machine uses.
#include <ATen/Version.h>
#include <c10/util/BFloat16.h>

#include "tile.h"

namespace bcos::cpu {

// BCOS_WITH_AVX: setup.py compiled tile.cpp for AVX2 and AVX-512 too (x86-64 with GCC or Clang).
#if defined(BCOS_WITH_AVX)
#define BCOS_DECLARE(suffix, T)                   \
  extern const Tiles<T> tiles_##suffix##_DEFAULT; \
  extern const Tiles<T> tiles_##suffix##_AVX2;    \
  extern const Tiles<T> tiles_##suffix##_AVX512;  \
  template <>                                     \
  const Tiles<T>& tiles<T>() {                    \
    switch (level()) {                            \
      case Level::kAvx512:                        \
        return tiles_##suffix##_AVX512;           \
      case Level::kAvx2:                          \
        return tiles_##suffix##_AVX2;             \
      default:                                    \
        return tiles_##suffix##_DEFAULT;          \
    }                                             \
  }
#else
#define BCOS_DECLARE(suffix, T)                   \
  extern const Tiles<T> tiles_##suffix##_DEFAULT; \
  template <>                                     \
  const Tiles<T>& tiles<T>() {                    \
    return tiles_##suffix##_DEFAULT;              \
  }
#endif

namespace {

enum class Level { kDefault, kAvx2, kAvx512 };

[[maybe_unused]] Level level() {
  static const Level found = [] {
    const std::string name = at::get_cpu_capability();
    return name == "AVX512" ? Level::kAvx512 : name == "AVX2" ? Level::kAvx2 : Level::kDefault;
  }();
  return found;
}

}  // namespace

BCOS_DECLARE(float, float)
BCOS_DECLARE(double, double)
BCOS_DECLARE(bfloat16, c10::BFloat16)

bool has_avx512() {
#if defined(BCOS_WITH_AVX)
  return level() == Level::kAvx512;
#else
  return false;
#endif
}

}  // namespace bcos::cpu
