// Rows of N:M matrices times a few batch rows (decoding), for N:M and V:N:M: values and packed positions are all that is
// read of W, 2.25 or 2.5 bytes per bfloat16 weight.
//
// The operands of kLanes consecutive values of a row lie in a window of x. Which group of columns each lane belongs to is
// known beforehand, so positions become indices into the window by a shift, a mask and an addition, and permutations of the
// window's vectors fetch the operands: 0.09 ns per weight at 2:4 on Zen 4 (AVX-512, W in L2), where gathering by column
// indices takes 0.21. From memory, its bandwidth bounds it.
#pragma once

#include "few.h"
#include "sparsekern/csr.h"

namespace sk::SK_ISA {
namespace {

// Larger batches run on the CSR kernels, whose tiles keep x in L1, and all where permutations are not instructions.
#if defined(__AVX2__) && !defined(__clang__)
constexpr int64_t kFewBatch = kLanes / 2;
#else
constexpr int64_t kFewBatch = 0;
#endif

// N of each M columns, as vectors of a row's values see them. A vector begins `phase` values into a group, and its window
// with that group.
struct Groups {
  Groups(int n, int m) : bits(m <= 4 ? 2 : 4) {
    int phase = 0;
    do {
      for (int l = 0; l < kLanes; l++) base[phase][l] = uint32_t((phase + l) / n * m);
      step[phase] = (phase + kLanes) / n * m;
      next[phase] = (phase + kLanes) % n;
      window = max(window, ((phase + kLanes - 1) / n + 1) * m);
      phase = next[phase];
    } while (phase != 0);
  }
  // 2 of each 4: lane 1 belongs to the first group yet, lane 2 to one that begins 4 columns later.
  bool pairs() const { return base[0][1] == 0 && base[0][2] == 4; }

  int bits;        // of a packed position
  int window = 0;  // columns of the widest window
  int step[16];    // columns from one window to the next
  int next[16];    // phase of the next vector
  uvec base[16];   // column in the window where each lane's group begins
};

// Row r of W has its `count` values at values + r * count and their positions at packed + r * packed_stride.
template <class T>
struct PackedRows {
  PackedRows(const void* values, const uint8_t* packed, const sk_csr& w, const Groups& groups)
      : values(static_cast<const T*>(values)),
        packed(packed),
        count(w.nnz / max<int64_t>(1, w.rows)),
        packed_stride(ceil_div(count * groups.bits, 32) * 4) {}
  const T* values;
  const uint8_t* packed;
  int64_t count, packed_stride;
};

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

constexpr int64_t kSumStride = kFewRows + kLanes;  // rows of sums may be written a little past their end
constexpr int kBlockRows = 4;                      // rows of W that share the loads of x, and one reduction of 4 sums

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

// Batch rows as the kernels take them: 1, 2 or a multiple of 4.
inline int64_t padded_batch(int64_t batch) { return batch <= 2 ? batch : ceil_div(batch, 4) * 4; }

// Floats from one row of x to the next. A window begins inside the row, and is read as up to 16 vectors.
inline int64_t padded_columns(int64_t columns) { return ceil_div(columns, kLanes) * kLanes + 17 * kLanes; }

// sums[b * kSumStride + r - r0] = row r of W times row b of x for rows [r0, r1) and b < batch, a padded_batch. Up to 3
// floats behind the rows are written, too.
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

template <class T>
void dot_rows(const Groups& groups, const PackedRows<T>& w, int64_t r0, int64_t r1, const float* x, int64_t x_stride,
              int64_t batch, float* sums) {
  const auto run = batch == 1 ? dot_rows<1, T> : batch == 2 ? dot_rows<2, T> : dot_rows<4, T>;
  run(groups, w, r0, r1, x, x_stride, batch, sums);
}

// Calls body(r0, r1, x rows, sums) on pieces of W's rows, in parallel, and finishes the sums that it writes. `extra` floats
// behind the padded_batch(x.batch) rows of x are free for it.
template <class T, class F>
void few_rows(const sk_csr& w, const sk_matrix& x, int64_t extra, const T* bias, sk_activation activation,
              const sk_matrix& y, const sk_threads& threads, F body) {
  const int64_t batch = padded_batch(x.batch), stride = padded_columns(x.features);
  parallel_for(threads, ceil_div(w.rows, kBlockRows), 2.0 * x.batch * w.nnz, [&](int64_t begin, int64_t end) {
    float* const rows = scratch<Use::kInput>().get<float>(batch * stride + extra);
    float* const sums = scratch<Use::kOutput>().get<float>(batch * kSumStride);
    copy_rows<T>(x, stride, rows);
    for (int64_t i = x.batch * stride; i < batch * stride; i++) rows[i] = 0.0f;
    const int64_t last = min(end * kBlockRows, w.rows);
    for (int64_t r0 = begin * kBlockRows; r0 < last; r0 += kFewRows) {
      const int64_t r1 = min(r0 + kFewRows, last);
      body(r0, r1, rows, sums);
      finish_sums(sums, kSumStride, r0, r1, bias, activation, y);
    }
  });
}

}  // namespace
}  // namespace sk::SK_ISA
