/* N:M kernels on NVIDIA GPUs. The conventions are csr_cuda.h's: device memory, a stream, NULL or CUDA's message, no
 * synchronization, no allocation, no atomics. */
#ifndef SPARSEKERN_NM_CUDA_H
#define SPARSEKERN_NM_CUDA_H

#include "sparsekern/common.h"

#ifdef __cplusplus
extern "C" {
#endif

/* An N:M [rows, cols] matrix without its values; see nm.h. */
typedef struct {
  int64_t rows;
  int64_t cols; /* < 2^31 */
  int32_t n;
  int32_t m;                /* 1 <= n <= m <= 16 */
  const uint8_t* packed;    /* as nm.h's */
  const uint32_t* metadata; /* which 2 of 4 columns values are in, as python/sparsekern/formats/metadata.py lays it out. Or
                               NULL: then the zeros beside them are multiplied too. Float32 products do without */
  const uint32_t* transposed; /* the same of W^T, where W and W^T are 2:4. Or NULL: then grad W multiplies zeros too */
} sk_nm_cuda;

/* How many words `metadata` has: 0 where the pattern can hold more than 2 values in 4 columns that begin at a multiple of 4.
 * And how many `transposed` has if it is not NULL: 0 where it must be. */
int64_t sk_nm_metadata_words_cuda(const sk_nm_cuda* w);
int64_t sk_nm_transposed_words_cuda(const sk_nm_cuda* w);

/* dense [rows, cols], contiguous, = the values where the pattern is and 0 elsewhere; values = dense where the pattern is.
 * element_bytes: 2, 4 or 8. */
const char* sk_nm_scatter_cuda(const sk_nm_cuda* w, const void* values, int element_bytes, void* dense, void* stream);
const char* sk_nm_gather_cuda(const sk_nm_cuda* w, const void* dense, int element_bytes, void* values, void* stream);

/* y = activation(x W^T + bias).
 *   w          W [out, in]
 *   values     [out, values of a row] of `dtype`
 *   x          [batch, in] of `dtype`, batch >= 1
 *   bias       w->rows numbers of `dtype`, or NULL
 *   y          [batch, out] of `dtype`, written
 *   workspace  sk_nm_linear_cuda_workspace() bytes, 256-byte aligned */
int64_t sk_nm_linear_cuda_workspace(const sk_nm_cuda* w, const sk_matrix* x, sk_dtype dtype);
const char* sk_nm_linear_cuda(const sk_nm_cuda* w, const void* values, const sk_matrix* x, const void* bias,
                              sk_activation activation, const sk_matrix* y, void* workspace, sk_dtype dtype, void* stream);

/* The gradients of nm_linear, those that are asked for.
 *   w            W [out, in]
 *   values       [out, values of a row] of `dtype`; may be NULL where grad_x is
 *   grad         [batch, out] of `dtype`: the gradient of y, batch >= 1
 *   x            [batch, in] of `dtype`; NULL where grad_values is
 *   grad_x       [batch, in] of `dtype`, written: grad W. Or NULL
 *   grad_values  as values, written: sum over b of grad[b, row(k)] * x[b, col(k)]. Or NULL
 *   grad_bias    w->rows numbers of `dtype`, written: sum over b of grad[b, r]. Or NULL
 *   workspace    sk_nm_linear_backward_cuda_workspace() bytes for the same grad and x, 256-byte aligned */
int64_t sk_nm_linear_backward_cuda_workspace(const sk_nm_cuda* w, const sk_matrix* grad, const sk_matrix* x,
                                             sk_dtype dtype);
const char* sk_nm_linear_backward_cuda(const sk_nm_cuda* w, const void* values, const sk_matrix* grad, const sk_matrix* x,
                                       const sk_matrix* grad_x, void* grad_values, void* grad_bias, void* workspace,
                                       sk_dtype dtype, void* stream);

#ifdef __cplusplus
}
#endif
#endif
