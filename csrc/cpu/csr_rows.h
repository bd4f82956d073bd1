// The inner loop of the CSR products: rows of a sparse matrix times a panel.
#pragma once

#include "activation.h"
#include "csr_weights.h"

namespace sk::SK_ISA {
namespace {

constexpr int kPrefetchOut = 16;  // rows; 8 KB of stores under way

// For rows [r0, r1) and a panel of NV vectors: out = sums (or, for the first tile, bias) + the row's entries in tiles [t, u)
// times x. `out` is `sums` itself, or where finished rows go. Returns the entry after the last one used.
template <int NV, class T, class Out>
[[gnu::noinline]] const Entry* linear_rows(const sk_csr& w, const Entry* entry, int64_t t, int64_t u, int64_t r0,
                                           int64_t r1, const float* x, const T* bias, int stride, const float* sums,
                                           Out* out, int64_t out_stride) {
  const int32_t* begins = w.tile_ptr + t * w.rows;
  const int32_t* ends = w.tile_ptr + u * w.rows;
  const bool in_place = static_cast<const void*>(out) == sums;
  for (int64_t r = r0; r < r1; r++, sums += stride, out += out_stride) {
    const Entry* end = entry + (ends[r] - begins[r]);
    if (!in_place && r + kPrefetchOut < r1)
      for (int c = 0; c < NV * kLanes; c += 64 / sizeof(Out)) __builtin_prefetch(out + kPrefetchOut * out_stride + c, 1);
    vec acc[NV];
    if (t == 0) {
      const vec b = bias ? broadcast(to_float(bias[r])) : vec{};
      for (int j = 0; j < NV; j++) acc[j] = b;
    } else {
      if (in_place && entry == end) continue;
      for (int j = 0; j < NV; j++) acc[j] = load(sums + j * kLanes);
    }
    for (; entry < end; entry++) {
      const vec v = broadcast_low(*entry);
      const float* operand = x + (*entry >> 32);
      for (int j = 0; j < NV; j++) acc[j] += v * load(operand + j * kLanes);
    }
    for (int j = 0; j < NV; j++) store(out + j * kLanes, acc[j]);
  }
  return entry;
}

// linear_rows for the rows' last tiles [t, w.tiles), and the activation: finished rows leave for y. Whole rows of a panel go there from registers,
// which takes 5 to 10 % less time at 90 % sparsity than a second pass; others through `sums`, kLanes rows at a time: their
// stores drain while the next rows compute.
template <int NV, class T>
[[gnu::noinline]] void finish_rows(const sk_csr& w, const Entry* entry, int64_t t, int64_t r0, int64_t r1, const float* x,
                                   const T* bias, sk_activation activation, const sk_matrix& y, Slice s, float* sums) {
  using Y = std::remove_const_t<T>;
  if (y.stride_batch == 1 && s.count == s.width && activation == SK_IDENTITY) {
    Y* const out = static_cast<Y*>(y.data) + s.begin + r0 * y.stride_feature;
    linear_rows<NV>(w, entry, t, w.tiles, r0, r1, x, bias, s.stride, sums, out, y.stride_feature);
    return;
  }
  for (int64_t r = r0; r < r1; r += kLanes, sums += kLanes * s.stride) {
    const int64_t end = min(r + kLanes, r1);
    prefetch_unpack<Y>(y, r, end, s);
    entry = linear_rows<NV>(w, entry, t, w.tiles, r, end, x, bias, s.stride, sums, sums, s.stride);
    activate(activation, sums, (end - r) * s.stride);
    unpack<Y>(y, r, end, s, sums);
  }
}

// The two for panels of one width.
template <class T>
struct RowFunctions {
  decltype(&linear_rows<1, T, float>) linear;
  decltype(&finish_rows<1, T>) finish;

  explicit RowFunctions(int width) {
    with_vectors(width, [&](auto nv) { linear = linear_rows<nv(), T, float>, finish = finish_rows<nv(), T>; });
  }
};

}  // namespace
}  // namespace sk::SK_ISA
