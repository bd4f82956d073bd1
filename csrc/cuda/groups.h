// N values in each group of columns of each row: what N:M and V:N:M share on the GPU, and how they differ.
//
// V:N:M is N:4 on the 4 columns of each group that a tile of V rows selects: `width` is 4, and "columns" below are those,
// counted through; `selected` says which of W they are. For N:M, `width` is M, and columns are W's own; all rows are one tile.
#pragma once

#include "gemm.h"

namespace sk::gpu::groups {

// A block computes [kTall * down, kWide] numbers of W x^T, of its like for the gradients, with 4 * down warps, down = 1 or 2: each
// 64 x 32 of them. The sum advances by kDepth, 128 bytes of a row.
constexpr int kStages = 3;
constexpr int kLogTall = 6, kTall = 1 << kLogTall, kLogWide = 7, kWide = 1 << kLogWide, kAcross = 4;
template <class T>
constexpr int kLogDepth = kLogRun<T> + 3;
template <class T>
constexpr int kDepth = 1 << kLogDepth<T>;
using WarpSums = Sums<kTall / 16, kWide / kAcross / 16>;

// Blocks of a multiprocessor: what its shared memory holds, at 97 KB for one, is to fit in its registers too. In float32, where
// every number is an operand of its own, that would take spills.
template <class T>
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kBlocks = 1;
#else
constexpr int kBlocks = sizeof(T) == 2 ? 2 : 1;
#endif

struct Groups {
  int64_t rows;  // of W, < 2^31 where there are values
  int cols;
  int n, m, width;
  int columns;                    // N:M: cols. V:N:M: 4 per group
  int row_values;                 // of a row
  int64_t tile_rows;              // V; N:M: all rows
  int bits;                       // of a position in `packed`, 2 or 4
  int row_bytes;                  // of `packed`
  const uint8_t* packed;          // position of each value in its group
  const int32_t* selected;        // [row tiles, columns]: which of W, or null
  const uint32_t* metadata;       // of the sparse tensor cores, or null: [row tiles, column_blocks, row_blocks, 2, 8, 4]
  const uint32_t* transposed;     // that of W^T, where both are 2:4, or null
  int row_blocks, column_blocks;  // of a row tile: 16 rows, 128 columns each, 4 multiplies

  // At most 2 values in any 4 columns that begin at a multiple of 4: what sparse tensor cores run.
  bool sparse() const { return (n <= 2 && width % 4 == 0) || (n == 1 && width == 2); }
  // Where there are always 2, values are the operand as they are stored.
  bool compressed() const { return (n == 2 && width == 4) || (n == 1 && width == 2); }
  int64_t tiles() const { return ceil_div(rows, tile_rows); }

