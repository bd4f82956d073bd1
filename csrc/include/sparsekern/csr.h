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
  int64_t nnz;             /* < 2^31 */
  int64_t tiles;           /* >= 1: columns are cut into tiles of 128 * 2^k, the smallest such width that makes this many */
  const int32_t* col_idx;  /* nnz ints: columns, ascending within a row */
  const int32_t* tile_ptr; /* (tiles + 1) * rows ints: entries of row r in tiles t..u-1 are
                              tile_ptr[t * rows + r] .. tile_ptr[u * rows + r] */
} sk_csr;

/* tile_ptr of a pattern [rows, cols] with tiles of `width` columns: (max(1, ceil(cols / width)) + 1) * rows ints, written. */
void sk_csr_tile(int64_t rows, int64_t cols, int64_t width, const int32_t* row_ptr, const int32_t* col_idx,
                 int32_t* tile_ptr);

/* The transposed pattern: t_row_ptr (cols + 1 ints), t_col_idx and t_perm (row_ptr[rows] ints), written; see wt and perm
 * below. */
void sk_csr_transpose(int64_t rows, int64_t cols, const int32_t* row_ptr, const int32_t* col_idx, int32_t* t_row_ptr,
                      int32_t* t_col_idx, int32_t* t_perm);

/* All products are deterministic: same input and thread count, same bits. Matrices must not overlap. A workspace is 64-byte
 * aligned; its size in bytes comes from the function named like its user. */

/* y = x W^T + bias.
 *   w       W [out, in]
 *   values  w->nnz numbers of `dtype`
 *   x       [batch, in] of `dtype`
 *   bias    w->rows numbers of `dtype`, or NULL
 *   y       [batch, out] of `dtype`, written */
int64_t sk_csr_linear_workspace(const sk_csr* w, int64_t batch, const sk_threads* threads);
void sk_csr_linear(const sk_csr* w, const void* values, const sk_matrix* x, const void* bias, const sk_matrix* y,
                   void* workspace, sk_dtype dtype, const sk_threads* threads);

/* The gradients of csr_linear, those that are asked for, in one pass over the gradient of y.
 *   w            W [out, in]
 *   wt           W transposed [in, out]
 *   perm         w->nnz ints: entry k of wt has the value values[perm[k]]
 *   values       w->nnz numbers of `dtype`; may be NULL where grad_x is
 *   grad         [batch, out] of `dtype`: the gradient of y, batch >= 1
 *   x            [batch, in] of `dtype`; may be NULL where grad_values is
 *   grad_x       [batch, in] of `dtype`, written: grad W. Or NULL
 *   grad_values  w->nnz numbers of `dtype`, written: sum over b of grad[b, row(k)] * x[b, col(k)]. Or NULL
 *   grad_bias    w->rows numbers of `dtype`, written: sum over b of grad[b, r]. Or NULL */
int64_t sk_csr_linear_backward_workspace(const sk_csr* w, const sk_csr* wt, int64_t batch, const sk_threads* threads);
void sk_csr_linear_backward(const sk_csr* w, const sk_csr* wt, const int32_t* perm, const void* values,
                            const sk_matrix* grad, const sk_matrix* x, const sk_matrix* grad_x, void* grad_values,
                            void* grad_bias, void* workspace, sk_dtype dtype, const sk_threads* threads);

#ifdef __cplusplus
}
#endif
#endif
