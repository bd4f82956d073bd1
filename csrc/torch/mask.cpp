// sparsekern::mask_* for torch: see python/sparsekern/formats/mask.py.

#include "sparsekern/mask.h"

#include "products.h"

namespace sk {
namespace {

// The bits and row starts of a weight of dense's shape, checked; contents are trusted.
sk_mask mask_of(const Checker& check, const Tensor& dense, const Tensor& values, const Tensor& bits,
                const Tensor& row_ptr) {
  check.require(dense.dim() == 2, "dense", "[out, in]", dense);
  const int64_t rows = dense.size(0), cols = dense.size(1);
  check.tensor("dense", dense, dense.scalar_type(), dense, {rows, cols});
  check.require(values.scalar_type() == dense.scalar_type() && values.is_contiguous() && values.numel() <= rows * cols,
                "values", "contiguous, of dense's dtype, and at most as many", values);
  check.tensor("bits", bits, ScalarType::Byte, dense, {rows, (cols + 7) / 8});
  check.tensor("row_ptr", row_ptr, ScalarType::Int, dense, {rows});
  return {rows, cols, values.numel(), bits.const_data_ptr<uint8_t>(), row_ptr.const_data_ptr<int32_t>()};
}

Tensor mask_bits(const Tensor& columns, const Tensor& row_ptr, int64_t cols) {
  const Checker check{"mask_bits"};
  const bool wide = columns.scalar_type() == ScalarType::Int;
  check.tensor("columns", columns, wide ? ScalarType::Int : ScalarType::UInt16, columns, {-1});
  check.tensor("row_ptr", row_ptr, ScalarType::Int, columns, {-1});
  const int64_t rows = row_ptr.numel();
  Tensor bits = empty_strided(columns, ScalarType::Byte, {rows, (cols + 7) / 8}, {(cols + 7) / 8, 1});
  const sk_csr w{
      rows,    cols,   columns.numel(), 1, 1, columns.const_data_ptr(), wide ? 4 : 2, row_ptr.const_data_ptr<int32_t>(),
      nullptr, nullptr};
  const sk_threads threads = torch_threads();
  sk_mask_bits(&w, bits.mutable_data_ptr<uint8_t>(), &threads);
  return bits;
}

void mask_expand(const Tensor& values, const Tensor& bits, const Tensor& row_ptr, Tensor dense) {
  const Checker check{"mask_expand"};
  const sk_mask mask = mask_of(check, dense, values, bits, row_ptr);
  const sk_threads threads = torch_threads();
  sk_mask_expand(&mask, values.const_data_ptr(), element_bytes(check, "values", values), dense.mutable_data_ptr(),
                 &threads);
}

void mask_compress(const Tensor& dense, const Tensor& bits, const Tensor& row_ptr, Tensor values) {
  const Checker check{"mask_compress"};
  const sk_mask mask = mask_of(check, dense, values, bits, row_ptr);
  const sk_threads threads = torch_threads();
  sk_mask_compress(&mask, dense.const_data_ptr(), element_bytes(check, "values", values), values.mutable_data_ptr(),
                   &threads);
}

}  // namespace
}  // namespace sk

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) {
  m.impl("mask_bits", TORCH_BOX(&sk::mask_bits));
  m.impl("mask_expand", TORCH_BOX(&sk::mask_expand));
  m.impl("mask_compress", TORCH_BOX(&sk::mask_compress));
}