  // The columns of the tile that `row` is in; null where they are W's own.
  SK_MEMBER const int32_t* chosen(int64_t row) const {
    return selected ? selected + int64_t(uint32_t(row) / uint32_t(tile_rows)) * columns : nullptr;
  }
  // Of value k of a row, in its group.
  SK_MEMBER int position(int64_t row, int k) const {
    const int64_t bit = int64_t(k) * bits;  // no division by a number that the compiler does not know
    return packed[row * row_bytes + (bit >> 3)] >> (bit & 7) & ((1 << bits) - 1);
  }
  SK_MEMBER int column(int64_t row, int k) const { return k / n * width + position(row, k); }
  SK_MEMBER int column_of_w(int64_t row, int k) const { return selected ? chosen(row)[column(row, k)] : column(row, k); }
};

inline Groups make_groups(int64_t rows, int64_t cols, int64_t tile_rows, int n, int m, const int32_t* selected,
                          const uint8_t* packed, const uint32_t* metadata) {
  Groups w = {};
  w.rows = rows, w.cols = int(cols), w.n = n, w.m = m;
  w.width = selected ? 4 : m, w.columns = int(selected ? ceil_div(cols, m) * 4 : cols);
  w.row_values = int(cols / m * n + (cols % m < n ? cols % m : n));
  w.tile_rows = tile_rows > 0 ? tile_rows : 1;
  w.bits = w.width <= 4 ? 2 : 4, w.row_bytes = int(ceil_div(int64_t(w.row_values) * w.bits, 32) * 4);
  w.packed = packed, w.selected = selected, w.metadata = metadata;
  w.row_blocks = int(ceil_div(w.tile_rows < rows ? w.tile_rows : rows, 16)),
  w.column_blocks = int(ceil_div(w.columns, 128));
  if (!selected) w.row_blocks = int(ceil_div(w.row_blocks, 4) * 4);  // as CUTLASS wants it
  return w;
}

// W^T of a 2:4 matrix whose transpose is 2:4 too. Its values are the compressed operand: nothing asks for their positions.
inline Groups transpose(const Groups& w) {
  return make_groups(w.cols, w.rows, w.cols, w.n, w.m, nullptr, nullptr, w.transposed);
}

// groups.cu; see sparsekern/nm_cuda.h.
int64_t metadata_words(const Groups& w);
const char* scatter(const Groups& w, const void* values, int element_bytes, void* dense, void* stream);
const char* gather(const Groups& w, const void* dense, int element_bytes, void* values, void* stream);
// To `to` = the values of transpose(w), 16 bits each; both aligned to 4 bytes.
const char* transpose_values(const Groups& w, const void* values, void* to, Stream stream);
int64_t linear_workspace(const Groups& w, const sk_matrix& x, sk_dtype dtype);
const char* linear(const Groups& w, const void* values, const sk_matrix& x, const void* bias, sk_activation activation,
                   const sk_matrix& y, void* workspace, sk_dtype dtype, void* stream);
int64_t backward_workspace(const Groups& w, const sk_matrix& grad, const sk_matrix* x, sk_dtype dtype);
const char* backward(const Groups& w, const void* values, const sk_matrix& grad, const sk_matrix* x,
                     const sk_matrix* grad_x, void* grad_values, void* grad_bias, void* workspace, sk_dtype dtype,
                     void* stream);

// The values in the two slots that the sparse tensor cores' operand has for columns 4 q .. 4 q + 3 of a row, -1 for none: by
// column, a lone one in the first, or in the second if it is in the last column. So says the metadata, which
// python/sparsekern/formats/metadata.py makes.
struct Slots {
  int first, second;
};

SK_DEVICE Slots slots(const Groups& w, int64_t row, int q) {
  if (2 * w.n == w.width) return {2 * q < w.row_values ? 2 * q : -1, 2 * q + 1 < w.row_values ? 2 * q + 1 : -1};
  const int per_group = w.width / 4, begin = q / per_group * w.n;
  const int end = begin + w.n < w.row_values ? begin + w.n : w.row_values;
  int first = -1, second = -1, last = 0;
  for (int k = begin; k < end; k++) {
    const int at = w.position(row, k);
    if (at / 4 != q % per_group) continue;
    if (first < 0)
      first = k, last = at % 4;
    else
      second = k;
  }
  if (second < 0 && last == 3) return {-1, first};
  return {first, second};
}

// --- blocks: 4 * down warps make 64 * down rows, of W or of its columns, times 128 --------------------------------------------

// Bytes of a stage: x's tile, and of 64 rows (or columns) of W's.
constexpr int kRightBytes = kWide * 128;
template <bool kSlots>
constexpr int kLeftBytes = kTall * (kSlots ? 64 + kWarp / 16 * 4 : 128);  // slots: with their metadata

// The rows of W that a block has, of one row tile.
struct RowBlock {
  int row0, tile, block16;  // the first row, its row tile, and which 16 rows of that the first ones are
  int rows;                 // 0: past the end of a last row tile that is cut short

