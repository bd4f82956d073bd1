// CSR on the CPU. Compiled once per ISA.
//
// All products run over panels of 64 batch columns (panel.h), so that one weight meets 64 floats: on AVX-512, 4 FMAs with a
// memory operand. What bounds them is L1 loads. On Zen 4 a loop of nothing else reaches 86 % of the FMA peak (one 64-byte load
// takes 1.12 cycles, and 4 sums are just enough to hide the FMA latency). That needs the operand in L1 and nothing else to wait
// for:
// - Columns are cut into tiles (tile_ptr); 128 columns x 64 floats are 32 KB. All rows pass over one tile before the next:
//   +35 % over rows that roam over a 256 KB panel in L2. The price: accumulators come from L2 and go back once per tile and
//   row, 512 bytes, some 14 cycles where a row's 12.8 weights of a tile (90 % sparsity) take 59: 70 % of the peak are left.
//   Widths from 112 to 192 are level; less width costs reloads (80: +14 %), more costs L1 misses (256: +6 % to +14 %).
// - In CSR order a row's weights in a tile lie a whole row apart from the next row's, which no prefetcher follows. So each
//   call first copies W into the order in which it is read, as 8-byte entries (value, offset of its operand in a panel):
//   +30 % (140 -> 185 GFLOP/s of 236, 4096 x 1024 at 80 %), for 2-10 % of the time. An entry is one load, and its value
//   reaches the vector unit from a general register: broadcasting it from memory costs 10 %.
// - A few batch rows would not repay the copy: decoding (csr_few.h) and backward passes of up to 16 to 64 rows
//   (csr_few_backward.h) read W in place. Backward, ns per float32 weight and thread, for 4096 x 4096 weights out of cache, of
//   which 50 to 95 % are missing, on 2 threads; a stream of the same bytes takes 0.5 to 0.7:
//     batch             1          4          8         16         24         32         48         64
//     in place    0.8-1.1    1.1-1.3    1.1-1.2    1.7-2.0    3.0-4.3    4.4-5.3    7.3-9.8     10-13
//     copied       6.5-10     7.2-12     6.2-10     7.1-10     6.9-12     7.5-13      11-17     14-22
// - The three gradients share one pass: a chunk of the output gradient's panel is packed once and meets both W transposed and
//   x's panel while it is in L2. Out of cache, the products are bound by memory, and this halves their traffic.
// - Threads share nothing that they write: each copies the weights and packs the panels that it needs itself. Where two cores
//   do not share an L3, reading what the other one wrote cost 5 times the copy itself.
// Tried and dropped: visiting rows by length, so that loop exits predict (-10 %: y is then visited at random; rows of equal
// length are no faster, the FMA queue hides the exits); panels of 128 floats (-5 to -10 %), of 32 or 48 (too few sums for the
// FMA latency); two panels per pass over the weights (level); prefetching the weights of 8 rows ahead instead of copying them
// (+10 % where the copy gives +30 %); fetching x for the next tile while this one computes (level); stores past the cache
// (level with fetching y's lines 16 rows ahead); panels handed to threads one by one (-5 %: neighbours share cache lines).

#include "sparsekern/csr.h"

#include "csr_backward.h"
#include "csr_few.h"
#include "csr_few_backward.h"
#include "csr_rows.h"
#include "kernels.h"

