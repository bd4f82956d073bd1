// The gradients of csr_linear on the CPU.
#pragma once

#include "csr_rows.h"

namespace sk::SK_ISA {
namespace {

// dot(row, x's column cols[i]) for i < M, over one panel; the lanes of i >= M are zero.
template <int NV, int M, class I>
[[gnu::always_inline]] inline vec4 dots(const vec (&row)[NV], const I* cols, int stride, const float* x) {
  vec acc[4] = {};
  for (int i = 0; i < M; i++) {
    const float* column = x + int64_t(cols[i]) * stride;
    acc[i] = row[0] * load(column);
    for (int j = 1; j < NV; j++) acc[i] += row[j] * load(column + j * kLanes);
  }
  return sum4(acc[0], acc[1], acc[2], acc[3]);
}

// Adds (or, without `add`, stores) dot(g's row r, x's column cols[k]) over one panel to the next sum, for the entries of rows
// [r0, r1) in tile t, in that order. Returns the sum after the last one. g's row stays in registers; four entries share one
// reduction. The rest of a row's entries gets code of its own: padding them to four costs 15 % at 90 % sparsity.
template <int NV, class I>
[[gnu::noinline]] float* weight_rows(const sk_csr& w, int64_t t, int64_t r0, int64_t r1, int stride, const float* g,
                                     const float* x, bool add, float* sums) {
  const int32_t* begins = w.tile_ptr + t * w.rows;
  const int32_t* ends = begins + w.rows;
  const I* cols = static_cast<const I*>(w.columns);
  for (int64_t r = r0; r < r1; r++, g += stride) {
    if (const int64_t ahead = r + kPrefetchRows; ahead < r1) __builtin_prefetch(cols + begins[ahead]);
    int32_t k = begins[r];
    const int32_t end = ends[r];
    if (k == end) continue;
    vec row[NV];
    for (int j = 0; j < NV; j++) row[j] = load(g + j * kLanes);
    for (; end - k >= 4; k += 4, sums += 4) {  // k + 4 can overflow
      vec4 total = dots<NV, 4>(row, cols + k, stride, x);
      if (add) {
        vec4 old;
        memcpy(&old, sums, sizeof old);
        total += old;
      }
      memcpy(sums, &total, sizeof total);
    }
    if (k == end) continue;
    const vec4 total = end - k == 3   ? dots<NV, 3>(row, cols + k, stride, x)
                       : end - k == 2 ? dots<NV, 2>(row, cols + k, stride, x)
                                      : dots<NV, 1>(row, cols + k, stride, x);
    for (int i = 0; k < end; i++, k++, sums++) *sums = (add ? *sums : 0.0f) + total[i];
  }
  return sums;
}

// The backward pass is split into groups of panels x ranges of W's column tiles. Each group sums the gradients of values and
// bias in memory of its own; each range packs the gradient of y anew.
struct BackwardPlan {
  Split split;
  int64_t panels, chunk, chunks, value_floats, bias_floats;

  BackwardPlan(const sk_csr& w, int64_t batch, int threads) {
    const sk_csr wt = transposed(w);
    const int stride = panel_stride(batch);
    panels = ceil_div(batch, kPanel);
    // A range's panels of x and of its gradient, up to 384 KB each, stay in L2.
    split = split_work(panels, threads, ceil_div(w.cols * stride, kChunkFloats * 3 / 2), w.tiles,
                       stride * w.rows * kFloatCost, stride * (2 * w.cols * kFloatCost + 2 * w.nnz * kColumnCost),
                       w.nnz * kEntryCost * 3, w.nnz * kFloatCost * 2);
    // Rows of W at a time, about 512 where tiles are narrower: whole tiles, equally many.
    const int64_t t_width = tile_width(wt);
    chunk = ceil_div(ceil_div(w.rows, ceil_div(w.rows, max<int64_t>(512, t_width))), t_width) * t_width;
    chunks = ceil_div(w.rows, chunk);
    value_floats = ceil_div(w.nnz + kLanes, 16) * 16;
    bias_floats = ceil_div(w.rows + kLanes, 16) * 16;
  }

