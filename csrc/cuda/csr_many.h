// CSR products with many rows of x: x is reused from shared memory.
//
// A block owns kRows rows of W times kTokens rows of x. It walks over the columns in panels of 64 KB of x, feature-major, and a
// warp passes its 32 rows over each panel: the sums of all of them stay in registers, 2 tokens per lane. Entries come 32 at a
// time, one load per lane, the next ones while the present ones are used; as value and place in the panel they go through
// shared memory, so that a lane reads two of them at once, all lanes the same. As columns ascend, a row's entries in a panel
// are those up to the first one past it: no index by panels is needed.
//
// What bounds it, per entry and 64 tokens in 16 bits: 1.5 cycles of shared memory (x: 128 bytes, entries: half a 16-byte load)
// against 0.5 of fused multiply-adds. Gathering x through L2 instead moves 128 bytes per entry there, some 5 times slower; a
// panel of x is read once per 256 rows, so that at 98 % sparsity each number of it is used 5 times.
#pragma once

#include "csr_rows.h"

namespace sk::gpu {

constexpr int kManyWarps = 8, kTokens = 64, kPanelBytes = 64 << 10;
constexpr int kRows = kManyWarps * kWarp;  // a lane keeps the position in one row of its warp
template <class T>
constexpr int kPanelColumns = kPanelBytes / kTokens / int(sizeof(T));

struct Entry {
  float value;
  uint32_t place;  // of its column's tokens in the panel
};

// kPack numbers as 16-byte copies.
template <class T>
SK_DEVICE void copy_run(Shared<T> to, const T* from, bool inside) {
  constexpr int kEach = 16 / int(sizeof(T));
#pragma unroll
  for (int i = 0; i < kPack; i += kEach) copy_async(to + i, from + i, inside);
}

// After the panel: a column of zeros, which the last four entries are filled up with; then 32 entries for each warp.
template <class T>
constexpr int kEntriesAt = kPanelBytes + kTokens * int(sizeof(T));
template <class T>
constexpr int kManyBytes = kEntriesAt<T> + kManyWarps * kWarp * int(sizeof(Entry));

// The [32 rows, kTokens] sums of a warp, finished and stored: a lane takes kPack rows of a token at a time, in a batch-major y
// one run of memory.
template <class T>
SK_DEVICE void store_sums(Shared<float> sums, int64_t row0, int64_t b0, const T* bias, sk_activation activation,
                          const Matrix<T>& y) {
  const bool runs = y.stride_feature == 1 && y.stride_batch % kPack == 0 && y.features % kPack == 0 &&
                    reinterpret_cast<uintptr_t>(y.data) % (kPack * sizeof(T)) == 0;
#pragma unroll 1
  for (int i = lane(); i < kWarp * kTokens / kPack; i += kWarp) {
    const int token = i % kTokens, r0 = i / kTokens * kPack;
    if (b0 + token >= y.batch) continue;
    Vector<T, kPack> out;
#pragma unroll
    for (int r = 0; r < kPack; r++) {
      const int64_t row = row0 + r0 + r;
      const float b = bias && row < y.features ? to_float(bias[row]) : 0.0f;
      out.at[r] = from_float<T>(activate(activation, sums.load((r0 + r) * kTokens + token) + b));
      if (!runs && row < y.features) y.at(b0 + token, row) = out.at[r];
    }
    if (runs && row0 + r0 < y.features) store(&y.at(b0 + token, row0 + r0), out);
  }
}

template <class T>
SK_KERNEL(kWarp* kManyWarps, 2)
many(Rows<T> w, Packed<T> x, const T* bias, sk_activation activation, Matrix<T> y) {
  constexpr int kColumns = kPanelColumns<T>, kZeros = kColumns * kTokens;
  const Shared<T> panel = shared_memory<T>(0);
  const Shared<Entry> entries = shared_memory<Entry>(kEntriesAt<T> + warp() * kWarp * int(sizeof(Entry)));
  const int64_t row0 = int64_t(block().x) * kRows + warp() * kWarp;
  const uint32_t begin = row0 + lane() < w.rows ? w.ptr[row0 + lane()] : 0;
  const uint32_t end = row0 + lane() < w.rows ? w.ptr[row0 + lane() + 1] : 0;
  for (int64_t b0 = int64_t(block().y) * kTokens; b0 < x.columns; b0 += int64_t(blocks().y) * kTokens) {
    uint32_t next = begin;  // lane r's is row r's
    float sum[kWarp][2] = {};
    for (int64_t c0 = 0; c0 < x.features; c0 += kColumns) {
      barrier();  // nobody reads the last panel any more
      const int columns = int(x.features - c0 < kColumns ? x.features - c0 : kColumns);
      for (int i = thread(); i < columns * (kTokens / kPack); i += kWarp * kManyWarps) {
        const int c = i / (kTokens / kPack), run = i % (kTokens / kPack) * kPack;
        copy_run(panel + (c * kTokens + run), x.at(c0 + c, b0 + run), b0 + run < x.columns);
      }
      if (thread() < kTokens) panel.store(kZeros + thread(), T{});
      commit_copies();
      wait_copies<0>();
      barrier();

      const uint32_t limit = uint32_t(c0) + kColumns;
      uint32_t column;
      float value;
      const auto fetch = [&](uint32_t position, uint32_t stop) {
        const uint32_t k = position + lane();
        column = k < stop ? uint32_t(w.idx[k]) : ~0u;
        value = k < stop ? to_float(w.value(k)) : 0.0f;
      };
      fetch(shuffle(next, 0), shuffle(end, 0));
#pragma unroll
      for (int r = 0; r < kWarp; r++) {
        if (row0 + r >= w.rows) break;
        uint32_t position = shuffle(next, r);
        const uint32_t stop = shuffle(end, r);
        for (int count = kWarp; count == kWarp;) {
          const bool inside = column < limit;
          count = popcount(votes(inside));
          entries.store(lane(), inside ? Entry{value, (column - uint32_t(c0)) * kTokens} : Entry{0.0f, uint32_t(kZeros)});
          position += count;
          if (count == kWarp)
            fetch(position, stop);
          else if (r + 1 < kWarp)
            fetch(shuffle(next, (r + 1) % kWarp), shuffle(end, (r + 1) % kWarp));
          warp_barrier();
#pragma unroll 1
          for (int j = 0; j < count; j += 4) {
            const Vector<Entry, 2> pairs[] = {entries.template load<Vector<Entry, 2>>(j),
                                              entries.template load<Vector<Entry, 2>>(j + 2)};
#pragma unroll
            for (int i = 0; i < 4; i++) {
              const Entry e = pairs[i / 2].at[i % 2];
              const auto v = panel.template load<Vector<T, 2>>(int(e.place) + 2 * lane());
              sum[r][0] += e.value * to_float(v.at[0]);
              sum[r][1] += e.value * to_float(v.at[1]);
            }
          }
          warp_barrier();
        }
        if (lane() == r) next = position;
      }
    }
    barrier();
    const Shared<float> sums = shared_memory<float>(warp() * kWarp * kTokens * int(sizeof(float)));
#pragma unroll
    for (int r = 0; r < kWarp; r++) sums.store(r * kTokens + 2 * lane(), Vector<float, 2>{{sum[r][0], sum[r][1]}});
    warp_barrier();
    store_sums(sums, row0, b0, bias, activation, y);
  }
}

template <class T>
const char* run_many(const Rows<T>& w, const Packed<T>& x, const T* bias, sk_activation activation, const Matrix<T>& y,
                     Stream stream) {
  static_assert(kRows * kTokens * int(sizeof(float)) <= kPanelBytes, "the sums take the panel's place");
  const Dim grid = {unsigned(ceil_div(w.rows, kRows)), limited(ceil_div(x.columns, kTokens)), 1};
  return launch(many<T>, grid, kWarp * kManyWarps, kManyBytes<T>, stream, w, x, bias, activation, y);
}

}  // namespace sk::gpu
