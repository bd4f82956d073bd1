// sparsekern::bsr_* for torch on NVIDIA GPUs.

#include "sparsekern/bsr_cuda.h"

#include "bsr_pattern.h"
#include "cuda.h"

namespace sk {
namespace {

struct BsrCuda : BsrPattern {
  using Device = Gpu;
  using BsrPattern::BsrPattern;

  void linear(const void* values, const sk_matrix* x, const void* bias, sk_activation activation, const sk_matrix* y,
              sk_dtype dtype, Gpu& at) const {
    at.aligned("values", values);
    void* const workspace = at.workspace(sk_bsr_linear_cuda_workspace(&w, x, dtype));
    at.done(sk_bsr_linear_cuda(&w, values, x, bias, activation, y, workspace, dtype, at.stream));
  }
  void backward(const void* values, const sk_matrix* grad, const sk_matrix* x, const sk_matrix* grad_x, void* grad_values,
                void* grad_bias, sk_dtype dtype, Gpu& at) const {
    at.aligned("values", values);
    void* const workspace = at.workspace(sk_bsr_linear_backward_cuda_workspace(&w, grad, x, dtype));
    at.done(sk_bsr_linear_backward_cuda(&w, values, grad, x, grad_x, grad_values, grad_bias, workspace, dtype, at.stream));
  }
  void scatter(const void* values, int bytes, void* dense, Gpu& at) const {
    at.done(sk_bsr_scatter_cuda(&w, values, bytes, dense, at.stream));
  }
  void gather(const void* dense, int bytes, void* values, Gpu& at) const {
    at.done(sk_bsr_gather_cuda(&w, dense, bytes, values, at.stream));
  }
};

}  // namespace
}  // namespace sk

SK_REGISTER_CUDA_PRODUCTS(bsr, sk::BsrCuda)
