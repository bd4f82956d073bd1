// The gradients of N:M and V:N:M products. gemm.h has the tiles and the pipeline, groups.h W's tiles.
// - grad_x = grad W reads W's tiles expanded and transposed: the multiplies of a dense product.
// - grad_values = grad^T x is made densely, and what W has of it is stored. In V:N:M, only of the selected columns: 4 / M.

#include "groups.h"

namespace sk::gpu::groups {

namespace {

// grad_x = grad W: a block has 64 * down columns of W.
template <class T>
SK_KERNEL(kMostThreads)
backward_input_tile(Groups w, const T* values, Operand<T> grad, Matrix<T> grad_x, int64_t column_blocks, int down) {
  const int c0 = int(block().x % column_blocks) * (kTall * down), log_tall = kLogTall + down - 1;
  const int64_t b0 = block().x / column_blocks * kWide;
  const int columns = w.cols - c0 < kTall * down ? w.cols - c0 : kTall * down;
  const int grad_at = kLeftBytes<false> * down, steps = int((w.rows + kDepth<T> - 1) / kDepth<T>);
  const Part part(columns, grad.batch - b0);
  const auto left = [&](int offset) { return Tile<T>{shared_memory<T>(offset), log_tall - kLogRun<T>}; };
  Sums d = {};
  pipeline(
      steps, grad_at + kRightBytes,
      [&](int step, int offset) {
        const int64_t row0 = int64_t(step) * kDepth<T>;
        expand<true>(left(offset), w, values, row0, kDepth<T>, w.rows, c0, kTall * down, 4 * down);
        copy_tile(grad, offset + grad_at, row0, kLogDepth<T>, b0, kLogWide, 128 * down);
      },
      [&](int, int offset) {
        const Tile<T> right = tile_for(grad, offset + grad_at, kLogDepth<T>, kLogWide);
        multiply_tiles(d, left(offset), true, right, !grad.feature_major, part);
      });
  store_product(d, part, grad_x, c0, columns, b0, static_cast<const T*>(nullptr), SK_IDENTITY, down);
}

// grad_values = grad^T x where W has values: a block has 64 * down rows and 128 columns of W.
template <class T>
SK_KERNEL(kMostThreads)
backward_weight_tile(Groups w, Operand<T> grad, Operand<T> x, T* grad_values, int64_t row_blocks, int down) {
  const RowBlock at(w, block().x % row_blocks, down);
  if (at.rows == 0) return;
  const int c0 = int(block().x / row_blocks) * kWide, log_tall = kLogTall + down - 1;
  const int32_t* const chosen = w.selected ? w.selected + at.tile * w.columns : nullptr;
  const int x_at = kLeftBytes<false> * down;
  const int64_t batch = grad.batch < x.batch ? grad.batch : x.batch;  // one may have zeros behind it
  const Part part(at.rows, w.columns - c0);
  Sums d = {};
  pipeline(
      int((batch + kDepth<T> - 1) / kDepth<T>), x_at + kRightBytes,
      [&](int step, int offset) {
        const int64_t b0 = int64_t(step) * kDepth<T>;
        copy_tile(grad, offset, at.row0, log_tall, b0, kLogDepth<T>, 128 * down);
        copy_tile(x, offset + x_at, c0, kLogWide, b0, kLogDepth<T>, 128 * down, chosen, w.columns);
      },
      [&](int, int offset) {
        const Tile<T> left = tile_for(grad, offset, log_tall, kLogDepth<T>);
        const Tile<T> right = tile_for(x, offset + x_at, kLogWide, kLogDepth<T>);
        multiply_tiles(d, left, !grad.feature_major, right, x.feature_major, part);
      });
  const Tile<float> tile = stage_sums(d, part, false, down);
  const int begin = c0 / w.width * w.n;
  const int64_t end = (int64_t(c0) + kWide + w.width - 1) / w.width * w.n;
  const int count = int(end < w.row_values ? end : w.row_values) - begin;
  for (int i = thread(); i < at.rows * count; i += 128 * down) {
    const int r = i / count, k = begin + i % count;
    const int64_t row = at.row0 + r;
    const int c = w.column(row, k) - c0;
    if (c >= 0 && c < kWide) grad_values[row * w.row_values + k] = from_float<T>(tile.data.load(tile.place(r, c)));
  }
}

template <class T>
const char* run_backward(const Groups& w, const void* values, const sk_matrix& grad, const sk_matrix* x,
                         const sk_matrix* grad_x, void* grad_values, void* grad_bias, void* workspace, Stream stream) {
  uint8_t* free = static_cast<uint8_t*>(workspace);
  Operand<T> g, input;
  const char* error = nullptr;
  const bool weight = grad_values != nullptr && w.rows > 0 && w.columns > 0, input_too = grad_x != nullptr && w.cols > 0;
  if (weight || input_too) error = operand(grad, weight && splits_runs(w), g, free, stream);
  if (weight && error == nullptr) error = operand(*x, gathers(w), input, free, stream);
  if (input_too && error == nullptr) {
    const int down = down_for(w.cols);
    const int64_t blocks = ceil_div(w.cols, kTall * down);
    const Dim grid = {unsigned(blocks * ceil_div(grad.batch, kWide)), 1, 1};
    error = launch(backward_input_tile<T>, grid, 128 * down, shared_bytes<false>(down), stream, w,
                   static_cast<const T*>(values), g, Matrix<T>(*grad_x), blocks, down);
  }
  if (weight && error == nullptr) {
    const Dim grid = {unsigned(row_blocks(w) * ceil_div(w.columns, kWide)), 1, 1};
    error = launch(backward_weight_tile<T>, grid, 128 * tile_down(w), shared_bytes<false>(tile_down(w)), stream, w, g,
                   input, static_cast<T*>(grad_values), row_blocks(w), tile_down(w));
  }
  if (grad_bias != nullptr && w.rows > 0 && error == nullptr) error = sum_batch(Matrix<const T>(grad), grad_bias, stream);
  return error;
}

}  // namespace

int64_t backward_workspace(const Groups& w, const sk_matrix& grad, const sk_matrix* x, sk_dtype dtype) {
  const auto bytes = dtype == SK_FLOAT32 ? operand_bytes<float> : operand_bytes<bf16>;
  return bytes(grad, x && splits_runs(w)) + (x ? bytes(*x, gathers(w)) : 0);
}

const char* backward(const Groups& w, const void* values, const sk_matrix& grad, const sk_matrix* x,
                     const sk_matrix* grad_x, void* grad_values, void* grad_bias, void* workspace, sk_dtype dtype,
                     void* stream) {
  return with_type(dtype, [&](auto zero) {
    return run_backward<decltype(zero)>(w, values, grad, x, grad_x, grad_values, grad_bias, workspace, Stream(stream));
  });
}

}  // namespace sk::gpu::groups
