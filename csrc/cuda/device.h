// Launches go to the current stream of a tensor's device.
#pragma once

#include <ATen/core/Tensor.h>

#include "stream.h"

#if !defined(BCOS_EMULATE)
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace bcos::cuda {

#if defined(BCOS_EMULATE)

class OnDevice {
 public:
  explicit OnDevice(const at::Tensor&) {}
  Stream stream() const { return nullptr; }
};

#else

class OnDevice {
 public:
  explicit OnDevice(const at::Tensor& t) : guard_(t.device()), stream_(c10::cuda::getCurrentCUDAStream()) {}
  Stream stream() const { return stream_.stream(); }

 private:
  c10::cuda::CUDAGuard guard_;
  c10::cuda::CUDAStream stream_;
};

#endif

}  // namespace bcos::cuda
