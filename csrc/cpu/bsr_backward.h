// The gradients of bsr_linear on the CPU.
#pragma once

#include "bsr_weight.h"

namespace sk::SK_ISA {
namespace {

// sums[r] (+)= the sum of g's row r over one panel, for `rows` rows.
void sum_rows(int64_t rows, Slice s, const float* g, bool add, float* sums) {
  for (int64_t r = 0; r < rows; r += 4) {
    vec row[4] = {};
    for (int i = 0; i < min<int64_t>(4, rows - r); i++)
      for (int c = 0; c < s.width; c += kLanes) row[i] += load(g + (r + i) * s.stride + c);
    const vec4 total = sum4(row[0], row[1], row[2], row[3]);
    for (int i = 0; i < min<int64_t>(4, rows - r); i++) sums[r + i] = (add ? sums[r + i] : 0.0f) + total[i];
  }
}

// The backward pass is split into groups of panels x ranges of W's block columns. Each group sums the gradients of values
// and bias in memory of its own; each range packs the gradient of y anew.
struct BackwardPlan {
  Split split;
  int64_t panels, block_cols, chunk, value_floats, bias_floats;

  BackwardPlan(const sk_bsr& w, int64_t batch, int threads) {
    const double columns = panel_stride(batch);
    panels = ceil_div(batch, kPanel);
    block_cols = ceil_div(w.cols, w.block_cols);
    value_floats = w.blocks * w.block_rows * w.block_cols;
    bias_floats = ceil_div(w.rows + kLanes, 16) * 16;
    split = split_work(panels, threads, 1, max<int64_t>(1, block_cols), columns * w.rows * kFloatCost,
                       columns * (2 * w.cols * kFloatCost + 2 * value_floats * kColumnCost), 0.0,
                       value_floats * kFloatCost * 2);
    // Rows of W at a time: their panel, 256 KB, stays in L2.
    chunk =
        max<int64_t>(1, ceil_div(ceil_div(w.rows, max<int64_t>(1, ceil_div(w.rows, 1024))), w.block_rows)) * w.block_rows;
  }

