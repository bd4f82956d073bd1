// Panels for dot instructions: 32-bit lanes that hold two bfloat16 each, neighbours along the sum. They take half the memory of
// a float32 panel, and half the stores and the transposing.
#pragma once

#include "panel.h"

namespace sk::SK_ISA {

// Numbers (i, k), i < count and k < depth, one of whose strides is 1. k runs along the sum.
struct Terms {
  const bf16* data;
  int64_t count, stride, depth, depth_stride;
};

// The first n of kLanes or 2 kLanes numbers. The others are zero and their memory is not touched.
template <class V>
[[gnu::always_inline]] inline V load_numbers(const bf16* p, int64_t n) {
  V v = {};
  memcpy(&v, p, n >= int64_t(sizeof v / sizeof *p) ? sizeof v : max<int64_t>(0, n) * sizeof *p);
  return v;
}

// Lane l is the pair of low[l] and high[l].
template <class H>
[[gnu::always_inline]] inline auto interleave(H low, H high) {
  using U = typename Vector<uint32_t, sizeof(H) / sizeof(bf16)>::type;
  return __builtin_convertvector(low, U) | __builtin_convertvector(high, U) << 16;
}

inline void transpose(uvec (&m)[kLanes]) {
  vec v[kLanes];
  memcpy(v, m, sizeof v);
  transpose(v);
  memcpy(m, v, sizeof v);
}

// Pair p of terms is (i, 2 p) and (i, 2 p + 1). kRowsArePairs: panel[p * stride + i] = pair p of i, for i < lanes; else
// panel[i * stride + p], for p < lanes. Zero past the terms; lanes is a multiple of kLanes.
template <bool kRowsArePairs>
[[gnu::noinline]] void pack_pairs(const Terms& t, int64_t lanes, int64_t stride, bf16x2* panel) {
  const int64_t pairs = ceil_div(t.depth, 2), rows = kRowsArePairs ? pairs : t.count;
  const bool along = t.depth_stride == 1;  // pairs are whole in memory; else they come from two lines of it
  const auto load_at = [&](int64_t row, int64_t lane) __attribute__((always_inline)) {
    const int64_t i = kRowsArePairs ? lane : row, k = 2 * (kRowsArePairs ? row : lane);
    if (i >= t.count || k >= t.depth) return uvec{};
    const bf16* const p = t.data + i * t.stride + k * t.depth_stride;
    if (along) return load_numbers<uvec>(p, t.depth - k);
    const hvec low = load_numbers<hvec>(p, t.count - i);
    return interleave(low, k + 1 < t.depth ? load_numbers<hvec>(p + t.depth_stride, t.count - i) : hvec{});
  };
  if (along != kRowsArePairs) {  // vectors of the panel lie in memory as they are
    const int64_t ahead = kPrefetchFeatures * (along ? t.stride : t.depth_stride);
    for (int64_t r = 0; r < rows; r++)
      for (int64_t l = 0; l < lanes; l += kLanes) {
        const bf16* const p = t.data + (along ? r * t.stride + 2 * l : 2 * r * t.depth_stride + l) + ahead;
        __builtin_prefetch(p, 0, 2);
        if (!along) __builtin_prefetch(p + t.depth_stride, 0, 2);
        store(panel + r * stride + l, load_at(r, l));
      }
    return;
  }
  for (int64_t r = 0; r < rows; r += kLanes)
    for (int64_t l = 0; l < lanes; l += kLanes) {
      uvec block[kLanes];
      for (int i = 0; i < kLanes; i++) block[i] = load_at(r, l + i);
      transpose(block);
      for (int i = 0; i < min<int64_t>(kLanes, rows - r); i++) store(panel + (r + i) * stride + l, block[i]);
    }
}

// panel[p * s.stride + c] = the pair m[batch s.begin + c, begin + 2 p] and [.., begin + 2 p + 1], for features [begin, end) and c <
// s.width; zero past them and past s.count.
template <class T>
void pack(const sk_matrix& m, int64_t begin, int64_t end, Slice s, bf16x2* panel) {
  const bf16* const data = static_cast<const bf16*>(m.data) + s.begin * m.stride_batch + begin * m.stride_feature;
  pack_pairs<true>({data, s.count, m.stride_batch, end - begin, m.stride_feature}, s.width, s.stride, panel);
}

// A slice as products over the batch see it: where T is a pair, one of two batch rows, in panels of one stride.
template <class T>
Slice along_batch(Slice s) {
  if constexpr (!std::is_same_v<T, bf16x2>) return s;
  const int64_t count = ceil_div(s.count, 2);
  return {s.begin, count, int(ceil_div(count, kLanes) * kLanes), kPanel / 2};
}

// Likewise: panel[(f - begin) * stride + p] = the pair m[batch s.begin + 2 p, f] and m[.. + 1, f]. Zero past s.count.
template <class T>
void pack_along_batch(const sk_matrix& m, int64_t begin, int64_t end, Slice s, float* panel) {
  pack<T>(m, begin, end, s, panel);
}
template <class T>
void pack_along_batch(const sk_matrix& m, int64_t begin, int64_t end, Slice s, bf16x2* panel) {
  const bf16* const data = static_cast<const bf16*>(m.data) + s.begin * m.stride_batch + begin * m.stride_feature;
  const Slice own = along_batch<T>(s);
  pack_pairs<false>({data, end - begin, m.stride_feature, s.count, m.stride_batch}, own.width, own.stride, panel);
}

// sums[r] (+)= the sum of the panel's row r, of pairs.
inline void sum_rows(int64_t rows, Slice s, const bf16x2* panel, bool add, float* sums) {
  const uvec ones = broadcast(bf16x2{{0x3f80}, {0x3f80}});
  for (int64_t r = 0; r < rows; r++) {
    vec sum = {};
    for (int c = 0; c < s.width; c += kLanes) sum = multiply_add(load(panel + r * s.stride + c), ones, sum);
    sums[r] = (add ? sums[r] : 0.0f) + sum4(sum, vec{}, vec{}, vec{})[0];
  }
}

}  // namespace sk::SK_ISA
