// What the library of operations was built with. A module of its own that links neither torch nor the operations: it
// can say that they were built for another torch before anything of that torch is loaded.
#include <pybind11/pybind11.h>

#include "build_config.h"  // written by setup.py

namespace {

const char* compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

}  // namespace

PYBIND11_MODULE(_build_info, m) {
  m.doc() = "What bcos_kernels' compiled extension was built with.";
  m.def("build_info", [] {
    pybind11::dict info;
    info["torch"] = BCOS_TORCH_VERSION;
    info["compiler"] = compiler();
    info["flags"] = BCOS_FLAGS;
    info["cuda_archs"] = BCOS_CUDA_ARCHS;  // empty: built without CUDA
    return info;
  });
}
