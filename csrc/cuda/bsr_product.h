// BSR times x on tensor cores, 16-bit numbers and blocks of 16 x 16 and up.
//
// A block of threads owns a block row of W, or with the transposed index a block column, and 64 to 256 rows of x. It walks over
// the blocks of W in steps of 32 (16) along the sum, 4 steps in flight. Neither W nor x is transposed in memory: load_matrices
// does it on the way to the registers, so batch-major and feature-major x, W and W transposed run the same code. What bounds it
// is how often a number of x is used once it is in shared memory: as many times as a block of W has rows.
#pragma once

#include "sparsekern/bsr.h"
#include "tensor_cores.h"

namespace sk::gpu {

// W or W transposed: `rows` x `columns` in blocks of `height` x `width`, as the product sees them.
template <class T>
struct Blocks {
  int64_t rows, columns;
  int height, width;
  const int32_t *ptr, *idx;
  const int32_t* which;  // which block of W each one is; null: in order
  const T* values;
  bool transposed;  // blocks are stored [width, height]

  Blocks(const sk_bsr& w, const void* v, bool t)
      : rows(t ? w.cols : w.rows),
        columns(t ? w.rows : w.cols),
        height(int(t ? w.block_cols : w.block_rows)),
        width(int(t ? w.block_rows : w.block_cols)),
        ptr(t ? w.t_block_ptr : w.block_row_ptr),
        idx(t ? w.t_block_row : w.block_col_idx),
        which(t ? w.t_block : nullptr),
        values(static_cast<const T*>(v)),
        transposed(t) {}
  SK_MEMBER const T* block(int64_t k) const { return values + (which ? which[k] : k) * height * width; }
};

// Results go through shared memory as floats, in runs of memory, padded against bank conflicts.
SK_DEVICE int result_pitch(int numbers) { return numbers + 4; }
SK_DEVICE Vector<float, kPack> load_run(Shared<float> from) {
  Vector<float, kPack> run;
#pragma unroll
  for (int i = 0; i < kPack; i += 4) {
    const auto four = from.load<Vector<float, 4>>(i);
#pragma unroll
    for (int j = 0; j < 4; j++) run.at[i + j] = four.at[j];
  }
  return run;
}

template <class T>
SK_KERNEL(kWarp* kMostWarps, 2)
product(Blocks<T> w, Operand<T> x, const T* bias, sk_activation activation, Matrix<T> y, int warps_down, int warps_across) {
  const int threads = warps_down * warps_across * kWarp, tokens = warps_across * kWarpColumns;
  const int depth = w.width < kDepth ? w.width : kDepth;
  const int steps_per_block = w.width / depth;
  const int m0 = warp() / warps_across * kWarpRows, n0 = warp() % warps_across * kWarpColumns;
  const int left_size = w.height * depth, stage_size = left_size + tokens * depth;
  // All block rows of one part of x first: it stays in L2.
  const unsigned block_rows = unsigned((w.rows + w.height - 1) / w.height), block_row = block().x % block_rows;
  const int64_t row0 = int64_t(block_row) * w.height, b0 = int64_t(block().x / block_rows) * tokens;
  const int begin = w.ptr[block_row], steps = (w.ptr[block_row + 1] - begin) * steps_per_block;
  const int left_log = log_of((w.transposed ? w.height : depth) / 8);
  const int right_log = log_of((x.feature_major ? tokens : depth) / 8);
  const auto left = [&](int stage) { return Tile<T>{shared_memory<T>(0) + stage * stage_size, left_log}; };
  const auto right = [&](int stage) { return Tile<T>{shared_memory<T>(0) + (stage * stage_size + left_size), right_log}; };

  int k = begin, at = 0, copied = 0;  // the next step to copy: the block, the place in it, the number
  const auto copy = [&] {
    if (copied < steps) {
      const int stage = copied % kStages;
      const int64_t column = int64_t(w.idx[k]) * w.width + at, inside = w.columns - column;
      // What a block holds past the edge of W counts as 0, along the sum at least.
      const bool t = w.transposed, f = x.feature_major;
      copy_tile(left(stage), t ? depth : w.height, threads, w.block(k) + (t ? at * w.height : at), t ? w.height : w.width,
                t ? inside : w.height, t ? w.height : inside);
      copy_tile(right(stage), f ? depth : tokens, threads, x.data + (f ? column * x.pitch + b0 : b0 * x.pitch + column),
                x.pitch, f ? inside : x.batch - b0, f ? x.batch - b0 : inside);
      at += depth;
      if (at == w.width) at = 0, k++;
    }
    copied++;
    commit_copies();
  };
#pragma unroll 1
  for (int i = 0; i < kStages - 1; i++) copy();
  Sums sums;
  const int mine = int(x.batch - b0 < tokens ? x.batch - b0 : tokens) - n0;  // rows of x that this warp has
  for (int step = 0; step < steps; step++) {
    wait_copies<kStages - 2>();
    barrier();
    copy();
    sums.add(left(step % kStages), !w.transposed, right(step % kStages), !x.feature_major, depth, m0, n0, w.height, mine);
  }
  wait_copies<0>();
  barrier();

  // Through shared memory, to store runs of y.
  const bool batch_major = y.stride_feature == 1;
  const int pitch = result_pitch(batch_major ? w.height : tokens);
  const Shared<float> results = shared_memory<float>(0);
  sums.store(results, batch_major ? 1 : pitch, batch_major ? pitch : 1, m0, n0, w.height, mine);
  barrier();
  const int run = batch_major ? w.height / kPack : tokens / kPack;
  const int64_t y_pitch = batch_major ? y.stride_batch : y.stride_feature;
  const bool aligned = y_pitch % kPack == 0 && reinterpret_cast<uintptr_t>(y.data) % (kPack * sizeof(T)) == 0;
#pragma unroll 1
  for (int i = thread(); i < w.height * tokens / kPack; i += threads) {
    const int slow = i / run, fast = i % run * kPack;
    const int64_t b = b0 + (batch_major ? slow : fast), row = row0 + (batch_major ? fast : slow);
    if (b >= y.batch || row >= y.features) continue;
    const int64_t inside = batch_major ? y.features - row : y.batch - b;
    const auto sum = load_run(results + (slow * pitch + fast));
    Vector<T, kPack> out;
#pragma unroll
    for (int q = 0; q < kPack; q++) {
      if (q >= inside) break;
      const float shift = bias ? to_float(bias[row + (batch_major ? q : 0)]) : 0.0f;
      out.at[q] = from_float<T>(activate(activation, sum.at[q] + shift));
      if (!aligned || inside < kPack) y.at(b + (batch_major ? 0 : q), row + (batch_major ? q : 0)) = out.at[q];
    }
    if (aligned && inside >= kPack) store(&y.at(b, row), out);
  }
}

template <class T>
const char* run_product(const Blocks<T>& w, const Operand<T>& x, const void* bias, sk_activation activation,
                        const sk_matrix& y, Stream stream) {
  // 128 x 128 of the result, with lower blocks 64 x 128 or 32 x 256; fewer tokens where there are no more.
  const int down = w.height > kWarpRows ? w.height / kWarpRows : 1;
  int across = down > 1 ? 2 : 4;
  while (across > 1 && (across / 2) * kWarpColumns >= x.batch) across /= 2;
  const int tokens = across * kWarpColumns, depth = w.width < kDepth ? w.width : kDepth;
  const int pipeline = kStages * (w.height + tokens) * depth * int(sizeof(T));
  const int results = (w.height * tokens + 4 * (w.height > tokens ? w.height : tokens)) * int(sizeof(float));
  const int64_t blocks = ceil_div(w.rows, w.height) * ceil_div(x.batch, tokens);
  if (blocks > INT32_MAX) return "the batch is too large: more than 2^31 - 1 blocks of threads";
  return launch(product<T>, {unsigned(blocks), 1, 1}, down * across * kWarp, pipeline > results ? pipeline : results,
                stream, w, x, static_cast<const T*>(bias), activation, Matrix<T>(y), down, across);
}

}  // namespace sk::gpu
