/* CSR kernels. W is [out, in], stored by rows; see python/sparsekern/formats/csr.py for the pattern. */
#ifndef SPARSEKERN_CSR_H
#define SPARSEKERN_CSR_H

#include "sparsekern/common.h"

#ifdef __cplusplus
extern "C" {
#endif

/* A sparse [rows, cols] matrix without its values. Contents are trusted: they were checked when the pattern was built. */
typedef struct {
  int64_t rows;
  int64_t cols;
  int64_t nnz;               /* < 2^31 */
  int64_t tiles;             /* >= 1: columns are cut into tiles of 128 * 2^k, the smallest such width that makes
                                this many */
  int64_t t_tiles;           /* >= 1: tiles of rows, likewise. Backward only */
  const void* columns;       /* nnz unsigned integers of column_bytes: columns, ascending within a row */
  int column_bytes;          /* 2 or 4 */
  const int32_t* tile_ptr;   /* (tiles + 1) * rows ints: entries of row r in tiles t..u-1 are
                                tile_ptr[t * rows + r] .. tile_ptr[u * rows + r] */
  const int32_t* t_tile_ptr; /* (t_tiles + 1) * cols ints: the same of W transposed: column c has
                                t_tile_ptr[u * cols + c] - t_tile_ptr[t * cols + c] entries in row tiles t..u-1, and
                                t_tile_ptr[c] in the columns before it. Backward only */
  const int32_t* t_slot; /* nnz ints: where each entry stands in W transposed if that is sorted by column tile, row tile,
                                column and row. Backward only */
} sk_csr;

/* tile_ptr, t_tile_ptr and t_slot of a pattern, written, for tiles of `width` columns and of `t_width` rows: with n = max(1,
 * ceil(cols / width)) tiles, (n + 1) * rows ints; t_tile_ptr likewise. */
void sk_csr_derive(int64_t rows, int64_t cols, int64_t width, int64_t t_width, const int32_t* row_ptr,
                   const int32_t* col_idx, int32_t* tile_ptr, int32_t* t_tile_ptr, int32_t* t_slot);

/* dense [rows, cols], contiguous, = the values where the pattern is and 0 elsewhere; values = dense where the pattern is.
 * element_bytes: 2, 4 or 8. */
void sk_csr_scatter(const sk_csr* w, const void* values, int element_bytes, void* dense, const sk_threads* threads);
void sk_csr_gather(const sk_csr* w, const void* dense, int element_bytes, void* values, const sk_threads* threads);

/* All products are deterministic: same input and thread count, same bits. Matrices must not overlap. Each thread keeps scratch
 * memory from call to call: a copy of the weights that it works on, 8 bytes per nonzero (all of W where threads split the
 * batch), and panels, 256 bytes per row or column of W at most. */

/* y = activation(x W^T + bias).
 *   w       W [out, in]
 *   values  w->nnz numbers of `dtype`
 *   x       [batch, in] of `dtype`
 *   bias    w->rows numbers of `dtype`, or NULL
 *   y       [batch, out] of `dtype`, written */
void sk_csr_linear(const sk_csr* w, const void* values, const sk_matrix* x, const void* bias, sk_activation activation,
                   const sk_matrix* y, sk_dtype dtype, const sk_threads* threads);

/* The gradients of csr_linear, those that are asked for, in one pass over the gradient of y.
 *   w            W [out, in]
 *   values       w->nnz numbers of `dtype`; may be NULL where grad_x is
 *   grad         [batch, out] of `dtype`: the gradient of y, batch >= 1
 *   x            [batch, in] of `dtype`; may be NULL where grad_values is
 *   grad_x       [batch, in] of `dtype`, written: grad W. Or NULL
 *   grad_values  w->nnz numbers of `dtype`, written: sum over b of grad[b, row(k)] * x[b, col(k)]. Or NULL
 *   grad_bias    w->rows numbers of `dtype`, written: sum over b of grad[b, r]. Or NULL
 *   workspace    sk_csr_linear_backward_workspace() bytes, 64-byte aligned */
int64_t sk_csr_linear_backward_workspace(const sk_csr* w, int64_t batch, const sk_threads* threads);
void sk_csr_linear_backward(const sk_csr* w, const void* values, const sk_matrix* grad, const sk_matrix* x,
                            const sk_matrix* grad_x, void* grad_values, void* grad_bias, void* workspace, sk_dtype dtype,
                            const sk_threads* threads);

#ifdef __cplusplus
}
#endif
#endif
