// 2:4 and V:2:M in bfloat16 on dot instructions, forward, with more than a few batch rows.
//
// A row's two weights in a group are neighbours in memory. They meet 2 of the 4 columns of x that the rows of a tile share, which
// is one of 6 pairs: packed for the tile, they halve the loads and the multiply-adds of the CSR kernels. Counted for 64 batch
// columns and Zen 4, expected and not yet measured: 24 stores of 64 bytes per group and tile, 48 cycles, and 4 cycles per row
// and group, where CSR's take 8. So tiles of 16 rows gain 1.25 times, of 64 rows 1.7 times.
#pragma once

#include "activation.h"
#include "pairs.h"
#include "sparsekern/csr.h"

namespace sk::SK_ISA {
namespace {

constexpr int64_t kLeastTileRows = 16;
constexpr int64_t kTileRowsAtOnce = 128;  // longer tiles are cut
constexpr int64_t kGroupsAtOnce = 16;     // their pairs stay in L1, 24 KB, while the tile's rows pass
constexpr int kRowsAtOnce = 4;            // 16 independent sums, where 12 hide the latency

// W's rows hold 2 of 4 columns per group, of columns `selected[4 g + i]` in each tile of v rows or, where that is null, 4 g + i;
// of the last group maybe 1. `packed` is as in sk_vnm.
struct PairGroups {
  const sk_csr& csr;
  const bf16* values;
  const uint8_t* packed;
  const int32_t* selected;
  int64_t v, groups;

