#include "layer.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <c10/core/InferenceMode.h>

namespace bcos::cpu {

at::Tensor scratch(at::IntArrayRef sizes, const at::TensorOptions& options, at::MemoryFormat format) {
  constexpr int64_t kMostKept = 16 << 20;
  const int64_t bytes = c10::multiply_integers(sizes) * static_cast<int64_t>(options.dtype().itemsize());
  if (bytes == 0 || bytes > kMostKept) return at::empty(sizes, options.memory_format(format));
  thread_local at::Tensor kept;
  if (!kept.defined() || kept.numel() < bytes) {
    const c10::InferenceMode normal(false);  // whoever comes next may not be in inference mode
    kept = at::empty({bytes}, options.dtype(at::kByte));
  }
  const at::Tensor flat = kept.narrow(0, 0, bytes).view(options.dtype().toScalarType());
  if (format != at::MemoryFormat::ChannelsLast) return flat.view(sizes);
  return flat.view({sizes[0], sizes[2], sizes[3], sizes[1]}).permute({0, 3, 1, 2});
}

at::Tensor scalar_or_nothing(const at::Tensor& like, bool wanted, double value) {
  const auto type = accumulator(like.scalar_type());
  return wanted ? at::full({}, value, like.options().dtype(type)) : nothing(like, type);
}

}  // namespace bcos::cpu
