// A CSR matrix as the kernels of csr.cu read it: W, or W transposed, whose values stand in W's order.
#pragma once

#include "matrix.h"

namespace sk::gpu {

template <class T>
struct Rows {
  int64_t rows;
  const int32_t *ptr, *idx;
  const int32_t* slot;  // where the values of W transposed stand; null: in order
  const T* values;
  bool vectors;  // idx, slot and values are aligned to 4 numbers

  Rows(int64_t n, const int32_t* row_ptr, const int32_t* col_idx, const int32_t* slots, const void* v)
      : rows(n), ptr(row_ptr), idx(col_idx), slot(slots), values(static_cast<const T*>(v)) {
    vectors = aligned(idx, 16) && aligned(slot, 16) && aligned(values, 4 * sizeof(T));
  }
  SK_MEMBER T value(uint32_t k) const { return values[slot ? uint32_t(slot[k]) : k]; }
};

}  // namespace sk::gpu
