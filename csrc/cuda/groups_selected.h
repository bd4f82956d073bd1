// grad_x = grad W for V:N:M with wide groups and high row tiles, at 4 / M of a dense product's multiplies: of each row tile only the
// selected columns are multiplied. Its sums go to those of W's columns in shared memory, as each row tile selects others.
#pragma once

#include "groups.h"

namespace sk::gpu::groups {

// A block has whole groups of columns, 16, 32 or 64 selected ones of each row tile, for kWide rows of grad; its 16 warps multiply
// [64, 128] numbers, 32 x 16 each, over 64 rows of W in a step. Nobody but one warp adds to a column's sums of a row of grad.
//
// Instructions bound it, of which a multiprocessor issues 4 in a cycle: some 480 of each warp in a step (100 to copy grad, 100 to expand
// W, 200 to multiply; 1900 cycles), where shared memory is busy for 1570 with V = 128 (fragments 768, sums 580: 8 bytes each, 2.3 times
// as lanes meet in banks) and the multiplies take 500. The kernel that multiplies the zeros too takes 2100 in a step, of 128 columns
// where M = 16 gives 256 here: so this one gains 2, and as much with larger M. M = 8 would have 128 columns.
constexpr int kSelectedThreads = 512;
constexpr int kSelectedPitch =
    kWide + 2;  // of sums, in numbers: pairs are aligned, and 8 rows of 4 columns are in 32 banks
struct Selected {
  int log_slots, columns;  // of a block: selected columns in a step, and those of W
  int stage_bytes;

  int shared_bytes() const { return kStages * stage_bytes + columns * kSelectedPitch * int(sizeof(float)); }
};

// How it runs for this many rows of grad; columns == 0: not. With the 163 KB of Ampere blocks would be too narrow to gain.
inline Selected selected_for(const Groups& w, int64_t batch) {
  if (w.selected == nullptr || w.n != 2 || w.tile_rows % 64 || w.m < 16) return {};
  for (int log_slots = 6; log_slots >= 4; log_slots--) {
    const Selected found = {log_slots, w.m << (log_slots - 2), kRightBytes + (128 << log_slots)};
    if (found.shared_bytes() > 227 << 10) continue;
    const int64_t blocks = ceil_div(w.cols, found.columns) * ceil_div(batch, kWide);
    const Device device = this_device();
    const bool runs = found.shared_bytes() <= device.shared_bytes && 4 * blocks >= 3 * device.multiprocessors;
    return runs ? found : Selected();
  }
  return {};
}

// A thread's part of W's tile, [64 rows, groups]: up to 2 pairs of values, and the bytes with their positions, as memory has them.
// They are read a step ahead: nothing is done with them before.
template <class T>
struct Pairs {
  uint16_t first[2], second[2];
  uint8_t positions[2];

  SK_MEMBER void read(const Groups& w, const T* values, int64_t row0, int group0, int log_groups) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int n = thread() + i * kSelectedThreads, k = 2 * (group0 + (n & ((1 << log_groups) - 1)));
      const int64_t row = row0 + (n >> log_groups);
      const bool there = n < 64 << log_groups && row < w.rows && k < w.row_values;
      const T* const from = values + row * w.row_values + k;
      first[i] = there ? from->bits : 0;
      second[i] = there && k + 1 < w.row_values ? from[1].bits : 0;
      positions[i] = there ? w.packed[row * w.row_bytes + k / 4] : 0;
    }
  }
  // 4 numbers for each pair, two of them 0.
  SK_MEMBER void write(const Tile<T>& tile, int group0, int log_groups) const {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int n = thread() + i * kSelectedThreads, group = n & ((1 << log_groups) - 1);
      if (n >= 64 << log_groups) continue;
      const int at = positions[i] >> (group0 + group) % 2 * 4;
      tile.data.store(tile.place(n >> log_groups, group * 4),
                      uint64_t(first[i]) << (at & 3) * 16 | uint64_t(second[i]) << (at >> 2 & 3) * 16);
    }
  }
};

