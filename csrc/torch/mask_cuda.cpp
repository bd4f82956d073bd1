// sparsekern::mask_linear and mask_linear_backward for torch on NVIDIA GPUs.

#include "sparsekern/mask_cuda.h"

#include "cuda.h"
#include "mask.h"

namespace sk {
namespace {

struct GpuMask {
  using Device = Gpu;
  static constexpr bool kGradX = false;
  sk_mask_cuda w;

  static sk_dtype dtype(const Checker& check, const char* name, const Tensor& t) {
    check.require(t.scalar_type() == ScalarType::BFloat16 || t.scalar_type() == ScalarType::Half, name,
                  "bfloat16 or float16 on a GPU", t);
    return check.dtype(name, t, true);
  }

  GpuMask(const Checker& check, int64_t rows, int64_t cols, const Tensor& like, const Tensor& values, const Tensor& bits,
          const Tensor& row_ptr) {
    const int64_t spans = (cols + SK_MASK_SPAN - 1) / SK_MASK_SPAN;
    check_values(check, rows, cols, like, values);
    check.tensor("bits", bits, ScalarType::Byte, like, {rows, spans * (SK_MASK_SPAN / 8)});
    check.tensor("row_ptr", row_ptr, ScalarType::Int, like, {rows * spans + 1});
    const void* const words = bits.const_data_ptr();
    if (reinterpret_cast<uintptr_t>(words) % 16) check.fail("bits", "aligned to 16 bytes", "a view that is not");
    w = {rows, cols, values.numel(), spans, static_cast<const uint32_t*>(words), row_ptr.const_data_ptr<int32_t>()};
  }

  void linear(const void* values, const sk_matrix* x, const void* bias, sk_activation activation, const sk_matrix* y,
              sk_dtype dtype, Gpu& at) const {
    void* const workspace = at.workspace(sk_mask_linear_cuda_workspace(&w, x, dtype));
    at.done(sk_mask_linear_cuda(&w, values, x, bias, activation, y, workspace, dtype, at.stream));
  }
  void backward(const void*, const sk_matrix* grad, const sk_matrix* x, const sk_matrix*, void* grad_values,
                void* grad_bias, sk_dtype dtype, Gpu& at) const {
    void* const workspace = at.workspace(sk_mask_linear_backward_cuda_workspace(&w, grad, x, dtype));
    at.done(sk_mask_linear_backward_cuda(&w, grad, x, grad_values, grad_bias, workspace, dtype, at.stream));
  }
};

}  // namespace
}  // namespace sk

#ifdef SPARSEKERN_EMULATED
SK_REGISTER_MASK_PRODUCTS(sparsekern_emulated, CPU, sk::GpuMask)
#else
SK_REGISTER_MASK_PRODUCTS(sparsekern, CUDA, sk::GpuMask)
#endif
