// What is derived from a CSR pattern when it is built. Integer work, bound by memory.

#include <algorithm>
#include <vector>

#include "sparsekern/csr.h"

extern "C" void sk_csr_derive(int64_t rows, int64_t cols, int64_t width, int64_t t_width, const int32_t* row_ptr,
                              const int32_t* col_idx, int32_t* tile_ptr, int32_t* t_tile_ptr, int32_t* t_slot) {
  const int64_t tiles = std::max<int64_t>(1, (cols + width - 1) / width);
  const int64_t t_tiles = std::max<int64_t>(1, (rows + t_width - 1) / t_width);
  std::fill(t_tile_ptr, t_tile_ptr + t_tiles * cols, 0);
  for (int64_t r = 0; r < rows; r++) {
    int32_t k = row_ptr[r];
    int32_t* counts = t_tile_ptr + r / t_width * cols;
    for (int64_t t = 0; t < tiles; t++) {
      tile_ptr[t * rows + r] = k;
      for (const int64_t end = (t + 1) * width; k < row_ptr[r + 1] && col_idx[k] < end; k++) counts[col_idx[k]]++;
    }
    tile_ptr[tiles * rows + r] = row_ptr[r + 1];
  }
  // The first slot of each (row tile, column): by column tile, row tile, column.
  std::vector<int32_t> next(t_tiles * cols);
  int32_t slot = 0;
  for (int64_t t = 0; t < tiles; t++)
    for (int64_t i = 0; i < t_tiles; i++)
      for (int64_t c = t * width; c < std::min((t + 1) * width, cols); c++) {
        next[i * cols + c] = slot;
        slot += t_tile_ptr[i * cols + c];
      }
  for (int64_t r = 0; r < rows; r++)
    for (int32_t k = row_ptr[r]; k < row_ptr[r + 1]; k++) t_slot[k] = next[r / t_width * cols + col_idx[k]]++;
  // From counts to where each (column, tile) begins, column by column.
  int32_t at = 0;
  for (int64_t c = 0; c < cols; c++) {
    for (int64_t t = 0; t < t_tiles; t++) {
      const int32_t count = t_tile_ptr[t * cols + c];
      t_tile_ptr[t * cols + c] = at;
      at += count;
    }
    t_tile_ptr[t_tiles * cols + c] = at;
  }
}