// grad_x's columns c0.. and rows b0.. from their sums. Lanes follow the batch, or have 32 bytes of each of 8 rows.
template <class T>
SK_DEVICE void store_sums(const Shared<float>& sums, const Matrix<T>& grad_x, int c0, int columns, int64_t b0) {
  const bool fm = grad_x.stride_feature != 1;
  const int batch = int(grad_x.batch - b0 < kWide ? grad_x.batch - b0 : kWide);
#pragma unroll 1
  for (int i = thread(); i < (columns + 15) / 16 * 16 * (kWide / 4); i += threads()) {
    const int c = fm ? i / 32 : (i / 8 % 4 + i / 512 * 4) * 4, b = fm ? i % 32 * 4 : i % 8 + i / 32 % 16 * 8;
    const int left = fm ? batch - b : columns - c;
    if (c >= columns || b >= batch) continue;
    T* const out = &grad_x.at(b0 + b, c0 + c);
    Vector<T, 4> v;
#pragma unroll
    for (int k = 0; k < 4; k++)
      v.at[k] = from_float<T>(k < left ? sums.load(c * kSelectedPitch + b + k * (fm ? 1 : kSelectedPitch)) : 0.0f);
    if (left >= 4 && reinterpret_cast<uintptr_t>(out) % (4 * sizeof(T)) == 0) {
      store(out, v);
    } else {
#pragma unroll
      for (int k = 0; k < 4; k++)
        if (k < left) out[k] = v.at[k];
    }
  }
}

template <class T>
SK_KERNEL(kSelectedThreads, 1)
backward_input_selected(Groups w, const T* values, Operand<T> grad, Matrix<T> grad_x, Selected at, int64_t column_blocks) {
  const int c0 = int(block().x % column_blocks) * at.columns, group0 = c0 / w.m, log_groups = at.log_slots - 2;
  const int64_t b0 = block().x / column_blocks * kWide;
  const int steps = int((w.rows + 63) / 64), per_tile = int(w.tile_rows < w.rows ? w.tile_rows / 64 : steps);
  const Shared<float> sums = shared_memory<float>(kStages * at.stage_bytes);
  const auto left = [&](int stage) { return tile_at<T>(stage * at.stage_bytes + kRightBytes, at.log_slots); };
  for (int i = thread(); i < at.columns * kSelectedPitch; i += threads()) sums.store(i, 0.0f);
  Pairs<T> pairs;
  pairs.read(w, values, 0, group0, log_groups);
  Sums<2, 1> d(8, 1 << at.log_slots, grad.batch - b0);
  int slot[4], to[4];  // those that the rows of d are, -1 for none; the columns of W that the row tile selects there
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int own = d.row + d.row_of(i / 2, i % 2 * 2), all = group0 * 4 + own;
    // A last group that is cut short repeats its last column.
    const bool there = own < 1 << at.log_slots && all < w.columns && all / 4 * w.m + all % 4 < w.cols;
    slot[i] = there ? all : -1;
  }
  int left_of_tile = 0;
  const int32_t* chosen = w.selected;
  pipeline<kStages>(
      steps,
      [&](int step, int stage) {
        pairs.write(left(stage), group0, log_groups);
        pairs.read(w, values, int64_t(step + 1) * 64, group0, log_groups);
        grad.copy(stage * at.stage_bytes, kLogDepth<T>, b0, kLogWide, [&](int i) { return int64_t(step) * 64 + i; });
      },
      [&](int step, int stage) {
        if (left_of_tile == 0) {
#pragma unroll
          for (int i = 0; i < 4; i++) to[i] = chosen[slot[i] < 0 ? 0 : slot[i]];
          left_of_tile = per_tile, chosen += w.columns;
        }
        d.add(left(stage), true, grad.tile(stage * at.stage_bytes, kLogDepth<T>, kLogWide), !grad.feature_major, 64);
        if (--left_of_tile > 0 && step + 1 < steps) return;
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
          for (int j = 0; j < 2; j++) {
            float (&own)[4] = d.at[i / 2][j];
            const int e = i % 2 * 2, place = (to[i] - c0) * kSelectedPitch + d.column + d.column_of(j, 0);
            if (slot[i] >= 0) {
              auto sum = sums.template load<Vector<float, 2>>(place);
              sum.at[0] += own[e], sum.at[1] += own[e + 1];
              sums.store(place, sum);
            }
            own[e] = own[e + 1] = 0.0f;
          }
      });
  barrier();
  store_sums(sums, grad_x, c0, w.cols - c0 < at.columns ? w.cols - c0 : at.columns, b0);
}

}  // namespace sk::gpu::groups
