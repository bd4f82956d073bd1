/* Values into a dense weight and back along a bit mask, for patterns that are dense enough for one. Any format whose values stand
 * row by row, by ascending column: CSR, N:M, V:N:M. */
#ifndef SPARSEKERN_MASK_H
#define SPARSEKERN_MASK_H

#include "sparsekern/csr.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  int64_t rows;
  int64_t cols;
  int64_t nnz;            /* < 2^31 */
  const uint8_t* bits;    /* rows of ceil(cols / 8) bytes: bit c % 8 of byte c / 8 says whether column c has a value */
  const int32_t* row_ptr; /* rows ints: where the values of each row begin */
} sk_mask;

/* `bits` of w's columns, written. */
void sk_mask_bits(const sk_csr* w, uint8_t* bits, const sk_threads* threads);

/* As sk_csr_scatter and sk_csr_gather. */
void sk_mask_expand(const sk_mask* mask, const void* values, int element_bytes, void* dense, const sk_threads* threads);
void sk_mask_compress(const sk_mask* mask, const void* dense, int element_bytes, void* values, const sk_threads* threads);

/* As sk_csr_linear and sk_csr_linear_backward, with W expanded piece by piece in the caches: for weights that are dense enough.
 * grad_bias may be asked for together with grad_values alone. Each thread keeps panels of 1 KB per row or column of W at most. */
void sk_mask_linear(const sk_mask* w, const void* values, const sk_matrix* x, const void* bias, sk_activation activation,
                    const sk_matrix* y, sk_dtype dtype, const sk_threads* threads);
void sk_mask_linear_backward(const sk_mask* w, const void* values, const sk_matrix* grad, const sk_matrix* x,
                             const sk_matrix* grad_x, void* grad_values, void* grad_bias, sk_dtype dtype,
                             const sk_threads* threads);

#ifdef __cplusplus
}
#endif
#endif
