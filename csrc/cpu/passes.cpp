#include "passes.h"

#include <vector>

#include "types.h"

namespace bcos::cpu {
namespace {

template <class T>
const T* in(const at::Tensor& t) {
  return t.defined() && t.numel() ? t.const_data_ptr<T>() : nullptr;
}

template <class T>
T* out(const at::Tensor& t) {
  return t.defined() && t.numel() ? t.mutable_data_ptr<T>() : nullptr;
}

template <class T>
void forward(const ScaleForward& a) {
  const int64_t skip = a.first * a.channels * a.layout.pixels;
  const auto past = [](auto* p, int64_t n) { return p ? p + n : p; };
  const T* u = past(in<T>(a.u), skip * a.max_out);
  const auto* norm = past(in<Acc<T>>(a.norm), a.first * a.layout.groups * a.layout.pixels);
  T* y = past(out<T>(a.y), skip);
  T* linear = past(out<T>(a.linear), skip);
  uint8_t* winner = past(out<uint8_t>(a.winner), skip);
  const bool by_row = a.layout.by_row;
  for_spans(a.layout, a.channels, thread_slots(), [&](const Span& s, int64_t) {
    const Place p = s.in(a.channels), wide = s.in(a.channels * a.max_out);
    const int64_t rows = s.rows(a.channels), cols = s.cols(a.channels);
    const T* l = u + p.offset;
    if (a.max_out > 1) {
      T* picked = (linear ? linear : y) + p.offset;
      tiles<T>().pick(by_row, u + wide.offset, wide.ld, picked, p.ld, winner ? winner + p.offset : nullptr, p.ld, rows,
                      cols, a.max_out);
      l = picked;
    }
    if (a.exponent.form != Form::kLinear) {
      tiles<T>().scale(by_row, l, p.ld, y + p.offset, p.ld, rows, cols, norm + s.map(), a.exponent);
    }
  });
}

template <class T>
double backward(const ScaleBackward& a) {
  const T* grad = in<T>(a.grad);
  const T* kept = in<T>(a.kept);
  const auto* norm = in<Acc<T>>(a.norm);
  const uint8_t* winner = in<uint8_t>(a.winner);
  T* du = out<T>(a.du);
  Acc<T>* pixel_sum = out<Acc<T>>(a.pixel_sum);
  const bool by_row = a.layout.by_row;
  const int64_t slots = thread_slots();
  std::vector<double> db(slots * 8, 0.0);  // 64 bytes apart: no two threads write to one cache line
  std::vector<std::vector<T>> scratch(slots);
  for_spans(a.layout, a.channels, slots, [&](const Span& s, int64_t slot) {
    const Place p = s.in(a.channels), wide = s.in(a.channels * a.max_out);
    const int64_t rows = s.rows(a.channels), cols = s.cols(a.channels);
    const T* dl = grad + p.offset;
    int64_t lddl = p.ld;
    if (a.exponent.form != Form::kLinear) {
      T* target = du + wide.offset;
      int64_t ld = wide.ld;
      if (a.max_out > 1) {
        scratch[slot].resize(rows * cols);
        target = scratch[slot].data();
        ld = cols;
      }
      tiles<T>().scale_backward(by_row, dl, p.ld, kept + p.offset, p.ld, target, ld, rows, cols, norm + s.map(),
                                pixel_sum ? pixel_sum + s.map() : nullptr, a.needs_b ? &db[slot * 8] : nullptr,
                                a.exponent, a.detach);
      dl = target;
      lddl = ld;
    }
    if (a.max_out > 1) {
      tiles<T>().scatter(by_row, dl, lddl, winner + p.offset, p.ld, du + wide.offset, wide.ld, rows, cols, a.max_out);
    }
  });
  double sum = 0;
  for (int64_t slot = 0; slot < slots; ++slot) sum += db[slot * 8];
  return sum;
}

}  // namespace

void ScaleForward::run() const {
  BCOS_DISPATCH(u.scalar_type(), "bcos_native: scale", [&] { forward<scalar_t>(*this); });
}

double ScaleBackward::run() const {
  double db = 0;
  BCOS_DISPATCH(grad.scalar_type(), "bcos_native: scale_backward", [&] { db = backward<scalar_t>(*this); });
  return db;
}

}  // namespace bcos::cpu
