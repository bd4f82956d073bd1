// Products along a bit mask on NVIDIA GPUs, in 16 bits: few rows of x (mask_few.h), and the gradient of the values (mask_weight.h).

#include "mask_few.h"
#include "mask_weight.h"

namespace {

using namespace sk::gpu;

// f(T()) for 16-bit types.
template <class F>
const char* with_short_type(sk_dtype dtype, F f) {
  return dtype == SK_BFLOAT16 ? f(bf16()) : dtype == SK_FLOAT16 ? f(fp16()) : "float32 has no products along a mask";
}

}  // namespace

int64_t sk_mask_linear_cuda_workspace(const sk_mask_cuda* w, const sk_matrix* x, sk_dtype) {
  return mask_few_workspace<bf16>(Mask(*w), *x);
}

const char* sk_mask_linear_cuda(const sk_mask_cuda* w, const void* values, const sk_matrix* x, const void* bias,
                                sk_activation activation, const sk_matrix* y, void* workspace, sk_dtype dtype,
                                void* stream) {
  if (w->rows == 0) return nullptr;
  return with_short_type(dtype, [&](auto zero) {
    return run_mask_few<decltype(zero)>(Mask(*w), values, *x, bias, activation, *y, workspace, Stream(stream));
  });
}

int64_t sk_mask_linear_backward_cuda_workspace(const sk_mask_cuda*, const sk_matrix* grad, const sk_matrix* x, sk_dtype) {
  return operand_bytes<bf16>(*grad) + operand_bytes<bf16>(*x);
}

const char* sk_mask_linear_backward_cuda(const sk_mask_cuda* w, const sk_matrix* grad, const sk_matrix* x,
                                         void* grad_values, void* grad_bias, void* workspace, sk_dtype dtype,
                                         void* stream) {
  return with_short_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    uint8_t* free = static_cast<uint8_t*>(workspace);
    const char* error = nullptr;
    if (grad_values != nullptr && w->nnz > 0) {
      Operand<T> g, input;
      error = operand(*grad, false, g, free, Stream(stream));
      if (error == nullptr) error = operand(*x, false, input, free, Stream(stream));
      if (error == nullptr) error = run_mask_weight(Mask(*w), g, input, static_cast<T*>(grad_values), Stream(stream));
    }
    if (grad_bias != nullptr && w->rows > 0 && error == nullptr) error = sum_batch(*grad, dtype, grad_bias, Stream(stream));
    return error;
  });
}