  // The sums of each group, and where those of each (chunk, tile) begin.
  int64_t bytes(const sk_csr& w) const {
    return split.groups * (value_floats + bias_floats) * sizeof(float) + chunks * w.tiles * sizeof(int32_t);
  }
};

// That for W's columns and panels of this width.
inline decltype(&weight_rows<1, uint16_t>) weight_function(const sk_csr& w, int width) {
  decltype(&weight_rows<1, uint16_t>) found = nullptr;
  with_vectors(width,
               [&](auto nv) { found = w.column_bytes == 2 ? weight_rows<nv(), uint16_t> : weight_rows<nv(), uint32_t>; });
  return found;
}

template <class T>
void backward(const sk_csr& w, const T* values, const sk_matrix& grad, const sk_matrix* x, const sk_matrix* grad_x,
              T* grad_values, T* grad_bias, void* workspace, const sk_threads& threads) {
  const sk_csr wt = transposed(w);
  const BackwardPlan plan(w, grad.batch, threads.threads);
  const int64_t groups = plan.split.groups, ranges = plan.split.ranges, chunk = plan.chunk;
  const int stride = panel_stride(grad.batch);
  const int64_t width = tile_width(w), t_width = tile_width(wt);
  const auto value_sums = [&](int64_t g) {
    return static_cast<float*>(workspace) + g * (plan.value_floats + plan.bias_floats);
  };
  const auto bias_sums = [&](int64_t g) { return value_sums(g) + plan.value_floats; };
  int32_t* const sum_starts =
      reinterpret_cast<int32_t*>(value_sums(groups));  // of each (chunk, tile): the same in all groups
  const auto first_tile = [&](int64_t range) { return range * w.tiles / ranges; };
  const auto column = [&](int64_t tile) { return min(tile * width, w.cols); };

  parallel_for(threads, groups * ranges, 4.0 * grad.batch * (w.nnz + w.rows), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; task++) {
      const int64_t g = task / ranges, range = task % ranges;
      const int64_t t0 = first_tile(range), t1 = first_tile(range + 1), c0 = column(t0), c1 = column(t1);
      const int64_t first = g * plan.panels / groups, last = (g + 1) * plan.panels / groups;
      const int64_t first_entry = row_begin(wt, c0), count = row_begin(wt, c1) - first_entry;
      Entry* const entries = scratch<Use::kWeights>().get<Entry>(grad_x ? count : 0) - first_entry;
      int32_t* const starts = scratch<Use::kStarts>().get<int32_t>((t1 - t0) * wt.tiles);
      if (grad_x != nullptr) pack_transposed(w, wt, values, t0, t1, stride, entries, starts);
      float* const g_panel = scratch<Use::kOutput>().get<float>(min(chunk, w.rows) * stride);
      float* const x_panel = scratch<Use::kInput>().get<float>((c1 - c0) * stride);
      float* const grad_x_panel = scratch<Use::kGradient>().get<float>((c1 - c0) * stride);
      for (int64_t p = first; p < last; p++) {
        const Slice s = slice(grad.batch, p);
        const RowFunctions<T> rows(s.width);
        const auto weights = weight_function(w, s.width);
        // Sums stand in the order in which they are visited: range by range, chunk by chunk, tile by tile, row by row.
        float* sums = value_sums(g) + row_begin(wt, c0);
        if (grad_values != nullptr) pack<T>(*x, c0, c1, s, x_panel);
        for (int64_t r0 = 0; r0 < w.rows; r0 += chunk) {
          const int64_t r1 = min(r0 + chunk, w.rows);
          pack<T>(grad, r0, r1, s, g_panel);
          if (grad_bias != nullptr && range == 0) sum_rows(r1 - r0, s, g_panel, p != first, bias_sums(g) + r0);
          // A tile of g stays in L1 while all columns pass over it.
          for (int64_t i = r0 / t_width; grad_x != nullptr && i * t_width < r1; i++)
            for (int64_t t = t0; t < t1; t++) {
              const Entry* const first_of = entries + starts[(t - t0) * wt.tiles + i];
              const float* const g_rows = g_panel - r0 * stride;
              float* const y = grad_x_panel + (column(t) - c0) * stride;
              if (i + 1 < wt.tiles)
                rows.linear(wt, first_of, i, i + 1, column(t), column(t + 1), g_rows, nullptr, stride, y, y, stride);
              else
                rows.finish(wt, first_of, i, column(t), column(t + 1), g_rows, nullptr, SK_IDENTITY, *grad_x, s, y);
            }
          // A tile of x stays in L1 while the chunk's rows pass over it.
          for (int64_t t = t0; grad_values != nullptr && t < t1; t++) {
            if (task < ranges && p == first) sum_starts[r0 / chunk * w.tiles + t] = int32_t(sums - value_sums(g));
            sums = weights(w, t, r0, r1, stride, g_panel, x_panel - c0 * stride, p != first, sums);
          }
        }
      }
    }
  });

  // Sum the groups in a fixed order, and put the sums where they belong: whole chunks of rows per thread, because two threads
  // that write to one cache line of grad_values cost more than reading what the other one summed.
  const auto sum_groups = [&](auto part, int64_t at) {
    vec total = load(part(0) + at);
    for (int64_t g = 1; g < groups; g++) total += load(part(g) + at);
    return total;
  };
  if (grad_values != nullptr)
    parallel_for(threads, plan.chunks * w.tiles, 2.0 * groups * w.nnz, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t t = i % w.tiles, r0 = i / w.tiles * chunk;
        int64_t at = sum_starts[i];
        for (int64_t r = r0; r < min(r0 + chunk, w.rows); r++) {
          const int64_t k = w.tile_ptr[t * w.rows + r], n = w.tile_ptr[(t + 1) * w.rows + r] - k;
          for (int64_t j = 0; j < n; j += kLanes) store_first(grad_values + k + j, sum_groups(value_sums, at + j), n - j);
          at += n;
        }
      }
    });
  if (grad_bias != nullptr)
    for (int64_t r = 0; r < w.rows; r += kLanes) store_first(grad_bias + r, sum_groups(bias_sums, r), w.rows - r);
}

}  // namespace
}  // namespace sk::SK_ISA
