// Products of a masked weight with many batch rows. W is expanded into tiles that stay in L1 while they meet a part of x or g in
// registers; its gradient is compressed from such tiles. Nothing else of W's dense size is read or written.
#pragma once

#include "activation.h"
#include "bsr_tile.h"
#include "mask_bits.h"

namespace sk::SK_ISA {
namespace {

// Tiles of W, 24 KB: [rows][columns] of a forward product, where long pieces of W's rows count most (24 x 256: -10 %), and of
// grad_x, for which they are transposed. And tiles of gradients. What meets 12 or 48 sums in a strip's column is whole kTileRows.
constexpr int64_t kRows = 12, kColumns = 512;
constexpr int64_t kInputRows = 128, kInputColumns = 48;
constexpr int64_t kGradientRows = 48, kGradientColumns = 64;
constexpr int64_t kGroup = 256;        // batch columns that share an expansion
constexpr int64_t kOperand = 1 << 16;  // floats of x that stay in L2 while the rows of g pass
constexpr int kStrip = kTileVectors * kLanes;

// Columns [begin, begin + count) of a product, packed as strips of kStrip, the last one as narrow as whole vectors allow.
struct Columns {
  int64_t begin, count;
  int64_t width() const { return ceil_div(count, kLanes) * kLanes; }
  Slice all() const { return {begin, count, int(width()), int(width())}; }
};

// Rows [k0, k1) of each strip, one strip after the other.
template <class T>
void pack_strips(const sk_matrix& m, int64_t k0, int64_t k1, Columns columns, float* strips) {
  for (int64_t c = 0; c < columns.count; c += kStrip, strips += kStrip * (k1 - k0)) {
    const Columns strip = {columns.begin + c, min<int64_t>(kStrip, columns.count - c)};
    pack<T>(m, k0, k1, strip.all(), strips);
  }
}

// out [rows, width] = a b + (kFirst ? start, a number per row : out), with a(i, k) = a[i * row + k * term] and, as b, rows [k0,
// k0 + terms) of strips of `depth`. Computes whole kTileRows.
template <bool kFirst>
void multiply_strips(int64_t rows, int64_t terms, const float* a, int64_t row, int64_t term, const float* strips,
                     int64_t k0, int64_t depth, int64_t width, const float* start, float* out) {
  const auto strip = [&](auto nv, int64_t c) __attribute__((always_inline)) {
    const float* const b = strips + c * depth + k0 * nv() * kLanes;
    for (int64_t r = 0; r < rows; r += kTileRows) {
      float* const to = out + r * width + c;
      vec acc[kTileRows][nv()];
      for (int i = 0; i < kTileRows; i++)
        for (int l = 0; l < nv(); l++) acc[i][l] = kFirst ? broadcast(start[r + i]) : load(to + i * width + l * kLanes);
      multiply<kTileRows, nv()>(terms, a + r * row, row, term, b, nv() * kLanes, acc);
      for (int i = 0; i < kTileRows; i++)
        for (int l = 0; l < nv(); l++) store(to + i * width + l * kLanes, acc[i][l]);
    }
  };
  int64_t c = 0;
  for (; c + kStrip <= width; c += kStrip) strip(std::integral_constant<int, kTileVectors>{}, c);
  const int64_t rest = (width - c) / kLanes;
  if constexpr (kTileVectors > 2) {
    if (rest == 3) return strip(std::integral_constant<int, 3>{}, c);
    if (rest == 2) return strip(std::integral_constant<int, 2>{}, c);
  }
  if (rest == 1) strip(std::integral_constant<int, 1>{}, c);
}

// tile[0 .. 8 bytes) = the weights at these bits; returns where the next values stand. As many of them are fetched: a tile later
// they are multiplied (+5 %).
template <class T>
const T* expand_row(const T* p, const uint8_t* bits, int64_t bytes, float* tile) {
  const T* const begin = p;
  for (int64_t k = 0; k < bytes; k++, tile += 8) {
    const uint8_t byte = bits[k];
    store(tile, weights8(p, byte));
    p += __builtin_popcount(byte);
  }
  for (const T *ahead = p, *end = p + (p - begin); ahead < end; ahead += 64 / sizeof(T)) __builtin_prefetch(ahead, 0, 2);
  return p;
}

// The gradients tile[0 .. 8 bytes) of the weights at these bits, from p on, up to `end`; returns where the next ones stand.
template <class T>
T* compress_row(const float* tile, const uint8_t* bits, int64_t bytes, T* p, const T* end) {
  for (int64_t k = 0; k < bytes; k++, tile += 8) {
    const uint8_t byte = bits[k];
    put8(load_as<vec8>(tile), byte, p, end);
    p += __builtin_popcount(byte);
  }
  return p;
}

// Rows [r0, r1) of y.
template <class T>
void mask_linear_rows(const sk_mask& w, const T* values, int64_t r0, int64_t r1, const sk_matrix& x, const T* bias,
                      sk_activation activation, const sk_matrix& y) {
  const Readable<T> from(w, values);
  for (int64_t b = 0; b < x.batch; b += kGroup) {
    const Columns columns = {b, min(kGroup, x.batch - b)};
    const int64_t width = columns.width();
    float* const strips = scratch<Use::kInput>().get<float>(w.cols * width);
    float* const sums = scratch<Use::kOutput>().get<float>(kRows * (width + kColumns));
    float* const tile = sums + kRows * width;
    pack_strips<T>(x, 0, w.cols, columns, strips);
    memset(tile, 0, kRows * kColumns * sizeof(float));  // rows past the last one are multiplied too
    for (int64_t r = r0; r < r1; r += kRows) {
      const int64_t rows = min(kRows, r1 - r);
      const T* next[kRows];
      float start[kRows] = {};
      for (int64_t i = 0; i < rows; i++) next[i] = from.row(r + i);
      for (int64_t i = 0; bias != nullptr && i < rows; i++) start[i] = to_float(bias[r + i]);
      for (int64_t c = 0; c == 0 || c < w.cols; c += kColumns) {
        const int64_t terms = min(kColumns, w.cols - c);
        for (int64_t i = 0; i < rows; i++)
          next[i] = expand_row(next[i], from.bits(r + i) + c / 8, ceil_div(terms, 8), tile + i * kColumns);
        (c == 0 ? multiply_strips<true> : multiply_strips<false>)(rows, terms, tile, kColumns, 1, strips, c, w.cols, width,
                                                                  start, sums);
      }
      activate(activation, sums, rows * width);
      unpack<T>(y, r, r + rows, columns.all(), sums);
    }
  }
}

// Columns [c0, c1) of grad_x, c0 a multiple of 8.
template <class T>
void mask_input_columns(const sk_mask& w, const T* values, int64_t c0, int64_t c1, const sk_matrix& grad,
                        const sk_matrix& grad_x) {
  const Readable<T> from(w, values);
  const int64_t cols = ceil_div(c1 - c0, kInputColumns) * kInputColumns;
  const float zeros[kInputColumns] = {};
  for (int64_t b = 0; b < grad.batch; b += kGroup) {
    const Columns columns = {b, min(kGroup, grad.batch - b)};
    const int64_t width = columns.width();
    float* const strips = scratch<Use::kInput>().get<float>(kInputRows * width);
    float* const tile = scratch<Use::kOutput>().get<float>(kInputRows * kInputColumns);
    float* const sums = scratch<Use::kGradient>().get<float>(cols * width);
    memset(tile, 0, kInputRows * kInputColumns * sizeof(float));
    for (int64_t r = 0; r < w.rows; r += kInputRows) {
      const int64_t terms = min(kInputRows, w.rows - r);
      const T* next[kInputRows];
      for (int64_t k = 0; k < terms; k++) next[k] = from.row(r + k, c0 / 8);
      pack_strips<T>(grad, r, r + terms, columns, strips);
      for (int64_t c = c0; c < c1; c += kInputColumns) {
        const int64_t count = min(kInputColumns, c1 - c);
        for (int64_t k = 0; k < terms; k++)
          next[k] = expand_row(next[k], from.bits(r + k) + c / 8, ceil_div(count, 8), tile + k * kInputColumns);
        (r == 0 ? multiply_strips<true> : multiply_strips<false>)(count, terms, tile, 1, kInputColumns, strips, 0, terms,
                                                                  width, zeros, sums + (c - c0) * width);
      }
    }
    unpack<T>(grad_x, c0, c1, columns.all(), sums);
  }
}

// The gradients of the values of rows [r0, r1), and of the bias. x's columns that meet all rows at a time stay in L2.
template <class T>
void mask_values_rows(const sk_mask& w, int64_t r0, int64_t r1, const sk_matrix& grad, const sk_matrix& x, T* grad_values,
                      T* grad_bias) {
  const Columns batch = {0, grad.batch};
  const int64_t depth = batch.count, stride = (w.cols + 7) / 8;
  const int64_t block = max<int64_t>(1, kOperand / depth / kGradientColumns) * kGradientColumns;
  const float zeros[kGradientRows] = {};
  float* const strips = scratch<Use::kInput>().get<float>(min(block, ceil_div(w.cols, kStrip) * kStrip) * depth);
  float* const g = scratch<Use::kOutput>().get<float>(kGradientRows * (batch.width() + kGradientColumns) + 8);
  float* const tile = g + kGradientRows * batch.width();
  memset(g, 0, kGradientRows * batch.width() * sizeof(float));  // rows past the last one are multiplied too
  T** const next = scratch<Use::kStarts>().get<T*>(r1 - r0) - r0;
  for (int64_t r = r0; r < r1; r++) next[r] = grad_values + first_value(w, r);
  for (int64_t c0 = 0; c0 == 0 || c0 < w.cols; c0 += block) {
    const int64_t c1 = min(c0 + block, w.cols);
    const auto columns_at = [&](int64_t c) { return Columns{c, min(kGradientColumns, c1 - c)}; };
    for (int64_t c = c0; c < c1; c += kGradientColumns)
      pack_strips<T>(swapped(x), 0, depth, columns_at(c), strips + (c - c0) * depth);
    for (int64_t r = r0; r < r1; r += kGradientRows) {
      const int64_t rows = min(kGradientRows, r1 - r);
      pack<T>(grad, r, r + rows, batch.all(), g);
      if (c0 == 0 && grad_bias != nullptr) {
        float sums[kGradientRows];
        sum_rows(rows, batch.all(), g, false, sums);
        for (int64_t i = 0; i < rows; i++) store_one(grad_bias + r + i, sums[i]);
      }
      for (int64_t c = c0; c < c1; c += kGradientColumns) {
        const Columns columns = columns_at(c);
        multiply_strips<true>(rows, depth, g, batch.width(), 1, strips + (c - c0) * depth, 0, depth, columns.width(), zeros,
                              tile);
        for (int64_t i = 0; i < rows; i++)
          next[r + i] = compress_row(tile + i * columns.width(), w.bits + (r + i) * stride + c / 8,
                                     ceil_div(columns.count, 8), next[r + i], grad_values + first_value(w, r + i + 1));
      }
    }
  }
}

}  // namespace
}  // namespace sk::SK_ISA
