// sparsekern::bsr_* for torch.

#include "bsr_pattern.h"

namespace sk {
namespace {

struct Bsr : BsrPattern {
  using Device = Cpu;
  using BsrPattern::BsrPattern;

  void linear(const void* values, const sk_matrix* x, const void* bias, sk_activation activation, const sk_matrix* y,
              sk_dtype dtype, const Cpu& at) const {
    sk_bsr_linear(&w, values, x, bias, activation, y, dtype, &at.threads);
  }
  void scatter(const void* values, int bytes, void* dense, const Cpu& at) const {
    sk_bsr_scatter(&w, values, bytes, dense, &at.threads);
  }
  void gather(const void* dense, int bytes, void* values, const Cpu& at) const {
    sk_bsr_gather(&w, dense, bytes, values, &at.threads);
  }
  void backward(const void* values, const sk_matrix* grad, const sk_matrix* x, const sk_matrix* grad_x, void* grad_values,
                void* grad_bias, sk_dtype dtype, const Cpu& at) const {
    void* const workspace = at.workspace(sk_bsr_linear_backward_workspace(&w, grad->batch, &at.threads));
    sk_bsr_linear_backward(&w, values, grad, x, grad_x, grad_values, grad_bias, workspace, dtype, &at.threads);
  }
};

}  // namespace
}  // namespace sk

SK_REGISTER_PRODUCTS(bsr, sk::Bsr)
