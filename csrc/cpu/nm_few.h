// Rows of N:M matrices times a few batch rows (decoding), for N:M and V:N:M: values and packed positions are all that is
// read of W, 2.25 or 2.5 bytes per bfloat16 weight.
//
// The operands of kLanes consecutive values of a row lie in a window of x. Which group of columns each lane belongs to is
// known beforehand, so positions become indices into the window by a shift, a mask and an addition, and permutations of the
// window's vectors fetch the operands: 0.09 ns per weight at 2:4 on Zen 4 (AVX-512, W in L2), where gathering by column
// indices takes 0.21. From memory, its bandwidth bounds it.
#pragma once

#include "few.h"
#include "sparsekern/csr.h"

namespace sk::SK_ISA {

// Larger batches run on the CSR kernels, whose tiles keep x in L1, and all where permutations are not instructions.
#if defined(__AVX2__) && !defined(__clang__)
constexpr int64_t kFewBatch = kLanes / 2;
#else
constexpr int64_t kFewBatch = 0;
#endif

// N of each M columns, as vectors of a row's values see them. A vector begins `phase` values into a group, and its window
// with that group.
struct Groups {
  Groups(int n, int m) : bits(m <= 4 ? 2 : 4) {
    int phase = 0;
    do {
      for (int l = 0; l < kLanes; l++) base[phase][l] = uint32_t((phase + l) / n * m);
      step[phase] = (phase + kLanes) / n * m;
      next[phase] = (phase + kLanes) % n;
      window = max(window, ((phase + kLanes - 1) / n + 1) * m);
      phase = next[phase];
    } while (phase != 0);
  }
  // 2 of each 4: lane 1 belongs to the first group yet, lane 2 to one that begins 4 columns later.
  bool pairs() const { return base[0][1] == 0 && base[0][2] == 4; }

  int bits;        // of a packed position
  int window = 0;  // columns of the widest window
  int step[16];    // columns from one window to the next
  int next[16];    // phase of the next vector
  uvec base[16];   // column in the window where each lane's group begins
};

// Row r of W has its `count` values at values + r * count and their positions at packed + r * packed_stride.
template <class T>
struct PackedRows {
  PackedRows(const void* values, const uint8_t* packed, const sk_csr& w, const Groups& groups)
      : values(static_cast<const T*>(values)),
        packed(packed),
        count(w.nnz / max<int64_t>(1, w.rows)),
        packed_stride(ceil_div(count * groups.bits, 32) * 4) {}
  const T* values;
  const uint8_t* packed;
  int64_t count, packed_stride;
};

constexpr int64_t kSumStride = kFewRows + kLanes;  // rows of sums may be written a little past their end
constexpr int kBlockRows = 4;                      // rows of W that share the loads of x, and one reduction of 4 sums

// Batch rows as the kernels take them: 1, 2 or a multiple of 4.
inline int64_t padded_batch(int64_t batch) { return batch <= 2 ? batch : ceil_div(batch, 4) * 4; }

// Floats from one row of x to the next. A window begins inside the row, and is read as up to 16 vectors.
inline int64_t padded_columns(int64_t columns) { return ceil_div(columns, kLanes) * kLanes + 17 * kLanes; }

// sums[b * kSumStride + r - r0] = row r of W times row b of x for rows [r0, r1) and b < batch, a padded_batch. Up to 3
// floats behind the rows are written, too. V:N:M shares nm.cpp's instances.
template <class T>
void dot_rows(const Groups& groups, const PackedRows<T>& w, int64_t r0, int64_t r1, const float* x, int64_t x_stride,
              int64_t batch, float* sums);

namespace {

// Calls body(r0, r1, x rows, sums) on pieces of W's rows, in parallel, and finishes the sums that it writes. `extra` floats
// behind the padded_batch(x.batch) rows of x are free for it.
template <class T, class F>
void few_rows(const sk_csr& w, const sk_matrix& x, int64_t extra, const T* bias, sk_activation activation,
              const sk_matrix& y, const sk_threads& threads, F body) {
  const int64_t batch = padded_batch(x.batch), stride = padded_columns(x.features);
  parallel_for(threads, ceil_div(w.rows, kBlockRows), 2.0 * x.batch * w.nnz, [&](int64_t begin, int64_t end) {
    float* const rows = scratch<Use::kInput>().get<float>(batch * stride + extra);
    float* const sums = scratch<Use::kOutput>().get<float>(batch * kSumStride);
    copy_rows<T>(x, stride, rows);
    for (int64_t i = x.batch * stride; i < batch * stride; i++) rows[i] = 0.0f;
    const int64_t last = min(end * kBlockRows, w.rows);
    for (int64_t r0 = begin * kBlockRows; r0 < last; r0 += kFewRows) {
      const int64_t r1 = min(r0 + kFewRows, last);
      body(r0, r1, rows, sums);
      finish_sums(sums, kSumStride, r0, r1, bias, activation, y);
    }
  });
}

}  // namespace
}  // namespace sk::SK_ISA