namespace sk::SK_ISA {
namespace {

// Rows [r0, r1) of y for one panel. `fill`: x's panel is packed first, each tile just before its rows. `whole`: x_panel holds
// all tiles, for rows that come later; else one tile at a time, which then never leaves L1 and L2.
template <class T>
void linear_panel(const sk_csr& w, const Entry* entry, int64_t group, int64_t r0, int64_t r1, const sk_matrix& x, bool fill,
                  bool whole, float* x_panel, const T* bias, sk_activation activation, const sk_matrix& y, Slice s,
                  float* sums) {
  const int64_t width = tile_width(w);
  const RowFunctions<T> rows(s.width);
  for (int64_t t = 0; t < w.tiles; t += group) {
    const int64_t c0 = t * width, c1 = min(w.cols, (t + group) * width);
    float* const tile = x_panel + (whole ? c0 * s.stride : 0);
    if (fill) pack<T>(x, c0, c1, s, tile);
    if (t + group < w.tiles)
      entry = rows.linear(w, entry, t, t + group, r0, r1, tile - c0 * s.stride, bias, s.stride, sums, sums, s.stride);
    else
      rows.finish(w, entry, t, r0, r1, tile - c0 * s.stride, bias, activation, y, s, sums);
  }
}

Split forward_split(const sk_csr& w, int64_t batch, int threads) {
  const double columns = panel_stride(batch);
  return split_work(ceil_div(batch, kPanel), threads, 1, max<int64_t>(1, w.rows), columns * w.cols * kFloatCost,
                    columns * (w.rows * kFloatCost + w.nnz * kColumnCost), w.nnz * kEntryCost, 0.0);
}

template <class T>
void linear(const sk_csr& w, const T* values, const sk_matrix& x, const T* bias, sk_activation activation,
            const sk_matrix& y, const sk_threads& threads) {
  if (x.batch <= kLanes) return linear_few(w, values, x, bias, activation, y, threads);
  const int stride = panel_stride(x.batch);
  const int64_t panels = ceil_div(x.batch, kPanel), group = tile_group(w, stride);
  const Split split = forward_split(w, x.batch, threads.threads);
  // Rows at a time: a chunk's accumulators, and its weights while they are copied, fit L2.
  const int64_t chunk = max<int64_t>(kLanes, min(kChunkFloats / stride, kChunkEntries * w.rows / max<int64_t>(1, w.nnz)));
  parallel_for(threads, split.groups * split.ranges, 2.0 * x.batch * (w.nnz + w.rows), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; task++) {
      const int64_t g = task / split.ranges, range = task % split.ranges;
      const int64_t first_row = range_begin(w, range, split.ranges), last_row = range_begin(w, range + 1, split.ranges);
      const int64_t first = g * panels / split.groups, last = (g + 1) * panels / split.groups;
      const int64_t first_entry = row_begin(w, first_row), count = row_begin(w, last_row) - first_entry;
      Entry* const entries = scratch<Use::kWeights>().get<Entry>(count) - first_entry;
      for (int64_t r = first_row; r < last_row; r += chunk)
        pack_rows(w, values, group, r, min(r + chunk, last_row), stride, entries);
      const bool whole = last_row - first_row > chunk;
      float* const x_panel = scratch<Use::kInput>().get<float>(whole ? w.cols * stride : tile_width(w) * group * stride);
      float* const y_panel = scratch<Use::kOutput>().get<float>(chunk * stride);
      for (int64_t p = first; p < last; p++) {
        const Slice s = slice(x.batch, p);
        for (int64_t r0 = first_row; r0 < last_row; r0 += chunk)
          linear_panel(w, entries + row_begin(w, r0), group, r0, min(r0 + chunk, last_row), x, r0 == first_row, whole,
                       x_panel, bias, activation, y, s, y_panel);
      }
    }
  });
}

}  // namespace

const CsrKernels csr_kernels = {
    [](const sk_csr* w, const void* values, const sk_matrix* x, const void* bias, sk_activation activation,
       const sk_matrix* y, sk_dtype dtype, const sk_threads* threads) {
      const auto run = [&](auto* typed) {
        using T = decltype(typed);
        linear(*w, static_cast<T>(values), *x, static_cast<T>(bias), activation, *y, *threads);
      };
      dtype == SK_BFLOAT16 ? run((const bf16*)nullptr) : run((const float*)nullptr);
    },
    [](const sk_csr* w, int64_t batch, const sk_threads* threads) -> int64_t {
      // Of both where the choice is the dtype's.
      const auto few_rows = [&](sk_dtype dtype) { return batch <= few_backward_rows(*w, dtype); };
      const int64_t few = few_rows(SK_FLOAT32) ? FewPlan(*w, batch, threads->threads).bytes() : 0;
      return few_rows(SK_BFLOAT16) ? few : max(few, BackwardPlan(*w, batch, threads->threads).bytes(*w));
    },
    [](const sk_csr* w, const void* values, const sk_matrix* grad, const sk_matrix* x, const sk_matrix* grad_x,
       void* grad_values, void* grad_bias, void* workspace, sk_dtype dtype, const sk_threads* threads) {
      const auto run = [&](auto* typed) {
        using T = std::remove_pointer_t<decltype(typed)>;
        const auto product = grad->batch <= few_backward_rows(*w, dtype) ? backward_few<T> : backward<T>;
        product(*w, static_cast<const T*>(values), *grad, x, grad_x, static_cast<T*>(grad_values),
                static_cast<T*>(grad_bias), workspace, *threads);
      };
      dtype == SK_BFLOAT16 ? run((bf16*)nullptr) : run((float*)nullptr);
    },
};

}  // namespace sk::SK_ISA
