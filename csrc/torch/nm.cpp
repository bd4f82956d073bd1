// sparsekern::nm_* for torch.

#include "sparsekern/nm.h"

#include "nm_pattern.h"
#include "tiles.h"

namespace sk {
namespace {

struct Nm : NmPattern, CsrBased {
  sk_nm w;

  Nm(const Checker& check, const Pattern& list, const Sizes& sizes, const Tensor& x)
      : NmPattern(check, list, sizes, x, kTileTensors) {
    csr = tiles(check, list, rows, cols, rows * values_shape[1], x);
    w = {csr, n, m, packed};
  }

  void linear(const void* values, const sk_matrix* x, const void* bias, sk_activation activation, const sk_matrix* y,
              sk_dtype dtype, const Cpu& at) const {
    sk_nm_linear(&w, values, x, bias, activation, y, dtype, &at.threads);
  }
};

}  // namespace
}  // namespace sk

SK_REGISTER_PRODUCTS(nm, sk::Nm)
