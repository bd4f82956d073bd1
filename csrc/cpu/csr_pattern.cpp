// What is derived from a CSR pattern when it is built: tiles and the transposed pattern. Integer work, bound by memory.

#include <algorithm>
#include <vector>

#include "sparsekern/csr.h"

extern "C" {

void sk_csr_tile(int64_t rows, int64_t cols, int64_t width, const int32_t* row_ptr, const int32_t* col_idx,
                 int32_t* tile_ptr) {
  const int64_t tiles = std::max<int64_t>(1, (cols + width - 1) / width);
  for (int64_t r = 0; r < rows; r++) {
    int32_t k = row_ptr[r];
    for (int64_t t = 0; t < tiles; t++) {
      tile_ptr[t * rows + r] = k;
      const int64_t end = (t + 1) * width;
      while (k < row_ptr[r + 1] && col_idx[k] < end) k++;
    }
    tile_ptr[tiles * rows + r] = row_ptr[r + 1];
  }
}

void sk_csr_transpose(int64_t rows, int64_t cols, const int32_t* row_ptr, const int32_t* col_idx, int32_t* t_row_ptr,
                      int32_t* t_col_idx, int32_t* t_perm) {
  // A counting sort by column; rows are visited in order, so they ascend within a column.
  std::fill(t_row_ptr, t_row_ptr + cols + 1, 0);
  for (int32_t k = 0; k < row_ptr[rows]; k++) t_row_ptr[col_idx[k] + 1]++;
  for (int64_t c = 0; c < cols; c++) t_row_ptr[c + 1] += t_row_ptr[c];
  std::vector<int32_t> next(t_row_ptr, t_row_ptr + cols);
  for (int64_t r = 0; r < rows; r++)
    for (int32_t k = row_ptr[r]; k < row_ptr[r + 1]; k++) {
      const int32_t at = next[col_idx[k]]++;
      t_col_idx[at] = int32_t(r);
      t_perm[at] = k;
    }
}

}  // extern "C"
