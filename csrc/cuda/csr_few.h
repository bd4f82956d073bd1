// CSR products with few rows of x: bound by the bytes of W, which are read once for kPack rows of x.
//
// A warp owns a row of W. Lanes take 4 consecutive entries each, loaded as vectors from where they are aligned (entries before
// the row's first are masked out), and gather for each the kPack numbers of x that it meets: one 16-byte load (two in float32),
// mostly from L1, since all of x is 64 KB at 4096 columns. Without packing x, 8 gathers of 2 bytes would move 8 sectors.
#pragma once

#include "csr_rows.h"

namespace sk::gpu {

constexpr int kFewWarps = 4;   // of a block: rows differ in length, and a block lasts as long as its longest
constexpr int kFewBatch = 32;  // from here on x is reused through shared memory, csr_many.h

// Columns [n block().y, n block().y + n) of x: 1 (x as it stands) or kPack.
template <class T, int n>
SK_KERNEL(kWarp* kFewWarps)
few(Rows<T> w, Packed<T> x, const T* bias, sk_activation activation, Matrix<T> y) {
  const int64_t row = int64_t(block().x) * kFewWarps + warp(), b0 = int64_t(block().y) * n;
  if (row >= w.rows) return;
  const uint32_t begin = w.ptr[row], end = w.ptr[row + 1];
  float sum[n] = {};
  for (uint32_t k = begin / 4 * 4 + 4 * lane(); k < end; k += 4 * kWarp) {
    Vector<int32_t, 4> column, slot;
    Vector<T, 4> value;
    if (w.vectors && k + 4 <= end) {
      column = load<Vector<int32_t, 4>>(w.idx + k);
      if (w.slot) {
        slot = load<Vector<int32_t, 4>>(w.slot + k);
#pragma unroll
        for (int i = 0; i < 4; i++) value.at[i] = w.values[slot.at[i]];
      } else {
        value = load<Vector<T, 4>>(w.values + k);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const bool inside = k + i >= begin && k + i < end;
        column.at[i] = inside ? w.idx[k + i] : 0;
        value.at[i] = inside ? w.value(k + i) : T{};
      }
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (k + i < begin || k + i >= end) continue;  // not times 0: x may hold NaN
      const auto v = load<Vector<T, n>>(x.at(column.at[i], b0));
#pragma unroll
      for (int j = 0; j < n; j++) sum[j] += to_float(value.at[i]) * to_float(v.at[j]);
    }
  }
  const float mine = warp_sums<n>(sum);
  if (lane() < n && b0 + lane() < y.batch)
    y.at(b0 + lane(), row) = from_float<T>(activate(activation, mine + (bias ? to_float(bias[row]) : 0.0f)));
}

template <class T>
const char* run_few(const Rows<T>& w, const Packed<T>& x, const T* bias, sk_activation activation, const Matrix<T>& y,
                    Stream stream) {
  const unsigned groups = unsigned(ceil_div(w.rows, kFewWarps));
  if (x.columns == 1) return launch(few<T, 1>, {groups, 1, 1}, kWarp * kFewWarps, 0, stream, w, x, bias, activation, y);
  return launch(few<T, kPack>, {groups, unsigned(x.columns / kPack), 1}, kWarp * kFewWarps, 0, stream, w, x, bias,
                activation, y);
}

}  // namespace sk::gpu
