// y = activation(x W^T + bias) for N:M and V:N:M. gemm.h has the tiles and the pipeline, groups.h W's tiles:
// - in their compressed form, as the sparse tensor cores take it, with the metadata in registers: half the multiplies of a dense
//   product. V:N:M is N:4 on the selected columns, so that its product is also just 4 / M as long;
// - expanded, where more than 2 of 4 columns can hold values, and in float32: the multiplies of a dense product (V:N:M: 4 / M of
//   those), but a sparse one's bytes of W.

#include "nm_hopper.h"

namespace sk::gpu::groups {

namespace {

// d += a b over 32 kHalf .. + 31 of 64 columns of W; a's tile holds 32 slots for these.
template <int kHalf, class T>
SK_DEVICE void add_slots(WarpSums& d, const Tile<T>& a, Shared<uint32_t> metadata, const Tile<T>& b, bool b_t) {
  uint32_t right[2][2][4] = {};  // 16 columns each, of the first and of the second 16 rows
#pragma unroll
  for (int j = 0; j < 2; j++)
#pragma unroll
    for (int k = 0; k < 2; k++)
      if (j < d.across) load_right(right[j][k], b, b_t, 32 * kHalf + 16 * k, d.column + 16 * j);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if (i >= d.down) continue;
    uint32_t left[4];
    load_left(left, a, false, d.row + 16 * i, 16 * kHalf);
    const uint32_t where = metadata.load(2 * d.row + kWarp * i + lane() % 2 * 16 + lane() / 4 * 2 + lane() % 4 / 2);
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const uint32_t (&r)[2][4] = right[j / 2];
      const uint32_t rows[4] = {r[0][j % 2 * 2], r[0][j % 2 * 2 + 1], r[1][j % 2 * 2], r[1][j % 2 * 2 + 1]};
      multiply_sparse<kHalf>(d.at[i][j], left, rows, where, static_cast<const T*>(nullptr));
    }
  }
}

// y = activation(x W^T + bias). `runs`: W's values are the compressed operand, in whole aligned runs. Where there are parts, a
// block makes one of them: the sums over its share of the columns.
template <class T, bool kSlots>
SK_KERNEL(kMostThreads, kBlocks<T>)
linear_tile(Groups w, const T* values, Operand<T> x, const T* bias, sk_activation activation, Matrix<T> y, float* parts,
            int64_t row_blocks, int steps, bool runs) {
  const int down = block_down();
  const RowBlock at(w, block().x % row_blocks, down);
  if (at.rows == 0) return;
  const int64_t b0 = block().x / row_blocks * kWide;
  const int stage_bytes = kRightBytes + kLeftBytes<kSlots> * down;
  const int all = (w.columns + kDepth<T> - 1) / kDepth<T>, first = int(block().y) * steps;
  WarpSums d(kAcross, at.rows, x.batch - b0);
  const auto left = [&](int stage) { return tile_at<T>(stage * stage_bytes + kRightBytes, kLogDepth<T> - kSlots); };
  const auto metadata = [&](int stage) {
    return shared_memory<uint32_t>(stage * stage_bytes + kRightBytes + kTall * 64 * down);
  };
  pipeline<kStages>(
      first, all - first < steps ? all : first + steps,
      [&](int step, int stage) {
        const int c0 = step * kDepth<T>;
        if constexpr (kSlots) {
          load_slots(left(stage), w, values, at, c0 / 2, runs, down);
          // A step has half of a column block: of its 2 x 8 runs of 4 words, 2 words each.
          const int run = thread() % 16, block16 = thread() / 16;
          if (block16 < kTall / 16 * down) {
            const int64_t blocks = (int64_t(at.tile) * w.column_blocks + step / 2) * w.row_blocks + at.block16 + block16;
            copy_async<8>(metadata(stage) + thread() * 2, w.metadata + blocks * 64 + run * 4 + step % 2 * 2,
                          16 * block16 < at.rows);
          }
        } else {
          expand<false>(left(stage), w, values, at.row0, kTall * down, int64_t(at.row0) + at.rows, c0, kDepth<T>, 4 * down);
        }
        copy_columns(w, at.tile, c0, x, stage * stage_bytes, kLogDepth<T>, b0, kLogWide);
      },
      [&](int, int stage) {
        const Tile<T> right = x.tile(stage * stage_bytes, kLogDepth<T>, kLogWide);
        if constexpr (kSlots) {
          if (d.across == 0) return;
          add_slots<0>(d, left(stage), metadata(stage), right, !x.feature_major);
          add_slots<1>(d, left(stage), metadata(stage), right, !x.feature_major);
        } else {
          d.add(left(stage), false, right, !x.feature_major, kDepth<T>);
        }
      });
  store_product(d, kLogTall + down - 1, kLogWide, y, at.row0, at.rows, b0, bias, activation,
                parts ? parts + block().y * y.batch * y.features : nullptr);
}

