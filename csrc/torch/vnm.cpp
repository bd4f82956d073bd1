// sparsekern::vnm_* for torch.

#include "sparsekern/vnm.h"

#include "tiles.h"

namespace sk {
namespace {

struct Vnm : CsrBased {
  static constexpr const char* kName = "vnm";
  int64_t rows, cols;
  Sizes values_shape;
  sk_vnm w;

  Vnm(const Checker& check, const Pattern& list, const Sizes& sizes, const Tensor& x) {
    check_lists(check, list, 8, sizes, 5, "VNM");
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
    csr = tiles(check, list, rows, cols, rows * each, x);
    w = {csr,
         v,
         int32_t(n),
         int32_t(m),
         list[2].const_data_ptr<int32_t>(),
         static_cast<const uint8_t*>(list[3].const_data_ptr())};
  }

  void linear(const void* values, const sk_matrix* x, const void* bias, sk_activation activation, const sk_matrix* y,
              sk_dtype dtype, const Cpu& at) const {
    sk_vnm_linear(&w, values, x, bias, activation, y, dtype, &at.threads);
  }
};

}  // namespace
}  // namespace sk

SK_REGISTER_PRODUCTS(vnm, sk::Vnm)
