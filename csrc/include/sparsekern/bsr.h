/* Block-sparse (BSR) kernels. W is [out, in], cut into blocks; see python/sparsekern/formats/bsr.py for the pattern. */
#ifndef SPARSEKERN_BSR_H
#define SPARSEKERN_BSR_H

#include "sparsekern/common.h"

#ifdef __cplusplus
extern "C" {
#endif

/* A block-sparse [rows, cols] matrix without its values. Blocks of the last block row and column may reach past the edge of W:
 * what stands there counts as zero, whatever it is. Contents are trusted. */
typedef struct {
  int64_t rows;
  int64_t cols;
  int64_t blocks;               /* < 2^31 */
  int64_t block_rows;           /* height of a block: 4, 8, 16, 32, 64 or 128 */
  int64_t block_cols;           /* width of a block: likewise */
  const int32_t* block_row_ptr; /* ceil(rows / block_rows) + 1 ints: block row i owns blocks ptr[i] .. ptr[i + 1] */
  const int32_t* block_col_idx; /* blocks ints: block columns, ascending within a block row */
  const int32_t* t_block_ptr;   /* ceil(cols / block_cols) + 1 ints: the same of W transposed. Backward only */
  const int32_t* t_block_row;   /* blocks ints: block rows, ascending within a block column. Backward only */
  const int32_t* t_block;       /* blocks ints: which block each of those is. Backward only */
} sk_bsr;

/* dense [rows, cols], contiguous, = the values where the pattern is and 0 elsewhere; values = dense where the pattern is, and
 * 0 past the edge of W. element_bytes: 2, 4 or 8. */
void sk_bsr_scatter(const sk_bsr* w, const void* values, int element_bytes, void* dense, const sk_threads* threads);
void sk_bsr_gather(const sk_bsr* w, const void* dense, int element_bytes, void* values, const sk_threads* threads);

/* All products are deterministic: same input and thread count, same bits. Matrices must not overlap. */

/* y = activation(x W^T + bias).
 *   w       W [out, in]
 *   values  [blocks, block_rows, block_cols] of `dtype`
 *   x       [batch, in] of `dtype`
 *   bias    w->rows numbers of `dtype`, or NULL
 *   y       [batch, out] of `dtype`, written */
void sk_bsr_linear(const sk_bsr* w, const void* values, const sk_matrix* x, const void* bias, sk_activation activation,
                   const sk_matrix* y, sk_dtype dtype, const sk_threads* threads);

/* The gradients of y = x W^T + bias, those that are asked for, in one pass over the gradient of y.
 *   w            W [out, in]
 *   values       [blocks, block_rows, block_cols] of `dtype`; may be NULL where grad_x is
 *   grad         [batch, out] of `dtype`: the gradient of y, batch >= 1
 *   x            [batch, in] of `dtype`; may be NULL where grad_values is
 *   grad_x       [batch, in] of `dtype`, written: grad W. Or NULL
 *   grad_values  like values, written: sum over b of grad[b, row] * x[b, column], and 0 past the edge of W. Or NULL
 *   grad_bias    w->rows numbers of `dtype`, written: sum over b of grad[b, r]. Or NULL
 *   workspace    sk_bsr_linear_backward_workspace() bytes, 64-byte aligned */
int64_t sk_bsr_linear_backward_workspace(const sk_bsr* w, int64_t batch, const sk_threads* threads);
void sk_bsr_linear_backward(const sk_bsr* w, const void* values, const sk_matrix* grad, const sk_matrix* x,
                            const sk_matrix* grad_x, void* grad_values, void* grad_bias, void* workspace, sk_dtype dtype,
                            const sk_threads* threads);

#ifdef __cplusplus
}
#endif
#endif
