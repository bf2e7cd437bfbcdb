// The CUDA operators, compiled for the emulator and registered for CPU tensors. Python defines the schemas.
#include <torch/library.h>

#include "../../csrc/cuda/layer.h"
#include "../../csrc/cuda/stream.h"
#include "emulation.h"

namespace {

void set_schedule(bool last_warp_first, bool copies_land_late) {
  bcos::emulation::schedule = {last_warp_first, copies_land_late};
}

// (launches, matrix products, bank conflicts) since the last call
std::tuple<int64_t, int64_t, int64_t> take_counts() {
  const auto c = bcos::emulation::counts;
  bcos::emulation::counts = {};
  return {c.launches, c.matrix_products, c.bank_conflicts};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(bcos_emulated, m) {
  m.def("set_schedule(bool last_warp_first, bool copies_land_late) -> ()", &set_schedule);
  m.def("take_counts() -> (int, int, int)", &take_counts);
  m.def("force_fused(bool? fused) -> ()", &bcos::cuda::force_fused);
}

TORCH_LIBRARY_IMPL(bcos_emulated, CPU, m) {
  m.impl("conv2d", &bcos::cuda::conv2d);
  m.impl("conv2d_backward", &bcos::cuda::conv2d_backward);
  m.impl("linear", &bcos::cuda::linear);
  m.impl("linear_backward", &bcos::cuda::linear_backward);
  m.impl("batch_norm", &bcos::cuda::batch_norm);
  m.impl("batch_norm_backward", &bcos::cuda::batch_norm_backward);
}
