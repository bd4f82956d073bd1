// Products of a masked weight with up to 8 batch rows: 8 weights at a time are expanded into a register, where they meet all
// batch rows.
#pragma once

#include "few.h"
#include "mask_bits.h"

namespace sk::SK_ISA {
namespace {

constexpr int64_t kMaskFew = kLanes >= 8 ? 8 : 0;  // where 8 weights are two vectors, tiles serve all batches

// Calls f(batch rows that are computed) for 1 to kMaskFew of them. 2 would take as long as 4.
template <class F>
void with_mask_few(int64_t batch, F f) {
  if constexpr (kMaskFew > 0) {
    if (batch == 1) return f(std::integral_constant<int, 1>{});
    if (batch <= 4) return f(std::integral_constant<int, 4>{});
    f(std::integral_constant<int, 8>{});
  }
}

// x as float32 rows of `stride`, those past the batch zero.
template <class T>
float* mask_rows(const sk_matrix& x, int64_t count, int64_t stride, Scratch& memory) {
  float* const rows = memory.get<float>(count * stride);
  copy_rows<T>(x, stride, rows);
  memset(rows + x.batch * stride, 0, (count - x.batch) * stride * sizeof(float));
  return rows;
}

// Rows of W that are multiplied together: each batch row has a sum for each, 8 sums hide the FMA latency.
template <int NB>
constexpr int kFewTogether = NB >= 8   ? 1
                             : NB >= 4 ? 2
                                       : 4;

// Rows [r0, r1) of y.
template <int NB, class T>
void mask_linear_few(const sk_mask& w, const T* values, int64_t r0, int64_t r1, const sk_matrix& x, const T* bias,
                     sk_activation activation, const sk_matrix& y) {
  constexpr int R = kFewTogether<NB>;
  const int64_t bytes = (w.cols + 7) / 8, stride = ceil_div(w.cols, 16) * 16 + 16;
  const Readable<T> from(w, values);
  const float* const rows = mask_rows<T>(x, NB, stride, scratch<Use::kInput>());
  float* const sums = scratch<Use::kOutput>().get<float>(NB * kFewRows);
  for (; r0 < r1; r0 += kFewRows) {
    const int64_t end = min(r0 + kFewRows, r1);
    for (int64_t r = r0; r < end; r += R) {
      const T* p[R];
      const uint8_t* bits[R];
      for (int i = 0; i < R; i++) {  // the last row again, where there are less
        p[i] = from.row(min(r + i, end - 1));
        bits[i] = from.bits(min(r + i, end - 1));
      }
      vec8 acc[R][NB] = {};
      for (int64_t k = 0; k < bytes; k++)
        for (int i = 0; i < R; i++) {
          const uint8_t byte = bits[i][k];
          const vec8 weights = weights8(p[i], byte);
          p[i] += __builtin_popcount(byte);
          for (int b = 0; b < NB; b++) acc[i][b] += weights * load_as<vec8>(rows + b * stride + 8 * k);
        }
      for (int i = 0; i < R; i++)
        for (int b = 0; b < NB; b += 4) {
          const auto sum_of = [&](int j) { return b + j < NB ? acc[i][b + j < NB ? b + j : 0] : vec8{}; };
          const vec4 totals = sum4(sum_of(0), sum_of(1), sum_of(2), sum_of(3));
          for (int j = 0; j < min(4, NB - b); j++) sums[(b + j) * kFewRows + r + i - r0] = totals[j];
        }
    }
    finish_sums(sums, kFewRows, r0, end, bias, activation, y);
  }
}

// Columns [8 k0, 8 k1) of grad_x.
template <int NB, class T>
void mask_input_few(const sk_mask& w, const T* values, int64_t k0, int64_t k1, const sk_matrix& grad,
                    const sk_matrix& grad_x) {
  constexpr int R = NB >= 8 ? 2 : 4;
  const int64_t stride = ceil_div((k1 - k0) * 8, 16) * 16 + 16, g_stride = ceil_div(w.rows, 16) * 16 + 16;
  const Readable<T> from(w, values);
  const float* const g = mask_rows<T>(grad, NB, g_stride, scratch<Use::kInput>());
  float* const sums = scratch<Use::kGradient>().get<float>(NB * stride);
  memset(sums, 0, NB * stride * sizeof(float));
  uint8_t* const none = scratch<Use::kStarts>().get<uint8_t>(k1 - k0);
  memset(none, 0, k1 - k0);
  for (int64_t r = 0; r < w.rows; r += R) {
    const T* p[R];
    const uint8_t* bits[R];
    float numbers[R][NB];
    for (int i = 0; i < R; i++) {  // nothing, where there are less rows
      const int64_t row = min(r + i, w.rows - 1);
      p[i] = from.row(row, k0);
      bits[i] = r + i < w.rows ? from.bits(row) + k0 : none;
      for (int b = 0; b < NB; b++) numbers[i][b] = g[b * g_stride + row];
    }
    for (int64_t k = 0; k < k1 - k0; k++) {
      vec8 weights[R];
      for (int i = 0; i < R; i++) {
        const uint8_t byte = bits[i][k];
        weights[i] = weights8(p[i], byte);
        p[i] += __builtin_popcount(byte);
      }
      for (int b = 0; b < NB; b++) {
        float* const to = sums + b * stride + 8 * k;
        vec8 sum = load_as<vec8>(to);
        for (int i = 0; i < R; i++) sum += weights[i] * (numbers[i][b] - vec8{});
        store(to, sum);
      }
    }
  }
  finish_sums<T>(sums, stride, 8 * k0, min(8 * k1, w.cols), nullptr, SK_IDENTITY, grad_x);
}

// The gradients of the values of rows [r0, r1), and of the bias. Half the time of tiles for one batch row, level for 8. Compressed
// next to each other first and then copied, they take as long.
template <int NB, class T>
void mask_values_few(const sk_mask& w, int64_t r0, int64_t r1, const sk_matrix& grad, const sk_matrix& x, T* grad_values,
                     T* grad_bias) {
  const int64_t bytes = (w.cols + 7) / 8;
  const int64_t stride = ceil_div(w.cols, 16) * 16 + 16, g_stride = ceil_div(w.rows, 16) * 16 + 16;
  const float* const rows = mask_rows<T>(x, NB, stride, scratch<Use::kInput>());
  const float* const g = mask_rows<T>(grad, NB, g_stride, scratch<Use::kOutput>());

  for (int64_t r = r0; r < r1; r++) {
    vec8 numbers[NB];
    float total = 0.0f;
    for (int b = 0; b < NB; b++) {
      total += g[b * g_stride + r];
      numbers[b] = g[b * g_stride + r] - vec8{};
    }
    if (grad_bias != nullptr) store_one(grad_bias + r, total);
    const uint8_t* const bits = w.bits + r * bytes;
    T *p = grad_values + first_value(w, r), *const end = grad_values + first_value(w, r + 1);

    for (int64_t k = 0; k < bytes; k++) {
      const uint8_t byte = bits[k];  // once: the stores could be to it, for all the compiler knows
      vec8 sum = load_as<vec8>(rows + 8 * k) * numbers[0];
      for (int b = 1; b < NB; b++) sum += load_as<vec8>(rows + b * stride + 8 * k) * numbers[b];
      put8(sum, byte, p, end);
      p += __builtin_popcount(byte);
    }
  }
}

}  // namespace
}  // namespace sk::SK_ISA
