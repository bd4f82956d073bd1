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
  int64_t tiles;           /* >= 1: columns are cut into this many tiles of equal width (the last may be narrower) */
  const int32_t* col_idx;  /* nnz ints: columns, ascending within a row */
  const int32_t* tile_ptr; /* (tiles + 1) * rows ints: entries of row r in tiles t..u-1 are
                              tile_ptr[t * rows + r] .. tile_ptr[u * rows + r] */
} sk_csr;

/* y = x W^T + bias: the forward product, and with the transposed pattern the gradient of x.
 *   w          W [out, in]
 *   values     w->nnz numbers of `dtype`
 *   perm       NULL, or w->nnz ints: entry k's value is values[perm[k]] (how a transposed pattern finds its values)
 *   x          [batch, in] of `dtype`
 *   bias       w->rows numbers of `dtype`, or NULL
 *   y          [batch, out] of `dtype`, written; must not overlap x
 *   workspace  sk_csr_linear_workspace() bytes, 64-byte aligned
 * Deterministic: each y is summed in one order, whatever the thread count. */
int64_t sk_csr_linear_workspace(const sk_csr* w, int64_t batch);
void sk_csr_linear(const sk_csr* w, const void* values, const int32_t* perm, const sk_matrix* x, const void* bias,
                   const sk_matrix* y, void* workspace, sk_dtype dtype, const sk_threads* threads);

/* grad_values[k] = sum over b of grad[b, row(k)] * x[b, col(k)]: the gradient of the values.
 *   grad         [batch, out] of `dtype`
 *   x            [batch, in] of `dtype`
 *   grad_values  w->nnz numbers of `dtype`, written
 *   workspace    sk_csr_linear_backward_weight_workspace() bytes, 64-byte aligned */
int64_t sk_csr_linear_backward_weight_workspace(const sk_csr* w, int64_t batch, sk_dtype dtype);
void sk_csr_linear_backward_weight(const sk_csr* w, const sk_matrix* grad, const sk_matrix* x, void* grad_values,
                                   void* workspace, sk_dtype dtype, const sk_threads* threads);

#ifdef __cplusplus
}
#endif
#endif
