// The gradient of the weights of BSR: for each block, a product of two panels over the batch.
#pragma once

#include "bsr_tile.h"

namespace sk::SK_ISA {
namespace {

// Columns of x that are packed together: as many as the sums of a few rows that fit the registers.
inline int64_t weight_width(const sk_bsr& w) { return min<int64_t>(w.block_cols, kTileVectors * kLanes); }

// Columns of x. Where blocks are as wide as a vector, they are packed with the batch as rows: vectors that meet numbers of
// g. Narrower ones stay a panel, for dot_tiles.
template <class T>
void pack_columns(const sk_matrix& x, int64_t c0, int64_t width, Slice s, float* out) {
  const int64_t count = min(width, x.features - c0);
  if (width < kLanes) return pack<T>(x, c0, c0 + count, s, out);
  // kLanes columns at a time where they have to be transposed: 32 streams at once take twice as long as 16.
  const int64_t step = x.stride_batch == 1 ? kLanes : width;
  for (int64_t c = 0; c < width; c += step)
    pack<T>(swapped(x), s.begin, s.begin + s.count, {c0 + c, max<int64_t>(0, min(step, count - c)), int(step), int(width)},
            out + c);
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

// out [rows, cols], rows `stride` apart, (+)= g x^T over one panel, rows and cols multiples of 4: kLanes dot products at a
// time, whose sums over the lanes share a tree of kLanes - 1 merges. 74 % of the FMA peak for 8 x 8, operands in L1.
template <bool kAdd>
void dot_tiles(int64_t rows, int64_t cols, int64_t stride, const float* g, const float* x, Slice s, float* out) {
  constexpr int kRows = kLanes / 4;
  for (int64_t c = 0; c < cols; c += 4)
    for (int64_t r = 0; r < rows; r += kRows) {
      vec acc[kLanes] = {};
      for (int j = 0; j < s.width; j += kLanes) {
        vec column[4];
        for (int i = 0; i < 4; i++) column[i] = load(x + (c + i) * s.stride + j);
        for (int i = 0; i < kLanes; i++) acc[i] += load(g + (r + i / 4) * s.stride + j) * column[i % 4];
      }
      if constexpr (kLanes >= 16) merge<8>(acc);
      if constexpr (kLanes >= 8) merge<4>(acc);
      merge<2>(acc);
      merge<1>(acc);
      vec4 sums[kRows];
      memcpy(sums, acc, sizeof sums);
      for (int i = 0; i < kRows; i++) {
        float* const to = out + (r + i) * stride + c;
        vec4 old = {};
        if (kAdd) memcpy(&old, to, sizeof old);
        sums[i] += old;
        memcpy(to, &sums[i], sizeof old);
      }
    }
}

// The gradient of one block over one panel. Strides are constants: 8 rows of g need one address then, where 8 did not fit
// the registers; +15 % of this product for 16 x 16.
template <bool kAdd, int kStride>
void weight_block(const sk_bsr& w, const float* g, const float* x, Slice s, float* out) {
  if (w.block_cols < kLanes) return dot_tiles<kAdd>(w.block_rows, w.block_cols, w.block_cols, g, x, s, out);
  const int64_t width = weight_width(w);
  for (int64_t c = 0; c < w.block_cols; c += width, x += width * kStride)
    for_tiles(w.block_rows, width / kLanes, [&](auto mr, auto nv, int64_t r, int64_t) {  // all of the width is one tile
      vec acc[mr()][nv()] = {};
      multiply<mr(), nv()>(s.count, g + r * kStride, kStride, 1, x, nv() * kLanes, acc);
      float* to = out + r * w.block_cols + c;
      for (int i = 0; i < mr(); i++, to += w.block_cols)
        for (int l = 0; l < nv(); l++) store(to + l * kLanes, kAdd ? load(to + l * kLanes) + acc[i][l] : acc[i][l]);
    });
}

}  // namespace
}  // namespace sk::SK_ISA
