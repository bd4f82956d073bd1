// sparsekern::mask_linear and mask_linear_backward for torch, on a device. A mask F is its tensors, checked:
//
//   F(check, rows, cols, like, values, bits, row_ptr)
//   Device, kGradX               where its kernels run; whether they make the gradient of x
//   linear(...), backward(...)   the C ABI's functions for it, given a Device
#pragma once

#include "products.h"

namespace sk {

template <class F>
Tensor mask_linear(const Tensor& x, const Tensor& values, const std::optional<Tensor>& bias, const Tensor& bits,
                   const Tensor& row_ptr, int64_t activation) {
  const Checker check{"mask_linear"};
  const sk_dtype dtype = F::dtype(check, "x", x);
  check.require(x.dim() == 2, "x", "[batch, in]", x);
  check.require(bits.dim() == 2, "bits", "[out, bytes of a row]", bits);
  const int64_t rows = bits.size(0), cols = x.size(1);
  const F w(check, rows, cols, x, values, bits, row_ptr);
  if (bias) check.tensor("bias", *bias, x.scalar_type(), x, {rows});
  if (activation < SK_IDENTITY || activation > SK_SILU)
    check.fail("activation", "0 to " + std::to_string(int(SK_SILU)), std::to_string(activation));
  const sk_matrix input = check.matrix("x", x, cols);
  Tensor y = empty_matrix(x, input.batch, rows);
  if (y.numel() == 0) return y;
  const sk_matrix output = check.matrix("y", y, rows);
  typename F::Device at(check, x);
  w.linear(values.const_data_ptr(), &input, bias ? bias->const_data_ptr() : nullptr, sk_activation(activation), &output,
           dtype, at);
  return y;
}

// The gradients that are asked for, that of the bias with that of the values; the others are empty tensors.
template <class F>
Gradients mask_linear_backward(const Tensor& grad, const Tensor& x, const Tensor& values, const Tensor& bits,
                               const Tensor& row_ptr, bool need_x, bool need_values) {
  const Checker check{"mask_linear_backward"};
  const sk_dtype dtype = F::dtype(check, "grad", grad);
  if (need_x && !F::kGradX)
    check.fail("need_x", "false on a GPU, where the gradient of x along a mask has no kernel", "true");
  check.require(x.dim() == 2 && x.scalar_type() == grad.scalar_type(), "x", "[batch, in] of grad's dtype", x);
  check.require(bits.dim() == 2, "bits", "[out, bytes of a row]", bits);
  const int64_t rows = bits.size(0), cols = x.size(1);
  const F w(check, rows, cols, grad, values, bits, row_ptr);
  const sk_matrix g = check.matrix("grad", grad, rows), input = check.matrix("x", x, cols);
  check.require(input.batch == g.batch && check.same_device(x, grad), "x",
                "[" + std::to_string(g.batch) + ", in] on grad's device", x);
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
  typename F::Device at(check, grad);
  w.backward(values.const_data_ptr(), &g, &input, need_x ? &output : nullptr,
             need_values ? grad_values.mutable_data_ptr() : nullptr, need_values ? grad_bias.mutable_data_ptr() : nullptr,
             dtype, at);
  return {grad_x, grad_values, grad_bias};
}

// Values of as many as a mask may have, in like's dtype.
inline void check_values(const Checker& check, int64_t rows, int64_t cols, const Tensor& like, const Tensor& values) {
  check.require(values.scalar_type() == like.scalar_type() && check.same_device(values, like) && values.is_contiguous() &&
                    values.numel() <= rows * cols,
                "values", "contiguous, of " + std::string(dtype_name(like.scalar_type())) + ", and at most out * in",
                values);
}

}  // namespace sk

#define SK_REGISTER_MASK_PRODUCTS(library, key, F)                           \
  STABLE_TORCH_LIBRARY_IMPL(library, key, m) {                               \
    m.impl("mask_linear", TORCH_BOX(&sk::mask_linear<F>));                   \
    m.impl("mask_linear_backward", TORCH_BOX(&sk::mask_linear_backward<F>)); \
  }
