// CSR weights as the CPU kernels read them: which tiles a call takes together, and copies of W in reading order.
#pragma once

#include "panel.h"
#include "sparsekern/csr.h"

namespace sk::SK_ISA {
namespace {

constexpr int kPrefetchRows = 8;
constexpr int64_t kL1Floats = 8192;         // 32 KB
constexpr int64_t kChunkFloats = 1 << 16;   // 256 KB: 1024 rows of a panel, several of which fit a 1 MB L2
constexpr int64_t kChunkEntries = 1 << 16;  // 512 KB of values and columns: what is copied at once

inline int64_t row_begin(const sk_csr& w, int64_t r) { return r < w.rows ? w.tile_ptr[r] : w.nnz; }

// W transposed: its tiles, but no column indices.
sk_csr transposed(const sk_csr& w) {
  return {w.cols, w.rows, w.nnz, w.t_tiles, w.tiles, nullptr, 0, w.t_tile_ptr, w.tile_ptr, nullptr};
}

// Columns per tile: the smallest 128 * 2^k that makes w.tiles tiles.
int64_t tile_width(const sk_csr& w) {
  int64_t width = 128;
  while (ceil_div(w.cols, width) > w.tiles) width *= 2;
  return width;
}

// How many of the pattern's tiles to take at once: as many as fit L1.
int64_t tile_group(const sk_csr& w, int stride) {
  return max<int64_t>(1, kL1Floats / (min(tile_width(w), w.cols + 1) * stride));
}

// Rows are as much work as their entries, and 4 more for their accumulators.
int64_t range_begin(const sk_csr& w, int64_t i, int64_t n) {
  return balanced_begin(w.rows, i, n, [&](int64_t r) { return double(row_begin(w, r)) + 4.0 * double(r); });
}

// f(W's column indices), of their type.
template <class F>
void with_columns(const sk_csr& w, F f) {
  w.column_bytes == 2 ? f(static_cast<const uint16_t*>(w.columns)) : f(static_cast<const uint32_t*>(w.columns));
}

// A weight and where its operand is: float32 bits below, float offset into a panel (column * stride) above.
using Entry = uint64_t;

inline Entry entry(float value, uint32_t offset) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits | uint64_t(offset) << 32;
}

// Copies the entries of rows [r0, r1) to entries + row_begin(r0) on: for each group of tiles, row by row. kStreams groups are
// written side by side, so that W is read in longer pieces: 1 to 4 % of the forward product.
template <class I, class T>
void pack_rows(const I* columns, const sk_csr& w, const T* values, int64_t group, int64_t r0, int64_t r1, int stride,
               Entry* entries) {
  constexpr int64_t kStreams = 8;
  struct {
    const int32_t *begins, *ends;
    Entry *next, *end;
  } streams[kStreams];
  Entry* next = entries + row_begin(w, r0);
  for (int64_t t = 0; t < w.tiles; t += kStreams * group) {
    const int64_t n = min(kStreams, ceil_div(w.tiles - t, group));
    for (int64_t i = 0; i < n; i++) {
      const int32_t* begins = w.tile_ptr + (t + i * group) * w.rows;
      const int32_t* ends = w.tile_ptr + min(t + (i + 1) * group, w.tiles) * w.rows;
      Entry* const begin = next;
      for (int64_t r = r0; r < r1; r++) next += ends[r] - begins[r];
      streams[i] = {begins, ends, begin, next};
    }
    for (int64_t r = r0; r < r1; r++)
      for (int64_t i = 0; i < n; i++) {
        const int64_t k = streams[i].begins[r], count = streams[i].ends[r] - k;
        Entry* const out = streams[i].next;
        streams[i].next += count;
        if (k + count + kLanes <= w.nnz && out + count + kLanes <= streams[i].end) {
          // Whole vectors: what is written past `count` is overwritten by the next row.
          for (int64_t j = 0; j < count; j += kLanes) {
            store_entries(out + j, load(values + k + j), load_unsigned(columns + k + j) * uint32_t(stride));
          }
        } else {
          for (int64_t j = 0; j < count; j++)
            out[j] = entry(to_float(values[k + j]), uint32_t(columns[k + j]) * uint32_t(stride));
        }
      }
  }
}

template <class T>
void pack_rows(const sk_csr& w, const T* values, int64_t group, int64_t r0, int64_t r1, int stride, Entry* entries) {
  with_columns(w, [&](auto* columns) { pack_rows(columns, w, values, group, r0, r1, stride, entries); });
}

// Copies the entries in column tiles [t0, t1), transposed, to their slots: block by block of W, a tile of rows x a tile of
// columns, whose 8 * nnz bytes stay in L1; within a block by column, rows ascending. starts[(t - t0) * wt.tiles + i] becomes
// the offset of the entries of column tile t and row tile i. Slots are computed once per pattern: finding them here by a
// counting sort, in place of keeping 4 bytes per nonzero, takes 2.5 times as long.
template <class T>
void pack_transposed(const sk_csr& w, const sk_csr& wt, const T* values, int64_t t0, int64_t t1, int stride, Entry* entries,
                     int32_t* starts) {
  const int64_t width = tile_width(w), t_width = tile_width(wt);
  int32_t at = int32_t(row_begin(wt, min(t0 * width, wt.rows)));
  for (int64_t t = t0; t < t1; t++) {
    const int32_t* begins = w.tile_ptr + t * w.rows;
    const int32_t* ends = begins + w.rows;
    for (int64_t i = 0; i < wt.tiles; i++) {
      *starts++ = at;
      for (int64_t r = i * t_width; r < min((i + 1) * t_width, w.rows); r++) {
        if (const int64_t ahead = r + kPrefetchRows; ahead < w.rows) {
          __builtin_prefetch(values + begins[ahead]);
          __builtin_prefetch(w.t_slot + begins[ahead]);
        }
        for (int32_t k = begins[r]; k < ends[r]; k++)
          entries[w.t_slot[k]] = entry(to_float(values[k]), uint32_t(r * stride));
        at += ends[r] - begins[r];
      }
    }
  }
}

}  // namespace
}  // namespace sk::SK_ISA
