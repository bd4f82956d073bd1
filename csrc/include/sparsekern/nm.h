/* N:M kernels: N of each M consecutive columns. W is [out, in]; see python/sparsekern/formats/nm.py for the pattern. */
#ifndef SPARSEKERN_NM_H
#define SPARSEKERN_NM_H

#include "sparsekern/csr.h"

#ifdef __cplusplus
extern "C" {
#endif

/* An N:M [rows, cols] matrix without its values. Each row holds nnz / rows values: N per group of M columns, and min(N, what
 * is left of the columns) in a last group that is cut short. */
typedef struct {
  sk_csr csr; /* the same matrix: what large batches and the backward pass run on */
  int32_t n;
  int32_t m; /* 1 <= n <= m <= 16 */
  const uint8_t*
      packed; /* the position of each value in its group: 2 bits where m <= 4, else 4, the first value lowest. Rows
                            begin 4-byte aligned: each takes ceil(values of a row * bits / 32) * 4 bytes */
} sk_nm;

/* y = activation(x W^T + bias); see sk_csr_linear. The gradients are those of w->csr. */
void sk_nm_linear(const sk_nm* w, const void* values, const sk_matrix* x, const void* bias, sk_activation activation,
                  const sk_matrix* y, sk_dtype dtype, const sk_threads* threads);

#ifdef __cplusplus
}
#endif
#endif
