/* CSR kernels on NVIDIA GPUs. The conventions are csr.h's; pointers are device memory.
 *
 * Work is enqueued on `stream`, a cudaStream_t of the current device. Functions return NULL, or CUDA's message if a launch
 * failed. No synchronization, no allocation: graph capture is safe. Deterministic: no atomics. */
#ifndef SPARSEKERN_CSR_CUDA_H
#define SPARSEKERN_CSR_CUDA_H

#include "sparsekern/common.h"

#ifdef __cplusplus
extern "C" {
#endif

/* A sparse [rows, cols] matrix without its values. */
typedef struct {
  int64_t rows;
  int64_t cols;
  int64_t nnz;              /* < 2^31 */
  const int32_t* row_ptr;   /* rows + 1 ints: row r owns entries row_ptr[r] .. row_ptr[r + 1] */
  const int32_t* col_idx;   /* nnz ints: their columns, ascending within a row */
  const int32_t* t_row_ptr; /* cols + 1 ints: the same of W transposed. Backward only */
  const int32_t* t_col_idx; /* nnz ints. Backward only */
  const int32_t* t_slot;    /* nnz ints: which entry of W each entry of W transposed is. Backward only */
} sk_csr_cuda;

/* dense [rows, cols], contiguous, = the values where the pattern is and 0 elsewhere; values = dense where the pattern is.
 * element_bytes: 2, 4 or 8. */
const char* sk_csr_scatter_cuda(const sk_csr_cuda* w, const void* values, int element_bytes, void* dense, void* stream);
const char* sk_csr_gather_cuda(const sk_csr_cuda* w, const void* dense, int element_bytes, void* values, void* stream);

/* y = activation(x W^T + bias).
 *   w          W [out, in]
 *   values     w->nnz numbers of `dtype`
 *   x          [batch, in] of `dtype`, batch >= 1
 *   bias       w->rows numbers of `dtype`, or NULL
 *   y          [batch, out] of `dtype`, written
 *   workspace  sk_csr_linear_cuda_workspace() bytes, 256-byte aligned */
int64_t sk_csr_linear_cuda_workspace(const sk_csr_cuda* w, const sk_matrix* x, sk_dtype dtype);
const char* sk_csr_linear_cuda(const sk_csr_cuda* w, const void* values, const sk_matrix* x, const void* bias,
                               sk_activation activation, const sk_matrix* y, void* workspace, sk_dtype dtype, void* stream);

/* The gradients of csr_linear, those that are asked for.
 *   w            W [out, in]
 *   values       w->nnz numbers of `dtype`; may be NULL where grad_x is
 *   grad         [batch, out] of `dtype`: the gradient of y, batch >= 1
 *   x            [batch, in] of `dtype`; NULL where grad_values is
 *   grad_x       [batch, in] of `dtype`, written: grad W. Or NULL
 *   grad_values  w->nnz numbers of `dtype`, written: sum over b of grad[b, row(k)] * x[b, col(k)]. Or NULL
 *   grad_bias    w->rows numbers of `dtype`, written: sum over b of grad[b, r]. Or NULL
 *   workspace    sk_csr_linear_backward_cuda_workspace() bytes for the same grad and x, 256-byte aligned */
int64_t sk_csr_linear_backward_cuda_workspace(const sk_csr_cuda* w, const sk_matrix* grad, const sk_matrix* x,
                                              sk_dtype dtype);
const char* sk_csr_linear_backward_cuda(const sk_csr_cuda* w, const void* values, const sk_matrix* grad, const sk_matrix* x,
                                        const sk_matrix* grad_x, void* grad_values, void* grad_bias, void* workspace,
                                        sk_dtype dtype, void* stream);

#ifdef __cplusplus
}
#endif
#endif
