// N:M on NVIDIA GPUs: groups.cu with W's own columns.

#include "groups.h"
#include "sparsekern/nm_cuda.h"

namespace {

sk::gpu::groups::Groups groups(const sk_nm_cuda& w) {
  auto made = sk::gpu::groups::make_groups(w.rows, w.cols, w.rows, w.n, w.m, nullptr, w.packed, w.metadata);
  made.transposed = w.transposed;
  return made;
}

}  // namespace

int64_t sk_nm_metadata_words_cuda(const sk_nm_cuda* w) { return sk::gpu::groups::metadata_words(groups(*w)); }

int64_t sk_nm_transposed_words_cuda(const sk_nm_cuda* w) {
  const bool tiles = w->n == 2 && w->m == 4 && w->rows % 4 == 0 && w->cols % 4 == 0;
  return tiles ? sk::gpu::groups::metadata_words(sk::gpu::groups::transpose(groups(*w))) : 0;
}

const char* sk_nm_scatter_cuda(const sk_nm_cuda* w, const void* values, int element_bytes, void* dense, void* stream) {
  return sk::gpu::groups::scatter(groups(*w), values, element_bytes, dense, stream);
}

const char* sk_nm_gather_cuda(const sk_nm_cuda* w, const void* dense, int element_bytes, void* values, void* stream) {
  return sk::gpu::groups::gather(groups(*w), dense, element_bytes, values, stream);
}

int64_t sk_nm_linear_cuda_workspace(const sk_nm_cuda* w, const sk_matrix* x, sk_dtype dtype) {
  return sk::gpu::groups::linear_workspace(groups(*w), *x, dtype);
}

const char* sk_nm_linear_cuda(const sk_nm_cuda* w, const void* values, const sk_matrix* x, const void* bias,
                              sk_activation activation, const sk_matrix* y, void* workspace, sk_dtype dtype, void* stream) {
  return sk::gpu::groups::linear(groups(*w), values, *x, bias, activation, *y, workspace, dtype, stream);
}

int64_t sk_nm_linear_backward_cuda_workspace(const sk_nm_cuda* w, const sk_matrix* grad, const sk_matrix* x,
                                             sk_dtype dtype) {
  return sk::gpu::groups::backward_workspace(groups(*w), *grad, x, dtype);
}

const char* sk_nm_linear_backward_cuda(const sk_nm_cuda* w, const void* values, const sk_matrix* grad, const sk_matrix* x,
                                       const sk_matrix* grad_x, void* grad_values, void* grad_bias, void* workspace,
                                       sk_dtype dtype, void* stream) {
  return sk::gpu::groups::backward(groups(*w), values, *grad, x, grad_x, grad_values, grad_bias, workspace, dtype, stream);
}
