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
  const Tensor &row_ptr, &col_idx, &tile_ptr, &t_tile_ptr, &t_slot;

  CsrPattern(const Checker& check, const std::vector<Tensor>& list, const Tensor& x)
      : CsrPattern(list.size() == 5
                       ? list
                       : (check.fail("pattern", "the 5 tensors of CSR.tensors()", std::to_string(list.size()) + " tensors"),
                          list)) {
    check.tensor("row_ptr", row_ptr, ScalarType::Int, x, {-1});
    if (row_ptr.numel() < 1) check.fail("row_ptr", "int32 [out + 1]", describe(row_ptr));
    check.tensor("col_idx", col_idx, ScalarType::Int, x, {-1});
    check.tensor("tile_ptr", tile_ptr, ScalarType::Int, x, {-1, out()});
    check.tensor("t_tile_ptr", t_tile_ptr, ScalarType::Int, x, {-1, -1});
    check.tensor("t_slot", t_slot, ScalarType::Int, x, {col_idx.numel()});
    // Entries address their operand by 32 bits: feature * 64 floats.
    if (out() >= kMostFeatures) check.fail("row_ptr", "of fewer than 2^26 rows", describe(row_ptr));
    if (in() >= kMostFeatures) check.fail("t_tile_ptr", "of fewer than 2^26 columns", describe(t_tile_ptr));
    tiled(check, "tile_ptr", tile_ptr, in(), "int32 [tiles + 1, out]");
    tiled(check, "t_tile_ptr", t_tile_ptr, out(), "int32 [tiles + 1, in]");
    if (x.is_cpu()) {
      ends(check, "row_ptr", row_ptr);
      if (out() > 0) ends(check, "tile_ptr", tile_ptr);
      if (in() > 0) ends(check, "t_tile_ptr", t_tile_ptr);
    }
  }

  int64_t out() const { return row_ptr.numel() - 1; }
  int64_t in() const { return t_tile_ptr.size(1); }
  sk_csr weight() const {
    return {out(),
            in(),
            col_idx.numel(),
            tile_ptr.size(0) - 1,
            t_tile_ptr.size(0) - 1,
            col_idx.const_data_ptr<int32_t>(),
            tile_ptr.const_data_ptr<int32_t>(),
            t_tile_ptr.const_data_ptr<int32_t>(),
            t_slot.const_data_ptr<int32_t>()};
  }

  static constexpr int64_t kNarrowestTile = 128, kWidestTile = int64_t(1) << 16, kMostFeatures = int64_t(1) << 26;
  static int64_t tiles(int64_t size, int64_t width) { return size > width ? (size + width - 1) / width : 1; }

 private:
  explicit CsrPattern(const std::vector<Tensor>& l)
      : row_ptr(l[0]), col_idx(l[1]), tile_ptr(l[2]), t_tile_ptr(l[3]), t_slot(l[4]) {}

  // As many tiles as one of the widths gives: the kernels recover the width from their number.
  static void tiled(const Checker& check, const char* name, const Tensor& ptr, int64_t size, const char* shape) {
    for (int64_t width = kNarrowestTile; width <= kWidestTile; width *= 2)
      if (ptr.size(0) - 1 == tiles(size, width)) return;
    check.fail(name, std::string(shape) + " with tiles of 128 * 2^k", describe(ptr));
  }

  // The last pointer is nnz. The other contents were checked when the pattern was built.
  void ends(const Checker& check, const char* name, const Tensor& ptr) const {
    const int64_t last = ptr.const_data_ptr<int32_t>()[ptr.numel() - 1];
    if (last != col_idx.numel())
      check.fail(name, "a pointer that ends at nnz = " + std::to_string(col_idx.numel()), std::to_string(last));
  }
};

// tile_ptr, t_tile_ptr and t_slot of a checked pattern.
std::tuple<Tensor, Tensor, Tensor> csr_derive(const Tensor& row_ptr, const Tensor& col_idx, int64_t in_features,
                                              int64_t width, int64_t t_width) {
  const Checker check{"csr_derive"};
  check.tensor("row_ptr", row_ptr, ScalarType::Int, row_ptr, {-1});
  check.tensor("col_idx", col_idx, ScalarType::Int, row_ptr, {-1});
  if (row_ptr.numel() < 1 || in_features < 0 || width < 1 || t_width < 1)
    check.fail("row_ptr", "int32 [out + 1], with in_features >= 0 and tile widths >= 1", describe(row_ptr));
  const int32_t *ptr = row_ptr.const_data_ptr<int32_t>(), *idx = col_idx.const_data_ptr<int32_t>();
  const int64_t nnz = col_idx.numel();
  bool sound = ptr[0] == 0 && ptr[row_ptr.numel() - 1] == nnz;
  for (int64_t r = 0; sound && r + 1 < row_ptr.numel(); r++) {
    sound = ptr[r] <= ptr[r + 1] && ptr[r + 1] <= nnz;
    for (int64_t k = ptr[r]; sound && k < ptr[r + 1]; k++)
      sound = idx[k] < in_features && (k == ptr[r] ? idx[k] >= 0 : idx[k] > idx[k - 1]);
  }
  if (!sound)
    check.fail("col_idx", "a CSR pattern with row_ptr: columns below in_features, ascending in each row", "another");
  const int64_t rows = row_ptr.numel() - 1;
  const auto ints = [&](int64_t tiles, int64_t size) {
    return empty_strided(row_ptr, ScalarType::Int, {tiles + 1, size}, {size > 0 ? size : 1, 1});
  };
  Tensor tile_ptr = ints(CsrPattern::tiles(in_features, width), rows);
  Tensor t_tile_ptr = ints(CsrPattern::tiles(rows, t_width), in_features);
  Tensor t_slot = empty_strided(row_ptr, ScalarType::Int, {col_idx.numel()}, {1});
  sk_csr_derive(rows, in_features, width, t_width, ptr, idx, tile_ptr.mutable_data_ptr<int32_t>(),
                t_tile_ptr.mutable_data_ptr<int32_t>(), t_slot.mutable_data_ptr<int32_t>());
  return {tile_ptr, t_tile_ptr, t_slot};
}

