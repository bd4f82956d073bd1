// The ops of every format for torch: check, allocate, call the C ABI. A format F is its pattern's tensors, checked:
//
//   F(check, pattern, sizes, x)      from the lists that Pattern.tensors() and Pattern.sizes() make, on x's device
//   rows, cols, values_shape
//   linear(...), workspace(...), backward(...), scatter(...), gather(...)   the C ABI's functions for it
#pragma once

#include "common.h"

namespace sk {

using Pattern = std::vector<Tensor>;
using Sizes = std::vector<int64_t>;
using Gradients = std::tuple<Tensor, Tensor, Tensor>;

// `list` must have `count` tensors, and `sizes` as many numbers as the format has.
inline void check_lists(const Checker& check, const Pattern& list, size_t count, const Sizes& sizes, size_t numbers,
                        const char* type) {
  if (list.size() != count)
    check.fail("pattern", "the " + std::to_string(count) + " tensors of " + type + ".tensors()",
               std::to_string(list.size()) + " tensors");
  bool sound = sizes.size() == numbers;
  for (int64_t size : sizes) sound = sound && size >= 0;
  if (!sound)
    check.fail("sizes", "the " + std::to_string(numbers) + " numbers of " + type + ".sizes()",
               std::to_string(sizes.size()) + " numbers");
}

// Checks and allocates for <format>_linear on any device; run(w, input, bias, activation, output, dtype) computes.
template <class F, class Run>
Tensor linear(const Tensor& x, const Tensor& values, const std::optional<Tensor>& bias, const Pattern& pattern,
              const Sizes& sizes, int64_t activation, Run run) {
  const std::string name = std::string(F::kName) + "_linear";
  const Checker check{name.c_str()};
  const F w(check, pattern, sizes, x);
  const sk_dtype dtype = check.dtype("x", x);
  check.tensor("values", values, x.scalar_type(), x, w.values_shape);
  if (bias) check.tensor("bias", *bias, x.scalar_type(), x, {w.rows});
  if (activation < SK_IDENTITY || activation > SK_SILU)
    check.fail("activation", "0 to " + std::to_string(int(SK_SILU)), std::to_string(activation));
  const sk_matrix input = check.matrix("x", x, w.cols);
  Tensor y = empty_matrix(x, input.batch, w.rows);
  if (y.numel() == 0) return y;
  const sk_matrix output = check.matrix("y", y, w.rows);
  run(w, input, bias ? bias->const_data_ptr() : nullptr, sk_activation(activation), output, dtype);
  return y;
}

template <class F>
Tensor linear_cpu(const Tensor& x, const Tensor& values, const std::optional<Tensor>& bias, const Pattern& pattern,
                  const Sizes& sizes, int64_t activation) {
  return linear<F>(
      x, values, bias, pattern, sizes, activation,
      [&](const F& w, const sk_matrix& input, const void* b, sk_activation a, const sk_matrix& output, sk_dtype dtype) {
        const sk_threads threads = torch_threads();
        w.linear(values.const_data_ptr(), &input, b, a, &output, dtype, &threads);
      });
}

// The gradients that are asked for; the others are empty tensors. x and values may be null where they are not needed.
template <class F>
Gradients gradients(const char* op, const Tensor& grad, const Tensor* x, const Tensor* values, const Pattern& pattern,
                    const Sizes& sizes, bool need_x, bool need_values, bool need_bias) {
  const std::string name = std::string(F::kName) + op;
  const Checker check{name.c_str()};
  const F w(check, pattern, sizes, grad);
  const sk_dtype dtype = check.dtype("grad", grad);
  const sk_matrix g = check.matrix("grad", grad, w.rows);
  if (need_x) check.tensor("values", *values, grad.scalar_type(), grad, w.values_shape);
  sk_matrix input{};
  if (need_values) {
    input = check.matrix("x", *x, w.cols);
    check.require(x->scalar_type() == grad.scalar_type() && check.same_device(*x, grad), "x", "of grad's dtype and device",
                  *x);
    check.require(input.batch == g.batch, "x", "[" + std::to_string(g.batch) + ", in]", *x);
  }
  Tensor grad_x = need_x ? empty_matrix(grad, g.batch, w.cols) : empty_tensor(grad, {0});
  Tensor grad_values = empty_tensor(grad, need_values ? w.values_shape : Sizes{0});
  Tensor grad_bias = empty_tensor(grad, {need_bias ? w.rows : 0});
  if (g.batch == 0 || w.rows == 0) {  // sums of nothing
    torch::stable::zero_(grad_x);
    torch::stable::zero_(grad_values);
    torch::stable::zero_(grad_bias);
    return {grad_x, grad_values, grad_bias};
  }
  const sk_matrix output = need_x ? check.matrix("grad_x", grad_x, w.cols) : sk_matrix{};
  const sk_threads threads = torch_threads();
  const Workspace workspace(w.workspace(g.batch, &threads));
  w.backward(need_x ? values->const_data_ptr() : nullptr, &g, need_values ? &input : nullptr, need_x ? &output : nullptr,
             need_values ? grad_values.mutable_data_ptr() : nullptr, need_bias ? grad_bias.mutable_data_ptr() : nullptr,
             workspace.data(), dtype, &threads);
  return {grad_x, grad_values, grad_bias};
}

template <class F>
Tensor backward_input_cpu(const Tensor& grad, const Tensor& values, const Pattern& pattern, const Sizes& sizes) {
  return std::get<0>(gradients<F>("_linear_backward_input", grad, nullptr, &values, pattern, sizes, true, false, false));
}

template <class F>
Tensor backward_weight_cpu(const Tensor& grad, const Tensor& x, const Pattern& pattern, const Sizes& sizes) {
  return std::get<1>(gradients<F>("_linear_backward_weight", grad, &x, nullptr, pattern, sizes, false, true, false));
}

template <class F>
Gradients backward_cpu(const Tensor& grad, const Tensor& x, const Tensor& values, const Pattern& pattern,
                       const Sizes& sizes, bool need_x, bool need_values, bool need_bias) {
  return gradients<F>("_linear_backward", grad, &x, &values, pattern, sizes, need_x, need_values, need_bias);
}

inline int element_bytes(const Checker& check, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::BFloat16:
    case ScalarType::Half: return 2;
    case ScalarType::Float: return 4;
    case ScalarType::Double: return 8;
    default: check.fail(name, "bfloat16, float16, float32 or float64", describe(t));
  }
}

