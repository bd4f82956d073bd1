// The tensors of a BSR pattern, checked: the same on CPUs and GPUs.
#pragma once

#include "products.h"
#include "sparsekern/bsr.h"

namespace sk {

struct BsrPattern {
  static constexpr const char* kName = "bsr";
  int64_t rows, cols;
  Sizes values_shape;
  sk_bsr w;

  BsrPattern(const Checker& check, const Pattern& list, const Sizes& sizes, const Tensor& x) {
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
};

}  // namespace sk
