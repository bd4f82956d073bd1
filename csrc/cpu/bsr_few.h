// bsr_linear for a few batch rows (decoding): weights are read in place, once, and their bytes bound it.
#pragma once

#include "bsr_tile.h"
#include "few.h"

namespace sk::SK_ISA {
namespace {

constexpr int64_t kFewBatch = 8;  // larger batches fill a vector: one weight meets kLanes batch rows

// The sums of each `width` lanes (a power of 2 from 4 on), in each of them.
template <int S>
[[gnu::always_inline]] inline vec add_swapped(vec v) {
  return v + shuffle(v, v, [](int l) constexpr { return l ^ S; }, Lanes{});
}
[[gnu::always_inline]] inline vec sum_lanes(vec v, int64_t width) {
  if constexpr (kLanes >= 16)
    if (width >= 16) v = add_swapped<8>(v);
  if constexpr (kLanes >= 8)
    if (width >= 8) v = add_swapped<4>(v);
  return add_swapped<1>(add_swapped<2>(v));
}

// Batch rows as the weights meet them: the columns of a block are `span` floats, a vector at least. Narrower blocks have as
// many rows to a vector of weights as fit it, and their columns are repeated for each.
struct FewRows {
  float* data;
  int64_t stride, span;
};

// How many batch rows the loops over them compute: the last ones are zero.
inline int64_t few_count(int64_t batch) { return batch <= 2 ? batch : batch <= 4 ? 4 : 8; }

// x [batch, features], padded to whole blocks of `width` columns and to few_count rows, in `memory`.
template <class T>
FewRows few_rows(const sk_matrix& x, int64_t width, Scratch& memory) {
  const int64_t count = few_count(x.batch), copies = max<int64_t>(1, kLanes / width);
  const int64_t columns = ceil_div(ceil_div(x.features, width) * width, kLanes) * kLanes;
  float* const rows = memory.get<float>(count * columns * (copies > 1 ? 1 + copies : 1));
  copy_rows<T>(x, columns, rows);
  memset(rows + x.batch * columns, 0, (count - x.batch) * columns * sizeof(float));
  if (copies == 1) return {rows, columns, width};
  float* const repeated = rows + count * columns;
  for (int64_t c = 0; c < count * columns; c += width)
    for (int64_t i = 0; i < copies; i++) memcpy(repeated + c * copies + i * width, rows + c, width * sizeof(float));
  return {repeated, columns * copies, width * copies};
}

// sums[b * sums_stride + r] = the dot products of NV vectors of rows, which begin `offset` weights into the blocks of block
// row i, and NB batch rows.
template <int NV, int NB, class T>
[[gnu::noinline]] void dot_rows(const sk_bsr& w, const T* values, int64_t i, int64_t offset, FewRows x, float* sums,
                                int64_t sums_stride) {
  const int64_t size = w.block_rows * w.block_cols, begin = w.block_row_ptr[i], end = w.block_row_ptr[i + 1];
  vec acc[NV][NB] = {};
  for (int64_t k = begin; k < end; k++) {
    const T* weights = values + k * size + offset;
    const int64_t j = w.block_col_idx[k], inside = w.cols - j * w.block_cols;
    if (offset == 0)  // whole blocks at a time are fetched, though a few of their rows are read
      for (int64_t n = 0; n < size; n += 64 / sizeof(T)) __builtin_prefetch(weights + 2 * size + n);
    alignas(64) T cut[NV * 128];
    if (inside < w.block_cols) {  // past the edge of W are no weights, whatever stands there
      for (int64_t n = 0; n < NV * x.span; n++) cut[n] = n % w.block_cols < inside ? weights[n] : T{};
      weights = cut;
    }
    for (int64_t c = 0; c < x.span; c += kLanes) {
      vec v[NB];
      for (int b = 0; b < NB; b++) v[b] = load(x.data + b * x.stride + j * x.span + c);
      for (int r = 0; r < NV; r++) {
        const vec weight = load(weights + r * x.span + c);
        for (int b = 0; b < NB; b++) acc[r][b] += weight * v[b];
      }
    }
  }
  const int64_t width = min<int64_t>(w.block_cols, kLanes);  // columns of W in a vector
  if constexpr (NV == 4 || NB % 4 == 0)
    if (width == kLanes) {  // four sums share a reduction
      for (int r = 0; r < NV; r += NV == 4 ? 4 : 1)
        for (int b = 0; b < NB; b += NV == 4 ? 1 : 4) {
          float* const out = sums + b * sums_stride + r;
          if constexpr (NV == 4) {
            const vec4 total = sum4(acc[r][b], acc[r + 1][b], acc[r + 2][b], acc[r + 3][b]);
            memcpy(out, &total, sizeof total);
          } else {
            const vec4 total = sum4(acc[r][b], acc[r][b + 1], acc[r][b + 2], acc[r][b + 3]);
            for (int i = 0; i < 4; i++) out[i * sums_stride] = total[i];
          }
        }
      return;
    }
  for (int r = 0; r < NV; r++)
    for (int b = 0; b < NB; b++) {
      alignas(64) float total[kLanes];
      store(total, sum_lanes(acc[r][b], width));
      float* out = sums + b * sums_stride + r * (kLanes / width);
      for (int64_t l = 0; l < kLanes; l += width) *out++ = total[l];
    }
}

// Block rows [i0, i1) of W times `count` batch rows, NB at a time. As many sums as fit the registers: 4 vectors of weights, or
// fewer.
template <int NB, class T>
void linear_few_rows(const sk_bsr& w, const T* values, int64_t i0, int64_t i1, FewRows x, int64_t count, float* sums,
                     int64_t sums_stride) {
  constexpr int kVectors = NB <= kTileVectors ? 4 : 4 * kTileVectors / NB;
  const int64_t size = w.block_rows * w.block_cols, rows = x.span / w.block_cols;  // of a block that share a vector
  for (int64_t i = i0; i < i1; i++, sums += w.block_rows)
    for (int64_t b = 0; b < count; b += NB) {
      const FewRows part = {x.data + b * x.stride, x.stride, x.span};
      float* out = sums + b * sums_stride;
      for (int64_t offset = 0, n; offset < size; offset += n * x.span, out += n * rows) {
        n = offset + kVectors * x.span <= size ? kVectors : 1;
        (n == 1 ? dot_rows<1, NB, T> : dot_rows<kVectors, NB, T>)(w, values, i, offset, part, out, sums_stride);
      }
    }
}

// Calls f with few_count as a compile-time constant.
template <class F>
void with_few_count(int64_t batch, F f) {
  switch (few_count(batch)) {
    case 1: return f(std::integral_constant<int, 1>{});
    case 2: return f(std::integral_constant<int, 2>{});
    case 4: return f(std::integral_constant<int, 4>{});
    case 8: return f(std::integral_constant<int, 8>{});
  }
}

// Block rows [i0, i1) of y.
template <class T>
void linear_few(const sk_bsr& w, const T* values, int64_t i0, int64_t i1, const sk_matrix& x, const T* bias,
                sk_activation activation, const sk_matrix& y) {
  const FewRows operand = few_rows<T>(x, w.block_cols, scratch<Use::kInput>());
  const int64_t step = max<int64_t>(1, kFewRows / w.block_rows), stride = step * w.block_rows;
  float* const sums = scratch<Use::kOutput>().get<float>(few_count(x.batch) * ceil_div(stride, kLanes) * kLanes);
  for (int64_t i = i0; i < i1; i += step) {
    const int64_t end = min(i + step, i1);
    with_few_count(x.batch, [&](auto nb) {
      // 8 rows at once leave AVX2 registers for one vector of weights, which takes 8 loads of x: 4 at once are 10 % faster.
      constexpr int kTogether = kLanes == 16 ? nb() : min(nb(), 4);
      linear_few_rows<kTogether>(w, values, i, end, operand, nb(), sums, stride);
    });
    finish_sums(sums, stride, i * w.block_rows, min(end * w.block_rows, w.rows), bias, activation, y);
  }
}

}  // namespace
}  // namespace sk::SK_ISA
