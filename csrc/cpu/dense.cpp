// Values into a dense weight and back, for every format. Bound by memory: no ISA of its own.

#include <algorithm>
#include <cstring>

#include "sparsekern/bsr.h"
#include "sparsekern/csr.h"
#include "sparsekern/mask.h"

namespace {

// Calls body(begin, end) on ranges of [0, n), in parallel.
template <class F>
void parallel_for(const sk_threads* threads, int64_t n, F body) {
  if (n <= 0) return;
  if (threads->threads <= 1 || n == 1) return body(int64_t(0), n);
  threads->parallel_for(n, [](int64_t begin, int64_t end, void* f) { (*static_cast<F*>(f))(begin, end); }, &body);
}

// Calls f with null pointers to unsigned integers as wide as an element.
template <class F>
void with_elements(int bytes, F f) {
  bytes == 2 ? f((uint16_t*)nullptr) : bytes == 4 ? f((uint32_t*)nullptr) : f((uint64_t*)nullptr);
}

// Calls f(row, its columns, their number, the first one's entry) for all rows, in parallel.
template <class F>
void csr_rows(const sk_csr& w, const sk_threads* threads, F f) {
  const auto begin_of = [&](int64_t r) -> int64_t { return r < w.rows ? w.tile_ptr[r] : w.nnz; };
  parallel_for(threads, w.rows, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      const int64_t k = begin_of(r), n = begin_of(r + 1) - k;
      w.column_bytes == 2 ? f(r, static_cast<const uint16_t*>(w.columns) + k, n, k)
                          : f(r, static_cast<const uint32_t*>(w.columns) + k, n, k);
    }
  });
}

// Calls f(the row of W, its first column, the place in values, how many columns) for all rows of all blocks, or their parts
// inside W, in parallel; rows below W's edge with 0 columns.
template <class F>
void bsr_rows(const sk_bsr& w, const sk_threads* threads, F f) {
  parallel_for(threads, (w.rows + w.block_rows - 1) / w.block_rows, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++)
      for (int64_t b = w.block_row_ptr[i]; b < w.block_row_ptr[i + 1]; b++)
        for (int64_t r = 0; r < w.block_rows; r++) {
          const int64_t row = i * w.block_rows + r, column = w.block_col_idx[b] * w.block_cols;
          f(row, column, (b * w.block_rows + r) * w.block_cols,
            row < w.rows ? std::min(w.block_cols, w.cols - column) : int64_t(0));
        }
  });
}

}  // namespace

extern "C" {

void sk_csr_scatter(const sk_csr* w, const void* values, int element_bytes, void* dense, const sk_threads* threads) {
  with_elements(element_bytes, [&](auto* typed) {
    using T = std::remove_pointer_t<decltype(typed)>;
    csr_rows(*w, threads, [&](int64_t r, auto* columns, int64_t n, int64_t k) {
      T* const row = static_cast<T*>(dense) + r * w->cols;
      memset(row, 0, w->cols * sizeof(T));
      for (int64_t i = 0; i < n; i++) row[columns[i]] = static_cast<const T*>(values)[k + i];
    });
  });
}

void sk_csr_gather(const sk_csr* w, const void* dense, int element_bytes, void* values, const sk_threads* threads) {
  with_elements(element_bytes, [&](auto* typed) {
    using T = std::remove_pointer_t<decltype(typed)>;
    csr_rows(*w, threads, [&](int64_t r, auto* columns, int64_t n, int64_t k) {
      const T* const row = static_cast<const T*>(dense) + r * w->cols;
      for (int64_t i = 0; i < n; i++) static_cast<T*>(values)[k + i] = row[columns[i]];
    });
  });
}

void sk_mask_bits(const sk_csr* w, uint8_t* bits, const sk_threads* threads) {
  const int64_t stride = (w->cols + 7) / 8;
  csr_rows(*w, threads, [&](int64_t r, auto* columns, int64_t n, int64_t) {
    memset(bits + r * stride, 0, stride);
    for (int64_t i = 0; i < n; i++) bits[r * stride + columns[i] / 8] |= 1 << columns[i] % 8;
  });
}

void sk_bsr_scatter(const sk_bsr* w, const void* values, int element_bytes, void* dense, const sk_threads* threads) {
  char* const out = static_cast<char*>(dense);
  parallel_for(threads, w->rows, [&](int64_t begin, int64_t end) {
    memset(out + begin * w->cols * element_bytes, 0, (end - begin) * w->cols * element_bytes);
  });
  bsr_rows(*w, threads, [&](int64_t row, int64_t column, int64_t at, int64_t n) {
    memcpy(out + (row * w->cols + column) * element_bytes, static_cast<const char*>(values) + at * element_bytes,
           n * element_bytes);
  });
}

void sk_bsr_gather(const sk_bsr* w, const void* dense, int element_bytes, void* values, const sk_threads* threads) {
  char* const out = static_cast<char*>(values);
  bsr_rows(*w, threads, [&](int64_t row, int64_t column, int64_t at, int64_t n) {
    if (n > 0)
      memcpy(out + at * element_bytes, static_cast<const char*>(dense) + (row * w->cols + column) * element_bytes,
             n * element_bytes);
    memset(out + (at + n) * element_bytes, 0, (w->block_cols - n) * element_bytes);
  });
}

}  // extern "C"
