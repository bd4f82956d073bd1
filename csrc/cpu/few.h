// What the products with a few batch rows (decoding) share, for all formats that read their weights in place: x as float32
// rows, and how finished sums leave for y.
#pragma once

#include "activation.h"
#include "panel.h"

namespace sk::SK_ISA {
namespace {

// Rows of W whose sums are finished together. The sums of one batch row stay in L1.
constexpr int64_t kFewRows = 256;

// rows[b * stride + f] = x[b, f], float32; zero for f from x.features to stride.
template <class T>
void copy_rows(const sk_matrix& x, int64_t stride, float* rows) {
  for (int64_t b = 0; b < x.batch; b++, rows += stride) {
    const T* const row = static_cast<const T*>(x.data) + b * x.stride_batch;
    if (x.stride_feature == 1)
      for (int64_t f = 0; f < x.features; f += kLanes)
        store_first(rows + f, load_first(row + f, x.features - f), stride - f);
    else
      for (int64_t f = 0; f < x.features; f++) rows[f] = to_float(row[f * x.stride_feature]);
    for (int64_t f = x.features; f < stride; f++) rows[f] = 0.0f;
  }
}

// y[b, r] = activation(sums[b * stride + r - r0] + bias[r]) for rows [r0, r1) of W and every b. stride is a multiple of
// kLanes; the sums are overwritten.
template <class T>
void finish_sums(float* sums, int64_t stride, int64_t r0, int64_t r1, const T* bias, sk_activation activation,
                 const sk_matrix& y) {
  const int64_t rows = r1 - r0;
  for (int64_t b = 0; b < y.batch; b++, sums += stride) {
    for (int64_t r = 0; r < rows; r += kLanes) {
      const vec shift = bias ? load_first(bias + r0 + r, rows - r) : vec{};
      store(sums + r, load_first(sums + r, rows - r) + shift);
    }
    activate(activation, sums, ceil_div(rows, kLanes) * kLanes);
    T* const out = static_cast<T*>(y.data) + b * y.stride_batch + r0 * y.stride_feature;
    for (int64_t r = 0; r < rows; r += kLanes) {
      if (y.stride_feature == 1)
        store_first(out + r, load(sums + r), rows - r);
      else
        for (int64_t i = r; i < min(r + kLanes, rows); i++) store_one(out + i * y.stride_feature, sums[i]);
    }
  }
}

}  // namespace
}  // namespace sk::SK_ISA
