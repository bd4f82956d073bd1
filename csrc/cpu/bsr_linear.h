// bsr_linear on the CPU.
#pragma once

#include "activation.h"
#include "bsr_few.h"
#include "pairs.h"

namespace sk::SK_ISA {
namespace {

// A block of which W has an odd number of columns: that of pairs which crosses W's edge has to be zero past it, whatever is there.
inline const bf16x2* cut_pairs(const bf16x2* block, int64_t height, int64_t width, int64_t terms) {
  bf16x2* const cut = scratch<Use::kWeights>().get<bf16x2>(height * width);
  memcpy(cut, block, height * width * sizeof *cut);
  for (int64_t r = 0; r < height; r++) cut[r * width + terms - 1].high = {};
  return cut;
}

// Rows of block rows [i0, i1) of y for one panel. `out` holds one block row. Columns are counted in T: pairs are half as many.
template <class T>
void linear_rows(const sk_bsr& w, const T* values, int64_t i0, int64_t i1, const Packed<T>* x, const Stored<T>* bias,
                 sk_activation activation, const sk_matrix& y, Slice s, float* out) {
  const int64_t height = w.block_rows, width = w.block_cols / kNumbers<T>, size = height * width,
                step = max<int64_t>(1, kSegment / width), cols = ceil_div(w.cols, kNumbers<T>);
  const Rows sums = {out, s.stride};
  float offsets[128];
  for (int64_t i = i0; i < i1; i++) {
    const int64_t r0 = i * height, r1 = min(r0 + height, w.rows), end = w.block_row_ptr[i + 1];
    const bool direct = has_rows<T>(y, s) && activation == SK_IDENTITY && r1 - r0 == height;
    for (int64_t r = 0; r < height; r++) offsets[r] = bias && r0 + r < r1 ? to_float(bias[r0 + r]) : 0.0f;
    Start from = {{}, offsets};
    int64_t k = w.block_row_ptr[i];
    do {  // once at least: rows without blocks are the bias
      for (int64_t c0 = 0; c0 < width; c0 += kSegment) {
        Parts<T> parts;
        for (int64_t b = k; b < min(k + step, end); b++) {
          const int64_t c = w.block_col_idx[b] * width + c0;
          Part<T> part = {values + b * size + c0, x + c * s.stride, min(min(width, kSegment), cols - c)};
          if constexpr (kNumbers<T> == 2)
            if (c + part.terms == cols && w.cols % 2 != 0)
              part.weights = cut_pairs(part.weights, height, width, part.terms);
          parts.add(part);
        }
        if (is_far<T>(w) && c0 == 0)
          for (int64_t b = k + step; b < min(k + 2 * step, w.blocks); b++) parts.fetch(values + b * size);
        const bool last = k + step >= end && c0 + kSegment >= width;
        multiply_parts<false>(parts, width, size, height, s, from, direct && last ? rows_of(y, r0, s) : sums);
        from.rows = sums;
      }
    } while ((k += step) < end);
    if (direct) continue;
    activate(activation, out, (r1 - r0) * s.stride);
    unpack<Stored<T>>(y, r0, r1, s, out);
  }
}

template <class T>
void linear(const sk_bsr& w, const T* values, const sk_matrix& x, const Stored<T>* bias, sk_activation activation,
            const sk_matrix& y, const sk_threads& threads) {
  const double nnz = double(w.blocks) * w.block_rows * w.block_cols;
  const int64_t block_rows = ceil_div(w.rows, w.block_rows), panels = ceil_div(x.batch, kPanel);
  const double columns = panel_stride(x.batch);
  const Split split = split_work(panels, threads.threads, 1, max<int64_t>(1, block_rows), columns * w.cols * kFloatCost,
                                 columns * (w.rows * kFloatCost + nnz * kColumnCost), 0.0, 0.0);
  parallel_for(threads, split.groups * split.ranges, 2.0 * x.batch * (nnz + w.rows), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; task++) {
      const int64_t g = task / split.ranges, range = task % split.ranges;
      const int64_t first = g * panels / split.groups, last = (g + 1) * panels / split.groups;
      const int64_t i0 = range_begin(w.block_row_ptr, block_rows, range, split.ranges);
      const int64_t i1 = range_begin(w.block_row_ptr, block_rows, range + 1, split.ranges);
      if constexpr (kNumbers<T> == 1)
        if (x.batch <= kFewBatch) {
          linear_few(w, values, i0, i1, x, bias, activation, y);
          continue;
        }
      auto* const x_panel = scratch<Use::kInput>().get<Packed<T>>(ceil_div(w.cols, kNumbers<T>) * panel_stride(x.batch));
      float* const out = scratch<Use::kOutput>().get<float>(w.block_rows * panel_stride(x.batch));
      for (int64_t p = first; p < last; p++) {
        const Slice s = own_slice(x.batch, p);
        pack<T>(x, 0, w.cols, s, x_panel);
        linear_rows<T>(w, values, i0, i1, x_panel, bias, activation, y, s, out);
      }
    }
  });
}

}  // namespace
}  // namespace sk::SK_ISA
