// A bit mask of W as the kernels of mask.cu read it.
#pragma once

#include "matrix.h"
#include "sparsekern/mask_cuda.h"

namespace sk::gpu {

struct Mask {
  int64_t rows, cols, spans;
  const uint32_t* words;
  const int32_t* starts;

  explicit Mask(const sk_mask_cuda& w) : rows(w.rows), cols(w.cols), spans(w.spans), words(w.words), starts(w.starts) {}
  SK_MEMBER const uint32_t* bits(int64_t row, int64_t span) const { return words + (row * spans + span) * 4; }
  // How many values stand before this span of a row; before the next row where it is one past the last.
  SK_MEMBER int start(int64_t row, int64_t span) const { return starts[row * spans + span]; }
};

}  // namespace sk::gpu
