// sparsekern::nm_* for torch on NVIDIA GPUs.

#include "sparsekern/nm_cuda.h"

#include "cuda.h"

namespace sk {
namespace {

struct NmCuda {
  static constexpr const char* kName = "nm";
  using Device = Gpu;
  int64_t rows, cols;
  Sizes values_shape;
  sk_nm_cuda w;

  NmCuda(const Checker& check, const Pattern& list, const Sizes& sizes, const Tensor& x) {
    check_lists(check, list, 3, sizes, 4, "NM");
    rows = sizes[0], cols = sizes[1];
    const int64_t n = sizes[2], m = sizes[3];
    if (n < 1 || n > m || m > 16)
      check.fail("sizes", "N and M with 1 <= N <= M <= 16", std::to_string(n) + ":" + std::to_string(m));
    const int64_t each = cols / m * n + (cols % m < n ? cols % m : n), bits = m <= 4 ? 2 : 4;
    values_shape = {rows, each};
    check.tensor("index", list[0], ScalarType::Byte, x, values_shape);
    check.tensor("packed", list[1], ScalarType::Byte, x, {rows, (each * bits + 31) / 32 * 4});
    w = {rows, cols, int32_t(n), int32_t(m), static_cast<const uint8_t*>(list[1].const_data_ptr()), nullptr};
    check.tensor("metadata", list[2], ScalarType::Int, x, {sk_nm_metadata_words_cuda(&w)});
    if (list[2].numel() > 0) w.metadata = static_cast<const uint32_t*>(list[2].const_data_ptr());
  }

  void linear(const void* values, const sk_matrix* x, const void* bias, sk_activation activation, const sk_matrix* y,
              sk_dtype dtype, Gpu& at) const {
    void* const workspace = at.workspace(sk_nm_linear_cuda_workspace(&w, x, dtype));
    at.done(sk_nm_linear_cuda(&w, values, x, bias, activation, y, workspace, dtype, at.stream));
  }
  void backward(const void* values, const sk_matrix* grad, const sk_matrix* x, const sk_matrix* grad_x, void* grad_values,
                void* grad_bias, sk_dtype dtype, Gpu& at) const {
    void* const workspace = at.workspace(sk_nm_linear_backward_cuda_workspace(&w, grad, x, dtype));
    at.done(sk_nm_linear_backward_cuda(&w, values, grad, x, grad_x, grad_values, grad_bias, workspace, dtype, at.stream));
  }
  void scatter(const void* values, int bytes, void* dense, Gpu& at) const {
    at.done(sk_nm_scatter_cuda(&w, values, bytes, dense, at.stream));
  }
  void gather(const void* dense, int bytes, void* values, Gpu& at) const {
    at.done(sk_nm_gather_cuda(&w, dense, bytes, values, at.stream));
  }
};

}  // namespace
}  // namespace sk

SK_REGISTER_CUDA_PRODUCTS(nm, sk::NmCuda)
