#include "layer.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/linalg_vector_norm.h>

namespace bcos::cpu {

namespace {

at::Tensor lengths(const at::Tensor& rows) { return at::linalg_vector_norm(rows, 2, at::IntArrayRef{1}, true); }

}  // namespace

at::Tensor unit_rows(const at::Tensor& weight, bool normalize) {
  if (!normalize) return weight;
  const at::Tensor wide = weight.to(accumulator(weight.scalar_type()));
  std::vector<int64_t> shape(weight.dim(), 1);
  shape[0] = weight.size(0);
  return wide.div(lengths(wide.flatten(1)).view(shape)).to(weight.scalar_type());
}

at::Tensor unit_rows_backward(const at::Tensor& dunit, const at::Tensor& weight, bool normalize) {
  if (!normalize) return dunit;
  const auto type = accumulator(weight.scalar_type());
  const at::Tensor rows = weight.to(type).flatten(1), drows = dunit.to(type).flatten(1);
  const at::Tensor length = lengths(rows), unit = rows.div(length);
  const at::Tensor along = drows.mul(unit).sum(at::IntArrayRef{1}, true);
  return drows.sub(unit.mul(along)).div(length).view(weight.sizes()).to(weight.scalar_type());
}

at::Tensor nothing(const at::Tensor& like) { return at::empty({0}, like.options()); }

at::Tensor nothing(const at::Tensor& like, at::ScalarType type) { return at::empty({0}, like.options().dtype(type)); }

at::Tensor scalar_or_nothing(const at::Tensor& like, bool wanted, double value) {
  const auto type = accumulator(like.scalar_type());
  return wanted ? at::full({}, value, like.options().dtype(type)) : nothing(like, type);
}

}  // namespace bcos::cpu