// Checks and allocates for csr_linear on any device; run(pattern, w, input, bias, output, dtype) computes.
template <class Run>
Tensor linear(const Tensor& x, const Tensor& values, const std::optional<Tensor>& bias, const std::vector<Tensor>& pattern,
              Run run) {
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
  run(p, w, input, bias ? bias->const_data_ptr() : nullptr, output, dtype);
  return y;
}

Tensor csr_linear(const Tensor& x, const Tensor& values, const std::optional<Tensor>& bias,
                  const std::vector<Tensor>& pattern) {
  return linear(x, values, bias, pattern,
                [&](const CsrPattern&, const sk_csr& w, const sk_matrix& input, const void* b, const sk_matrix& output,
                    sk_dtype dtype) {
                  const sk_threads threads = torch_threads();
                  sk_csr_linear(&w, values.const_data_ptr(), &input, b, &output, dtype, &threads);
                });
}

#ifdef SPARSEKERN_CUDA
Tensor csr_linear_cuda(const Tensor& x, const Tensor& values, const std::optional<Tensor>& bias,
                       const std::vector<Tensor>& pattern) {
  return linear(x, values, bias, pattern,
                [&](const CsrPattern& p, const sk_csr& w, const sk_matrix& input, const void* b, const sk_matrix& output,
                    sk_dtype dtype) {
                  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
                  const char* error =
                      sk_csr_linear_cuda(&w, p.row_ptr.const_data_ptr<int32_t>(), values.const_data_ptr(), &input, b,
                                         &output, dtype, current_cuda_stream(x.get_device_index()));
                  if (error != nullptr)
                    throw std::runtime_error(std::string("sparsekern::csr_linear: CUDA says: ") + error);
                });
}
#endif

// The gradients that are asked for; the others are empty tensors.
std::tuple<Tensor, Tensor, Tensor> backward(const Checker& check, const Tensor& grad, const Tensor* x, const Tensor* values,
                                            const std::vector<Tensor>& pattern, bool need_x, bool need_values,
                                            bool need_bias) {
  const CsrPattern p(check, pattern, grad);
  const sk_csr w = p.weight();
  const sk_dtype dtype = check.dtype("grad", grad);
  const sk_matrix g = check.matrix("grad", grad, w.rows);
  if (need_x) check.tensor("values", *values, grad.scalar_type(), grad, {w.nnz});
  sk_matrix input{};
  if (need_values) {
    input = check.matrix("x", *x, w.cols);
    check.require(x->scalar_type() == grad.scalar_type() && check.same_device(*x, grad), "x", "of grad's dtype and device",
                  *x);
    check.require(input.batch == g.batch, "x", "[" + std::to_string(g.batch) + ", in]", *x);
  }
  Tensor grad_x = need_x ? empty_matrix(grad, g.batch, w.cols) : empty_vector(grad, 0);
  Tensor grad_values = empty_vector(grad, need_values ? w.nnz : 0);
  Tensor grad_bias = empty_vector(grad, need_bias ? w.rows : 0);
  if (g.batch == 0 || w.rows == 0) {  // sums of nothing
    torch::stable::zero_(grad_x);
    torch::stable::zero_(grad_values);
    torch::stable::zero_(grad_bias);
    return {grad_x, grad_values, grad_bias};
  }
  const sk_matrix output = need_x ? check.matrix("grad_x", grad_x, w.cols) : sk_matrix{};
  const sk_threads threads = torch_threads();
  const Workspace workspace(sk_csr_linear_backward_workspace(&w, g.batch, &threads));
  sk_csr_linear_backward(&w, need_x ? values->const_data_ptr() : nullptr, &g, need_values ? &input : nullptr,
                         need_x ? &output : nullptr, need_values ? grad_values.mutable_data_ptr() : nullptr,
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
