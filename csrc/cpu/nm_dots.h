// The inner loops of nm_few.h.
#pragma once

#include "nm_few.h"

namespace sk::SK_ISA {
namespace {

template <class F, int... I>
constexpr uvec lanes(F f, std::integer_sequence<int, I...>) {
  return uvec{uint32_t(f(I))...};
}

constexpr int kPairs = 0;  // in place of a number of vectors: the window of a vector of 2:4, see permute<kPairs>

// base + the packed position of each lane, for permute. n positions exist: whole 4-byte words are read, as rows are padded
// to them.
template <int kBits, int kVectors>
[[gnu::always_inline]] inline uvec unpack_index(const uint8_t* packed, int64_t n, uvec base) {
  constexpr int kBytes = kLanes * kBits / 8;
  const uvec lane = lanes([](int l) { return l; }, Lanes{});
  uint32_t low = 0, high = 0;
  memcpy(&low, packed, kBytes < 4 ? kBytes : 4);
  uvec words = low - uvec{};
  if constexpr (kBytes == 8) {
    if (n > kLanes / 2) memcpy(&high, packed + 4, 4);
    words = lane < kLanes / 2 ? words : high - uvec{};
  }
  const uvec position = words >> (lane * kBits % 32);
  if constexpr (kVectors == kPairs) return position;  // its low 2 bits are all that is looked at
  return (position & ((1 << kBits) - 1)) + base;
}

// Lane l of the result is p[index[l]], for index[l] < kVectors * kLanes.
template <int kVectors>
[[gnu::always_inline]] inline vec permute(const float* p, uvec index) {
#if defined(__clang__)  // has no permutation by a variable
  vec v;
  for (int l = 0; l < kLanes; l++) v[l] = p[index[l] % (kVectors * kLanes)];
#else
  vec v = __builtin_shuffle(load(p), load(p + kLanes), index);
  for (int i = 2; i < kVectors; i += 2)
    v = (ivec)index < i * kLanes ? v : __builtin_shuffle(load(p + i * kLanes), load(p + (i + 1) * kLanes), index);
#endif
  return v;
}

// Lane l of the result is p[l / 2 * 4 + position[l] % 4]. On AVX2 a permutation within 16 bytes fetches the operands of even
// groups, another those of odd ones. Two across the register take 1.3 to 1.5 times as long for 1 to 4 rows of x, W in L3: they
// are 2 operations each, and need a mask, an addition and a comparison more.
#if defined(__AVX2__) && !defined(__AVX512F__) && !defined(__clang__)
constexpr bool kHasPairs = true;
template <>
[[gnu::always_inline]] inline vec permute<kPairs>(const float* p, uvec position) {
  const vec a = load(p), b = load(p + kLanes);
  const vec even = shuffle(a, b, [](int l) constexpr { return l < 4 ? l : l + 4; }, Lanes{});
  const vec odd = shuffle(a, b, [](int l) constexpr { return l < 4 ? l + 4 : l + 8; }, Lanes{});
  const vec x = __builtin_ia32_vpermilvarps256(even, (ivec)position);
  const vec y = __builtin_ia32_vpermilvarps256(odd, (ivec)position);
  return shuffle(x, y, [](int l) constexpr { return l & 2 ? l + kLanes : l; }, Lanes{});
}
#else
constexpr bool kHasPairs = false;
#endif

// sums[b * kSumStride + i] = row r0 + i of W times row b of x, x + b * x_stride, for i < kBlockRows and b < kBatch. Rows
// past r1 are the last one again.
template <int kBits, int kVectors, int kBatch, class T>
void dot_block(const Groups& groups, const PackedRows<T>& w, int64_t r0, int64_t r1, const float* x, int64_t x_stride,
               float* sums) {
  constexpr int kLine = 64 / sizeof(T);
  const T* values[kBlockRows];
  const uint8_t* packed[kBlockRows];
  for (int i = 0; i < kBlockRows; i++) {
    const int64_t r = min(r0 + i, r1 - 1);
    values[i] = w.values + r * w.count;
    packed[i] = w.packed + r * w.packed_stride;
  }
  vec sum[kBlockRows][kBatch] = {};
  int phase = 0;
  int64_t k = 0;
  for (; k + kLanes <= w.count; k += kLanes) {
    // The next rows, which lie behind these: four short streams are too much for the hardware. From memory: 13 -> 17 GB/s.
    for (int i = 0; i < kBlockRows * kLanes; i += kLine) __builtin_prefetch(values[0] + (w.count + k) * kBlockRows + i);
    __builtin_prefetch(packed[0] + (w.packed_stride + k * kBits / 8) * kBlockRows);
    for (int i = 0; i < kBlockRows; i++) {
      const uvec index = unpack_index<kBits, kVectors>(packed[i] + k * kBits / 8, kLanes, groups.base[phase]);
      const vec v = load(values[i] + k);
      for (int b = 0; b < kBatch; b++) sum[i][b] += v * permute<kVectors>(x + b * x_stride, index);
    }
    x += groups.step[phase];
    phase = groups.next[phase];
  }
  if (const int64_t n = w.count - k; n > 0)
    for (int i = 0; i < kBlockRows; i++) {
      const uvec index = unpack_index<kBits, kVectors>(packed[i] + k * kBits / 8, n, groups.base[phase]);
      const vec v = load_first(values[i] + k, n);
      for (int b = 0; b < kBatch; b++) {
        alignas(64) float operands[kLanes];
        store(operands, permute<kVectors>(x + b * x_stride, index));
        sum[i][b] += v * load_first(operands, n);  // what lanes past the row's end fetch may be NaN
      }
    }
  for (int b = 0; b < kBatch; b++) {
    const vec4 total = sum4(sum[0][b], sum[1][b], sum[2][b], sum[3][b]);
    memcpy(sums + b * kSumStride, &total, sizeof total);
  }
}

template <int kBatch, class T>
void dot_rows(const Groups& groups, const PackedRows<T>& w, int64_t r0, int64_t r1, const float* x, int64_t x_stride,
              int64_t batch, float* sums) {
  const int vectors = int(ceil_div(groups.window, kLanes));
  auto block = dot_block<4, 16, kBatch, T>;
  if (groups.bits == 2) {
    block = vectors <= 2 ? dot_block<2, 2, kBatch, T> : dot_block<2, 4, kBatch, T>;
    if constexpr (kHasPairs)
      if (groups.pairs()) block = dot_block<2, kPairs, kBatch, T>;
  } else if (vectors <= 8) {
    block = vectors <= 2   ? dot_block<4, 2, kBatch, T>
            : vectors <= 4 ? dot_block<4, 4, kBatch, T>
                           : dot_block<4, 8, kBatch, T>;
  }
  for (int64_t r = r0; r < r1; r += kBlockRows)
    for (int64_t b = 0; b < batch; b += kBatch)
      block(groups, w, r, r1, x + b * x_stride, x_stride, sums + b * kSumStride + r - r0);
}

}  // namespace

template <class T>
void dot_rows(const Groups& groups, const PackedRows<T>& w, int64_t r0, int64_t r1, const float* x, int64_t x_stride,
              int64_t batch, float* sums) {
  if constexpr (kFewBatch > 0) {
    const auto run = batch == 1 ? dot_rows<1, T> : batch == 2 ? dot_rows<2, T> : dot_rows<4, T>;
    run(groups, w, r0, r1, x, x_stride, batch, sums);
  }
}

}  // namespace sk::SK_ISA
