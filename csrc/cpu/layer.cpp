#include "layer.h"

#include <ATen/ops/full.h>

namespace bcos::cpu {

at::Tensor scalar_or_nothing(const at::Tensor& like, bool wanted, double value) {
  const auto type = accumulator(like.scalar_type());
  return wanted ? at::full({}, value, like.options().dtype(type)) : nothing(like, type);
}

}  // namespace bcos::cpu
