// BSR times x on tensor cores, 16-bit numbers and blocks of 16 x 16 and up.
//
// A block of threads owns a block row of W, or with the transposed index a block column, and 64 to 256 rows of x. It walks over
// the blocks of W in steps of 32 (16) along the sum, 4 steps in flight. What bounds it is how often a number of x is used once it is in
// shared memory: as many times as a block of W has rows.
#pragma once

#include "gemm.h"
#include "sparsekern/bsr.h"

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

constexpr int kDepth = 32;                       // of a step, at most: along the dimension that is summed over
constexpr int kStages = 4;                       // steps under way
constexpr int kWarpRows = 32, kWarpTokens = 64;  // of a warp's sums
using WarpSums = Sums<kWarpRows / 16, kWarpTokens / 16>;

// Bytes of shared memory for a block's operands, and after them its sums.
template <class T>
int shared_bytes(int height, int width, int depth) {
  const int operands = kStages * (height + width) * depth * int(sizeof(T)), sums = results_bytes(height, width);
  return operands > sums ? operands : sums;
}

template <class T>
SK_KERNEL(kMostThreads, 2)
product(Blocks<T> w, Operand<T> x, const T* bias, sk_activation activation, Matrix<T> y, int warps_across) {
  const int tokens = warps_across * kWarpTokens;
  const int depth = w.width < kDepth ? w.width : kDepth;
  const int log_height = log_of(w.height), log_tokens = log_of(tokens), log_depth = log_of(depth);
  const int x_at = w.height * depth * int(sizeof(T)), stage_bytes = x_at + tokens * depth * int(sizeof(T));
  // All block rows of one part of x first: it stays in L2.
  const unsigned block_rows = unsigned((w.rows + w.height - 1) / w.height), block_row = block().x % block_rows;
  const int64_t row0 = int64_t(block_row) * w.height, b0 = int64_t(block().x / block_rows) * tokens;
  const int rows = int(w.rows - row0 < w.height ? w.rows - row0 : w.height);
  const bool t = w.transposed;
  const auto left = [&](int stage) { return tile_at<T>(stage * stage_bytes, t ? log_height : log_depth); };
  int k = w.ptr[block_row], at = 0;  // the next step to copy: the block, and the place in it
  WarpSums sums(warps_across, rows, x.batch - b0);
  pipeline<kStages>((w.ptr[block_row + 1] - k) * (w.width >> log_depth),
                    [&](int, int stage) {
                      const int64_t column = int64_t(w.idx[k]) * w.width + at, inside = w.columns - column;
                      const T* const from = w.block(k) + (t ? at * w.height : at);
                      // What a block holds past the edge of W counts as 0, along the sum at least.
                      copy_tile(left(stage), t ? depth : w.height, [&](int r, int c, int64_t& numbers) {
                        numbers = t ? r < inside ? kRun<T> : 0 : inside - c;
                        return from + r * (t ? w.height : w.width) + c;
                      });
                      x.copy(stage * stage_bytes + x_at, log_depth, b0, log_tokens, [&](int i) { return column + i; });
                      at += depth;
                      if (at == w.width) at = 0, k++;
                    },
                    [&](int, int stage) {
                      sums.add(left(stage), t, x.tile(stage * stage_bytes + x_at, log_depth, log_tokens), !x.feature_major,
                               depth);
                    });
  store_product(sums, log_height, log_tokens, y, row0, rows, b0, bias, activation);
}

template <class T>
const char* run_product(const Blocks<T>& w, const Operand<T>& x, const void* bias, sk_activation activation,
                        const sk_matrix& y, Stream stream) {
  // 128 x 128 of the result, with lower blocks 64 x 128 or 32 x 256; fewer tokens where there are no more.
  const int down = w.height > kWarpRows ? w.height / kWarpRows : 1;
  int across = down > 1 ? 2 : 4;
  while (across > 1 && (across / 2) * kWarpTokens >= x.batch) across /= 2;
  const int tokens = across * kWarpTokens, depth = w.width < kDepth ? w.width : kDepth;
  const int64_t blocks = ceil_div(w.rows, w.height) * ceil_div(x.batch, tokens);
  if (blocks > INT32_MAX) return "the batch is too large: more than 2^31 - 1 blocks of threads";
  return launch(product<T>, {unsigned(blocks), 1, 1}, down * across * kWarp, shared_bytes<T>(w.height, tokens, depth),
                stream, w, x, static_cast<const T*>(bias), activation, Matrix<T>(y), across);
}

}  // namespace sk::gpu
