/* V:N:M kernels on NVIDIA GPUs. The conventions are csr_cuda.h's: device memory, a stream, NULL or CUDA's message, no
 * synchronization, no allocation, no atomics. */
#ifndef SPARSEKERN_VNM_CUDA_H
#define SPARSEKERN_VNM_CUDA_H

#include "sparsekern/common.h"

#ifdef __cplusplus
extern "C" {
#endif

/* A V:N:M [rows, cols] matrix without its values; see vnm.h. */
typedef struct {
  int64_t rows;
  int64_t cols;             /* < 2^31 */
  int64_t v;                /* >= 1; a multiple of 16 wastes no multiplies */
  int32_t n;                /* 1 <= n <= 4 */
  int32_t m;                /* 4 <= m */
  const int32_t* selected;  /* as vnm.h's */
  const uint8_t* packed;    /* as vnm.h's */
  const uint32_t* metadata; /* which 2 of 4 columns values are in, as python/sparsekern/formats/metadata.py lays it out. Or
                               NULL: then the zeros beside them are multiplied too. Float32 products do without */
} sk_vnm_cuda;

/* How many words `metadata` has: 0 where n > 2. */
int64_t sk_vnm_metadata_words_cuda(const sk_vnm_cuda* w);

/* As nm_cuda.h's. */
const char* sk_vnm_scatter_cuda(const sk_vnm_cuda* w, const void* values, int element_bytes, void* dense, void* stream);
const char* sk_vnm_gather_cuda(const sk_vnm_cuda* w, const void* dense, int element_bytes, void* values, void* stream);

int64_t sk_vnm_linear_cuda_workspace(const sk_vnm_cuda* w, const sk_matrix* x, sk_dtype dtype);
const char* sk_vnm_linear_cuda(const sk_vnm_cuda* w, const void* values, const sk_matrix* x, const void* bias,
                               sk_activation activation, const sk_matrix* y, void* workspace, sk_dtype dtype, void* stream);

int64_t sk_vnm_linear_backward_cuda_workspace(const sk_vnm_cuda* w, const sk_matrix* grad, const sk_matrix* x,
                                              sk_dtype dtype);
const char* sk_vnm_linear_backward_cuda(const sk_vnm_cuda* w, const void* values, const sk_matrix* grad, const sk_matrix* x,
                                        const sk_matrix* grad_x, void* grad_values, void* grad_bias, void* workspace,
                                        sk_dtype dtype, void* stream);

#ifdef __cplusplus
}
#endif
#endif
