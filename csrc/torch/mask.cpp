// sparsekern::mask_* for torch: see python/sparsekern/formats/mask.py.

#include "sparsekern/mask.h"

#include "mask.h"

namespace sk {
namespace {

// The bits and row starts of a [rows, cols] weight, checked; contents are trusted.
sk_mask mask_of(const Checker& check, int64_t rows, int64_t cols, const Tensor& like, const Tensor& values,
                const Tensor& bits, const Tensor& row_ptr) {
  check_values(check, rows, cols, like, values);
  check.tensor("bits", bits, ScalarType::Byte, like, {rows, (cols + 7) / 8});
  check.tensor("row_ptr", row_ptr, ScalarType::Int, like, {rows});
  return {rows, cols, values.numel(), bits.const_data_ptr<uint8_t>(), row_ptr.const_data_ptr<int32_t>()};
}

struct CpuMask {
  using Device = Cpu;
  static constexpr bool kGradX = true;
  static sk_dtype dtype(const Checker& check, const char* name, const Tensor& t) { return check.dtype(name, t, false); }
  sk_mask w;

  template <class... Arguments>
  explicit CpuMask(const Arguments&... arguments) : w(mask_of(arguments...)) {}
  void linear(const void* values, const sk_matrix* x, const void* bias, sk_activation activation, const sk_matrix* y,
              sk_dtype dtype, const Cpu& at) const {
    sk_mask_linear(&w, values, x, bias, activation, y, dtype, &at.threads);
  }
  void backward(const void* values, const sk_matrix* grad, const sk_matrix* x, const sk_matrix* grad_x, void* grad_values,
                void* grad_bias, sk_dtype dtype, const Cpu& at) const {
    sk_mask_linear_backward(&w, values, grad, x, grad_x, grad_values, grad_bias, dtype, &at.threads);
  }
};

sk_mask mask_of(const Checker& check, const Tensor& dense, const Tensor& values, const Tensor& bits,
                const Tensor& row_ptr) {
  check.require(dense.dim() == 2, "dense", "[out, in]", dense);
  const int64_t rows = dense.size(0), cols = dense.size(1);
  check.tensor("dense", dense, dense.scalar_type(), dense, {rows, cols});
  return mask_of(check, rows, cols, dense, values, bits, row_ptr);
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

SK_REGISTER_MASK_PRODUCTS(sparsekern, CPU, sk::CpuMask)
