// The gradient of the weights of BSR: for each block, a product of two panels over the batch.
#pragma once

#include "bsr_tile.h"
#include "pairs.h"

namespace sk::SK_ISA {
namespace {

// Columns of x that are packed together: as many as the sums of a few rows that fit the registers.
inline int64_t weight_width(const sk_bsr& w) { return min<int64_t>(w.block_cols, kTileVectors * kLanes); }

// Columns of x. Where blocks are as wide as a vector, they are packed with the batch as rows: vectors that meet numbers of
// g. Narrower ones stay a panel, for dot_tiles.
template <class T>
void pack_columns(const sk_matrix& x, int64_t c0, int64_t width, Slice s, Packed<T>* out) {
  const int64_t count = min(width, x.features - c0);
  if (width < kLanes) return pack_along_batch<T>(x, c0, c0 + count, s, out);
  // kLanes columns at a time where they have to be transposed: 32 streams at once take twice as long as 16. The next ones
  // are fetched meanwhile: +5 % of this product.
  const int64_t step = x.stride_batch == 1 ? kLanes : width;
  for (int64_t c = 0; c < width; c += step) {
    if (x.stride_batch == 1)
      for (int64_t i = c0 + c + step; i < min(c0 + c + 2 * step, x.features); i++)
        for (int64_t b = 0; b < s.count; b += 64 / sizeof(Stored<T>))
          __builtin_prefetch(static_cast<const Stored<T>*>(x.data) + i * x.stride_feature + s.begin + b, 0, 2);
    pack<T>(swapped(x), s.begin, s.begin + s.count, {c0 + c, max<int64_t>(0, min(step, count - c)), int(step), int(width)},
            out + c);
  }
}

// Zero past the edges of W, whatever was multiplied there.
template <class T>
void clear_padding(const sk_bsr& w, T* grad_values) {
  const int64_t height = w.block_rows, width = w.block_cols;
  for (int64_t i = 0; i * height < w.rows; i++)
    for (int64_t k = w.block_row_ptr[i]; k < w.block_row_ptr[i + 1]; k++) {
      const int64_t rows = w.rows - i * height, cols = w.cols - w.block_col_idx[k] * width;
      if (rows >= height && cols >= width) continue;
      for (int64_t r = 0; r < height; r++)
        for (int64_t c = r < rows ? min(cols, width) : 0; c < width; c++)
          store_one(grad_values + (k * height + r) * width + c, 0.0f);
    }
}

// v[i] = v[i] and v[i + S], each with neighbours S lanes apart added: lanes without the bit S hold those of v[i].
template <int S>
[[gnu::always_inline]] inline void merge(vec (&v)[kLanes]) {
  for (int i = 0; i < S; i++) {
    const auto own = [](int l) constexpr { return l & S ? kLanes + l : l; };
    const auto other = [](int l) constexpr { return l & S ? kLanes + (l ^ S) : l ^ S; };
    v[i] = shuffle(v[i], v[i + S], own, Lanes{}) + shuffle(v[i], v[i + S], other, Lanes{});
  }
}

// What a product over one panel multiplies: rows of g and columns of x. P is float or bf16x2, and `s` counts batch rows or pairs
// of them.
template <class P>
struct Operands {
  const P* g;
  const P* x;
  Slice s;
};

// out [rows, cols] (+)= g x^T over the panels, rows and cols multiples of 4: kLanes dot products at a time, whose sums over
// the lanes share a tree of kLanes - 1 merges. 74 % of the FMA peak for 8 x 8, operands in L1.
template <class P>
inline void dot_tiles(int64_t rows, int64_t cols, const Operands<P>* panels, int count, bool add, float* out) {
  constexpr int kRows = kLanes / 4;
  for (int64_t c = 0; c < cols; c += 4)
    for (int64_t r = 0; r < rows; r += kRows) {
      vec acc[kLanes] = {};
      for (int p = 0; p < count; p++) {
        const auto& [g, x, s] = panels[p];
        for (int j = 0; j < s.width; j += kLanes) {
          decltype(load(x)) column[4];
          for (int i = 0; i < 4; i++) column[i] = load(x + (c + i) * s.stride + j);
          for (int i = 0; i < kLanes; i++)
            acc[i] = multiply_add(load(g + (r + i / 4) * s.stride + j), column[i % 4], acc[i]);
        }
      }
      if constexpr (kLanes >= 16) merge<8>(acc);
      if constexpr (kLanes >= 8) merge<4>(acc);
      merge<2>(acc);
      merge<1>(acc);
      vec4 sums[kRows];
      memcpy(sums, acc, sizeof sums);
      for (int i = 0; i < kRows; i++) {
        float* const to = out + (r + i) * cols + c;
        vec4 old = {};
        if (add) memcpy(&old, to, sizeof old);
        sums[i] += old;
        memcpy(to, &sums[i], sizeof old);
      }
    }
}

// The gradient of one block over the panels, all as wide as the first; `next` is that of the block after it. Strides are
// constants: 8 rows of g need one address then, where 8 did not fit the registers; +15 % of this product for 16 x 16.
template <int kStride, class P>
void weight_block(const sk_bsr& w, const Operands<P>* panels, int count, bool add, float* out, const float* next) {
  if (w.block_cols < kLanes) return dot_tiles(w.block_rows, w.block_cols, panels, count, add, out);
  const int64_t width = weight_width(w);
  for (int64_t c = 0; c < w.block_cols; c += width)
    for_tiles(w.block_rows, width / kLanes, [&](auto mr, auto nv, int64_t r, int64_t) {  // all of the width is one tile
      vec acc[mr()][nv()] = {};
      for (int p = 0; p < count; p++)
        multiply<mr(), nv()>(panels[p].s.count, panels[p].g + r * kStride, kStride, 1, panels[p].x + c * kStride,
                             nv() * kLanes, acc);
      for (int i = 0; i < mr(); i++)
        for (int l = 0; l < nv(); l++) __builtin_prefetch(next + (r + i) * w.block_cols + c + l * kLanes, 1);
      float* to = out + r * w.block_cols + c;
      for (int i = 0; i < mr(); i++, to += w.block_cols)
        for (int l = 0; l < nv(); l++) store(to + l * kLanes, add ? load(to + l * kLanes) + acc[i][l] : acc[i][l]);
    });
}

}  // namespace
}  // namespace sk::SK_ISA
