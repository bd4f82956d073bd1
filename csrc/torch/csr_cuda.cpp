// sparsekern::csr_* for torch on NVIDIA GPUs.

#include "sparsekern/csr_cuda.h"

#include "cuda.h"

namespace sk {
namespace {

struct CsrCuda {
  static constexpr const char* kName = "csr";
  static constexpr CudaFunctions<sk_csr_cuda> kFunctions = {
      sk_csr_linear_cuda_workspace, sk_csr_linear_cuda,  sk_csr_linear_backward_cuda_workspace,
      sk_csr_linear_backward_cuda,  sk_csr_scatter_cuda, sk_csr_gather_cuda};
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
};

}  // namespace
}  // namespace sk

SK_REGISTER_CUDA_PRODUCTS(csr, sk::CsrCuda)