  SK_MEMBER RowBlock(const Groups& w, int64_t i, int down) {
    const int height = kTall * down;
    const int64_t per_tile = (w.tile_rows + height - 1) / height, in_tile = i % per_tile * height;
    tile = int(i / per_tile), block16 = int(in_tile / 16);
    const int64_t first = tile * w.tile_rows + in_tile;
    const int64_t end = w.tile_rows - in_tile < w.rows - first ? w.tile_rows - in_tile : w.rows - first;
    row0 = int(first), rows = int(end < 0 ? 0 : end < height ? end : height);
  }
};

// A block has 64 rows of a row tile, or up to 128 where there are more.
SK_DEVICE int block_down() { return threads() / 128; }
inline int down_for(int64_t rows) { return rows > kTall ? 2 : 1; }
inline int tile_down(const Groups& w) { return down_for(w.tile_rows < w.rows ? w.tile_rows : w.rows); }
inline int64_t row_blocks(const Groups& w) { return w.tiles() * ceil_div(w.tile_rows, kTall * tile_down(w)); }
template <bool kSlots>
int shared_bytes(int down) {
  const int operands = kStages * (kLeftBytes<kSlots> * down + kRightBytes), sums = results_bytes(kTall * down, kWide);
  return operands > sums ? operands : sums;
}
// Starts to copy those rows of x that a row tile meets in columns c0 ..: columns of W, or those that the tile selects.
template <class T>
SK_DEVICE void copy_columns(const Groups& w, int tile, int c0, const Operand<T>& x, int offset, int log_columns, int64_t b0,
                            int log_batch) {
  const int32_t* const chosen = w.selected + int64_t(tile) * w.columns;
  x.copy(offset, log_columns, b0, log_batch, [&](int i) -> int64_t {
    return w.selected == nullptr ? c0 + i : c0 + i < w.columns ? chosen[c0 + i] : x.features;
  });
}

// The columns that V:N:M gathers are runs along the batch.
inline bool gathers(const Groups& w) { return w.selected != nullptr; }
// A row tile's part of grad must begin at a whole run.
inline bool splits_runs(const Groups& w) { return w.tiles() > 1 && w.tile_rows % kPack; }

// --- W's tiles in shared memory -------------------------------------------------------------------------------------------

// The operand's slots k0 .. k0 + 31 of a block's rows, 4 runs per row. `runs`: values are the operand, and in aligned runs.
template <class T>
SK_DEVICE void load_slots(const Tile<T>& tile, const Groups& w, const T* values, const RowBlock& at, int k0, bool runs,
                          int down) {
  if (runs) {
    const T* const from = values + int64_t(at.row0) * w.row_values + k0;
    copy_tile(tile, kTall * down, [&](int r, int c, int64_t& numbers) {
      numbers = r < at.rows ? w.row_values - k0 - c : 0;
      return from + int64_t(r) * w.row_values + c;
    });
    return;
  }
#pragma unroll 1
  for (int i = thread(); i < kTall * down * 16; i += threads()) {
    const int r = i / 16, c = i % 16 * 2;
    const int64_t row = at.row0 + r;
    Vector<T, 2> pair = {};
    if (r < at.rows) {
      const Slots q = slots(w, row, (k0 + c) / 2);
      if (q.first >= 0) pair.at[0] = values[row * w.row_values + q.first];
      if (q.second >= 0) pair.at[1] = values[row * w.row_values + q.second];
    }
    tile.data.store(tile.place(r, c), pair);
  }
}

// Rows row0 .. row0 + rows (those below row_end) and columns c0 .. c0 + columns of W with its zeros; kOfW: the columns of W
// itself. A warp writes rows of its own, zeros first: no barrier between. A lane keeps to one place of a row and goes down the rows, so that
// a value takes 30 instructions (60 where W's columns are selected), 3 or 4 of them in flight. They are read as they are needed: it is
// other blocks on the multiprocessor that hide the time that this takes.
template <bool kOfW, class T>
SK_DEVICE void expand(const Tile<T>& tile, const Groups& w, const T* values, int64_t row0, int rows, int64_t row_end,
                      int c0, int columns, int warps) {
  constexpr int kTogether = kOfW ? 4 : 3;  // as many as registers hold
  const int per_warp = rows / warps, first = warp() * per_warp;
  for (int i = lane(); i < per_warp << tile.log_runs; i += kWarp)
    tile.data.store(tile.run(first + (i >> tile.log_runs), (i & ((1 << tile.log_runs) - 1)) * kRun<T>),
                    Vector<T, kRun<T>>{});
  warp_barrier();
  const int group = kOfW ? w.m : w.width, group0 = c0 / group, begin = group0 * w.n;
  const int64_t end = (int64_t(c0) + columns + group - 1) / group * w.n, left = row_end - row0 - first;
  const int count = int(end < w.row_values ? end : w.row_values) - begin, height = int(left < per_warp ? left : per_warp);
  int log_lanes = 0;  // of a row
  while (log_lanes < 5 && 1 << log_lanes < count) log_lanes++;
  const int step = kWarp >> log_lanes;  // rows at once
#pragma unroll 1
  for (int k = lane() & ((1 << log_lanes) - 1); k < count; k += kWarp) {
    const int column = (group0 + k / w.n) * w.width, shift = int(int64_t(begin + k) * w.bits & 7);
    int r = first + (lane() >> log_lanes);
    const T* from = values + (row0 + r) * w.row_values + begin + k;
    const uint8_t* where = w.packed + (row0 + r) * w.row_bytes + (int64_t(begin + k) * w.bits >> 3);
#pragma unroll 1
    for (; r < first + height; r += kTogether * step) {
      T value[kTogether];
      uint8_t at[kTogether];
#pragma unroll
      for (int j = 0; j < kTogether; j++) {
        const bool there = r + j * step < first + height;
        value[j] = there ? *from : T{};
        at[j] = there ? *where : 0;
        from += int64_t(step) * w.row_values, where += int64_t(step) * w.row_bytes;
      }
      int to[kTogether];
#pragma unroll
      for (int j = 0; j < kTogether; j++) {
        const bool there = r + j * step < first + height;
        to[j] = column + (at[j] >> shift & ((1 << w.bits) - 1));
        if constexpr (kOfW)
          if (w.selected) to[j] = there ? w.chosen(row0 + r + j * step)[to[j]] : 0;
        to[j] = there ? to[j] - c0 : -1;
      }
#pragma unroll
      for (int j = 0; j < kTogether; j++)
        if (to[j] >= 0 && to[j] < columns) tile.data.store(tile.place(r + j * step, to[j]), value[j]);
    }
  }
}

}  // namespace sk::gpu::groups
