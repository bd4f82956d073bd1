// What N:M and V:N:M do without arithmetic, bound by the bytes of the dense matrix: a warp takes a row.

#include "groups.h"

namespace sk::gpu::groups {

namespace {

constexpr int kCopyWarps = 8;

template <class E>
SK_KERNEL(kWarp* kCopyWarps)
scatter_groups(Groups w, const E* values, E* dense) {
  const int64_t row = int64_t(block().x) * kCopyWarps + warp();
  if (row >= w.rows) return;
  for (int c = lane(); c < w.cols; c += kWarp) dense[row * w.cols + c] = 0;
  warp_barrier();
  for (int k = lane(); k < w.row_values; k += kWarp)
    dense[row * w.cols + w.column_of_w(row, k)] = values[row * w.row_values + k];
}

template <class E>
SK_KERNEL(kWarp* kCopyWarps)
gather_groups(Groups w, E* values, const E* dense) {
  const int64_t row = int64_t(block().x) * kCopyWarps + warp();
  if (row >= w.rows) return;
  for (int k = lane(); k < w.row_values; k += kWarp)
    values[row * w.row_values + k] = dense[row * w.cols + w.column_of_w(row, k)];
}

}  // namespace

const char* scatter(const Groups& w, const void* values, int element_bytes, void* dense, void* stream) {
  if (w.rows == 0) return nullptr;
  return with_element(element_bytes, [&](auto zero) {
    using E = decltype(zero);
    return launch(scatter_groups<E>, {unsigned(ceil_div(w.rows, kCopyWarps)), 1, 1}, kWarp * kCopyWarps, 0, Stream(stream),
                  w, static_cast<const E*>(values), static_cast<E*>(dense));
  });
}

const char* gather(const Groups& w, const void* dense, int element_bytes, void* values, void* stream) {
  if (w.rows == 0) return nullptr;
  return with_element(element_bytes, [&](auto zero) {
    using E = decltype(zero);
    return launch(gather_groups<E>, {unsigned(ceil_div(w.rows, kCopyWarps)), 1, 1}, kWarp * kCopyWarps, 0, Stream(stream),
                  w, static_cast<E*>(values), static_cast<const E*>(dense));
  });
}

int64_t metadata_words(const Groups& w) { return w.sparse() ? w.tiles() * w.row_blocks * w.column_blocks * 64 : 0; }

}  // namespace sk::gpu::groups
