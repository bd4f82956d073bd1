/* CSR kernels on NVIDIA GPUs. The conventions are csr.h's; pointers are device memory. */
#ifndef SPARSEKERN_CSR_CUDA_H
#define SPARSEKERN_CSR_CUDA_H

#include "sparsekern/csr.h"

#ifdef __cplusplus
extern "C" {
#endif

/* y = activation(x W^T + bias), enqueued on `stream` (a cudaStream_t).
 *   rows     rows of W
 *   row_ptr  rows + 1 ints: row r owns entries row_ptr[r] .. row_ptr[r + 1]
 *   col_idx  their columns, ascending within a row
 * Returns NULL, or CUDA's message if the launch failed. No synchronization, no allocation: graph capture is safe. */
const char* sk_csr_linear_cuda(int64_t rows, const int32_t* row_ptr, const int32_t* col_idx, const void* values,
                               const sk_matrix* x, const void* bias, sk_activation activation, const sk_matrix* y,
                               sk_dtype dtype, void* stream);

#ifdef __cplusplus
}
#endif
#endif
