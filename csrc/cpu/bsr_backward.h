// The gradients of bsr_linear on the CPU.
#pragma once

#include "bsr_weight.h"

namespace sk::SK_ISA {
namespace {

// Panels that one pass over the blocks takes: the sums of the gradient of values are then read and written half as often,
// +7 % of this product for 16 x 16, level for 64 x 64; 4 are level with 2.
constexpr int64_t kTogether = 2;

// The backward pass is split into groups of panels x ranges of W's block columns. Each group sums the gradients of values
// and bias in memory of its own; each range packs the gradient of y anew.
struct BackwardPlan {
  Split split;
  int64_t panels, block_cols, together, chunk, value_floats, bias_floats;

  BackwardPlan(const sk_bsr& w, int64_t batch, int threads, bool need_values) {
    const double columns = panel_stride(batch);
    panels = ceil_div(batch, kPanel);
    block_cols = ceil_div(w.cols, w.block_cols);
    together = need_values ? kTogether : 1;
    value_floats = need_values ? w.blocks * w.block_rows * w.block_cols : 0;
    bias_floats = ceil_div(w.rows + kLanes, 16) * 16;
    const double nnz = double(w.blocks) * w.block_rows * w.block_cols;
    split = split_work(panels, threads, 1, max<int64_t>(1, block_cols), columns * w.rows * kFloatCost,
                       columns * (2 * w.cols * kFloatCost + 2 * nnz * kColumnCost), 0.0, value_floats * kFloatCost * 2);
    // Rows of W at a time: their panel, 256 KB, stays in L2.
    chunk =
        max<int64_t>(1, ceil_div(ceil_div(w.rows, max<int64_t>(1, ceil_div(w.rows, 1024))), w.block_rows)) * w.block_rows;
  }