template <class F>
Tensor scatter_cpu(const Tensor& values, const Pattern& pattern, const Sizes& sizes) {
  const std::string name = std::string(F::kName) + "_scatter";
  const Checker check{name.c_str()};
  const F w(check, pattern, sizes, values);
  const int bytes = element_bytes(check, "values", values);
  check.tensor("values", values, values.scalar_type(), values, w.values_shape);
  Tensor dense = empty_tensor(values, {w.rows, w.cols});
  const sk_threads threads = torch_threads();
  if (dense.numel() > 0) w.scatter(values.const_data_ptr(), bytes, dense.mutable_data_ptr(), &threads);
  return dense;
}

template <class F>
Tensor gather_cpu(const Tensor& dense, const Pattern& pattern, const Sizes& sizes) {
  const std::string name = std::string(F::kName) + "_gather";
  const Checker check{name.c_str()};
  const F w(check, pattern, sizes, dense);
  const int bytes = element_bytes(check, "dense", dense);
  check.tensor("dense", dense, dense.scalar_type(), dense, {w.rows, w.cols});
  Tensor values = empty_tensor(dense, w.values_shape);
  const sk_threads threads = torch_threads();
  if (values.numel() > 0) w.gather(dense.const_data_ptr(), bytes, values.mutable_data_ptr(), &threads);
  return values;
}

}  // namespace sk

// The CPU kernels of the ops that python/sparsekern/formats/products.py defines for a format.
#define SK_REGISTER_PRODUCTS(format, F)                                                \
  STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) {                                      \
    m.impl(#format "_linear", TORCH_BOX(&sk::linear_cpu<F>));                          \
    m.impl(#format "_linear_backward", TORCH_BOX(&sk::backward_cpu<F>));               \
    m.impl(#format "_linear_backward_input", TORCH_BOX(&sk::backward_input_cpu<F>));   \
    m.impl(#format "_linear_backward_weight", TORCH_BOX(&sk::backward_weight_cpu<F>)); \
    m.impl(#format "_scatter", TORCH_BOX(&sk::scatter_cpu<F>));                        \
    m.impl(#format "_gather", TORCH_BOX(&sk::gather_cpu<F>));                          \
  }