// A block has 2 steps' bytes of W under way, 18 KB of 2:4, which takes 0.7 us: one per multiprocessor reads 3.5 TB/s, and the 32 that
// 4096 rows of W make read 0.84. Where a grid has less than two for each, blocks divide the columns, 4 steps at least.
constexpr int kEnoughBlocks = 256;
struct Parts {
  int count, steps;  // of each
};
template <class T>
Parts parts_of(const Groups& w, int64_t batch) {
  const int64_t all = ceil_div(w.columns, kDepth<T>), blocks = row_blocks(w) * ceil_div(batch, kWide);
  const int64_t wanted = blocks > 0 ? ceil_div(kEnoughBlocks, blocks) : 1, most = all / 4 > 1 ? all / 4 : 1;
  const int64_t steps = ceil_div(all, wanted < most ? wanted : most);
  return {steps > 0 ? int(ceil_div(all, steps)) : 1, int(steps)};
}

template <bool kSlots, class T>
const char* launch_linear(const Groups& w, const void* values, const Operand<T>& x, const void* bias,
                          sk_activation activation, const sk_matrix& y, uint8_t* workspace, Stream stream) {
  const int down = tile_down(w);
  const Parts p = parts_of<T>(w, y.batch);
  const bool runs = kSlots && w.compressed() && w.row_values % kRun<T> == 0 && aligned(values, 16);
  float* const parts = p.count > 1 ? reinterpret_cast<float*>(workspace) : nullptr;
  const Dim grid = {unsigned(row_blocks(w) * ceil_div(y.batch, kWide)), unsigned(p.count), 1};
  const char* const error =
      launch(linear_tile<T, kSlots>, grid, 128 * down, shared_bytes<kSlots>(down), stream, w, static_cast<const T*>(values),
             x, static_cast<const T*>(bias), activation, Matrix<T>(y), parts, row_blocks(w), p.steps, runs);
  if (error != nullptr || parts == nullptr) return error;
  return sum_parts(parts, p.count, bias, activation, y, kDtype<T>, stream);
}

template <class T>
const char* run_linear(const Groups& w, const void* values, const sk_matrix& x, const void* bias, sk_activation activation,
                       const sk_matrix& y, void* workspace, Stream stream) {
  if (w.rows == 0) return nullptr;
  uint8_t* free = static_cast<uint8_t*>(workspace);
  Operand<T> input;
  if (const char* error = operand(x, gathers(w), input, free, stream)) return error;
  if constexpr (sizeof(T) == 2)
    if (w.metadata) return launch_linear<true>(w, values, input, bias, activation, y, free, stream);
  return launch_linear<false>(w, values, input, bias, activation, y, free, stream);
}

}  // namespace

int64_t linear_workspace(const Groups& w, const sk_matrix& x, sk_dtype dtype) {
  const auto bytes = [&](auto zero) {
    using T = decltype(zero);
    const int count = parts_of<T>(w, x.batch).count;
    return operand_bytes<T>(x, gathers(w)) + (count > 1 ? count * x.batch * w.rows * int64_t(sizeof(float)) : 0);
  };
  return dtype == SK_FLOAT32 ? bytes(float()) : bytes(bf16());
}

const char* linear(const Groups& w, const void* values, const sk_matrix& x, const void* bias, sk_activation activation,
                   const sk_matrix& y, void* workspace, sk_dtype dtype, void* stream) {
  if (hopper_runs(w, values, x, y, dtype)) return hopper_linear(w, values, x, bias, activation, y, dtype, stream);
  return with_type(dtype, [&](auto zero) {
    return run_linear<decltype(zero)>(w, values, x, bias, activation, y, workspace, Stream(stream));
  });
}

}  // namespace sk::gpu::groups
