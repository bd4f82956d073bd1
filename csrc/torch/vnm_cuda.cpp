// sparsekern::vnm_* for torch on NVIDIA GPUs.

#include "sparsekern/vnm_cuda.h"

#include "cuda.h"

namespace sk {
namespace {

struct VnmCuda {
  static constexpr const char* kName = "vnm";
  using Device = Gpu;
  int64_t rows, cols;
  Sizes values_shape;
  sk_vnm_cuda w;

  VnmCuda(const Checker& check, const Pattern& list, const Sizes& sizes, const Tensor& x) {
    check_lists(check, list, 5, sizes, 5, "VNM");
    rows = sizes[0], cols = sizes[1];
    const int64_t v = sizes[2], n = sizes[3], m = sizes[4];
    if (v < 1 || n < 1 || n > 4 || m < 4 || m > 256)
      check.fail("sizes", "V, N and M with V >= 1, 1 <= N <= 4 <= M <= 256",
                 std::to_string(v) + ":" + std::to_string(n) + ":" + std::to_string(m));
    const int64_t tiles_down = (rows + v - 1) / v, groups = (cols + m - 1) / m;
    const int64_t each = cols / m * n + (cols % m < n ? cols % m : n);
    values_shape = {rows, each};
    check.tensor("columns", list[0], ScalarType::Byte, x, {tiles_down, groups, 4});
    check.tensor("index", list[1], ScalarType::Byte, x, values_shape);
    check.tensor("selected", list[2], ScalarType::Int, x, {tiles_down, groups, 4});
    check.tensor("packed", list[3], ScalarType::Byte, x, {rows, (each * 2 + 31) / 32 * 4});
    w = {rows,
         cols,
         v,
         int32_t(n),
         int32_t(m),
         list[2].const_data_ptr<int32_t>(),
         static_cast<const uint8_t*>(list[3].const_data_ptr()),
         nullptr};
    check.tensor("metadata", list[4], ScalarType::Int, x, {sk_vnm_metadata_words_cuda(&w)});
    if (list[4].numel() > 0) w.metadata = static_cast<const uint32_t*>(list[4].const_data_ptr());
  }

  void linear(const void* values, const sk_matrix* x, const void* bias, sk_activation activation, const sk_matrix* y,
              sk_dtype dtype, Gpu& at) const {
    void* const workspace = at.workspace(sk_vnm_linear_cuda_workspace(&w, x, dtype));
    at.done(sk_vnm_linear_cuda(&w, values, x, bias, activation, y, workspace, dtype, at.stream));
  }
  void backward(const void* values, const sk_matrix* grad, const sk_matrix* x, const sk_matrix* grad_x, void* grad_values,
                void* grad_bias, sk_dtype dtype, Gpu& at) const {
    void* const workspace = at.workspace(sk_vnm_linear_backward_cuda_workspace(&w, grad, x, dtype));
    at.done(sk_vnm_linear_backward_cuda(&w, values, grad, x, grad_x, grad_values, grad_bias, workspace, dtype, at.stream));
  }
  void scatter(const void* values, int bytes, void* dense, Gpu& at) const {
    at.done(sk_vnm_scatter_cuda(&w, values, bytes, dense, at.stream));
  }
  void gather(const void* dense, int bytes, void* values, Gpu& at) const {
    at.done(sk_vnm_gather_cuda(&w, dense, bytes, values, at.stream));
  }
};

}  // namespace
}  // namespace sk

SK_REGISTER_CUDA_PRODUCTS(vnm, sk::VnmCuda)
