// BSR without tensor cores: float32, which they would round, and blocks with a side of 4 or 8. Simple, not fast: what bounds it
// is loads of x, one of 2 numbers per 8 multiply-adds.
#pragma once

#include "bsr_product.h"

namespace sk::gpu {

constexpr int kSimpleWarps = 4, kPatch = 4;  // a warp computes kPatch rows of W or kPatch x kPatch values
constexpr int kSimpleTokens = 2 * kWarp;

template <class T, bool kTransposed>
SK_KERNEL(kWarp* kSimpleWarps, 4)
simple_product(Blocks<T> w, Packed<T> x, const T* bias, sk_activation activation, Matrix<T> y) {
  const int64_t row0 = (int64_t(block().x) * kSimpleWarps + warp()) * kPatch;
  if (row0 >= w.rows) return;
  const int64_t block_row = row0 / w.height;
  const int m = int(row0 % w.height);
  for (int64_t b = int64_t(block().y) * kSimpleTokens + 2 * lane(); b < x.columns;
       b += int64_t(blocks().y) * kSimpleTokens) {
    float sum[kPatch][2] = {};
    for (int64_t k = w.ptr[block_row]; k < w.ptr[block_row + 1]; k++) {
      const int64_t column = int64_t(w.idx[k]) * w.width;
      const T* const values = w.block(k);
      for (int c = 0; c < w.width; c += kPatch) {
        Vector<T, kPatch> patch[kPatch];  // rows of it, transposed columns
#pragma unroll
        for (int i = 0; i < kPatch; i++)
          patch[i] = load<Vector<T, kPatch>>(values + (kTransposed ? (c + i) * w.height + m : (m + i) * w.width + c));
#pragma unroll
        for (int j = 0; j < kPatch; j++) {
          if (column + c + j >= w.columns) break;
          const auto v = load<Vector<T, 2>>(x.at(column + c + j, b));
#pragma unroll
          for (int i = 0; i < kPatch; i++) {
            const float value = to_float(kTransposed ? patch[j].at[i] : patch[i].at[j]);
            sum[i][0] += value * to_float(v.at[0]);
            sum[i][1] += value * to_float(v.at[1]);
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kPatch; i++)
#pragma unroll
      for (int j = 0; j < 2; j++)
        if (row0 + i < w.rows && b + j < y.batch)
          y.at(b + j, row0 + i) = from_float<T>(activate(activation, sum[i][j] + (bias ? to_float(bias[row0 + i]) : 0.0f)));
  }
}

template <class T>
SK_KERNEL(kWarp* kSimpleWarps)
simple_weight_gradient(Blocks<T> w, int64_t count, Packed<T> g, Packed<T> x, const int32_t* block_row, T* grad_values) {
  const int across = w.width / kPatch, patches = w.height / kPatch * across;
  const int64_t i = int64_t(block().x) * kSimpleWarps + warp(), place = i / patches;
  if (place >= count) return;
  // Blocks in the order of W transposed, which says the row of each; idx are the columns in W's order.
  const int64_t k = w.which[place];
  const int m = int(i % patches) / across * kPatch, n = int(i % patches) % across * kPatch;
  const int64_t row0 = int64_t(block_row[place]) * w.height + m, column0 = int64_t(w.idx[k]) * w.width + n;
  float sum[kPatch * kPatch] = {};
  for (int64_t b = 2 * lane(); b < g.columns; b += kSimpleTokens) {
    Vector<T, 2> left[kPatch], right[kPatch];
#pragma unroll
    for (int q = 0; q < kPatch; q++) {
      left[q] = row0 + q < w.rows ? load<Vector<T, 2>>(g.at(row0 + q, b)) : Vector<T, 2>{};
      right[q] = column0 + q < w.columns ? load<Vector<T, 2>>(x.at(column0 + q, b)) : Vector<T, 2>{};
    }
#pragma unroll
    for (int q = 0; q < kPatch * kPatch; q++)
#pragma unroll
      for (int j = 0; j < 2; j++) sum[q] += to_float(left[q / kPatch].at[j]) * to_float(right[q % kPatch].at[j]);
  }
  const float mine = warp_sums<kPatch * kPatch>(sum);
  if (lane() >= kPatch * kPatch) return;
  const int r = lane() / kPatch, c = lane() % kPatch;
  const bool inside = row0 + r < w.rows && column0 + c < w.columns;
  grad_values[(k * w.height + m + r) * w.width + n + c] = from_float<T>(inside ? mine : 0.0f);
}

template <class T>
const char* run_simple_product(const Blocks<T>& w, const Packed<T>& x, const void* bias, sk_activation activation,
                               const sk_matrix& y, Stream stream) {
  const auto kernel = w.transposed ? simple_product<T, true> : simple_product<T, false>;
  const Dim grid = {unsigned(ceil_div(w.rows, kSimpleWarps * kPatch)), limited(ceil_div(x.columns, kSimpleTokens)), 1};
  return launch(kernel, grid, kWarp * kSimpleWarps, 0, stream, w, x, static_cast<const T*>(bias), activation, Matrix<T>(y));
}

template <class T>
const char* run_simple_weight_gradient(Blocks<T> w, const sk_bsr& pattern, const Packed<T>& g, const Packed<T>& x,
                                       T* grad_values, Stream stream) {
  w.which = pattern.t_block;
  const int64_t patches = pattern.blocks * (w.height / kPatch) * (w.width / kPatch);
  return launch(simple_weight_gradient<T>, {unsigned(ceil_div(patches, kSimpleWarps)), 1, 1}, kWarp * kSimpleWarps, 0,
                stream, w, pattern.blocks, g, x, pattern.t_block_row, grad_values);
}

}  // namespace sk::gpu
