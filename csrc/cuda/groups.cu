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

// The values of W^T where it is 2:4 as W is. A lane has 4 x 4 numbers of W, 4 pairs of 16 bits, and makes the 4 pairs of W's columns.
// A block has 32 x 32 lanes' share, whose pairs pass shared memory, since lanes follow W's rows to read and its columns to write, 128
// bytes each time; rows there are one bank longer than a warp: no conflicts on either side. 36 MB of 4096 x 4096: 8 us at 4.3 TB/s, of
// which a multiprocessor's 6 blocks have 27 KB under way; its 210 instructions for 32 lanes' 16 numbers take 7 us. Bad positions give
// wrong numbers, and write nowhere else.
SK_KERNEL(kWarp* kCopyWarps)
transpose_pairs(Groups w, const uint32_t* values, uint32_t* to, int64_t blocks_across) {
  const Shared<uint32_t> tile = shared_memory<uint32_t>(0);  // [column of 4 x 4, across, down]
  const int across = w.cols / 4, down = int(w.rows / 4);
  const int x0 = int(block().x % blocks_across) * kWarp, y0 = int(block().x / blocks_across) * kWarp;
  const int x = x0 + lane();
#pragma unroll 1
  for (int i = warp(); i < kWarp; i += kCopyWarps) {
    const int y = y0 + i;
    uint32_t columns[4] = {};
    if (x < across && y < down) {
      const uint32_t* const from = values + int64_t(y) * 4 * across + x;
      const uint8_t* const where = w.packed + int64_t(y) * 4 * w.row_bytes + x / 2;
      uint32_t pairs[4], positions[4];
#pragma unroll
      for (int r = 0; r < 4; r++) pairs[r] = from[r * across], positions[r] = where[r * w.row_bytes];
#pragma unroll
      for (int r = 0; r < 4; r++)
#pragma unroll
        for (int c = 0; c < 4; c++) {  // the upper row's number moves to the lower half as the next one comes
          const int both = positions[r] >> x % 2 * 4;
          const bool first = (both & 3) == c, second = (both >> 2 & 3) == c;
          columns[c] = bytes_of(columns[c], pairs[r], first ? 0x5432 : second ? 0x7632 : 0x3210);
        }
    }
#pragma unroll
    for (int c = 0; c < 4; c++) tile.store((c * kWarp + lane()) * (kWarp + 1) + i, columns[c]);
  }
  barrier();
  const int columns = w.cols - x0 * 4 < 4 * kWarp ? w.cols - x0 * 4 : 4 * kWarp;
  uint32_t* const out = to + int64_t(x0) * 4 * down + y0 + lane();
  if (y0 + lane() < down)
    for (int c = warp(); c < columns; c += kCopyWarps)
      out[int64_t(c) * down] = tile.load((c % 4 * kWarp + c / 4) * (kWarp + 1) + lane());
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

const char* transpose_values(const Groups& w, const void* values, void* to, Stream stream) {
  const int64_t across = ceil_div(w.cols, 4 * kWarp), down = ceil_div(w.rows, 4 * kWarp);
  return launch(transpose_pairs, {unsigned(across * down), 1, 1}, kWarp * kCopyWarps, 4 * kWarp * (kWarp + 1) * 4, stream,
                w, static_cast<const uint32_t*>(values), static_cast<uint32_t*>(to), across);
}

int64_t metadata_words(const Groups& w) { return w.sparse() ? w.tiles() * w.row_blocks * w.column_blocks * 64 : 0; }

}  // namespace sk::gpu::groups
