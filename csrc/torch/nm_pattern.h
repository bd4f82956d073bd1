// The tensors of an N:M pattern, checked: what CPUs and GPUs share of them.
#pragma once

#include "products.h"

namespace sk {

struct NmPattern {
  static constexpr const char* kName = "nm";
  int64_t rows, cols;
  Sizes values_shape;
  int32_t n, m;
  const uint8_t* packed;

  // `derived`: how many tensors follow that are the device's own.
  NmPattern(const Checker& check, const Pattern& list, const Sizes& sizes, const Tensor& x, size_t derived) {
    check_lists(check, list, 2 + derived, sizes, 4, "NM");
    rows = sizes[0], cols = sizes[1];
    if (sizes[2] < 1 || sizes[2] > sizes[3] || sizes[3] > 16)
      check.fail("sizes", "N and M with 1 <= N <= M <= 16", std::to_string(sizes[2]) + ":" + std::to_string(sizes[3]));
    n = int32_t(sizes[2]), m = int32_t(sizes[3]);
    const int64_t each = cols / m * n + (cols % m < n ? cols % m : n), bits = m <= 4 ? 2 : 4;
    values_shape = {rows, each};
    check.tensor("index", list[0], ScalarType::Byte, x, values_shape);
    check.tensor("packed", list[1], ScalarType::Byte, x, {rows, (each * bits + 31) / 32 * 4});
    packed = static_cast<const uint8_t*>(list[1].const_data_ptr());
  }
};

}  // namespace sk
