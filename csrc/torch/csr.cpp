// sparsekern::csr_* for torch: check, allocate, call the C ABI.

#include "sparsekern/csr.h"

#include "common.h"
#ifdef SPARSEKERN_CUDA
#include "cuda.h"
#include "sparsekern/csr_cuda.h"
#endif

namespace sk {
namespace {

// The list that CSR.tensors() in python/sparsekern/formats/csr.py makes.
struct CsrPattern {
  const Tensor &row_ptr, &col_idx, &tile_ptr, &t_row_ptr, &t_col_idx, &t_perm, &t_tile_ptr;

  CsrPattern(const Checker& check, const std::vector<Tensor>& list, const Tensor& x)
      : CsrPattern(list.size() == 7 ? list
                                    : (check.fail("pattern", "the 7 tensors of CSR.tensors()",
                                                  std::to_string(list.size()) + " tensors"),
                                       list)) {
    check.tensor("row_ptr", row_ptr, ScalarType::Int, x, {-1});
    if (row_ptr.numel() < 1) check.fail("row_ptr", "int32 [out + 1]", describe(row_ptr));
    check.tensor("t_row_ptr", t_row_ptr, ScalarType::Int, x, {-1});
    if (t_row_ptr.numel() < 1) check.fail("t_row_ptr", "int32 [in + 1]", describe(t_row_ptr));
    check.tensor("col_idx", col_idx, ScalarType::Int, x, {-1});
    check.tensor("tile_ptr", tile_ptr, ScalarType::Int, x, {-1, out()});
    check.tensor("t_col_idx", t_col_idx, ScalarType::Int, x, {nnz()});
    check.tensor("t_perm", t_perm, ScalarType::Int, x, {nnz()});
    check.tensor("t_tile_ptr", t_tile_ptr, ScalarType::Int, x, {-1, in()});
    if (tile_ptr.size(0) < 2) check.fail("tile_ptr", "int32 [tiles + 1, out] with tiles >= 1", describe(tile_ptr));
    if (t_tile_ptr.size(0) < 2) check.fail("t_tile_ptr", "int32 [tiles + 1, in] with tiles >= 1", describe(t_tile_ptr));
  }

  int64_t out() const { return row_ptr.numel() - 1; }
  int64_t in() const { return t_row_ptr.numel() - 1; }
  int64_t nnz() const { return col_idx.numel(); }
  sk_csr weight() const {
    return {out(), in(), nnz(), tile_ptr.size(0) - 1, col_idx.const_data_ptr<int32_t>(), tile_ptr.const_data_ptr<int32_t>()};
  }
  sk_csr transposed() const {
    return {in(), out(), nnz(), t_tile_ptr.size(0) - 1, t_col_idx.const_data_ptr<int32_t>(),
            t_tile_ptr.const_data_ptr<int32_t>()};
  }

