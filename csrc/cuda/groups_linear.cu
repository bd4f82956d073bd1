// y = activation(x W^T + bias) for N:M and V:N:M. gemm.h has the tiles and the pipeline, groups.h W's tiles:
// - in their compressed form, as the sparse tensor cores take it, with the metadata in registers: half the multiplies of a dense
//   product. V:N:M is N:4 on the selected columns, so that its product is also just 4 / M as long;
// - expanded, where more than 2 of 4 columns can hold values, and in float32: the multiplies of a dense product (V:N:M: 4 / M of
//   those), but a sparse one's bytes of W.

#include "groups.h"

namespace sk::gpu::groups {

namespace {

// d += a b over 32 kHalf .. + 31 of 64 columns of W; a's tile holds 32 slots for these.
template <int kHalf, class T>
SK_DEVICE void multiply_slots(Sums& d, const Tile<T>& a, const uint32_t (&metadata)[4], const Tile<T>& b, bool b_t,
                              const Part& part) {
  uint32_t right[2][2][4], left[4];  // 16 columns each, of the first and of the second 16 rows
#pragma unroll
  for (int j = 0; j < 2; j++)
#pragma unroll
    for (int k = 0; k < 2; k++)
      if (j < part.across) load_right(right[j][k], b, b_t, 32 * kHalf + 16 * k, part.column + 16 * j);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if (i >= part.down) continue;
    load_left(left, a, false, part.row + 16 * i, 16 * kHalf);
#pragma unroll
    for (int j = 0; j < 4; j++) {
      if (j / 2 >= part.across) continue;
      const uint32_t (&r)[2][4] = right[j / 2];
      const uint32_t rows[4] = {r[0][j % 2 * 2], r[0][j % 2 * 2 + 1], r[1][j % 2 * 2], r[1][j % 2 * 2 + 1]};
      multiply_sparse<kHalf>(d.at[i][j], left, rows, metadata[i], static_cast<const T*>(nullptr));
    }
  }
}

// y = activation(x W^T + bias). `runs`: W's values are the compressed operand, in whole aligned runs.
template <class T, bool kSlots>
SK_KERNEL(kMostThreads)
linear_tile(Groups w, const T* values, Operand<T> x, const T* bias, sk_activation activation, Matrix<T> y,
            int64_t row_blocks, bool runs, int down) {
  const RowBlock at(w, block().x % row_blocks, down);
  if (at.rows == 0) return;
  const int64_t b0 = block().x / row_blocks * kWide, row_end = at.row0 + at.rows;
  const int32_t* const chosen = w.selected ? w.selected + at.tile * w.columns : nullptr;
  const int x_at = kLeftBytes<kSlots> * down, steps = (w.columns + kDepth<T> - 1) / kDepth<T>;
  const Part part(at.rows, x.batch - b0);
  const auto left = [&](int offset) { return Tile<T>{shared_memory<T>(offset), kSlots ? 2 : 3}; };
  uint32_t next[4] = {};
  const auto load_metadata = [&](int step) {  // a step before it is used
    if (!kSlots || step >= steps) return;
    const uint32_t* const from = w.metadata + ((at.block16 + part.row / 16) * w.column_blocks + step) * kWarp + lane();
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (i < part.down) next[i] = from[int64_t(i) * w.column_blocks * kWarp];
  };
  Sums d = {};
  load_metadata(0);
  pipeline(
      steps, x_at + kRightBytes,
      [&](int step, int offset) {
        if constexpr (kSlots)
          load_slots(left(offset), w, values, at.row0, row_end, step * (kDepth<T> / 2), runs, down);
        else
          expand<false>(left(offset), w, values, at.row0, kTall * down, row_end, step * kDepth<T>, kDepth<T>, 4 * down);
        copy_tile(x, offset + x_at, int64_t(step) * kDepth<T>, kLogDepth<T>, b0, kLogWide, 128 * down, chosen, w.columns);
      },
      [&](int step, int offset) {
        const Tile<T> right = tile_for(x, offset + x_at, kLogDepth<T>, kLogWide);
        if constexpr (kSlots) {
          const uint32_t metadata[4] = {next[0], next[1], next[2], next[3]};
          load_metadata(step + 1);
          multiply_slots<0>(d, left(offset), metadata, right, !x.feature_major, part);
          multiply_slots<1>(d, left(offset), metadata, right, !x.feature_major, part);
        } else {
          multiply_tiles(d, left(offset), false, right, !x.feature_major, part);
        }
      });
  store_product(d, part, y, at.row0, at.rows, b0, bias, activation, down);
}

template <bool kSlots, class T>
const char* launch_linear(const Groups& w, const void* values, const Operand<T>& x, const void* bias,
                          sk_activation activation, const Matrix<T>& y, Stream stream) {
  const int down = tile_down(w);
  const bool runs = kSlots && w.compressed() && w.row_values % kRun<T> == 0 && aligned(values, 16);
  const Dim grid = {unsigned(row_blocks(w) * ceil_div(y.batch, kWide)), 1, 1};
  return launch(linear_tile<T, kSlots>, grid, 128 * down, shared_bytes<kSlots>(down), stream, w,
                static_cast<const T*>(values), x, static_cast<const T*>(bias), activation, y, row_blocks(w), runs, down);
}

template <class T>
const char* run_linear(const Groups& w, const void* values, const sk_matrix& x, const void* bias, sk_activation activation,
                       const sk_matrix& y, void* workspace, Stream stream) {
  if (w.rows == 0) return nullptr;
  uint8_t* free = static_cast<uint8_t*>(workspace);
  Operand<T> input;
  if (const char* error = operand(x, gathers(w), input, free, stream)) return error;
  if constexpr (sizeof(T) == 2)
    if (w.metadata) return launch_linear<true>(w, values, input, bias, activation, Matrix<T>(y), stream);
  return launch_linear<false>(w, values, input, bias, activation, Matrix<T>(y), stream);
}

}  // namespace

int64_t linear_workspace(const Groups& w, const sk_matrix& x, sk_dtype dtype) {
  return dtype == SK_FLOAT32 ? operand_bytes<float>(x, gathers(w)) : operand_bytes<bf16>(x, gathers(w));
}

const char* linear(const Groups& w, const void* values, const sk_matrix& x, const void* bias, sk_activation activation,
                   const sk_matrix& y, void* workspace, sk_dtype dtype, void* stream) {
  return with_type(dtype, [&](auto zero) {
    return run_linear<decltype(zero)>(w, values, x, bias, activation, y, workspace, Stream(stream));
  });
}

}  // namespace sk::gpu::groups
