// The gradient of BSR values on tensor cores: for each block g^T x over the batch.
//
// A block of threads owns a run of blocks in a block row, up to 128 columns together, so that small blocks share what is read
// of g. Its columns are gathered from x. As in bsr_product.h, load_matrices transposes what needs it.
#pragma once

#include "bsr_product.h"

namespace sk::gpu {

constexpr int kRunColumns = 128;

template <class T>
SK_KERNEL(kWarp* kMostWarps, 2)
weight_gradient(Blocks<T> w, Operand<T> g, Operand<T> x, T* grad_values, int warps_down, int warps_across) {
  const int threads = warps_down * warps_across * kWarp;
  const int run = w.width < kRunColumns ? kRunColumns / w.width : 1, columns = run * w.width;
  const int log_width = log_of(w.width);
  const int m0 = warp() / warps_across * kWarpRows, n0 = warp() % warps_across * kWarpColumns;
  const int left_size = w.height * kDepth, stage_size = left_size + columns * kDepth;
  const int64_t row0 = int64_t(block().x) * w.height;
  const int64_t end = w.ptr[block().x + 1];
  const int steps = int((x.batch + kDepth - 1) / kDepth);
  const auto left = [&](int step) {
    return Tile<T>{shared_memory<T>(0) + step % kStages * stage_size, log_of((g.feature_major ? kDepth : w.height) / 8)};
  };
  const auto right = [&](int step) {
    return Tile<T>{shared_memory<T>(0) + (step % kStages * stage_size + left_size),
                   log_of((x.feature_major ? kDepth : columns) / 8)};
  };

  for (int64_t first = w.ptr[block().x] + int64_t(block().y) * run; first < end; first += int64_t(blocks().y) * run) {
    const int mine = int(end - first < run ? end - first : run) * w.width - n0;  // columns that this warp has
    const auto copy = [&](int step) {
      const int64_t b0 = int64_t(step) * kDepth, inside = x.batch - b0;
      if (step < steps) {
        if (g.feature_major)
          copy_tile(left(step), w.height, threads, g.data + row0 * g.pitch + b0, g.pitch, g.features - row0, inside);
        else
          copy_tile(left(step), kDepth, threads, g.data + b0 * g.pitch + row0, g.pitch, inside, g.features - row0);
        const Tile<T> to = right(step);
        for (int i = thread(); i < columns * kDepth / 8; i += threads) {
          const int row = i >> to.log_chunks, c = i & ((1 << to.log_chunks) - 1);
          const int n = x.feature_major ? row : c * 8;  // of the run
          const int64_t k = first + (n >> log_width);
          const int64_t column = k < end ? int64_t(w.idx[k]) * w.width + (n & (w.width - 1)) : w.columns;
          if (x.feature_major)
            copy_chunk(to.chunk(row, c), x.data + column * x.pitch + b0 + c * 8, column < w.columns ? inside - c * 8 : 0);
          else
            copy_chunk(to.chunk(row, c), x.data + (b0 + row) * x.pitch + column, row < inside ? w.columns - column : 0);
        }
      }
      commit_copies();
    };
    for (int step = 0; step < kStages - 1; step++) copy(step);
    Sums sums;
    for (int step = 0; step < steps; step++) {
      wait_copies<kStages - 2>();
      barrier();
      copy(step + kStages - 1);
      sums.add(left(step), g.feature_major, right(step), x.feature_major, kDepth, m0, n0, w.height, mine);
    }
    wait_copies<0>();
    barrier();

    const int pitch = result_pitch(columns);
    const Shared<float> results = shared_memory<float>(0);
    sums.store(results, pitch, 1, m0, n0, w.height, mine);
    barrier();
    for (int i = thread(); i < w.height * columns / kPack; i += threads) {
      const int r = i / (columns / kPack), n = i % (columns / kPack) * kPack;
      const int64_t k = first + (n >> log_width);
      if (k >= end) continue;
      const int c = n & (w.width - 1);
      // Past the edge of W they are 0, even where x or g holds infinities.
      const int64_t inside = row0 + r < w.rows ? w.columns - int64_t(w.idx[k]) * w.width - c : 0;
      const auto sum = load_run(results + (r * pitch + n));
      Vector<T, kPack> out;
#pragma unroll
      for (int q = 0; q < kPack; q++) out.at[q] = from_float<T>(q < inside ? sum.at[q] : 0.0f);
      store(grad_values + (k * w.height + r) * w.width + c, out);
    }
    barrier();
  }
}

template <class T>
const char* run_weight_gradient(const Blocks<T>& w, int64_t blocks, const Operand<T>& g, const Operand<T>& x,
                                T* grad_values, Stream stream) {
  const int down = w.height > kWarpRows ? w.height / kWarpRows : 1, across = kRunColumns / kWarpColumns;
  const int run = w.width < kRunColumns ? kRunColumns / w.width : 1;
  const int64_t block_rows = ceil_div(w.rows, w.height);
  const int pipeline = kStages * (w.height + kRunColumns) * kDepth * int(sizeof(T));
  const int results = w.height * (kRunColumns + 4) * int(sizeof(float));
  const Dim grid = {unsigned(block_rows), limited(ceil_div(ceil_div(blocks, block_rows), run)), 1};
  return launch(weight_gradient<T>, grid, down * across * kWarp, pipeline > results ? pipeline : results, stream, w, g, x,
                grad_values, down, across);
}

}  // namespace sk::gpu
