// The tensors of a V:N:M pattern, checked: what CPUs and GPUs share of them.
#pragma once

#include "products.h"

namespace sk {

struct VnmPattern {
  static constexpr const char* kName = "vnm";
  int64_t rows, cols, v;
  Sizes values_shape;
  int32_t n, m;
  const int32_t* selected;
  const uint8_t* packed;

  // `derived`: how many tensors follow that are the device's own.
  VnmPattern(const Checker& check, const Pattern& list, const Sizes& sizes, const Tensor& x, size_t derived) {
    check_lists(check, list, 4 + derived, sizes, 5, "VNM");
    rows = sizes[0], cols = sizes[1], v = sizes[2];
    if (v < 1 || sizes[3] < 1 || sizes[3] > 4 || sizes[4] < 4 || sizes[4] > 256)
      check.fail("sizes", "V, N and M with V >= 1, 1 <= N <= 4 <= M <= 256",
                 std::to_string(v) + ":" + std::to_string(sizes[3]) + ":" + std::to_string(sizes[4]));
    n = int32_t(sizes[3]), m = int32_t(sizes[4]);
    const int64_t tiles_down = (rows + v - 1) / v, groups = (cols + m - 1) / m;
    const int64_t each = cols / m * n + (cols % m < n ? cols % m : n);
    values_shape = {rows, each};
    check.tensor("columns", list[0], ScalarType::Byte, x, {tiles_down, groups, 4});
    check.tensor("index", list[1], ScalarType::Byte, x, values_shape);
    check.tensor("selected", list[2], ScalarType::Int, x, {tiles_down, groups, 4});
    check.tensor("packed", list[3], ScalarType::Byte, x, {rows, (each * 2 + 31) / 32 * 4});
    selected = list[2].const_data_ptr<int32_t>();
    packed = static_cast<const uint8_t*>(list[3].const_data_ptr());
  }
};

}  // namespace sk
