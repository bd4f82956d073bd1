// The gradient of CSR values: for each entry (r, c) the dot product of row r of g^T and row c of x^T over the batch.
//
// A warp owns a row of W and keeps a run of its g in registers, while kDots entries' runs of x come in as independent 16-byte
// loads. Per entry and batch row that is 2 bytes (in 16 bits) from L2, where x is, and one multiply-add: L2 bounds it. Each
// entry is summed by one group of lanes in a fixed order, so the bits do not depend on timing.
#pragma once

#include "csr_rows.h"

namespace sk::gpu {

constexpr int kDotWarps = 4, kDots = 8;

// `group` lanes, a power of two, share an entry: with a short batch a warp takes several entries at once.
template <class T>
SK_KERNEL(kWarp* kDotWarps)
dots(Rows<T> w, Packed<T> g, Packed<T> x, T* grad_values, int group) {
  const int64_t row = int64_t(block().x) * kDotWarps + warp();
  if (row >= w.rows) return;
  const int64_t end = w.ptr[row + 1];
  const int groups = kWarp / group, first = lane() % group * kRun<T>;
  for (int64_t k0 = w.ptr[row] + int64_t(block().y) * groups * kDots; k0 < end;
       k0 += int64_t(blocks().y) * groups * kDots) {
    const int64_t k = k0 + lane() / group;  // and every `groups` from there
    const T* column[kDots];
    float sum[kDots] = {};
#pragma unroll
    for (int i = 0; i < kDots; i++) column[i] = k + i * groups < end ? x.at(w.idx[k + i * groups], 0) : nullptr;
    for (int64_t b = first; b < g.columns; b += group * kRun<T>) {
      const auto left = load<Vector<T, kRun<T>>>(g.at(row, b));
#pragma unroll
      for (int i = 0; i < kDots; i++) {
        if (column[i] == nullptr) continue;
        const auto right = load<Vector<T, kRun<T>>>(column[i] + b);
#pragma unroll
        for (int j = 0; j < kRun<T>; j++) sum[i] += to_float(left.at[j]) * to_float(right.at[j]);
      }
    }
#pragma unroll
    for (int i = 0; i < kDots; i++) {
      for (int m = group / 2; m > 0; m /= 2) sum[i] += shuffle_xor(sum[i], m);
      if (first == 0 && column[i] != nullptr) grad_values[k + i * groups] = from_float<T>(sum[i]);
    }
  }
}

template <class T>
const char* run_dots(const Rows<T>& w, int64_t nnz, const Packed<T>& g, const Packed<T>& x, T* grad_values, Stream stream) {
  int group = 1;
  while (group < kWarp && group * kRun<T> < g.columns) group *= 2;
  // As many warps per row as its entries on average keep busy.
  const int64_t split = ceil_div(ceil_div(nnz, w.rows), kWarp / group * kDots);
  const Dim grid = {unsigned(ceil_div(w.rows, kDotWarps)), limited(split), 1};
  return launch(dots<T>, grid, kWarp * kDotWarps, 0, stream, w, g, x, grad_values, group);
}

}  // namespace sk::gpu
