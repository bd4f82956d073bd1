// The ops of every format for torch: check, allocate, call the C ABI. A format F is its pattern's tensors, checked:
//
//   F(check, pattern, sizes, x)      from the lists that Pattern.tensors() and Pattern.sizes() make, on x's device
//   rows, cols, values_shape
//   Device                           where its kernels run: Cpu, or Gpu of cuda.h
//   linear(...), backward(...), scatter(...), gather(...)   the C ABI's functions for it, given a Device
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

// torch's threads, and memory that is kept between calls.
class Cpu {
 public:
  static constexpr bool kFloat16 = false;

  Cpu(const Checker&, const Tensor&) : threads(torch_threads()) {}
  const sk_threads threads;
  void* workspace(int64_t bytes) const { return kept_memory(bytes); }
};

template <class F>
Tensor linear(const Tensor& x, const Tensor& values, const std::optional<Tensor>& bias, const Pattern& pattern,
              const Sizes& sizes, int64_t activation) {
  const std::string name = std::string(F::kName) + "_linear";
  const Checker check{name.c_str()};
  const F w(check, pattern, sizes, x);
  const sk_dtype dtype = check.dtype("x", x, F::Device::kFloat16);
  check.tensor("values", values, x.scalar_type(), x, w.values_shape);
  if (bias) check.tensor("bias", *bias, x.scalar_type(), x, {w.rows});
  if (activation < SK_IDENTITY || activation > SK_SILU)
    check.fail("activation", "0 to " + std::to_string(int(SK_SILU)), std::to_string(activation));
  const sk_matrix input = check.matrix("x", x, w.cols);
  Tensor y = empty_matrix(x, input.batch, w.rows);
  if (y.numel() == 0) return y;
  const sk_matrix output = check.matrix("y", y, w.rows);
  typename F::Device at(check, x);
  w.linear(values.const_data_ptr(), &input, bias ? bias->const_data_ptr() : nullptr, sk_activation(activation), &output,
           dtype, at);
  return y;
}

// The gradients that are asked for; the others are empty tensors. x and values may be null where they are not needed.
template <class F>
Gradients gradients(const char* op, const Tensor& grad, const Tensor* x, const Tensor* values, const Pattern& pattern,
                    const Sizes& sizes, bool need_x, bool need_values, bool need_bias) {
  const std::string name = std::string(F::kName) + op;
  const Checker check{name.c_str()};
  const F w(check, pattern, sizes, grad);
  const sk_dtype dtype = check.dtype("grad", grad, F::Device::kFloat16);
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
  typename F::Device at(check, grad);
  w.backward(need_x ? values->const_data_ptr() : nullptr, &g, need_values ? &input : nullptr, need_x ? &output : nullptr,
             need_values ? grad_values.mutable_data_ptr() : nullptr, need_bias ? grad_bias.mutable_data_ptr() : nullptr,
             dtype, at);
  return {grad_x, grad_values, grad_bias};
}

template <class F>
Tensor backward_input(const Tensor& grad, const Tensor& values, const Pattern& pattern, const Sizes& sizes) {
  return std::get<0>(gradients<F>("_linear_backward_input", grad, nullptr, &values, pattern, sizes, true, false, false));
}

template <class F>
Tensor backward_weight(const Tensor& grad, const Tensor& x, const Pattern& pattern, const Sizes& sizes) {
  return std::get<1>(gradients<F>("_linear_backward_weight", grad, &x, nullptr, pattern, sizes, false, true, false));
}

template <class F>
Gradients backward(const Tensor& grad, const Tensor& x, const Tensor& values, const Pattern& pattern, const Sizes& sizes,
                   bool need_x, bool need_values, bool need_bias) {
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
Tensor scatter(const Tensor& values, const Pattern& pattern, const Sizes& sizes) {
  const std::string name = std::string(F::kName) + "_scatter";
  const Checker check{name.c_str()};
  const F w(check, pattern, sizes, values);
  const int bytes = element_bytes(check, "values", values);
  check.tensor("values", values, values.scalar_type(), values, w.values_shape);
  Tensor dense = empty_tensor(values, {w.rows, w.cols});
  if (dense.numel() == 0) return dense;
  typename F::Device at(check, values);
  w.scatter(values.const_data_ptr(), bytes, dense.mutable_data_ptr(), at);
  return dense;
}

template <class F>
Tensor gather(const Tensor& dense, const Pattern& pattern, const Sizes& sizes) {
  const std::string name = std::string(F::kName) + "_gather";
  const Checker check{name.c_str()};
  const F w(check, pattern, sizes, dense);
  const int bytes = element_bytes(check, "dense", dense);
  check.tensor("dense", dense, dense.scalar_type(), dense, {w.rows, w.cols});
  Tensor values = empty_tensor(dense, w.values_shape);
  if (values.numel() == 0) return values;
  typename F::Device at(check, dense);
  w.gather(dense.const_data_ptr(), bytes, values.mutable_data_ptr(), at);
  return values;
}

}  // namespace sk

// The kernels of the ops that python/sparsekern/formats/products.py defines for a format, on a device.
#define SK_REGISTER_PRODUCTS_ON(library, key, format, F)                           \
  STABLE_TORCH_LIBRARY_IMPL(library, key, m) {                                     \
    m.impl(#format "_linear", TORCH_BOX(&sk::linear<F>));                          \
    m.impl(#format "_linear_backward", TORCH_BOX(&sk::backward<F>));               \
    m.impl(#format "_linear_backward_input", TORCH_BOX(&sk::backward_input<F>));   \
    m.impl(#format "_linear_backward_weight", TORCH_BOX(&sk::backward_weight<F>)); \
    m.impl(#format "_scatter", TORCH_BOX(&sk::scatter<F>));                        \
    m.impl(#format "_gather", TORCH_BOX(&sk::gather<F>));                          \
  }
#define SK_REGISTER_PRODUCTS(format, F) SK_REGISTER_PRODUCTS_ON(sparsekern, CPU, format, F)
