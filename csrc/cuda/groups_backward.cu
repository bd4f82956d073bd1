// The gradients of N:M and V:N:M products. gemm.h has the tiles and the pipeline, groups.h W's tiles.
// - grad_x = grad W reads W's tiles expanded and transposed: the multiplies of a dense product. Where W^T is 2:4 too, it is
//   groups_linear.cu's product with that: half of them. Of V:N:M with wide groups groups_selected.h makes it: 4 / M.
// - grad_values = grad^T x is made densely, and what W has of it is stored. In V:N:M, only of the selected columns: 4 / M.

#include "groups_selected.h"

namespace sk::gpu::groups {

namespace {

// grad_x = grad W: a block has 64 * down columns of W.
template <class T>
SK_KERNEL(kMostThreads, kBlocks<T>)
backward_input_tile(Groups w, const T* values, Operand<T> grad, Matrix<T> grad_x, int64_t column_blocks) {
  const int down = block_down();
  const int c0 = int(block().x % column_blocks) * (kTall * down), log_tall = kLogTall + down - 1;
  const int64_t b0 = block().x / column_blocks * kWide;
  const int columns = w.cols - c0 < kTall * down ? w.cols - c0 : kTall * down;
  const int stage_bytes = kRightBytes + kLeftBytes<false> * down;
  WarpSums d(kAcross, columns, grad.batch - b0);
  pipeline<kStages>(
      int((w.rows + kDepth<T> - 1) / kDepth<T>),
      [&](int step, int stage) {
        const int64_t row0 = int64_t(step) * kDepth<T>;
        expand<true>(tile_at<T>(stage * stage_bytes + kRightBytes, log_tall), w, values, row0, kDepth<T>, w.rows, c0,
                     kTall * down, 4 * down);
        grad.copy(stage * stage_bytes, kLogDepth<T>, b0, kLogWide, [&](int i) { return row0 + i; });
      },
      [&](int, int stage) {
        d.add(tile_at<T>(stage * stage_bytes + kRightBytes, log_tall), true,
              grad.tile(stage * stage_bytes, kLogDepth<T>, kLogWide), !grad.feature_major, kDepth<T>);
      });
  store_product(d, log_tall, kLogWide, grad_x, c0, columns, b0, static_cast<const T*>(nullptr), SK_IDENTITY);
}

// grad_values = grad^T x where W has values: a block has 64 * down rows and 128 columns of W.
template <class T>
SK_KERNEL(kMostThreads, kBlocks<T>)
backward_weight_tile(Groups w, Operand<T> grad, Operand<T> x, T* grad_values, int64_t row_blocks) {
  const int down = block_down();
  const RowBlock at(w, block().x % row_blocks, down);
  if (at.rows == 0) return;
  const int c0 = int(block().x / row_blocks) * kWide, log_tall = kLogTall + down - 1;
  const int stage_bytes = kRightBytes + kLeftBytes<false> * down;
  WarpSums d(kAcross, at.rows, w.columns - c0);
  pipeline<kStages>(
      int((grad.batch + kDepth<T> - 1) / kDepth<T>),
      [&](int step, int stage) {
        const int64_t b0 = int64_t(step) * kDepth<T>;
        grad.copy(stage * stage_bytes + kRightBytes, log_tall, b0, kLogDepth<T>,
                  [&](int i) { return int64_t(at.row0) + i; });
        copy_columns(w, at.tile, c0, x, stage * stage_bytes, kLogWide, b0, kLogDepth<T>);
      },
      [&](int, int stage) {
        d.add(grad.tile(stage * stage_bytes + kRightBytes, log_tall, kLogDepth<T>), !grad.feature_major,
              x.tile(stage * stage_bytes, kLogWide, kLogDepth<T>), x.feature_major, kDepth<T>);
      });
  const Results results = d.stage(false, kWide);
  const int begin = c0 / w.width * w.n;
  const int64_t end = (int64_t(c0) + kWide + w.width - 1) / w.width * w.n;
  const int count = int(end < w.row_values ? end : w.row_values) - begin;
#pragma unroll 1
  for (int i = thread(); i < at.rows * count; i += threads()) {
    const int r = i / count, k = begin + i % count;
    const int64_t row = at.row0 + r;
    const int c = w.column(row, k) - c0;
    if (c >= 0 && c < kWide) grad_values[row * w.row_values + k] = from_float<T>(results.one(r, c));
  }
}

// Whether grad_x is the sparse product with W^T, whose values are written for it: 36 MB of a 4096 x 4096 weight, 8 us, and a launch.
// By the arithmetic of cost_gpu.py, for Hopper and without CUTLASS, the other way and this one take with 4096 rows of grad 552 and 205 us;
// with 16, where the other one's 32 blocks leave 100 multiprocessors idle as they expand W, 44 and 17. With up to 64 rows it loses where
// columns make blocks for all of the GPU: W [4096, 16384], 16 rows, 44 and 55.
bool runs_transposed(const Groups& w, sk_dtype dtype) { return w.transposed != nullptr && dtype != SK_FLOAT32; }
// Bytes of the workspace.
int64_t transposed_bytes(const Groups& w) { return ceil_div(w.rows * w.row_values * 2, 256) * 256; }

// grad_x = the sparse product of grad, an operand already, with W^T.
template <class T>
const char* backward_input_transposed(const Groups& w, const void* values, const Operand<T>& grad, const sk_matrix& grad_x,
                                      uint8_t* workspace, Stream stream) {
  if (const char* error = transpose_values(w, values, workspace, stream)) return error;
  const sk_matrix g = {const_cast<T*>(grad.data), grad.batch, grad.features, grad.feature_major ? 1 : grad.stride,
                       grad.feature_major ? grad.stride : 1};
  return linear(transpose(w), workspace, g, nullptr, SK_IDENTITY, grad_x, workspace + transposed_bytes(w), kDtype<T>,
                stream);
}

// Whether groups_selected.h makes grad_x, and its error.
template <class T>
bool run_selected(const Groups& w, const void* values, const Operand<T>& grad, const sk_matrix& grad_x, const char*& error,
                  Stream stream) {
  if constexpr (sizeof(T) == 2) {
    if (const Selected at = selected_for(w, grad.batch); at.columns > 0) {
      const int64_t blocks = ceil_div(w.cols, at.columns);
      const Dim grid = {unsigned(blocks * ceil_div(grad.batch, kWide)), 1, 1};
      error = launch(backward_input_selected<T>, grid, kSelectedThreads, at.shared_bytes(), stream, w,
                     static_cast<const T*>(values), grad, Matrix<T>(grad_x), at, blocks);
      return true;
    }
  }
  return false;
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
  if (input_too && error == nullptr && runs_transposed(w, kDtype<T>) && aligned(values, 4)) {
    error = backward_input_transposed(w, values, g, *grad_x, free, stream);
  } else if (input_too && error == nullptr && !run_selected(w, values, g, *grad_x, error, stream)) {
    const int down = down_for(w.cols);
    const int64_t blocks = ceil_div(w.cols, kTall * down);
    const Dim grid = {unsigned(blocks * ceil_div(grad.batch, kWide)), 1, 1};
    error = launch(backward_input_tile<T>, grid, 128 * down, shared_bytes<false>(down), stream, w,
                   static_cast<const T*>(values), g, Matrix<T>(*grad_x), blocks);
  }
  if (weight && error == nullptr) {
    const Dim grid = {unsigned(row_blocks(w) * ceil_div(w.columns, kWide)), 1, 1};
    error = launch(backward_weight_tile<T>, grid, 128 * tile_down(w), shared_bytes<false>(tile_down(w)), stream, w, g,
                   input, static_cast<T*>(grad_values), row_blocks(w));
  }
  if (grad_bias != nullptr && w.rows > 0 && error == nullptr) error = sum_batch(grad, kDtype<T>, grad_bias, stream);
  return error;
}

}  // namespace

int64_t backward_workspace(const Groups& w, const sk_matrix& grad, const sk_matrix* x, sk_dtype dtype) {
  const auto bytes = dtype == SK_FLOAT32 ? operand_bytes<float> : operand_bytes<bf16>;
  const int64_t of_x = x ? bytes(*x, gathers(w)) : 0;
  if (runs_transposed(w, dtype)) return of_x + transposed_bytes(w) + linear_workspace(transpose(w), grad, dtype);
  return of_x + bytes(grad, x && splits_runs(w));
}

const char* backward(const Groups& w, const void* values, const sk_matrix& grad, const sk_matrix* x,
                     const sk_matrix* grad_x, void* grad_values, void* grad_bias, void* workspace, sk_dtype dtype,
                     void* stream) {
  return with_type(dtype, [&](auto zero) {
    return run_backward<decltype(zero)>(w, values, grad, x, grad_x, grad_values, grad_bias, workspace, Stream(stream));
  });
}

}  // namespace sk::gpu::groups
