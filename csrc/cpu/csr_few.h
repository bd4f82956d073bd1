// y = activation(x W^T + bias) for a CSR matrix W and at most kLanes batch rows: decoding. Copying W would cost as much as
// multiplying with it, so it is read in place, whole rows at a time: its bytes bound the product, and the hardware
// prefetches them.
#pragma once

#include "csr_weights.h"
#include "few.h"

namespace sk::SK_ISA {
namespace {

typedef Vector<uint32_t, 4>::type uvec4;

// Eight column indices. 16-bit ones are loaded two at a time: shifts are cheaper than loads here.
template <class I>
class Columns {
 public:
  explicit Columns(const I* p) { memcpy(words_, p, sizeof words_); }
  uint32_t operator[](int i) const {
    if constexpr (sizeof(I) == 4) return words_[i];
    return i % 2 ? words_[i / 2] >> 16 : words_[i / 2] & 0xffff;
  }

 private:
  uint32_t words_[8 * sizeof(I) / 4];
};

// Eight weights. Those of bfloat16 are split into even and odd ones: 2 operations where widening them in order takes 4.
// half[h][l] is weight at<T>(h, l).
struct Weights {
  vec4 half[2];
};
inline Weights load8(const float* p) {
  Weights w;
  memcpy(&w, p, sizeof w);
  return w;
}
inline Weights load8(const bf16* p) {
  uvec4 pairs;
  memcpy(&pairs, p, sizeof pairs);
  return {{(vec4)(pairs << 16), (vec4)(pairs & 0xffff0000u)}};
}
template <class T>
constexpr int at(int half, int lane) {
  return sizeof(T) == 2 ? 2 * lane + half : 4 * half + lane;
}

// The dot product of weights [k, end) and the numbers of x at their columns: one batch row. x is in L1. 0.21 ns per
// bfloat16 weight on Zen 4, 0.22 per float32 one. What bounds it are loads, 10 for 8 weights at 2 per cycle, and the 3
// shuffles that combine 4 numbers of x. Scalar arithmetic takes 0.33 ns, gather instructions 0.43, vectors of more than 4
// numbers of x 0.6.
template <class I, class T>
float dot(const T* values, const I* columns, int64_t k, int64_t end, const float* x) {
  vec4 sum[2] = {};
  for (; k + 8 <= end; k += 8) {
    const Weights w = load8(values + k);
    const Columns<I> c(columns + k);
    for (int h = 0; h < 2; h++)
      sum[h] += w.half[h] * vec4{x[c[at<T>(h, 0)]], x[c[at<T>(h, 1)]], x[c[at<T>(h, 2)]], x[c[at<T>(h, 3)]]};
  }
  float rest = 0.0f;
  for (; k < end; k++) rest += to_float(values[k]) * x[columns[k]];
  sum[0] += sum[1];
  return (sum[0][0] + sum[0][1]) + (sum[0][2] + sum[0][3]) + rest;
}

// sums[0 .. W) = the sum of weights [k, end) times the W batch columns of x at their columns, x[column * W ..].
template <int W, class I, class T>
void dot_columns(const T* values, const I* columns, int64_t k, int64_t end, const float* x, float* sums) {
  using V = typename Vector<float, W>::type;
  V sum[4] = {};  // 4: to hide the FMA latency
  const auto add = [&](int i, float value, int64_t column) { sum[i] += (value - V{}) * load_as<V>(x + column * W); };
  for (; k + 8 <= end; k += 8) {
    const Weights w = load8(values + k);
    const Columns<I> c(columns + k);
    for (int h = 0; h < 2; h++)
      for (int l = 0; l < 4; l++) add(l, w.half[h][l], c[at<T>(h, l)]);
  }
  for (; k < end; k++) add(0, to_float(values[k]), columns[k]);
  sum[0] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  memcpy(sums, sum, sizeof *sum);
}

// Rows [r0, r1) of y for one batch row.
template <class T>
void linear_single(const sk_csr& w, const T* values, int64_t r0, int64_t r1, const sk_matrix& x, const T* bias,
                   sk_activation activation, const sk_matrix& y) {
  float* const row = scratch<Use::kInput>().get<float>(w.cols);
  float* const sums = scratch<Use::kOutput>().get<float>(kFewRows);
  copy_rows<T>(x, w.cols, row);
  for (; r0 < r1; r0 += kFewRows) {
    const int64_t end = min(r0 + kFewRows, r1);
    with_columns(w, [&](auto* columns) {
      for (int64_t r = r0; r < end; r++) sums[r - r0] = dot(values, columns, row_begin(w, r), row_begin(w, r + 1), row);
    });
    finish_sums(sums, kFewRows, r0, end, bias, activation, y);
  }
}

// The same for 2 to W batch rows. x's panel [cols][W] is in L2, and loads of it bound the product: 0.4, 0.65 and 1.3 ns per
// weight for W = 4, 8 and 16. In tiles that fit L1 it took twice as long at 95 % sparsity, with W out of cache.
template <int W, class T>
void linear_narrow(const sk_csr& w, const T* values, int64_t r0, int64_t r1, const sk_matrix& x, const T* bias,
                   sk_activation activation, const sk_matrix& y) {
  // pack and unpack move whole vectors, in ascending order: the panels are longer by one.
  const Slice s = {0, x.batch, kLanes, W};
  float* const x_panel = scratch<Use::kInput>().get<float>(w.cols * W + kLanes);
  float* const sums = scratch<Use::kOutput>().get<float>(kFewRows * W + kLanes);
  pack<T>(x, 0, w.cols, s, x_panel);
  for (; r0 < r1; r0 += kFewRows) {
    const int64_t end = min(r0 + kFewRows, r1);
    with_columns(w, [&](auto* columns) {
      for (int64_t r = r0; r < end; r++)
        dot_columns<W>(values, columns, row_begin(w, r), row_begin(w, r + 1), x_panel, sums + (r - r0) * W);
    });
    for (int64_t r = r0; bias != nullptr && r < end; r++)
      for (int b = 0; b < W; b++) sums[(r - r0) * W + b] += to_float(bias[r]);
    activate(activation, sums, ceil_div((end - r0) * W, kLanes) * kLanes);
    unpack<T>(y, r0, end, s, sums);
  }
}

// Calls f with the panel's width for 1 to kLanes batch rows as a compile-time constant: 1, 4, 8 or 16.
template <class F>
void with_few_width(int64_t batch, F f) {
  if (batch == 1) return f(std::integral_constant<int, 1>{});
  if constexpr (kLanes >= 8)
    if (batch <= 4) return f(std::integral_constant<int, 4>{});
  if constexpr (kLanes >= 16)
    if (batch <= 8) return f(std::integral_constant<int, 8>{});
  f(std::integral_constant<int, kLanes>{});
}

// y = activation(x W^T + bias) for a batch of 1 to kLanes.
template <class T>
void linear_few(const sk_csr& w, const T* values, const sk_matrix& x, const T* bias, sk_activation activation,
                const sk_matrix& y, const sk_threads& threads) {
  const int64_t ranges = max<int64_t>(1, min<int64_t>(threads.threads, w.rows));
  parallel_for(threads, ranges, 2.0 * x.batch * (w.nnz + w.rows), [&](int64_t begin, int64_t end) {
    const int64_t r0 = range_begin(w, begin, ranges), r1 = range_begin(w, end, ranges);
    with_few_width(x.batch, [&](auto width) {
      if constexpr (width() == 1)
        linear_single(w, values, r0, r1, x, bias, activation, y);
      else
        linear_narrow<width()>(w, values, r0, r1, x, bias, activation, y);
    });
  });
}

}  // namespace
}  // namespace sk::SK_ISA
