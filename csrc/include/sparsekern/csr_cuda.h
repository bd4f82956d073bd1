/* CSR kernels on NVIDIA GPUs. The conventions are csr.h's; pointers are device memory. */
#ifndef SPARSEKERN_CSR_CUDA_H
#define SPARSEKERN_CSR_CUDA_H

#include "sparsekern/csr.h"

#ifdef __cplusplus
extern "C" {
#endif

/* y = x W^T + bias, enqueued on `stream` (a cudaStream_t).
 *   row_ptr  w->rows + 1 ints; w->tile_ptr is not used
 * Returns NULL, or CUDA's message if the launch failed. No synchronization, no allocation: graph capture is safe. */
const char* sk_csr_linear_cuda(const sk_csr* w, const int32_t* row_ptr, const void* values, const sk_matrix* x,
                               const void* bias, const sk_matrix* y, sk_dtype dtype, void* stream);

#ifdef __cplusplus
}
#endif
#endif
