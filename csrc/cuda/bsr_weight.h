// The gradient of BSR values on tensor cores: for each block g^T x over the batch.
//
// A block of threads owns a run of blocks in a block row, up to 128 columns together, so that small blocks share what is read
// of g. Its columns are gathered from x.
#pragma once

#include "bsr_product.h"

namespace sk::gpu {

constexpr int kLogRunColumns = 7, kRunColumns = 1 << kLogRunColumns;

// The blocks that a block of threads owns, at least one.
SK_DEVICE int run_length(int width) { return width < kRunColumns ? kRunColumns / width : 1; }

template <class T>
SK_KERNEL(kMostThreads, 2)
weight_gradient(Blocks<T> w, Operand<T> g, Operand<T> x, T* grad_values) {
  constexpr int kAcross = kRunColumns / kWarpTokens, kLogDepth = 5;
  const int run = run_length(w.width);
  const int log_width = log_of(w.width), log_height = log_of(w.height);
  const int x_at = w.height * kDepth * int(sizeof(T)), stage_bytes = x_at + kRunColumns * kDepth * int(sizeof(T));
  const int64_t row0 = int64_t(block().x) * w.height;
  const int64_t end = w.ptr[block().x + 1];
  for (int64_t first = w.ptr[block().x] + int64_t(block().y) * run; first < end; first += int64_t(blocks().y) * run) {
    const int64_t blocks_here = end - first < run ? end - first : run;
    WarpSums sums(kAcross, w.height, blocks_here << log_width);
    pipeline<kStages>(
        int((x.batch + kDepth - 1) / kDepth),
        [&](int step, int stage) {
          const int64_t b0 = int64_t(step) * kDepth;
          g.copy(stage * stage_bytes, log_height, b0, kLogDepth, [&](int i) { return row0 + i; });
          x.copy(stage * stage_bytes + x_at, kLogRunColumns, b0, kLogDepth, [&](int i) {
            const int64_t k = first + (i >> log_width);
            return k < end ? int64_t(w.idx[k]) * w.width + (i & (w.width - 1)) : x.features;
          });
        },
        [&](int, int stage) {
          sums.add(g.tile(stage * stage_bytes, log_height, kLogDepth), !g.feature_major,
                   x.tile(stage * stage_bytes + x_at, kLogRunColumns, kLogDepth), x.feature_major, kDepth);
        });
    const Results results = sums.stage(false, kRunColumns);
#pragma unroll 1
    for (int i = thread(); i < w.height * kRunColumns / kPack; i += threads()) {
      const int r = i / (kRunColumns / kPack), n = i % (kRunColumns / kPack) * kPack;
      const int64_t k = first + (n >> log_width);
      if (k >= end) continue;
      const int c = n & (w.width - 1);
      // Past the edge of W they are 0, even where x or g holds infinities.
      const int64_t inside = row0 + r < w.rows ? w.columns - int64_t(w.idx[k]) * w.width - c : 0;
      Vector<T, kPack> out;
#pragma unroll
      for (int q = 0; q < kPack; q += 4) {
        const Vector<float, 4> sum = results.four(r, n + q);
#pragma unroll
        for (int l = 0; l < 4; l++) out.at[q + l] = from_float<T>(q + l < inside ? sum.at[l] : 0.0f);
      }
      store(grad_values + (k * w.height + r) * w.width + c, out);
    }
    barrier();
  }
}

template <class T>
const char* run_weight_gradient(const Blocks<T>& w, int64_t blocks, const Operand<T>& g, const Operand<T>& x,
                                T* grad_values, Stream stream) {
  const int down = w.height > kWarpRows ? w.height / kWarpRows : 1, across = kRunColumns / kWarpTokens;
  const int run = w.width < kRunColumns ? kRunColumns / w.width : 1;
  const int64_t block_rows = ceil_div(w.rows, w.height);
  const Dim grid = {unsigned(block_rows), limited(ceil_div(ceil_div(blocks, block_rows), run)), 1};
  return launch(weight_gradient<T>, grid, down * across * kWarp, shared_bytes<T>(w.height, kRunColumns, kDepth), stream, w,
                g, x, grad_values);
}

}  // namespace sk::gpu
