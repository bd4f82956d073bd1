// The tensors of Tiles in python/sparsekern/formats/csr.py, checked: what CSR, N:M and V:N:M share.
#pragma once

#include "products.h"
#include "sparsekern/csr.h"

namespace sk {

constexpr int64_t kNarrowestTile = 128, kWidestTile = int64_t(1) << 16;

inline int64_t tile_count(int64_t size, int64_t width) { return size > width ? (size + width - 1) / width : 1; }

constexpr size_t kTileTensors = 4;

// The rows x cols matrix with nnz entries that the last tensors of `list`, those of Tiles, describe.
inline sk_csr tiles(const Checker& check, const Pattern& list, int64_t rows, int64_t cols, int64_t nnz, const Tensor& x) {
  const Tensor* t = list.data() + list.size() - kTileTensors;
  const Tensor &columns = t[0], &tile_ptr = t[1], &t_tile_ptr = t[2], &t_slot = t[3];
  const bool wide = columns.scalar_type() == ScalarType::Int;
  if (!wide && cols > (1 << 16)) check.fail("columns", "int32 [nnz] where in > 65536", describe(columns));
  check.tensor("columns", columns, wide ? ScalarType::Int : ScalarType::UInt16, x, {nnz});
  check.tensor("tile_ptr", tile_ptr, ScalarType::Int, x, {-1, rows});
  check.tensor("t_tile_ptr", t_tile_ptr, ScalarType::Int, x, {-1, cols});
  check.tensor("t_slot", t_slot, ScalarType::Int, x, {nnz});
  // Entries address their operand by 32 bits: feature * 64 floats.
  constexpr int64_t kMostFeatures = int64_t(1) << 26;
  if (rows >= kMostFeatures) check.fail("sizes", "fewer than 2^26 rows", std::to_string(rows));
  if (cols >= kMostFeatures) check.fail("sizes", "fewer than 2^26 columns", std::to_string(cols));
  // As many tiles as one of the widths gives: the kernels recover the width from their number.
  const auto tiled = [&](const char* name, const Tensor& ptr, int64_t size, const char* shape) {
    for (int64_t width = kNarrowestTile; width <= kWidestTile; width *= 2)
      if (ptr.size(0) - 1 == tile_count(size, width)) return;
    check.fail(name, std::string(shape) + " with tiles of 128 * 2^k", describe(ptr));
  };
  tiled("tile_ptr", tile_ptr, cols, "int32 [tiles + 1, out]");
  tiled("t_tile_ptr", t_tile_ptr, rows, "int32 [tiles + 1, in]");
  // The last pointer is nnz. The other contents were checked when the pattern was built.
  const auto ends = [&](const char* name, const Tensor& ptr) {
    const int64_t last = ptr.numel() && x.is_cpu() ? ptr.const_data_ptr<int32_t>()[ptr.numel() - 1] : nnz;
    if (last != nnz) check.fail(name, "a pointer that ends at nnz = " + std::to_string(nnz), std::to_string(last));
  };
  ends("tile_ptr", tile_ptr);
  ends("t_tile_ptr", t_tile_ptr);
  return {rows,
          cols,
          nnz,
          tile_ptr.size(0) - 1,
          t_tile_ptr.size(0) - 1,
          columns.const_data_ptr(),
          wide ? 4 : 2,
          tile_ptr.const_data_ptr<int32_t>(),
          t_tile_ptr.const_data_ptr<int32_t>(),
          t_slot.const_data_ptr<int32_t>()};
}

// What a format whose matrices are CSR matrices too has from there: all but the forward product.
struct CsrBased {
  using Device = Cpu;
  sk_csr csr;

  void scatter(const void* values, int bytes, void* dense, const Cpu& at) const {
    sk_csr_scatter(&csr, values, bytes, dense, &at.threads);
  }
  void gather(const void* dense, int bytes, void* values, const Cpu& at) const {
    sk_csr_gather(&csr, dense, bytes, values, &at.threads);
  }
  void backward(const void* values, const sk_matrix* grad, const sk_matrix* x, const sk_matrix* grad_x, void* grad_values,
                void* grad_bias, sk_dtype dtype, const Cpu& at) const {
    void* const workspace = at.workspace(sk_csr_linear_backward_workspace(&csr, grad->batch, &at.threads));
    sk_csr_linear_backward(&csr, values, grad, x, grad_x, grad_values, grad_bias, workspace, dtype, &at.threads);
  }
};

}  // namespace sk
