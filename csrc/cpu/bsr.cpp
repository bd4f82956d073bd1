// BSR on the CPU. Compiled once per ISA.
//
// All products run over panels of 64 batch columns (panel.h) and are small dense matrix products whose sums stay in
// registers (bsr_tile.h): one number is broadcast and meets up to 4 vectors. With operands in L1 that reaches 90 to 95 % of
// the FMA peak on AVX-512; whole products reach 60 to 85 %, by how fast memory brings and takes panels.
// - Forward: 64 columns of a block row's blocks at a time, whose 16 KB of x serve all rows of the blocks from L1. Finished
//   rows go to y from registers (+4 %), and y's lines are fetched while FMAs go on (up to +10 %).
// - Backward: one pass over the gradient of y, at most 1024 rows of it at a time, in L2 (512: -3 %). Rows that a block
//   column needs are in L1 for the gradient of x, which reads blocks by columns, and then meet that column's x for the
//   gradient of the values: outer products over the batch. Blocks narrower than a vector take dot products over the batch:
//   adding up their lanes is a quarter of that time.
// - Up to 8 batch rows are dot products along the rows of blocks (bsr_few.h): 4 times as fast as a panel for 1 row, twice
//   for 4, level for 8 (bfloat16: +30 %).
// Tried and dropped: packing the next panel of x, or fetching it, while this one is in use; fetching weights, sums or the
// next gradients ahead (all level); copying each segment of x to L1 instead of packing x (+2 % for 128 x 128, -15 % for 16
// x 16); strips of rows as functions of their own (-4 %).

#include "sparsekern/bsr.h"

#include "activation.h"
#include "bsr_backward.h"
#include "bsr_few.h"
#include "kernels.h"

namespace sk::SK_ISA {
namespace {

// Rows of block rows [i0, i1) of y for one panel. `out` holds one block row.
template <class T>
void linear_rows(const sk_bsr& w, const T* values, int64_t i0, int64_t i1, const float* x, const T* bias,
                 sk_activation activation, const sk_matrix& y, Slice s, float* out) {
  const int64_t height = w.block_rows, width = w.block_cols, step = max<int64_t>(1, kSegment / width);
  const Rows sums = {out, s.stride};
  for (int64_t i = i0; i < i1; i++) {
    const int64_t r0 = i * height, r1 = min(r0 + height, w.rows), begin = w.block_row_ptr[i], end = w.block_row_ptr[i + 1];
    const bool direct = has_rows<T>(y, s) && activation == SK_IDENTITY && r1 - r0 == height && begin < end;
    for (int64_t r = r0; r < r1; r++) {
      const vec b = bias ? broadcast(to_float(bias[r])) : vec{};
      for (int c = 0; c < s.width; c += kLanes) store(out + (r - r0) * s.stride + c, b);
    }
    for (int64_t k = begin; k < end; k += step)
      for (int64_t c0 = 0; c0 < width; c0 += kSegment) {
        const bool last = k + step >= end && c0 + kSegment >= width;
        Parts<T> parts;
        for (int64_t b = k; b < min(k + step, end); b++) {
          const int64_t c = w.block_col_idx[b] * width + c0;
          parts.add({values + b * height * width + c0, x + c * s.stride, min(min(width, kSegment), w.cols - c)});
        }
        multiply_parts<false>(parts, width, height, s, sums, direct && last ? rows_of(y, r0, s) : sums,
                              [&](int64_t r, int64_t n) __attribute__((always_inline)) {
                                if (k == begin && c0 == 0) prefetch_rows<T>(y, r0, r, n, r1, s);
                              });
      }
    if (direct) continue;
    activate(activation, out, (r1 - r0) * s.stride);
    unpack<T>(y, r0, r1, s, out);
  }
}

template <class T>
void linear(const sk_bsr& w, const T* values, const sk_matrix& x, const T* bias, sk_activation activation,
            const sk_matrix& y, const sk_threads& threads) {
  const double nnz = double(w.blocks) * w.block_rows * w.block_cols;
  const int64_t block_rows = ceil_div(w.rows, w.block_rows), panels = ceil_div(x.batch, kPanel);
  const double columns = panel_stride(x.batch);
  const Split split = split_work(panels, threads.threads, 1, max<int64_t>(1, block_rows), columns * w.cols * kFloatCost,
                                 columns * (w.rows * kFloatCost + nnz * kColumnCost), 0.0, 0.0);
  parallel_for(threads, split.groups * split.ranges, 2.0 * x.batch * (nnz + w.rows), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; task++) {
      const int64_t g = task / split.ranges, range = task % split.ranges;
      const int64_t first = g * panels / split.groups, last = (g + 1) * panels / split.groups;
      const int64_t i0 = range_begin(w.block_row_ptr, block_rows, range, split.ranges);
      const int64_t i1 = range_begin(w.block_row_ptr, block_rows, range + 1, split.ranges);
      if (x.batch <= kFewBatch) {
        linear_few(w, values, i0, i1, x, bias, activation, y);
        continue;
      }
      float* const x_panel = scratch<Use::kInput>().get<float>(w.cols * panel_stride(x.batch));
      float* const out = scratch<Use::kOutput>().get<float>(w.block_rows * panel_stride(x.batch));
      for (int64_t p = first; p < last; p++) {
        const Slice s = own_slice(x.batch, p);
        pack<T>(x, 0, w.cols, s, x_panel);
        linear_rows(w, values, i0, i1, x_panel, bias, activation, y, s, out);
      }
    }
  });
}

}  // namespace

const BsrKernels bsr_kernels = {
    [](const sk_bsr* w, const void* values, const sk_matrix* x, const void* bias, sk_activation activation,
       const sk_matrix* y, sk_dtype dtype, const sk_threads* threads) {
      const auto run = [&](auto* typed) {
        using T = const std::remove_pointer_t<decltype(typed)>;
        linear(*w, static_cast<T*>(values), *x, static_cast<T*>(bias), activation, *y, *threads);
      };
      dtype == SK_BFLOAT16 ? run((bf16*)nullptr) : run((float*)nullptr);
    },
    [](const sk_bsr* w, int64_t batch, const sk_threads* threads) -> int64_t {
      return BackwardPlan(*w, batch, threads->threads).bytes();
    },
    [](const sk_bsr* w, const void* values, const sk_matrix* grad, const sk_matrix* x, const sk_matrix* grad_x,
       void* grad_values, void* grad_bias, void* workspace, sk_dtype dtype, const sk_threads* threads) {
      const auto run = [&](auto* typed) {
        using T = std::remove_pointer_t<decltype(typed)>;
        backward(*w, static_cast<const T*>(values), *grad, x, grad_x, static_cast<T*>(grad_values),
                 static_cast<T*>(grad_bias), workspace, *threads);
      };
      dtype == SK_BFLOAT16 ? run((bf16*)nullptr) : run((float*)nullptr);
    },
};

}  // namespace sk::SK_ISA
