// sparsekern::vnm_* for torch.

#include "sparsekern/vnm.h"

#include "tiles.h"
#include "vnm_pattern.h"

namespace sk {
namespace {

struct Vnm : VnmPattern, CsrBased {
  sk_vnm w;

  Vnm(const Checker& check, const Pattern& list, const Sizes& sizes, const Tensor& x)
      : VnmPattern(check, list, sizes, x, kTileTensors) {
    csr = tiles(check, list, rows, cols, rows * values_shape[1], x);
    w = {csr, v, n, m, selected, packed};
  }

  void linear(const void* values, const sk_matrix* x, const void* bias, sk_activation activation, const sk_matrix* y,
              sk_dtype dtype, const Cpu& at) const {
    sk_vnm_linear(&w, values, x, bias, activation, y, dtype, &at.threads);
  }
};

}  // namespace
}  // namespace sk

SK_REGISTER_PRODUCTS(vnm, sk::Vnm)