  int64_t bytes() const { return split.groups * (value_floats + bias_floats) * sizeof(float); }
};

// Zero past the edges of W, whatever was multiplied there.
template <class T>
void clear_padding(const sk_bsr& w, T* grad_values) {
  const int64_t height = w.block_rows, width = w.block_cols;
  for (int64_t i = 0; i * height < w.rows; i++)
    for (int64_t k = w.block_row_ptr[i]; k < w.block_row_ptr[i + 1]; k++) {
      const int64_t rows = w.rows - i * height, cols = w.cols - w.block_col_idx[k] * width;
      if (rows >= height && cols >= width) continue;
      for (int64_t r = 0; r < height; r++)
        for (int64_t c = r < rows ? min(cols, width) : 0; c < width; c++)
          store_one(grad_values + (k * height + r) * width + c, 0.0f);
    }
}

// Block column j and the rows [r0, r1) of W over one panel, from the block k of W transposed on; returns the block after
// the last one. g and x are panels of those rows and columns. `sums` are those of grad_values; grad_x is summed from `from`
// to `from`, or to `to` when the column is complete. Each may be null. Few rows of g at a time: they stay in L1 for both
// products.
template <class T>
int64_t backward_column(const sk_bsr& w, const T* values, int64_t j, int64_t k, int64_t r0, int64_t r1, const float* g,
                        const float* x, Slice s, float* sums, bool add, const sk_matrix* grad_x, Rows from, Rows to) {
  const int64_t height = w.block_rows, width = w.block_cols, end = w.t_block_ptr[j + 1];
  const int64_t begin = k;
  while (k < end && w.t_block_row[k] * height < r1) {
    const int64_t first = k, most = min(k + max<int64_t>(1, kSegment / height), end);
    while (k < most && w.t_block_row[k] * height < r1) k++;
    for (int64_t h = 0; h < height && from.data != nullptr; h += kSegment) {
      Parts<T> parts;
      for (int64_t b = first; b < k; b++) {
        const int64_t r = w.t_block_row[b] * height + h;
        parts.add({values + (w.t_block[b] * height + h) * width, g + (r - r0) * s.stride,
                   min(min(height, kSegment), w.rows - r)});
      }
      multiply_parts<true>(parts, width, width, s, from, k == end && h + kSegment >= height ? to : from,
                           [&](int64_t c, int64_t n) __attribute__((always_inline)) {
                             if (r1 == w.rows && first == begin && h == 0)
                               prefetch_rows<T>(*grad_x, j * width, c, n, w.cols, s);
                           });
    }
    for (int64_t b = first; b < k && sums != nullptr; b++)
      with_vectors(s.width, [&](auto nv) {
        (add ? weight_block<true, nv * kLanes>
             : weight_block<false, nv * kLanes>)(w, g + (w.t_block_row[b] * height - r0) * s.stride, x, s,
                                                 sums + w.t_block[b] * height * width);
      });
  }
  return k;
}

template <class T>
void backward(const sk_bsr& w, const T* values, const sk_matrix& grad, const sk_matrix* x, const sk_matrix* grad_x,
              T* grad_values, T* grad_bias, void* workspace, const sk_threads& threads) {
  const BackwardPlan plan(w, grad.batch, threads.threads);
  const int64_t groups = plan.split.groups, ranges = plan.split.ranges, width = w.block_cols;
  const int64_t stride = panel_stride(grad.batch);
  const bool whole = plan.chunk >= w.rows;  // block columns are finished one by one, in L1
  constexpr bool in_place = std::is_same_v<T, float>;
  const auto bias_sums = [&](int64_t g) { return static_cast<float*>(workspace) + g * plan.bias_floats; };
  const auto value_sums = [&](int64_t g) -> float* {  // the first group's are grad_values itself if that is float32
    if constexpr (in_place)
      if (g == 0) return grad_values;
    return bias_sums(groups) + (g - in_place) * plan.value_floats;
  };

  parallel_for(threads, groups * ranges, 4.0 * grad.batch * (plan.value_floats + w.rows), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; task++) {
      const int64_t g = task / ranges, range = task % ranges;
      const int64_t first = g * plan.panels / groups, last = (g + 1) * plan.panels / groups;
      const int64_t j0 = range_begin(w.t_block_ptr, plan.block_cols, range, ranges);
      const int64_t j1 = range_begin(w.t_block_ptr, plan.block_cols, range + 1, ranges);
      const int64_t held = (whole ? 1 : j1 - j0) * width * stride;
      float* const g_panel = scratch<Use::kOutput>().get<float>(plan.chunk * stride);
      float* const x_panel = scratch<Use::kInput>().get<float>(held);
      float* const grad_x_panel = scratch<Use::kGradient>().get<float>(held);
      int32_t* const next = scratch<Use::kStarts>().get<int32_t>(j1 - j0) - j0;  // block of each block column
      for (int64_t p = first; p < last; p++) {
        const Slice s = own_slice(grad.batch, p);
        for (int64_t j = j0; j < j1; j++) next[j] = w.t_block_ptr[j];
        for (int64_t r0 = 0; r0 < w.rows; r0 += plan.chunk) {
          const int64_t r1 = min(r0 + plan.chunk, w.rows);
          pack<T>(grad, r0, r1, s, g_panel);
          if (grad_bias != nullptr && range == 0) sum_rows(r1 - r0, s, g_panel, p != first, bias_sums(g) + r0);
          for (int64_t j = j0; j < j1; j++) {
            const int64_t c0 = j * width, c1 = min(c0 + width, w.cols), at = whole ? 0 : (j - j0) * width * s.stride;
            Rows from = {}, to = {};
            if (grad_x != nullptr) {
              from = to = {grad_x_panel + at, s.stride};
              if (r0 == 0) memset(from.data, 0, width * s.stride * sizeof(float));
              if (has_rows<T>(*grad_x, s) && c1 - c0 == width) to = rows_of(*grad_x, c0, s);
            }
            if (r0 == 0 && grad_values != nullptr)
              for (int64_t c = c0; c < c1; c += weight_width(w))
                pack_columns<T>(*x, c, weight_width(w), s, x_panel + at + (c - c0) * s.stride);
            next[j] =
                int32_t(backward_column(w, values, j, next[j], r0, r1, g_panel, x_panel + at, s,
                                        grad_values != nullptr ? value_sums(g) : nullptr, p != first, grad_x, from, to));
            const bool written = to.data != from.data && w.t_block_ptr[j] < w.t_block_ptr[j + 1];
            if (r1 == w.rows && grad_x != nullptr && !written) unpack<T>(*grad_x, c0, c1, s, from.data);
          }
        }
      }
    }
  });

  // Sum the groups in a fixed order.
  if (grad_values != nullptr) {
    if (!in_place || groups > 1)
      parallel_for(threads, plan.value_floats / 16, 2.0 * groups * plan.value_floats, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin * 16; i < end * 16; i += kLanes) {
          vec total = load(value_sums(0) + i);
          for (int64_t g = 1; g < groups; g++) total += load(value_sums(g) + i);
          store(grad_values + i, total);
        }
      });
    clear_padding(w, grad_values);
  }
  if (grad_bias != nullptr)
    for (int64_t r = 0; r < w.rows; r += kLanes) {
      vec total = load(bias_sums(0) + r);
      for (int64_t g = 1; g < groups; g++) total += load(bias_sums(g) + r);
      store_first(grad_bias + r, total, w.rows - r);
    }
}

}  // namespace
}  // namespace sk::SK_ISA