  int64_t bytes() const { return split.groups * (value_floats + bias_floats) * sizeof(float); }
};

// A panel of g, where the gradient of a block column of x is summed over it, and where that goes when it is complete: maybe there.
template <class T>
struct GradX {
  const Packed<T>* g;
  Slice s;
  Rows sums, to;
};

// The weights of the blocks [first, last) of W transposed, one after the other, with those as pairs that are neighbours in a
// column: 5 instructions for 16 pairs, which meet 64 dot instructions in each panel. Zero past the last row of W.
inline const bf16x2* pair_rows(const sk_bsr& w, const bf16* values, int64_t first, int64_t last) {
  const int64_t height = w.block_rows, width = w.block_cols;
  bf16x2* out = scratch<Use::kWeights>().get<bf16x2>((last - first) * height * width / 2);
  bf16x2* const copies = out;
  const auto copy = [&](auto n, const bf16* low, const bf16* high) __attribute__((always_inline)) {
    for (int64_t c = 0; c < width; c += n()) {
      typename Vector<uint16_t, n()>::type a, b = {};
      memcpy(&a, low + c, sizeof a);
      if (high != nullptr) memcpy(&b, high + c, sizeof b);
      const auto pairs = interleave(a, b);
      memcpy(out + c, &pairs, sizeof pairs);
    }
  };
  for (int64_t b = first; b < last; b++) {
    const int64_t inside = w.rows - w.t_block_row[b] * height;
    const bf16* low = values + w.t_block[b] * height * width;
    for (int64_t r = 0; r < height; r += 2, low += 2 * width, out += width) {
      const bf16* const high = r + 1 < inside ? low + width : nullptr;
      width >= kLanes ? copy(std::integral_constant<int, kLanes>{}, low, high)
                      : copy(std::integral_constant<int, 4>{}, low, high);
    }
  }
  return copies;
}

// Block column j and the rows [r0, r1) of W, from the block k of W transposed on; returns the block after the last one. The
// operands are panels of those rows and columns; `sums` are those of grad_values. It or grad_x may be null. Few rows of g
// at a time: they stay in L1 for both products. Rows are counted in T: pairs are half as many.
template <class T>
int64_t backward_column(const sk_bsr& w, const Stored<T>* values, int64_t j, int64_t k, int64_t r0, int64_t r1,
                        const Operands<Packed<T>>* panels, int count, const GradX<T>* grad_x, float* sums, bool add) {
  static const float zeros[128] = {};
  constexpr int64_t n = kNumbers<T>;
  const int64_t height = w.block_rows / n, width = w.block_cols, size = height * width, rows = ceil_div(w.rows, n);
  const int64_t begin = w.t_block_ptr[j], end = w.t_block_ptr[j + 1], step = max<int64_t>(1, kSegment / height);
  const T* const blocks = reinterpret_cast<const T*>(values);
  const auto here = [&](int64_t b) { return b < end && w.t_block_row[b] * w.block_rows < r1; };
  bool empty = begin == end && r0 == 0;  // a column without blocks is zero
  while (empty || here(k)) {
    const int64_t first = k;
    while (k < first + step && here(k)) k++;
    const T* paired = nullptr;
    if constexpr (n == 2)
      if (grad_x != nullptr) paired = pair_rows(w, values, first, k);
    for (int p = 0; p < count && grad_x != nullptr; p++) {
      const Slice s = grad_x[p].s;
      Start from = {first == begin ? Rows{} : grad_x[p].sums, zeros};
      for (int64_t h = 0; h < height; h += kSegment) {
        Parts<T> parts;
        for (int64_t b = first; b < k; b++) {
          const int64_t r = w.t_block_row[b] * height + h;
          const T* const block = n == 1 ? blocks + w.t_block[b] * size : paired + (b - first) * size;
          parts.add({block + h * width, grad_x[p].g + (r - r0 / n) * s.stride, min(min(height, kSegment), rows - r)});
        }
        if (is_far<T>(w) && h == 0 && p == 0)
          for (int64_t b = k; b < min(k + step, end); b++) parts.fetch(blocks + w.t_block[b] * size);
        const bool last = k == end && h + kSegment >= height;
        multiply_parts<true>(parts, width, size, width, s, from, last ? grad_x[p].to : grad_x[p].sums);
        from.rows = grad_x[p].sums;
      }
    }
    for (int64_t b = first; b < k && sums != nullptr; b++) {
      Operands<Packed<T>> own[kTogether];
      for (int p = 0; p < count; p++) {
        own[p] = panels[p];
        own[p].g += (w.t_block_row[b] * w.block_rows - r0) * panels[p].s.stride;
      }
      float* const own_sums = sums + w.t_block[b] * size * n;
      float* const next = sums + w.t_block[min(b + 1, end - 1)] * size * n;
      if constexpr (n == 2)
        weight_block<kPanel / 2>(w, own, count, add, own_sums, next);
      else
        with_vectors(panels[0].s.stride, [&](auto nv) { weight_block<nv * kLanes>(w, own, count, add, own_sums, next); });
    }
    empty = false;
  }
  return k;
}

// Whole panels [first, last) and block columns [j0, j1). value_sums and bias_sums, of these panels, may be null.
template <class T>
void backward_panels(const sk_bsr& w, const Stored<T>* values, const BackwardPlan& plan, int64_t first, int64_t last,
                     int64_t j0, int64_t j1, const sk_matrix& grad, const sk_matrix* x, const sk_matrix* grad_x,
                     float* value_sums, float* bias_sums) {
  constexpr bool kPairs = kNumbers<T> == 2;  // g is packed twice: in pairs of rows of W and in pairs of the batch
  const int64_t width = w.block_cols, stride = panel_stride(grad.batch), batch_stride = kPairs ? kPanel / 2 : stride;
  const int64_t paired = kPairs ? plan.chunk / 2 * stride : 0, g_size = paired + plan.chunk * batch_stride;
  const bool whole = plan.chunk >= w.rows;  // block columns are finished one by one, in L1
  const int64_t columns = (whole ? 1 : j1 - j0) * width, x_size = columns * batch_stride, grad_x_size = columns * stride;
  auto* const g_panels = scratch<Use::kOutput>().get<Packed<T>>(plan.together * g_size);
  auto* const x_panels = scratch<Use::kInput>().get<Packed<T>>(plan.together * x_size);
  float* const grad_x_panels = scratch<Use::kGradient>().get<float>(plan.together * grad_x_size);
  int32_t* const next = scratch<Use::kStarts>().get<int32_t>(j1 - j0) - j0;  // block of each block column
  for (int64_t p = first, count; p < last; p += count) {
    Slice s[kTogether];
    for (count = 0; count < min(plan.together, last - p); count++) {
      s[count] = own_slice(grad.batch, p + count);
      if (s[count].width != s[0].width) break;
    }
    for (int64_t j = j0; j < j1; j++) next[j] = w.t_block_ptr[j];
    for (int64_t r0 = 0; r0 < w.rows; r0 += plan.chunk) {
      const int64_t r1 = min(r0 + plan.chunk, w.rows);
      for (int64_t i = 0; i < count; i++) {
        Packed<T>* const g = g_panels + i * g_size;
        if (kPairs && grad_x != nullptr) pack<T>(grad, r0, r1, s[i], g);
        if (!kPairs || value_sums != nullptr || bias_sums != nullptr) pack_along_batch<T>(grad, r0, r1, s[i], g + paired);
        if (bias_sums != nullptr) sum_rows(r1 - r0, along_batch<T>(s[i]), g + paired, p + i != first, bias_sums + r0);
      }
      for (int64_t j = j0; j < j1; j++) {
        const int64_t c0 = j * width, c1 = min(c0 + width, w.cols), at = whole ? 0 : (j - j0) * width;
        Operands<Packed<T>> operands[kTogether];
        GradX<T> targets[kTogether];
        for (int64_t i = 0; i < count; i++) {
          Packed<T>* const x_panel = x_panels + i * x_size + at * batch_stride;
          operands[i] = {g_panels + i * g_size + paired, x_panel, along_batch<T>(s[i])};
          if (grad_x != nullptr) {
            targets[i].g = g_panels + i * g_size, targets[i].s = s[i];
            targets[i].sums = targets[i].to = {grad_x_panels + i * grad_x_size + at * stride, s[i].stride};
            if (has_rows<T>(*grad_x, s[i]) && c1 - c0 == width) targets[i].to = rows_of(*grad_x, c0, s[i]);
          }
          for (int64_t c = c0; c < c1 && r0 == 0 && value_sums != nullptr; c += weight_width(w))
            pack_columns<T>(*x, c, weight_width(w), s[i], x_panel + (c - c0) * operands[i].s.stride);
        }
        next[j] = int32_t(backward_column<T>(w, values, j, next[j], r0, r1, operands, int(count),
                                             grad_x != nullptr ? targets : nullptr, value_sums, p != first));
        for (int64_t i = 0; i < count && grad_x != nullptr && r1 == w.rows; i++)
          if (targets[i].to.data == targets[i].sums.data) unpack<Stored<T>>(*grad_x, c0, c1, s[i], targets[i].sums.data);
      }
    }
  }
}

inline int64_t backward_bytes(const sk_bsr& w, int64_t batch, const sk_threads& threads) {
  return max(BackwardPlan(w, batch, threads.threads, false).bytes(), BackwardPlan(w, batch, threads.threads, true).bytes());
}

template <class T>
void backward(const sk_bsr& w, const Stored<T>* values, const sk_matrix& grad, const sk_matrix* x, const sk_matrix* grad_x,
              Stored<T>* grad_values, Stored<T>* grad_bias, void* workspace, const sk_threads& threads) {
  const BackwardPlan plan(w, grad.batch, threads.threads, grad_values != nullptr);
  const int64_t groups = plan.split.groups, ranges = plan.split.ranges;
  constexpr bool in_place = std::is_same_v<T, float>;
  const auto bias_sums = [&](int64_t g) { return static_cast<float*>(workspace) + g * plan.bias_floats; };
  const auto value_sums = [&](int64_t g) -> float* {  // the first group's are grad_values itself if that is float32
    if constexpr (in_place)
      if (g == 0) return grad_values;
    return bias_sums(groups) + (g - in_place) * plan.value_floats;
  };

  const double flops = 4.0 * grad.batch * (double(w.blocks) * w.block_rows * w.block_cols + w.rows);
  parallel_for(threads, groups * ranges, flops, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; task++) {
      const int64_t g = task / ranges, range = task % ranges;
      backward_panels<T>(w, values, plan, g * plan.panels / groups, (g + 1) * plan.panels / groups,
                         range_begin(w.t_block_ptr, plan.block_cols, range, ranges),
                         range_begin(w.t_block_ptr, plan.block_cols, range + 1, ranges), grad, x, grad_x,
                         grad_values != nullptr ? value_sums(g) : nullptr,
                         grad_bias != nullptr && range == 0 ? bias_sums(g) : nullptr);
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
