// The gradients of bsr_linear for a few batch rows: weights are read and their gradients written in place, once, and these
// bytes bound it. Panels take 2.0 to 2.7 times as long for all gradients of 1 row, 1.5 for 8 rows, 16 x 16 and up.
#pragma once

#include "bsr_few.h"
#include "bsr_weight.h"

namespace sk::SK_ISA {
namespace {

// Blocks of W transposed, a block column's, and what they meet. Blocks lie wherever W's rows have them, so those that come
// 4 KB later are fetched: +60 % for 8 x 8, level from 32 x 32 on.
struct FewBlocks {
  const sk_bsr* w;
  int64_t begin, end;
  int64_t size() const { return w->block_rows * w->block_cols; }
  int64_t at(int64_t k) const { return w->t_block[k] * size(); }
  int64_t later(int64_t k) const { return at(min(k + max<int64_t>(1, 1024 / size()), w->blocks - 1)); }
  int64_t row(int64_t k) const { return w->t_block_row[k] * w->block_rows; }
};

// Gradients of more bytes go past the caches, and are not read into them first: +40 to +140 % for 32 MB. 7 MB, which fit an
// L3, take up to twice as long that way.
constexpr int64_t kStreamValues = 16 << 20;

// What meets a vector of weights: a number of g or, where the vector holds rows of a narrow block, one for each of them.
template <int kWidth>
[[gnu::always_inline]] inline vec few_g(const float* g) {
  if constexpr (kWidth == kLanes) return broadcast(*g);
  const vec rows = load(g);
  return shuffle(rows, rows, [](int l) constexpr { return l / kWidth; }, Lanes{});
}

// Calls f with kWidth, the columns of W in a vector of weights, and few_count, as compile-time constants.
template <class F>
void with_few(int64_t width, int64_t batch, F f) {
  with_few_count(batch, [&](auto nb) {
    if constexpr (kLanes >= 16)
      if (width >= 16) return f(std::integral_constant<int, 16>{}, nb);
    if constexpr (kLanes >= 8)
      if (width >= 8) return f(std::integral_constant<int, 8>{}, nb);
    f(std::integral_constant<int, 4>{}, nb);
  });
}

// sums [NB, span] += g W.
template <int kWidth, int NB, class T>
void add_grad_x(FewBlocks blocks, const T* values, FewRows g, FewRows sums) {
  for (int64_t c = 0; c < sums.span; c += kLanes) {
    vec acc[NB];
    for (int b = 0; b < NB; b++) acc[b] = load(sums.data + b * sums.stride + c);
    for (int64_t k = blocks.begin; k < blocks.end; k++) {
      const T *const weights = values + blocks.at(k), *const later = values + blocks.later(k);
      const float* numbers = g.data + blocks.row(k);
      const int64_t inside = min(blocks.w->block_rows, blocks.w->rows - blocks.row(k)) * blocks.w->block_cols;
      for (int64_t n = c; n < inside; n += sums.span, numbers += kLanes / kWidth) {
        __builtin_prefetch(later + n);
        const vec weight = load_first(weights + n, inside - n);
        for (int b = 0; b < NB; b++) acc[b] += few_g<kWidth>(numbers + b * g.stride) * weight;
      }
    }
    for (int b = 0; b < NB; b++) store(sums.data + b * sums.stride + c, acc[b]);
  }
}

// grad_values = g^T x.
template <int kWidth, int NB, class T>
void set_grad_values(FewBlocks blocks, T* grad_values, bool past_caches, FewRows g, FewRows x) {
  for (int64_t c = 0; c < x.span; c += kLanes) {
    vec column[NB];
    for (int b = 0; b < NB; b++) column[b] = load(x.data + b * x.stride + c);
    for (int64_t k = blocks.begin; k < blocks.end; k++) {
      T *const to = grad_values + blocks.at(k), *const later = grad_values + blocks.later(k);
      const float* numbers = g.data + blocks.row(k);
      for (int64_t n = c; n < blocks.size(); n += x.span, numbers += kLanes / kWidth) {
        if (!past_caches) __builtin_prefetch(later + n, 1);
        vec total = few_g<kWidth>(numbers) * column[0];
        for (int b = 1; b < NB; b++) total += few_g<kWidth>(numbers + b * g.stride) * column[b];
        if constexpr (std::is_same_v<T, float>)
          if (past_caches) {
            stream(to + n, total);
            continue;
          }
        store(to + n, total);
      }
    }
  }
}

// Block columns [j0, j1).
template <class T>
void few_columns(const sk_bsr& w, const T* values, int64_t j0, int64_t j1, const sk_matrix& grad, const sk_matrix* x,
                 const sk_matrix* grad_x, T* grad_values) {
  if (j0 == j1) return;
  const int64_t width = w.block_cols, span = max<int64_t>(width, kLanes), count = few_count(grad.batch);
  const int64_t c0 = j0 * width, c1 = min(j1 * width, w.cols);
  const auto part = [&](const sk_matrix& m) {
    return sk_matrix{static_cast<T*>(m.data) + c0 * m.stride_feature, m.batch, c1 - c0, m.stride_batch, m.stride_feature};
  };
  // Whole blocks of rows, and a vector more.
  const int64_t rows = ceil_div(ceil_div(w.rows, w.block_rows) * w.block_rows, kLanes) * kLanes + kLanes;
  const FewRows g = {scratch<Use::kOutput>().get<float>(count * rows), rows, 1};
  copy_rows<T>(grad, rows, g.data);
  memset(g.data + grad.batch * rows, 0, (count - grad.batch) * rows * sizeof(float));
  FewRows columns = {nullptr, 0, span}, sums = {nullptr, (j1 - j0) * span, span};
  if (grad_values != nullptr) columns = few_rows<T>(part(*x), width, scratch<Use::kInput>());
  if (grad_x != nullptr) {
    sums.data = scratch<Use::kGradient>().get<float>(count * sums.stride);
    memset(sums.data, 0, count * sums.stride * sizeof(float));
  }
  const int64_t step = max<int64_t>(1, 1024 / (w.block_rows * width));  // 4 KB of blocks share what is kept in registers
  const bool past_caches = std::is_same_v<T, float> && kLanes == 16 &&
                           w.blocks * w.block_rows * width * 4 > kStreamValues &&
                           reinterpret_cast<uintptr_t>(grad_values) % 64 == 0;
  with_few(width, grad.batch, [&](auto lanes, auto nb) {
    for (int64_t j = j0; j < j1; j++) {
      const auto own = [&](FewRows m) { return FewRows{m.data + (j - j0) * span, m.stride, span}; };
      for (int64_t k = w.t_block_ptr[j]; k < w.t_block_ptr[j + 1]; k += step) {
        const FewBlocks blocks = {&w, k, min<int64_t>(k + step, w.t_block_ptr[j + 1])};
        if (grad_x != nullptr) add_grad_x<lanes(), nb()>(blocks, values, g, own(sums));
        if (grad_values != nullptr) set_grad_values<lanes(), nb()>(blocks, grad_values, past_caches, g, own(columns));
      }
    }
  });
  if (grad_x == nullptr) return;
  if (width < kLanes)  // add up the rows of a block that shared a vector
    for (int64_t b = 0; b < grad.batch; b++) {
      float* const row = sums.data + b * sums.stride;
      for (int64_t c = 0; c < (j1 - j0) * width; c++) {
        float total = 0.0f;
        for (int64_t i = c % width; i < kLanes; i += width) total += row[c / width * kLanes + i];
        row[c] = total;
      }
    }
  finish_sums<T>(sums.data, sums.stride, 0, c1 - c0, nullptr, SK_IDENTITY, part(*grad_x));
}

// The gradients for a batch of at most kFewBatch rows.
template <class T>
void backward_few(const sk_bsr& w, const T* values, const sk_matrix& grad, const sk_matrix* x, const sk_matrix* grad_x,
                  T* grad_values, T* grad_bias, const sk_threads& threads) {
  const int64_t block_cols = ceil_div(w.cols, w.block_cols);
  const int64_t ranges = max<int64_t>(1, min<int64_t>(threads.threads, block_cols));
  const double nnz = double(w.blocks) * w.block_rows * w.block_cols;
  parallel_for(threads, ranges, 4.0 * grad.batch * (nnz + w.rows), [&](int64_t begin, int64_t end) {
    few_columns(w, values, range_begin(w.t_block_ptr, block_cols, begin, ranges),
                range_begin(w.t_block_ptr, block_cols, end, ranges), grad, x, grad_x, grad_values);
  });
  if (grad_values != nullptr) clear_padding(w, grad_values);
  if (grad_bias == nullptr) return;
  const T* const g = static_cast<const T*>(grad.data);
  for (int64_t r = 0; r < w.rows; r += kLanes) {
    const int64_t n = min<int64_t>(kLanes, w.rows - r);
    vec total = {};
    for (int64_t b = 0; b < grad.batch; b++)
      if (grad.stride_feature == 1)
        total += load_first(g + b * grad.stride_batch + r, n);
      else
        for (int64_t i = 0; i < n; i++) total[i] += to_float(g[b * grad.stride_batch + (r + i) * grad.stride_feature]);
    store_first(grad_bias + r, total, n);
  }
}

}  // namespace
}  // namespace sk::SK_ISA