  int64_t count() const { return csr.nnz / max<int64_t>(1, csr.rows); }  // of a row's values
  int64_t column(int64_t tile, int64_t g, int64_t i) const {
    return selected ? selected[(tile * groups + g) * 4 + i] : min(4 * g + i, csr.cols - 1);
  }
};

inline bf16x2 load_pair(const bf16* p) {
  bf16x2 pair;
  memcpy(&pair, p, sizeof pair);
  return pair;
}

// Row 6 (g - g0) + i of `pairs`, of NV vectors, = pair i of group g of a tile, in the order 01 02 03 12 13 23, for groups [g0, g1).
template <int NV>
void pack_groups(const PairGroups& w, int64_t tile, int64_t g0, int64_t g1, const float* x, int64_t stride, bf16x2* pairs) {
  for (int64_t g = g0; g < g1; g++, pairs += 6 * NV * kLanes) {
    const bool single = 2 * g + 1 == w.count();  // it has no second weight, which would be 0 times infinity
    for (int j = 0; j < NV * kLanes; j += kLanes) {
      uvec column[4];  // bfloat16 in the high half of each lane
      for (int i = 0; i < 4; i++) column[i] = (uvec)load(x + w.column(tile, g, i) * stride + j);
      bf16x2* row = pairs + j;
      for (int a = 0; a < 4; a++)
        for (int b = a + 1; b < 4; b++, row += NV * kLanes) store(row, column[a] >> 16 | (single ? uvec{} : column[b]));
    }
  }
}

// out [kRowsAtOnce, NV kLanes] += rows of W from r on times the pairs of groups [g0, g1). Rows past r1 are the last one again.
template <int NV>
void multiply_groups(const PairGroups& w, int64_t r, int64_t r1, int64_t g0, int64_t g1, const bf16x2* pairs, float* out) {
  // By the two positions, the first lowest: which pair they are.
  static constexpr uint8_t kPair[16] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 3, 0, 0, 2, 4, 5, 0};
  const int64_t count = w.count(), packed_stride = ceil_div(count * 2, 32) * 4;
  const bf16* values[kRowsAtOnce];
  const uint8_t* packed[kRowsAtOnce];
  vec acc[kRowsAtOnce][NV];
  for (int i = 0; i < kRowsAtOnce; i++) {
    const int64_t row = min(r + i, r1 - 1);
    values[i] = w.values + row * count + 2 * g0, packed[i] = w.packed + row * packed_stride;
    for (int j = 0; j < NV; j++) acc[i][j] = load(out + (i * NV + j) * kLanes);
  }
  bf16x2 last[kRowsAtOnce];
  for (int64_t g = g0; g < g1;) {
    const int64_t first = g;
    if (2 * g + 1 == count)  // the last group's only weight
      for (int i = 0; i < kRowsAtOnce; i++)
        last[i] = {w.values[min(r + i, r1 - 1) * count + 2 * g], {}}, values[i] = &last[i].low;
    for (const int64_t end = 2 * g + 1 < count ? min(g1, count / 2) : g1; g < end; g++, pairs += 6 * NV * kLanes)
      for (int i = 0; i < kRowsAtOnce; i++) {
        const bf16x2* const pair = pairs + kPair[packed[i][g / 2] >> (g & 1) * 4 & 15] * NV * kLanes;
        const uvec weights = broadcast(load_pair(values[i] + 2 * (g - first)));
        for (int j = 0; j < NV; j++) acc[i][j] = multiply_add(weights, load(pair + j * kLanes), acc[i][j]);
      }
  }
  for (int i = 0; i < kRowsAtOnce; i++)
    for (int j = 0; j < NV; j++) store(out + (i * NV + j) * kLanes, acc[i][j]);
}

// Rows [r0, r1) of a tile for one panel of x, of s.width = NV kLanes columns. Whole kRowsAtOnce of `out` are written.
template <int NV>
void multiply_tile(const PairGroups& w, int64_t tile, int64_t r0, int64_t r1, const float* x, Slice s, const bf16* bias,
                   bf16x2* pairs, float* out) {
  memset(out, 0, ceil_div(r1 - r0, kRowsAtOnce) * kRowsAtOnce * NV * kLanes * sizeof *out);
  for (int64_t r = r0; bias != nullptr && r < r1; r++)
    for (int j = 0; j < NV; j++) store(out + ((r - r0) * NV + j) * kLanes, broadcast(bias[r]));
  for (int64_t g0 = 0; g0 < w.groups; g0 += kGroupsAtOnce) {
    const int64_t g1 = min(g0 + kGroupsAtOnce, w.groups);
    pack_groups<NV>(w, tile, g0, g1, x, s.stride, pairs);
    for (int64_t r = r0; r < r1; r += kRowsAtOnce)
      multiply_groups<NV>(w, r, r1, g0, g1, pairs, out + (r - r0) * NV * kLanes);
  }
}

void linear(const PairGroups& w, const sk_matrix& x, const bf16* bias, sk_activation activation, const sk_matrix& y,
            const sk_threads& threads) {
  const int64_t rows = w.csr.rows, panels = ceil_div(x.batch, kPanel), tiles = ceil_div(rows, w.v);
  const double columns = panel_stride(x.batch), nnz = double(w.csr.nnz);
  const Split split = split_work(panels, threads.threads, 1, max<int64_t>(1, tiles), columns * w.csr.cols * kFloatCost,
                                 columns * (rows * kFloatCost + nnz * kColumnCost), 0.0, 0.0);
  parallel_for(threads, split.groups * split.ranges, 2.0 * x.batch * (nnz + rows), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; task++) {
      const int64_t group = task / split.ranges, range = task % split.ranges;
      const int64_t t0 = range * tiles / split.ranges, t1 = (range + 1) * tiles / split.ranges;
      float* const x_panel = scratch<Use::kInput>().get<float>(w.csr.cols * panel_stride(x.batch));
      float* const out = scratch<Use::kOutput>().get<float>(kTileRowsAtOnce * kPanel);
      bf16x2* const pairs = scratch<Use::kWeights>().get<bf16x2>(kGroupsAtOnce * 6 * kPanel);
      for (int64_t p = group * panels / split.groups; p < (group + 1) * panels / split.groups; p++) {
        Slice s = slice(x.batch, p);
        s.stride = s.width;
        pack<bf16>(x, 0, w.csr.cols, s, x_panel);
        for (int64_t t = t0; t < t1; t++)
          for (int64_t r = t * w.v, r1; r < min((t + 1) * w.v, rows); r = r1) {
            r1 = min(r + kTileRowsAtOnce, min((t + 1) * w.v, rows));
            with_vectors(s.width, [&](auto nv) { multiply_tile<nv>(w, t, r, r1, x_panel, s, bias, pairs, out); });
            activate(activation, out, (r1 - r) * s.stride);
            unpack<bf16>(y, r, r1, s, out);
          }
      }
    }
  });
}

}  // namespace
}  // namespace sk::SK_ISA
