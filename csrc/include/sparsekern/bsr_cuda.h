/* Block-sparse (BSR) kernels on NVIDIA GPUs. The conventions are bsr.h's, of csr_cuda.h for streams and workspaces; pointers
 * are device memory, those to values aligned to 16 bytes. */
#ifndef SPARSEKERN_BSR_CUDA_H
#define SPARSEKERN_BSR_CUDA_H

#include "sparsekern/bsr.h"

#ifdef __cplusplus
extern "C" {
#endif

/* See sk_bsr_scatter and sk_bsr_gather. */
const char* sk_bsr_scatter_cuda(const sk_bsr* w, const void* values, int element_bytes, void* dense, void* stream);
const char* sk_bsr_gather_cuda(const sk_bsr* w, const void* dense, int element_bytes, void* values, void* stream);

/* y = activation(x W^T + bias); see sk_bsr_linear. batch >= 1. */
int64_t sk_bsr_linear_cuda_workspace(const sk_bsr* w, const sk_matrix* x, sk_dtype dtype);
const char* sk_bsr_linear_cuda(const sk_bsr* w, const void* values, const sk_matrix* x, const void* bias,
                               sk_activation activation, const sk_matrix* y, void* workspace, sk_dtype dtype, void* stream);

/* The gradients of y = x W^T + bias, those that are asked for; see sk_bsr_linear_backward. x is NULL where grad_values is. */
int64_t sk_bsr_linear_backward_cuda_workspace(const sk_bsr* w, const sk_matrix* grad, const sk_matrix* x, sk_dtype dtype);
const char* sk_bsr_linear_backward_cuda(const sk_bsr* w, const void* values, const sk_matrix* grad, const sk_matrix* x,
                                        const sk_matrix* grad_x, void* grad_values, void* grad_bias, void* workspace,
                                        sk_dtype dtype, void* stream);

#ifdef __cplusplus
}
#endif
#endif
