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

// tile_ptr, t_row_ptr, t_col_idx, t_perm and t_tile_ptr of a checked pattern.
std::vector<Tensor> csr_derive(const Tensor& row_ptr, const Tensor& col_idx, int64_t in_features, int64_t width,
                               int64_t t_width) {
  const Checker check{"csr_derive"};
  check.tensor("row_ptr", row_ptr, ScalarType::Int, row_ptr, {-1});
  check.tensor("col_idx", col_idx, ScalarType::Int, row_ptr, {-1});
  if (row_ptr.numel() < 1 || in_features < 0 || width < 1 || t_width < 1)
    check.fail("row_ptr", "int32 [out + 1], with in_features >= 0 and tile widths >= 1", describe(row_ptr));
  const int64_t rows = row_ptr.numel() - 1, nnz = col_idx.numel();
  const auto ints = [&](std::vector<int64_t> shape) {
    const int64_t last = shape.back();
    return shape.size() == 1 ? empty_strided(row_ptr, ScalarType::Int, shape, {1})
                             : empty_strided(row_ptr, ScalarType::Int, shape, {last > 0 ? last : 1, 1});
  };
  const auto tiles = [](int64_t size, int64_t w) { return size > w ? (size + w - 1) / w : 1; };
  Tensor tile_ptr = ints({tiles(in_features, width) + 1, rows}), t_row_ptr = ints({in_features + 1}), t_col_idx = ints({nnz}),
         t_perm = ints({nnz}), t_tile_ptr = ints({tiles(rows, t_width) + 1, in_features});
  const int32_t *ptr = row_ptr.const_data_ptr<int32_t>(), *idx = col_idx.const_data_ptr<int32_t>();
  sk_csr_tile(rows, in_features, width, ptr, idx, tile_ptr.mutable_data_ptr<int32_t>());
  sk_csr_transpose(rows, in_features, ptr, idx, t_row_ptr.mutable_data_ptr<int32_t>(), t_col_idx.mutable_data_ptr<int32_t>(),
                   t_perm.mutable_data_ptr<int32_t>());
  sk_csr_tile(in_features, rows, t_width, t_row_ptr.const_data_ptr<int32_t>(), t_col_idx.const_data_ptr<int32_t>(),
              t_tile_ptr.mutable_data_ptr<int32_t>());
  return {tile_ptr, t_row_ptr, t_col_idx, t_perm, t_tile_ptr};
}

Tensor csr_linear(const Tensor& x, const Tensor& values, const std::optional<Tensor>& bias, const std::vector<Tensor>& pattern) {
  const Checker check{"csr_linear"};
  const CsrPattern p(check, pattern, x);
  const sk_csr w = p.weight();
  const sk_dtype dtype = check.dtype("x", x);
  check.tensor("values", values, x.scalar_type(), x, {w.nnz});
  if (bias) check.tensor("bias", *bias, x.scalar_type(), x, {w.rows});
  const sk_matrix input = check.matrix("x", x, w.cols);
  Tensor y = empty_matrix(x, input.batch, w.rows);
  if (y.numel() == 0) return y;
  const sk_matrix output = check.matrix("y", y, w.rows);
  const sk_threads threads = torch_threads();
  const Workspace workspace(x, sk_csr_linear_workspace(&w, input.batch, &threads));
  sk_csr_linear(&w, values.const_data_ptr(), &input, bias ? bias->const_data_ptr() : nullptr, &output, workspace.data(),
                dtype, &threads);
  return y;
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

// The gradients that are asked for; the others are empty tensors.
std::tuple<Tensor, Tensor, Tensor> backward(const Checker& check, const Tensor& grad, const Tensor* x, const Tensor* values,
                                            const std::vector<Tensor>& pattern, bool need_x, bool need_values,
                                            bool need_bias) {
  const CsrPattern p(check, pattern, grad);
  const sk_csr w = p.weight(), wt = p.transposed();
  const sk_dtype dtype = check.dtype("grad", grad);
  const sk_matrix g = check.matrix("grad", grad, w.rows);
  if (need_x) check.tensor("values", *values, grad.scalar_type(), grad, {w.nnz});
  sk_matrix input{};
  if (need_values) {
    input = check.matrix("x", *x, w.cols);
    check.require(x->scalar_type() == grad.scalar_type() && check.same_device(*x, grad), "x", "of grad's dtype and device", *x);
    check.require(input.batch == g.batch, "x", "[" + std::to_string(g.batch) + ", in]", *x);
  }
  Tensor grad_x = need_x ? empty_matrix(grad, g.batch, w.cols) : empty_vector(grad, 0);
  Tensor grad_values = empty_vector(grad, need_values ? w.nnz : 0);
  Tensor grad_bias = empty_vector(grad, need_bias ? w.rows : 0);
  if (g.batch == 0) {
    torch::stable::zero_(grad_values);
    torch::stable::zero_(grad_bias);
    return {grad_x, grad_values, grad_bias};
  }
  const sk_matrix output = need_x ? check.matrix("grad_x", grad_x, w.cols) : sk_matrix{};
  const sk_threads threads = torch_threads();
  const Workspace workspace(grad, sk_csr_linear_backward_workspace(&w, &wt, g.batch, &threads));
  sk_csr_linear_backward(&w, &wt, p.t_perm.const_data_ptr<int32_t>(), need_x ? values->const_data_ptr() : nullptr, &g,
                         need_values ? &input : nullptr, need_x ? &output : nullptr,
                         need_values ? grad_values.mutable_data_ptr() : nullptr,
                         need_bias ? grad_bias.mutable_data_ptr() : nullptr, workspace.data(), dtype, &threads);
  return {grad_x, grad_values, grad_bias};
}

Tensor csr_linear_backward_input(const Tensor& grad, const Tensor& values, const std::vector<Tensor>& pattern) {
  return std::get<0>(backward({"csr_linear_backward_input"}, grad, nullptr, &values, pattern, true, false, false));
}

Tensor csr_linear_backward_weight(const Tensor& grad, const Tensor& x, const std::vector<Tensor>& pattern) {
  return std::get<1>(backward({"csr_linear_backward_weight"}, grad, &x, nullptr, pattern, false, true, false));
}

std::tuple<Tensor, Tensor, Tensor> csr_linear_backward(const Tensor& grad, const Tensor& x, const Tensor& values,
                                                       const std::vector<Tensor>& pattern, bool need_x, bool need_values,
                                                       bool need_bias) {
  return backward({"csr_linear_backward"}, grad, &x, &values, pattern, need_x, need_values, need_bias);
}

}  // namespace
}  // namespace sk

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) {
  m.impl("csr_derive", TORCH_BOX(&sk::csr_derive));
  m.impl("csr_linear", TORCH_BOX(&sk::csr_linear));
  m.impl("csr_linear_backward", TORCH_BOX(&sk::csr_linear_backward));
  m.impl("csr_linear_backward_input", TORCH_BOX(&sk::csr_linear_backward_input));
  m.impl("csr_linear_backward_weight", TORCH_BOX(&sk::csr_linear_backward_weight));
}

#ifdef SPARSEKERN_CUDA
STABLE_TORCH_LIBRARY_IMPL(sparsekern, CUDA, m) { m.impl("csr_linear", TORCH_BOX(&sk::csr_linear_cuda)); }
#endif
