// The inner loops of the BSR products: dense matrix products whose sums stay in registers.
#pragma once

#include "panel.h"
#include "sparsekern/bsr.h"

namespace sk::SK_ISA {
namespace {

// Sums in registers are kTileVectors vectors of kTileRows rows: 4 x 4 of AVX-512's 32 registers, 6 x 2 of AVX2's 16, 4 x 2
// elsewhere; fewer vectors leave room for 8 rows. 4 vectors that meet 4 weights are 8 loads and 16 FMAs, 2 that meet 6 are 8
// and 12. Of the FMA peak, operands in L1, 64 terms: 4 x 4 and 8 x 2 99 %, 8 x 1 95 %, 16 x 1 88 %. AVX2 (Zen 3): 6 x 2 and 5 x
// 2 92 %, 4 x 2 90 %, 8 x 1 75 %; a busy neighbour on the same core leaves 6 x 2 85 %, 4 x 2 78 %. 4 x 3, 94 %, has no use for a
// panel's 8 vectors.
constexpr int kTileVectors = kLanes == 16 ? 4 : 2;
constexpr int kTileRows = kLanes == 8 ? 6 : 4;
constexpr int64_t kSegment = 64;  // panel rows that meet all rows of a block while they stay in L1: 16 KB

// A matrix with its axes swapped: what is packed then has the batch as rows.
inline sk_matrix swapped(const sk_matrix& m) { return {m.data, m.features, m.batch, m.stride_feature, m.stride_batch}; }

// Panel p of a batch, as narrow as its columns allow.
inline Slice own_slice(int64_t batch, int64_t p) {
  Slice s = slice(batch, p);
  s.stride = s.width;
  return s;
}

// Block rows (or columns) are as much work as their blocks, and one more.
inline int64_t range_begin(const int32_t* ptr, int64_t rows, int64_t i, int64_t n) {
  return balanced_begin(rows, i, n, [&](int64_t r) { return double(ptr[r]) + double(r); });
}

// What the products multiply: T is float, bf16, or bf16x2, pairs of numbers that are neighbours along the sum, for dot
// instructions. Stored<T> is how x, W and y are stored, Packed<T> what panels hold.
template <class T>
constexpr int kNumbers = std::is_same_v<T, bf16x2> ? 2 : 1;
template <class T>
using Stored = std::conditional_t<kNumbers<T> == 2, bf16, T>;
template <class T>
using Packed = std::conditional_t<kNumbers<T> == 2, bf16x2, float>;

// acc[r][j] += the sum over k < n of a[r * row + k * term] times row k of b, NV vectors.
template <int MR, int NV, class T, class P>
[[gnu::always_inline]] inline void multiply(int64_t n, const T* a, int64_t row, int64_t term, const P* b, int64_t b_row,
                                            vec (&acc)[MR][NV]) {
  for (int64_t k = 0; k < n; k++, a += term, b += b_row) {
    decltype(load(b)) v[NV];
    for (int j = 0; j < NV; j++) v[j] = load(b + j * kLanes);
    for (int r = 0; r < MR; r++) {
      const auto weight = broadcast(a[r * row]);
      for (int j = 0; j < NV; j++) acc[r][j] = multiply_add(weight, v[j], acc[r][j]);
    }
  }
}

// Cuts rows x vectors into what fits the registers: calls f(MR, NV, r, j) for MR rows from r and NV vectors from j, MR and
// NV compile-time constants. `rows` is a power of 2 from 4 on.
template <int NV, class F>
[[gnu::always_inline]] inline void for_strips(int64_t rows, int64_t j, F f) {
  constexpr int kRows = NV * 8 <= 4 * kTileVectors ? 8 : 4;
  if constexpr (kRows < kTileRows) {  // evenly: 4, 4 or 5, 5, 6
    const int64_t strips = ceil_div(rows, kTileRows);
    for (int64_t i = 0, r = 0, next; i < strips; i++, r = next) {
      next = rows * (i + 1) / strips;
      switch (next - r) {
        case 4: f(std::integral_constant<int, 4>{}, std::integral_constant<int, NV>{}, r, j); break;
        case 5: f(std::integral_constant<int, 5>{}, std::integral_constant<int, NV>{}, r, j); break;
        case 6: f(std::integral_constant<int, 6>{}, std::integral_constant<int, NV>{}, r, j); break;
      }
    }
  } else if (rows % kRows == 0)
    for (int64_t r = 0; r < rows; r += kRows)
      f(std::integral_constant<int, kRows>{}, std::integral_constant<int, NV>{}, r, j);
  else
    for (int64_t r = 0; r < rows; r += 4) f(std::integral_constant<int, 4>{}, std::integral_constant<int, NV>{}, r, j);
}
template <class F>
[[gnu::always_inline]] inline void for_tiles(int64_t rows, int64_t vectors, F f) {
  int64_t j = 0;
  for (; j + kTileVectors <= vectors; j += kTileVectors) for_strips<kTileVectors>(rows, j, f);
  if constexpr (kTileVectors > 2)
    if (j + 2 <= vectors) for_strips<2>(rows, j, f), j += 2;
  if (j < vectors) for_strips<1>(rows, j, f);
}

// Rows of a panel or, feature-major, of a matrix.
struct Rows {
  float* data;
  int64_t stride;
  bool past_caches = false;
};

// Whether features of `m` can be written as rows: finished sums then go there from registers, without a second pass (+5 %).
template <class T>
bool has_rows(const sk_matrix& m, Slice s) {
  return std::is_same_v<T, float> && m.stride_batch == 1 && s.count == s.width;
}
inline Rows rows_of(const sk_matrix& m, int64_t feature, Slice s) {
  return {static_cast<float*>(m.data) + feature * m.stride_feature + s.begin, m.stride_feature,
          streams<float>(m, feature, s)};
}

// Where sums begin: at the rows of a panel or, where that is null, at a number per row.
struct Start {
  Rows rows;
  const float* numbers;
};

// A block, or a part of it, that meets `terms` rows of a panel.
template <class T>
struct Part {
  const T* weights;
  const Packed<T>* panel;
  int64_t terms;
};

// Those of a segment. Listed once, where each strip of rows would have to find them: +2 %.
template <class T>
struct Parts {
  static constexpr int64_t kMost = kSegment / 4 * kNumbers<T>;
  Part<T> part[kMost];
  int64_t count = 0;
  const T* next[kMost];  // blocks to fetch into L2 meanwhile
  int64_t fetched = 0;
  void add(Part<T> p) { part[count++] = p; }
  void fetch(const T* block) { next[fetched++] = block; }
};

// Whether weights come from memory, panel after panel. A strip's share of the next segment is fetched then: at 50 %
// sparsity +10 to +20 % for 16 x 16, forward, +5 to +12 % for dx. It costs 2 to 4 % where W is in a cache.
template <class T>
bool is_far(const sk_bsr& w) {
  return w.blocks * w.block_rows * w.block_cols * int64_t(sizeof(Stored<T>)) > (4 << 20);
}

// MR rows from r x NV vectors from `column`: to = from + the sum of weights * panel over the parts, from `offset` on in the
// weights. Inlined: calls, each of which ends with vzeroupper, cost 4 %.
template <bool kTransposed, int MR, int NV, class T>
[[gnu::always_inline]] inline void multiply_strip(const Parts<T>& parts, int64_t offset, int64_t width, int64_t r,
                                                  int64_t column, int64_t stride, Start from, Rows to) {
  vec acc[MR][NV];
  if (from.rows.data == nullptr) {
    for (int i = 0; i < MR; i++)
      for (int l = 0; l < NV; l++) acc[i][l] = broadcast(from.numbers[r + i]);
  } else {
    const float* row = from.rows.data + r * from.rows.stride + column;
    for (int i = 0; i < MR; i++, row += from.rows.stride)
      for (int l = 0; l < NV; l++) acc[i][l] = load(row + l * kLanes);
  }
  for (int64_t k = 0; k < parts.count; k++)
    multiply<MR, NV>(parts.part[k].terms, parts.part[k].weights + offset, kTransposed ? 1 : width, kTransposed ? width : 1,
                     parts.part[k].panel + column, stride, acc);
  float* out = to.data + r * to.stride + column;
  for (int i = 0; i < MR; i++, out += to.stride)
    for (int l = 0; l < NV; l++) to.past_caches ? stream(out + l * kLanes, acc[i][l]) : store(out + l * kLanes, acc[i][l]);
}

// to [rows, s.width] = from + the sum of weights (kTransposed: their transpose) * panel over the parts; `width` is that of
// a block, of `size` weights.
template <bool kTransposed, class T>
void multiply_parts(const Parts<T>& parts, int64_t width, int64_t size, int64_t rows, Slice s, Start from, Rows to) {
  for_tiles(rows, s.width / kLanes, [&](auto mr, auto nv, int64_t r, int64_t j) {
    if (j == 0)
      for (int64_t i = 0; i < parts.fetched; i++)
        for (int64_t k = r * (size / rows); k < (r + mr()) * (size / rows); k += 64 / sizeof(T))
          __builtin_prefetch(parts.next[i] + k, 0, 2);
    multiply_strip<kTransposed, mr(), nv()>(parts, kTransposed ? r : r * width, width, r, j * kLanes, s.stride, from, to);
  });
}

}  // namespace
}  // namespace sk::SK_ISA
