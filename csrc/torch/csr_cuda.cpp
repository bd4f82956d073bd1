// sparsekern::csr_* for torch on NVIDIA GPUs.

#include "sparsekern/csr_cuda.h"

#include "cuda.h"

namespace sk {
namespace {

struct CsrCuda {
  static constexpr const char* kName = "csr";
  using Device = Gpu;
  int64_t rows, cols;
  Sizes values_shape;
  sk_csr_cuda w;

  CsrCuda(const Checker& check, const Pattern& list, const Sizes& sizes, const Tensor& x) {
    check_lists(check, list, 5, sizes, 2, "CSR");
    rows = sizes[0], cols = sizes[1];
    const int64_t nnz = list[1].numel();
    values_shape = {nnz};
    check.tensor("row_ptr", list[0], ScalarType::Int, x, {rows + 1});
    check.tensor("col_idx", list[1], ScalarType::Int, x, {-1});
    check.tensor("t_row_ptr", list[2], ScalarType::Int, x, {cols + 1});
    check.tensor("t_col_idx", list[3], ScalarType::Int, x, {nnz});
    check.tensor("t_slot", list[4], ScalarType::Int, x, {nnz});
    const auto ints = [&](size_t i) { return list[i].const_data_ptr<int32_t>(); };
    w = {rows, cols, nnz, ints(0), ints(1), ints(2), ints(3), ints(4)};
  }

  void linear(const void* values, const sk_matrix* x, const void* bias, sk_activation activation, const sk_matrix* y,
              sk_dtype dtype, Gpu& at) const {
    void* const workspace = at.workspace(sk_csr_linear_cuda_workspace(&w, x, dtype));
    at.done(sk_csr_linear_cuda(&w, values, x, bias, activation, y, workspace, dtype, at.stream));
  }
  void backward(const void* values, const sk_matrix* grad, const sk_matrix* x, const sk_matrix* grad_x, void* grad_values,
                void* grad_bias, sk_dtype dtype, Gpu& at) const {
    void* const workspace = at.workspace(sk_csr_linear_backward_cuda_workspace(&w, grad, x, dtype));
    at.done(sk_csr_linear_backward_cuda(&w, values, grad, x, grad_x, grad_values, grad_bias, workspace, dtype, at.stream));
  }
  void scatter(const void* values, int bytes, void* dense, Gpu& at) const {
    at.done(sk_csr_scatter_cuda(&w, values, bytes, dense, at.stream));
  }
  void gather(const void* dense, int bytes, void* values, Gpu& at) const {
    at.done(sk_csr_gather_cuda(&w, dense, bytes, values, at.stream));
  }
};

}  // namespace
}  // namespace sk

SK_REGISTER_CUDA_PRODUCTS(csr, sk::CsrCuda)
