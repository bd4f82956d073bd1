// sparsekern::nm_* for torch.

#include "sparsekern/nm.h"

#include "tiles.h"

namespace sk {
namespace {

struct Nm : CsrBased {
  static constexpr const char* kName = "nm";
  int64_t rows, cols;
  Sizes values_shape;
  sk_nm w;

  Nm(const Checker& check, const Pattern& list, const Sizes& sizes, const Tensor& x) {
    check_lists(check, list, 6, sizes, 4, "NM");
    rows = sizes[0], cols = sizes[1];
    const int64_t n = sizes[2], m = sizes[3];
    if (n < 1 || n > m || m > 16)
      check.fail("sizes", "N and M with 1 <= N <= M <= 16", std::to_string(n) + ":" + std::to_string(m));
    const int64_t each = cols / m * n + (cols % m < n ? cols % m : n), bits = m <= 4 ? 2 : 4;
    values_shape = {rows, each};
    check.tensor("index", list[0], ScalarType::Byte, x, values_shape);
    check.tensor("packed", list[1], ScalarType::Byte, x, {rows, (each * bits + 31) / 32 * 4});
    csr = tiles(check, list, rows, cols, rows * each, x);
    w = {csr, int32_t(n), int32_t(m), static_cast<const uint8_t*>(list[1].const_data_ptr())};
  }

  void linear(const void* values, const sk_matrix* x, const void* bias, sk_activation activation, const sk_matrix* y,
              sk_dtype dtype, const Cpu& at) const {
    sk_nm_linear(&w, values, x, bias, activation, y, dtype, &at.threads);
  }
};

}  // namespace
}  // namespace sk

SK_REGISTER_PRODUCTS(nm, sk::Nm)
