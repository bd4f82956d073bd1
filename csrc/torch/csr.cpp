// sparsekern::csr_* for torch.

#include "sparsekern/csr.h"

#include "tiles.h"

namespace sk {
namespace {

struct Csr : CsrBased {
  static constexpr const char* kName = "csr";
  const Tensor &row_ptr, &col_idx;
  int64_t rows, cols;
  Sizes values_shape;

  Csr(const Checker& check, const Pattern& list, const Sizes& sizes, const Tensor& x)
      : row_ptr((check_lists(check, list, 6, sizes, 2, "CSR"), list[0])),
        col_idx(list[1]),
        rows(sizes[0]),
        cols(sizes[1]),
        values_shape{col_idx.numel()} {
    check.tensor("row_ptr", row_ptr, ScalarType::Int, x, {rows + 1});
    check.tensor("col_idx", col_idx, ScalarType::Int, x, {-1});
    csr = tiles(check, list, rows, cols, col_idx.numel(), x);
    if (x.is_cpu() && row_ptr.const_data_ptr<int32_t>()[rows] != csr.nnz)
      check.fail("row_ptr", "a pointer that ends at nnz = " + std::to_string(csr.nnz),
                 std::to_string(row_ptr.const_data_ptr<int32_t>()[rows]));
  }

  void linear(const void* values, const sk_matrix* x, const void* bias, sk_activation activation, const sk_matrix* y,
              sk_dtype dtype, const Cpu& at) const {
    sk_csr_linear(&csr, values, x, bias, activation, y, dtype, &at.threads);
  }
};

// tile_ptr, t_tile_ptr and t_slot of a checked pattern.
std::tuple<Tensor, Tensor, Tensor> csr_derive(const Tensor& row_ptr, const Tensor& col_idx, int64_t in_features,
                                              int64_t width, int64_t t_width) {
  const Checker check{"csr_derive"};
  check.tensor("row_ptr", row_ptr, ScalarType::Int, row_ptr, {-1});
  check.tensor("col_idx", col_idx, ScalarType::Int, row_ptr, {-1});
  if (row_ptr.numel() < 1 || in_features < 0 || width < 1 || t_width < 1)
    check.fail("row_ptr", "int32 [out + 1], with in_features >= 0 and tile widths >= 1", describe(row_ptr));
  const int32_t *ptr = row_ptr.const_data_ptr<int32_t>(), *idx = col_idx.const_data_ptr<int32_t>();
  const int64_t nnz = col_idx.numel();
  bool sound = ptr[0] == 0 && ptr[row_ptr.numel() - 1] == nnz;
  for (int64_t r = 0; sound && r + 1 < row_ptr.numel(); r++) {
    sound = ptr[r] <= ptr[r + 1] && ptr[r + 1] <= nnz;
    for (int64_t k = ptr[r]; sound && k < ptr[r + 1]; k++)
      sound = idx[k] < in_features && (k == ptr[r] ? idx[k] >= 0 : idx[k] > idx[k - 1]);
  }
  if (!sound)
    check.fail("col_idx", "a CSR pattern with row_ptr: columns below in_features, ascending in each row", "another");
  const int64_t rows = row_ptr.numel() - 1;
  const auto ints = [&](int64_t tiles, int64_t size) {
    return empty_strided(row_ptr, ScalarType::Int, {tiles + 1, size}, {size > 0 ? size : 1, 1});
  };
  Tensor tile_ptr = ints(tile_count(in_features, width), rows);
  Tensor t_tile_ptr = ints(tile_count(rows, t_width), in_features);
  Tensor t_slot = empty_strided(row_ptr, ScalarType::Int, {col_idx.numel()}, {1});
  sk_csr_derive(rows, in_features, width, t_width, ptr, idx, tile_ptr.mutable_data_ptr<int32_t>(),
                t_tile_ptr.mutable_data_ptr<int32_t>(), t_slot.mutable_data_ptr<int32_t>());
  return {tile_ptr, t_tile_ptr, t_slot};
}

}  // namespace
}  // namespace sk

SK_REGISTER_PRODUCTS(csr, sk::Csr)

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) { m.impl("csr_derive", TORCH_BOX(&sk::csr_derive)); }
