// sparsekern::bsr_* for torch.

#include "sparsekern/bsr.h"

#include "products.h"

namespace sk {
namespace {

struct Bsr {
  static constexpr const char* kName = "bsr";
  using Device = Cpu;
  int64_t rows, cols;
  Sizes values_shape;
  sk_bsr w;

  Bsr(const Checker& check, const Pattern& list, const Sizes& sizes, const Tensor& x) {
    check_lists(check, list, 5, sizes, 4, "BSR");
    rows = sizes[0], cols = sizes[1];
    const int64_t height = sizes[2], width = sizes[3];
    const auto side = [](int64_t size) { return size >= 4 && size <= 128 && (size & (size - 1)) == 0; };
    if (!side(height) || !side(width))
      check.fail("sizes", "a block whose sides are 4, 8, 16, 32, 64 or 128",
                 std::to_string(height) + " x " + std::to_string(width));
    const int64_t down = (rows + height - 1) / height, across = (cols + width - 1) / width;
    const int64_t blocks = list[1].numel();
    values_shape = {blocks, height, width};
    check.tensor("block_row_ptr", list[0], ScalarType::Int, x, {down + 1});
    check.tensor("block_col_idx", list[1], ScalarType::Int, x, {-1});
    check.tensor("t_block_ptr", list[2], ScalarType::Int, x, {across + 1});
    check.tensor("t_block_row", list[3], ScalarType::Int, x, {blocks});
    check.tensor("t_block", list[4], ScalarType::Int, x, {blocks});
    for (size_t i = 0; i <= 2; i += 2)
      if (const int32_t last = x.is_cpu() ? list[i].const_data_ptr<int32_t>()[list[i].numel() - 1] : int32_t(blocks);
          last != blocks)
        check.fail(i ? "t_block_ptr" : "block_row_ptr",
                   "a pointer that ends at the number of blocks, " + std::to_string(blocks), std::to_string(last));
    const auto ints = [&](size_t i) { return list[i].const_data_ptr<int32_t>(); };
    w = {rows, cols, blocks, height, width, ints(0), ints(1), ints(2), ints(3), ints(4)};
  }

  void linear(const void* values, const sk_matrix* x, const void* bias, sk_activation activation, const sk_matrix* y,
              sk_dtype dtype, const Cpu& at) const {
    sk_bsr_linear(&w, values, x, bias, activation, y, dtype, &at.threads);
  }
  void scatter(const void* values, int bytes, void* dense, const Cpu& at) const {
    sk_bsr_scatter(&w, values, bytes, dense, &at.threads);
  }
  void gather(const void* dense, int bytes, void* values, const Cpu& at) const {
    sk_bsr_gather(&w, dense, bytes, values, &at.threads);
  }
  void backward(const void* values, const sk_matrix* grad, const sk_matrix* x, const sk_matrix* grad_x, void* grad_values,
                void* grad_bias, sk_dtype dtype, const Cpu& at) const {
    void* const workspace = at.workspace(sk_bsr_linear_backward_workspace(&w, grad->batch, &at.threads));
    sk_bsr_linear_backward(&w, values, grad, x, grad_x, grad_values, grad_bias, workspace, dtype, &at.threads);
  }
};

}  // namespace
}  // namespace sk

SK_REGISTER_PRODUCTS(bsr, sk::Bsr)