 private:
  explicit CsrPattern(const std::vector<Tensor>& l)
      : row_ptr(l[0]), col_idx(l[1]), tile_ptr(l[2]), t_row_ptr(l[3]), t_col_idx(l[4]), t_perm(l[5]), t_tile_ptr(l[6]) {}
};

// x (or grad) times W (or its transpose): the product behind csr_linear and csr_linear_backward_input.
Tensor multiply(const Checker& check, const char* x_name, const Tensor& x, const Tensor& values, const sk_csr& w,
                const int32_t* perm, const std::optional<Tensor>& bias) {
  const sk_dtype dtype = check.dtype(x_name, x);
  check.tensor("values", values, x.scalar_type(), x, {w.nnz});
  if (bias) check.tensor("bias", *bias, x.scalar_type(), x, {w.rows});
  const sk_matrix input = check.matrix(x_name, x, w.cols);
  Tensor y = empty_matrix(x, input.batch, w.rows);
  if (y.numel() == 0) return y;
  const sk_matrix output = check.matrix("y", y, w.rows);
  const sk_threads threads = torch_threads();
  const int64_t bytes = sk_csr_linear_workspace(&w, input.batch);
  std::optional<Tensor> scratch;
  if (bytes > 0) scratch = workspace(x, bytes);
  sk_csr_linear(&w, values.const_data_ptr(), perm, &input, bias ? bias->const_data_ptr() : nullptr, &output,
                scratch ? scratch->mutable_data_ptr() : nullptr, dtype, &threads);
  return y;
}

Tensor csr_linear(const Tensor& x, const Tensor& values, const std::optional<Tensor>& bias, const std::vector<Tensor>& pattern) {
  const Checker check{"csr_linear"};
  const CsrPattern p(check, pattern, x);
  return multiply(check, "x", x, values, p.weight(), nullptr, bias);
}

Tensor csr_linear_backward_input(const Tensor& grad, const Tensor& values, const std::vector<Tensor>& pattern) {
  const Checker check{"csr_linear_backward_input"};
  const CsrPattern p(check, pattern, grad);
  return multiply(check, "grad", grad, values, p.transposed(), p.t_perm.const_data_ptr<int32_t>(), std::nullopt);
}

#ifdef SPARSEKERN_CUDA
Tensor csr_linear_cuda(const Tensor& x, const Tensor& values, const std::optional<Tensor>& bias,
                       const std::vector<Tensor>& pattern) {
  const Checker check{"csr_linear"};
  const CsrPattern p(check, pattern, x);
  const sk_csr w = p.weight();
  const sk_dtype dtype = check.dtype("x", x);
  check.tensor("values", values, x.scalar_type(), x, {w.nnz});
  if (bias) check.tensor("bias", *bias, x.scalar_type(), x, {w.rows});
  const sk_matrix input = check.matrix("x", x, w.cols);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor y = empty_matrix(x, input.batch, w.rows);
  if (y.numel() == 0) return y;
  const sk_matrix output = check.matrix("y", y, w.rows);
  const char* error = sk_csr_linear_cuda(&w, p.row_ptr.const_data_ptr<int32_t>(), values.const_data_ptr(), &input,
                                         bias ? bias->const_data_ptr() : nullptr, &output, dtype,
                                         current_cuda_stream(x.get_device_index()));
  if (error != nullptr) throw std::runtime_error(std::string("sparsekern::csr_linear: CUDA says: ") + error);
  return y;
}
#endif

Tensor csr_linear_backward_weight(const Tensor& grad, const Tensor& x, const std::vector<Tensor>& pattern) {
  const Checker check{"csr_linear_backward_weight"};
  const CsrPattern p(check, pattern, x);
  const sk_dtype dtype = check.dtype("x", x);
  const sk_csr w = p.weight();
  const sk_matrix g = check.matrix("grad", grad, w.rows), input = check.matrix("x", x, w.cols);
  check.require(grad.scalar_type() == x.scalar_type() && check.same_device(grad, x), "grad", "of x's dtype and device", grad);
  check.require(g.batch == input.batch, "grad", "[" + std::to_string(input.batch) + ", out]", grad);
  Tensor grad_values = empty_strided(x, x.scalar_type(), {w.nnz}, {1});
  if (w.nnz == 0) return grad_values;
  const sk_threads threads = torch_threads();
  const Tensor scratch = workspace(x, sk_csr_linear_backward_weight_workspace(&w, input.batch, dtype));
  sk_csr_linear_backward_weight(&w, &g, &input, grad_values.mutable_data_ptr(), scratch.mutable_data_ptr(), dtype, &threads);
  return grad_values;
}

}  // namespace
}  // namespace sk

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) {
  m.impl("csr_linear", TORCH_BOX(&sk::csr_linear));
  m.impl("csr_linear_backward_input", TORCH_BOX(&sk::csr_linear_backward_input));
  m.impl("csr_linear_backward_weight", TORCH_BOX(&sk::csr_linear_backward_weight));
}

#ifdef SPARSEKERN_CUDA
STABLE_TORCH_LIBRARY_IMPL(sparsekern, CUDA, m) { m.impl("csr_linear", TORCH_BOX(&sk::csr_linear_cuda)); }
#endif
