// sparsekern::mask_* for torch: see python/sparsekern/formats/mask.py.

#include "sparsekern/mask.h"

#include "products.h"

namespace sk {
namespace {

// The bits and row starts of a [rows, cols] weight, checked; contents are trusted.
sk_mask mask_of(const Checker& check, int64_t rows, int64_t cols, const Tensor& like, const Tensor& values,
                const Tensor& bits, const Tensor& row_ptr) {
  check.require(values.scalar_type() == like.scalar_type() && values.is_contiguous() && values.numel() <= rows * cols,
                "values", "contiguous, of " + std::string(dtype_name(like.scalar_type())) + ", and at most out * in",
                values);
  check.tensor("bits", bits, ScalarType::Byte, like, {rows, (cols + 7) / 8});
  check.tensor("row_ptr", row_ptr, ScalarType::Int, like, {rows});
  return {rows, cols, values.numel(), bits.const_data_ptr<uint8_t>(), row_ptr.const_data_ptr<int32_t>()};
}
sk_mask mask_of(const Checker& check, const Tensor& dense, const Tensor& values, const Tensor& bits,
                const Tensor& row_ptr) {
  check.require(dense.dim() == 2, "dense", "[out, in]", dense);
  const int64_t rows = dense.size(0), cols = dense.size(1);
  check.tensor("dense", dense, dense.scalar_type(), dense, {rows, cols});
  return mask_of(check, rows, cols, dense, values, bits, row_ptr);
}

Tensor mask_bits(const Tensor& columns, const Tensor& row_ptr, int64_t cols) {
  const Checker check{"mask_bits"};
  const bool wide = columns.scalar_type() == ScalarType::Int;
  check.tensor("columns", columns, wide ? ScalarType::Int : ScalarType::UInt16, columns, {-1});
  check.tensor("row_ptr", row_ptr, ScalarType::Int, columns, {-1});
  const int64_t rows = row_ptr.numel();
  Tensor bits = empty_strided(columns, ScalarType::Byte, {rows, (cols + 7) / 8}, {(cols + 7) / 8, 1});
  const sk_csr w{
      rows,    cols,   columns.numel(), 1, 1, columns.const_data_ptr(), wide ? 4 : 2, row_ptr.const_data_ptr<int32_t>(),
      nullptr, nullptr};
  const sk_threads threads = torch_threads();
  sk_mask_bits(&w, bits.mutable_data_ptr<uint8_t>(), &threads);
  return bits;
}

void mask_expand(const Tensor& values, const Tensor& bits, const Tensor& row_ptr, Tensor dense) {
  const Checker check{"mask_expand"};
  const sk_mask mask = mask_of(check, dense, values, bits, row_ptr);
  const sk_threads threads = torch_threads();
  sk_mask_expand(&mask, values.const_data_ptr(), element_bytes(check, "values", values), dense.mutable_data_ptr(),
                 &threads);
}

void mask_compress(const Tensor& dense, const Tensor& bits, const Tensor& row_ptr, Tensor values) {
  const Checker check{"mask_compress"};
  const sk_mask mask = mask_of(check, dense, values, bits, row_ptr);
  const sk_threads threads = torch_threads();
  sk_mask_compress(&mask, dense.const_data_ptr(), element_bytes(check, "values", values), values.mutable_data_ptr(),
                   &threads);
}

Tensor mask_linear(const Tensor& x, const Tensor& values, const std::optional<Tensor>& bias, const Tensor& bits,
                   const Tensor& row_ptr, int64_t activation) {
  const Checker check{"mask_linear"};
  const sk_dtype dtype = check.dtype("x", x, false);
  check.require(x.dim() == 2, "x", "[batch, in]", x);
  const int64_t rows = row_ptr.numel(), cols = x.size(1);
  const sk_mask mask = mask_of(check, rows, cols, x, values, bits, row_ptr);
  if (bias) check.tensor("bias", *bias, x.scalar_type(), x, {rows});
  if (activation < SK_IDENTITY || activation > SK_SILU)
    check.fail("activation", "0 to " + std::to_string(int(SK_SILU)), std::to_string(activation));
  const sk_matrix input = check.matrix("x", x, cols);
  Tensor y = empty_matrix(x, input.batch, rows);
  if (y.numel() == 0) return y;
  const sk_matrix output = check.matrix("y", y, rows);
  const sk_threads threads = torch_threads();
  sk_mask_linear(&mask, values.const_data_ptr(), &input, bias ? bias->const_data_ptr() : nullptr, sk_activation(activation),
                 &output, dtype, &threads);
  return y;
}

// The gradients that are asked for, that of the bias with that of the values; the others are empty tensors.
Gradients mask_linear_backward(const Tensor& grad, const Tensor& x, const Tensor& values, const Tensor& bits,
                               const Tensor& row_ptr, bool need_x, bool need_values) {
  const Checker check{"mask_linear_backward"};
  const sk_dtype dtype = check.dtype("grad", grad, false);
  check.require(x.dim() == 2 && x.scalar_type() == grad.scalar_type(), "x", "[batch, in] of grad's dtype", x);
  const int64_t rows = row_ptr.numel(), cols = x.size(1);
  const sk_mask mask = mask_of(check, rows, cols, grad, values, bits, row_ptr);
  const sk_matrix g = check.matrix("grad", grad, rows), input = check.matrix("x", x, cols);
  check.require(input.batch == g.batch, "x", "[" + std::to_string(g.batch) + ", in]", x);
  Tensor grad_x = need_x ? empty_matrix(grad, g.batch, cols) : empty_tensor(grad, {0});
  Tensor grad_values = empty_tensor(grad, {need_values ? values.numel() : 0});
  Tensor grad_bias = empty_tensor(grad, {need_values ? rows : 0});
  if (g.batch == 0 || rows == 0) {  // sums of nothing
    torch::stable::zero_(grad_x);
    torch::stable::zero_(grad_values);
    torch::stable::zero_(grad_bias);
    return {grad_x, grad_values, grad_bias};
  }
  const sk_matrix output = need_x ? check.matrix("grad_x", grad_x, cols) : sk_matrix{};
  const sk_threads threads = torch_threads();
  sk_mask_linear_backward(&mask, values.const_data_ptr(), &g, &input, need_x ? &output : nullptr,
                          need_values ? grad_values.mutable_data_ptr() : nullptr,
                          need_values ? grad_bias.mutable_data_ptr() : nullptr, dtype, &threads);
  return {grad_x, grad_values, grad_bias};
}

}  // namespace
}  // namespace sk

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) {
  m.impl("mask_bits", TORCH_BOX(&sk::mask_bits));
  m.impl("mask_expand", TORCH_BOX(&sk::mask_expand));
  m.impl("mask_compress", TORCH_BOX(&sk::mask_compress));
  m.impl("mask_linear", TORCH_BOX(&sk::mask_linear));
  m.impl("mask_linear_backward", TORCH_BOX(&sk::mask_linear_backward));
}
