/* Products along a bit mask on NVIDIA GPUs, in 16 bits. The conventions are csr_cuda.h's. */
#ifndef SPARSEKERN_MASK_CUDA_H
#define SPARSEKERN_MASK_CUDA_H

#include "sparsekern/common.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Columns whose values' place is known without counting bits. */
#define SK_MASK_SPAN 128

/* A sparse [rows, cols] matrix without its values, which stand row by row, by ascending column. Rows of bits are padded to whole
 * spans with zeros. */
typedef struct {
  int64_t rows;
  int64_t cols;
  int64_t nnz;           /* < 2^31 */
  int64_t spans;         /* of a row: ceil(cols / SK_MASK_SPAN) */
  const uint32_t* words; /* 4 per span, 16-byte aligned: bit c % 32 of word c / 32 of a row: whether column c has a value */
  const int32_t* starts; /* rows * spans + 1: how many values stand before each span; at last nnz */
} sk_mask_cuda;

/* As sk_csr_linear_cuda, for bfloat16 and float16: float32 would have to be cut to the 10 bits of TF32. Any batch >= 1,
 * 64 rows of x at a time. */
int64_t sk_mask_linear_cuda_workspace(const sk_mask_cuda* w, const sk_matrix* x, sk_dtype dtype);
const char* sk_mask_linear_cuda(const sk_mask_cuda* w, const void* values, const sk_matrix* x, const void* bias,
                                sk_activation activation, const sk_matrix* y, void* workspace, sk_dtype dtype,
                                void* stream);

/* grad_values and grad_bias of sk_csr_linear_backward_cuda, for bfloat16 and float16. There is no grad_x: by
 * arithmetic a dense product with W in memory, or CSR's own kernel, is the faster one. */
int64_t sk_mask_linear_backward_cuda_workspace(const sk_mask_cuda* w, const sk_matrix* grad, const sk_matrix* x,
                                               sk_dtype dtype);
const char* sk_mask_linear_backward_cuda(const sk_mask_cuda* w, const sk_matrix* grad, const sk_matrix* x,
                                         void* grad_values, void* grad_bias, void* workspace, sk_dtype dtype, void* stream);

#ifdef __cplusplus
}
#endif
#endif
