/* V:N:M kernels: V rows share 4 of each M consecutive columns, and each row holds N of those 4. W is [out, in]; see
 * python/sparsekern/formats/vnm.py for the pattern. */
#ifndef SPARSEKERN_VNM_H
#define SPARSEKERN_VNM_H

#include "sparsekern/csr.h"

#ifdef __cplusplus
extern "C" {
#endif

/* A V:N:M [rows, cols] matrix without its values. With c columns in a group (M, or what is left in the last one), min(4, c)
 * are selected, and each row holds min(N, c) of them. */
typedef struct {
  sk_csr csr; /* the same matrix: what large batches and the backward pass run on */
  int64_t v;
  int32_t n; /* 1 <= n <= 4 */
  int32_t m; /* 4 <= m */
  const int32_t*
      selected;          /* [ceil(rows / v), ceil(cols / m), 4]: the selected columns of each tile of W, ascending; where a
                              last group has fewer than 4, the last of them is repeated */
  const uint8_t* packed; /* which of the 4 each value belongs to, 2 bits, the first value lowest. Rows begin 4-byte aligned:
                              each takes ceil(values of a row * 2 / 32) * 4 bytes */
} sk_vnm;

/* y = activation(x W^T + bias); see sk_csr_linear. The gradients are those of w->csr. */
void sk_vnm_linear(const sk_vnm* w, const void* values, const sk_matrix* x, const void* bias, sk_activation activation,
                   const sk_matrix* y, sk_dtype dtype, const sk_threads* threads);

#ifdef __cplusplus
}
#endif
#endif
