#include "layer.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <atomic>
#include <vector>

namespace bcos::cuda {
namespace {

// Up to this many inputs an output, by the bytes and operations of an H100 (no kernel was timed yet): with more,
// cuDNN's and cuBLAS's faster tensor-core instructions gain more than the passes cost.
constexpr int64_t kFusedDepth = 1152;

// -1: as the table says
std::atomic<int> forced{-1};

bool aligned(const at::Tensor& t) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0; }

}  // namespace

void force_fused(std::optional<bool> fused) { forced = fused ? static_cast<int>(*fused) : -1; }

bool fuses(const at::Tensor& x, const at::Tensor& weight, Form form, int64_t max_out, int64_t channels, int64_t depth) {
  const bool half = x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf;
  if (!half || form == Form::kLinear || max_out != 1 || channels == 0 || channels % 8 != 0) return false;
  if (!aligned(x) || !aligned(weight)) return false;
  const int force = forced;
  return force >= 0 ? force == 1 : depth <= kFusedDepth;
}

at::Tensor gain(const at::Tensor& weight, bool normalize) {
  return normalize ? row_lengths(weight).reciprocal().reshape({-1}) : at::Tensor();
}

at::Tensor Sizes::like_y(const at::Tensor& u, at::ScalarType type) const {
  std::vector<int64_t> shape = u.sizes().vec();
  shape[1] = at.channels;
  return at::empty(shape, u.options().dtype(type).memory_format(format));
}

Scaled scale(const Sizes& sizes, const Exponents& e, const at::Tensor& u, const at::Tensor& norm, bool keep_linear,
             bool keep_winner, Stream stream) {
  Scaled s{u, nothing(u), nothing(u, at::kByte)};
  if (!e.scaled() && sizes.max_out == 1) return s;
  if (sizes.max_out > 1 || keep_linear) s.y = sizes.like_y(u, u.scalar_type());
  if (keep_linear) s.linear = sizes.max_out == 1 ? u : sizes.like_y(u, u.scalar_type());
  if (keep_winner) s.winner = sizes.like_y(u, at::kByte);
  BCOS_DISPATCH_CUDA(u.scalar_type(), "bcos_native: scale", [&] {
    using A = Acc<scalar_t>;
    scale<scalar_t, A>({sizes.at, sizes.max_out, e.power<A>(), in<scalar_t>(u), in<A>(norm), out<scalar_t>(s.y),
                        out<scalar_t>(s.linear), out<uint8_t>(s.winner)},
                       stream);
  });
  return s;
}

Unscaled scale_backward(const Sizes& sizes, const Exponents& e, const at::Tensor& grad, const at::Tensor& kept,
                        const at::Tensor& norm, const at::Tensor& winner, std::array<bool, 4> needs, bool detach,
                        Stream stream) {
  const auto acc = accumulator(grad.scalar_type());
  Unscaled s{grad, {}, nothing(grad, acc)};
  if (!e.scaled() && sizes.max_out == 1) return s;
  const bool needs_u = needs[0] || needs[1] || needs[2];
  if (needs_u) {
    std::vector<int64_t> shape = grad.sizes().vec();
    shape[1] *= sizes.max_out;
    s.du = at::empty(shape, grad.options().memory_format(sizes.format));
  }
  if (e.scaled() && needs[0] && !detach) s.pull = at::empty_like(norm);
  at::Tensor parts;
  if (needs[3]) {
    s.db = at::empty({}, grad.options().dtype(acc));
    parts = at::empty({scale_backward_blocks()}, grad.options().dtype(at::kDouble));
  }
  // In float16 l is kept for B = 2 too: see contract.py.
  const bool kept_linear = grad.scalar_type() == at::kHalf;
  BCOS_DISPATCH_CUDA(grad.scalar_type(), "bcos_native: scale_backward", [&] {
    using A = Acc<scalar_t>;
    scale_backward<scalar_t, A>(
        {sizes.at, sizes.max_out, e.power<A>(), detach, kept_linear, sizes.root, in<scalar_t>(grad), in<scalar_t>(kept),
         in<A>(norm), in<uint8_t>(winner), needs_u ? out<scalar_t>(s.du) : nullptr, out<A>(s.pull), out<A>(s.db),
         out<double>(parts)},
        stream);
  });
  return s;
}

}  // namespace bcos::cuda
