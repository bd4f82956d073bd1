// The gradient of a weight's values along its bit mask: grad^T x on tensor cores in tiles of 128 x 128, of which what the mask
// marks is stored, in order. No dense gradient of W passes through memory, which is what bounds a dense product with few rows of x
// and the gather after it: 4 bytes per weight. Here it is the stores: 128 x 128 sums take 1000 cycles of shared memory and 128
// times 85 instructions to pick from. Tiles without a value are skipped.
#pragma once

#include "gemm.h"
#include "mask_rows.h"

namespace sk::gpu {

constexpr int kLogMaskTile = 7, kMaskTile = 1 << kLogMaskTile;
constexpr int kLogMaskDepth = 6, kMaskDepth = 1 << kLogMaskDepth, kMaskStages = 3, kMaskWarpsAcross = 4;
using MaskSums = Sums<4, 2>;
constexpr int kMaskOperandBytes = kMaskTile * kMaskDepth * 2;
constexpr int kMaskWeightBytes = kMaskStages * 2 * kMaskOperandBytes;
static_assert(results_bytes(kMaskTile, kMaskTile) <= kMaskWeightBytes, "the sums take the operands' place");

// The bits of a row in a tile.
using Words = Vector<uint32_t, 4>;
SK_DEVICE Words tile_words(const Mask& w, int64_t row, int64_t span) { return load<Words>(w.bits(row, span)); }

// Whether rows row0.. have a value in this span; by all threads, who agree.
SK_DEVICE bool tile_has_values(const Mask& w, int64_t row0, int64_t span) {
  bool any = false;
  if (thread() < kMaskTile && row0 + thread() < w.rows) {
    const Words bits = tile_words(w, row0 + thread(), span);
    any = (bits.at[0] | bits.at[1] | bits.at[2] | bits.at[3]) != 0;
  }
  const Shared<int> found = shared_memory<int>(0);
  const uint32_t of_warp = votes(any);
  if (lane() == 0) found.store(warp(), int(of_warp != 0));
  barrier();
  int all = 0;
  for (int i = 0; i < kMaskTile / kWarp; i++) all |= found.load(i);
  return all;
}

template <class T>
SK_KERNEL(kMostThreads, 2)
mask_weight(Mask w, Operand<T> grad, Operand<T> x, T* grad_values, int64_t row_blocks) {
  const int64_t row0 = block().x % row_blocks * kMaskTile, span = block().x / row_blocks, c0 = span * kMaskTile;
  if (!tile_has_values(w, row0, span)) return;
  MaskSums d(kMaskWarpsAcross, w.rows - row0, w.cols - c0);
  const auto at = [](int stage, int operand) { return (2 * stage + operand) * kMaskOperandBytes; };
  pipeline<kMaskStages>(
      int((grad.batch + kMaskDepth - 1) / kMaskDepth),
      [&](int step, int stage) {
        const int64_t b0 = int64_t(step) * kMaskDepth;
        grad.copy(at(stage, 0), kLogMaskTile, b0, kLogMaskDepth, [&](int i) { return row0 + i; });
        x.copy(at(stage, 1), kLogMaskTile, b0, kLogMaskDepth, [&](int i) { return c0 + i; });
      },
      [&](int, int stage) {
        d.add(grad.tile(at(stage, 0), kLogMaskTile, kLogMaskDepth), !grad.feature_major,
              x.tile(at(stage, 1), kLogMaskTile, kLogMaskDepth), x.feature_major, kMaskDepth);
      });
  // A warp takes a row at a time, a lane a column of each word: what a word marks is stored as one run.
  const Results results = d.stage(false, kMaskTile);
#pragma unroll 1
  for (int r = warp(); r < kMaskTile && row0 + r < w.rows; r += kMostThreads / kWarp) {
    const Words bits = tile_words(w, row0 + r, span);
    T* to = grad_values + w.start(row0 + r, span);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const uint32_t word = bits.at[i];
      if (word >> lane() & 1) to[popcount(word & ((1u << lane()) - 1))] = from_float<T>(results.one(r, kWarp * i + lane()));
      to += popcount(word);
    }
  }
}

template <class T>
const char* run_mask_weight(const Mask& w, const Operand<T>& grad, const Operand<T>& x, T* grad_values, Stream stream) {
  static_assert(SK_MASK_SPAN == kMaskTile, "a tile's values begin with a span");
  const int64_t row_blocks = ceil_div(w.rows, kMaskTile), blocks = row_blocks * ceil_div(w.cols, kMaskTile);
  if (blocks > INT32_MAX) return "the weight is too large: more than 2^31 - 1 blocks of threads";
  return launch(mask_weight<T>, {unsigned(blocks), 1, 1}, kMostThreads, kMaskWeightBytes, stream, w, grad, x, grad_values,
                row_blocks);
}

}  // namespace sk::gpu
