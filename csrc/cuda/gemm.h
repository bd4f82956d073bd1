// Tiles of matrices in shared memory, copies into them, and products of them: what the tensor-core kernels share.
//
// A block computes [kTall * down, kWide] numbers of W x^T, of its like for the gradients, with 4 * down warps, down = 1 or 2:
// each warp 64 x 32 of them, which stay in 64 registers per lane. The sum advances by kDepth, 128 bytes of a row. Per 16 of it, a
// warp reads 3 KB of shared memory (4 + 2 ldmatrix of 512 bytes) for 16 multiplies of 16 x 8 x 16.
// In float32 the same tiles meet fused multiply-adds, one by one.
#pragma once

#include "matrix.h"

namespace sk::gpu::groups {

template <class T>
constexpr int kLogRun = sizeof(T) == 2 ? 3 : 2;
template <class T>
constexpr int kRun = 1 << kLogRun<T>;  // numbers of 16 bytes, which move as one
template <class T>
constexpr int kLogDepth = kLogRun<T> + 3;
template <class T>
constexpr int kDepth = 1 << kLogDepth<T>;
constexpr int kLogTall = 6, kTall = 1 << kLogTall, kLogWide = 7, kWide = 1 << kLogWide;
constexpr int kMostThreads = 256;

// A matrix in shared memory whose rows are 2^shift runs of 16 bytes, 4 or a multiple of 8. ldmatrix reads 8 rows at the same
// run: these must be in 8 different 16-byte columns of the 128 bytes that all banks deliver at once. So run c of row r stands
// at c ^ (r % 8) or, where two rows share the 128 bytes, at c ^ (r / 2 % 4).
template <class T>
struct Tile {
  Shared<T> data;
  int shift;

  SK_MEMBER int place(int row, int column) const {
    const int turn = shift == 2 ? row / 2 % 4 : row % 8;
    return ((row << shift) + (column / kRun<T> ^ turn)) * kRun<T> + column % kRun<T>;
  }
  SK_MEMBER Shared<T> at(int row, int column) const { return data + place(row, column); }
};

// A [batch, features] matrix in whole aligned runs: along the batch, or along the features.
template <class T>
struct Operand {
  const T* data;
  int64_t batch, features, stride;
  bool feature_major;
};

template <class T>
bool in_runs(const sk_matrix& m) {
  return m.stride_feature == 1 && m.features % kPack == 0 && m.stride_batch % kPack == 0 && aligned(m.data, 16);
}

// Bytes of workspace that operand() takes.
template <class T>
int64_t operand_bytes(const sk_matrix& m, bool feature_major) {
  return !feature_major && in_runs<T>(m) ? 0 : packed_bytes<T>(m);
}

// `to` = m: in place where that is in runs, else feature-major in the workspace, which goes on after it.
template <class T>
const char* operand(const sk_matrix& m, bool feature_major, Operand<T>& to, uint8_t*& workspace, Stream stream) {
  if (!feature_major && in_runs<T>(m)) {
    to = {static_cast<const T*>(m.data), m.batch, m.features, m.stride_batch, false};
    return nullptr;
  }
  Packed<T> packed;
  const char* const error = pack(m, packed, workspace, stream);
  to = {packed.data, packed.columns, packed.features, packed.stride, true};
  return error;
}

// The tile at this byte of shared memory for 2^log_features features and 2^log_batch rows of x: it runs as x does,
// [features, batch] or [batch, features].
template <class T>
SK_DEVICE Tile<T> tile_for(const Operand<T>& x, int offset, int log_features, int log_batch) {
  return {shared_memory<T>(offset), (x.feature_major ? log_batch : log_features) - kLogRun<T>};
}

// Starts to copy that many features from f0 on and rows from b0 on, zeros where x ends. Features are counted in `chosen` ones
// if that is given: f stands for chosen[f], for f < count; x must be feature-major then.
template <class T>
SK_DEVICE void copy_tile(const Operand<T>& x, int offset, int64_t f0, int log_features, int64_t b0, int log_batch,
                         int threads, const int32_t* chosen = nullptr, int64_t count = 0) {
  const bool fm = x.feature_major;
  const Tile<T> tile = tile_for(x, offset, log_features, log_batch);
  const int64_t row0 = fm ? f0 : b0, rows = chosen ? count : fm ? x.features : x.batch;
  const int64_t column0 = fm ? b0 : f0, columns = fm ? x.batch : x.features;
  for (int i = thread(); i < 1 << ((fm ? log_features : log_batch) + tile.shift); i += threads) {
    const int r = i >> tile.shift, c = (i & ((1 << tile.shift) - 1)) * kRun<T>;
    const bool inside = row0 + r < rows && column0 + c < columns;
    const int64_t row = chosen && inside ? chosen[row0 + r] : row0 + r;
    copy_async(tile.at(r, c), inside ? x.data + row * x.stride + column0 + c : x.data, inside);
  }
}

// The numbers of a warp: [64, 32], laid out as the [16, 8] results of 4 x 4 multiplies.
struct Sums {
  float at[4][4][4];

  static SK_MEMBER int row(int i, int e) { return 16 * i + e / 2 * 8 + lane() / 4; }
  static SK_MEMBER int column(int j, int e) { return 8 * j + lane() % 4 * 2 + e % 2; }
};

// A warp's part of a block's tile: where it begins, and how many 16 rows and 16 columns of it are within the matrix.
struct Part {
  int row, column, down, across;

  SK_MEMBER Part(int64_t rows, int64_t columns) : row(warp() / 4 * kTall), column(warp() % 4 * 32) {
    down = count(rows - row, 4);
    across = count(columns - column, 2);
  }

 private:
  static SK_MEMBER int count(int64_t left, int most) {
    return left <= 0 ? 0 : left >= 16 * most ? most : int(left + 15) / 16;
  }
};

// A fragment [16, 16] of a: rows m.., columns k.. of a tile that holds a, or a transposed.
template <class T>
SK_DEVICE void load_left(uint32_t (&r)[4], const Tile<T>& a, bool transposed, int m, int k) {
  if (transposed)
    load_matrices_transposed(r, a.at(k + lane() % 8 + lane() / 16 * 8, m + lane() / 8 % 2 * 8));
  else
    load_matrices(r, a.at(m + lane() % 16, k + lane() / 16 * 8));
}

// Two fragments [16, 8] of b: rows k.., columns n.. and n + 8.. of a tile that holds b, or b transposed.
template <class T>
SK_DEVICE void load_right(uint32_t (&r)[4], const Tile<T>& b, bool transposed, int k, int n) {
  if (transposed)
    load_matrices(r, b.at(n + lane() % 8 + lane() / 16 * 8, k + lane() / 8 % 2 * 8));
  else
    load_matrices_transposed(r, b.at(k + lane() % 16, n + lane() / 16 * 8));
}

// d += a b over kDepth; a_t and b_t tell that the tiles hold a [64 * down, kDepth] and b [kDepth, kWide] transposed.
template <class T>
SK_DEVICE void multiply_tiles(Sums& d, const Tile<T>& a, bool a_t, const Tile<T>& b, bool b_t, const Part& part) {
#pragma unroll
  for (int k = 0; k < kDepth<T>; k += 16) {
    uint32_t right[2][4], left[4];
#pragma unroll
    for (int j = 0; j < 2; j++)
      if (j < part.across) load_right(right[j], b, b_t, k, part.column + 16 * j);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (i >= part.down) continue;
      load_left(left, a, a_t, part.row + 16 * i, k);
#pragma unroll
      for (int j = 0; j < 4; j++)
        if (j / 2 < part.across)
          multiply(d.at[i][j], left, right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1], static_cast<const T*>(nullptr));
    }
  }
}

SK_DEVICE void multiply_tiles(Sums& d, const Tile<float>& a, bool a_t, const Tile<float>& b, bool b_t, const Part& part) {
#pragma unroll 2
  for (int k = 0; k < kDepth<float>; k++) {
    float right[4][2];
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const int n = part.column + Sums::column(j, e);
        right[j][e] = j / 2 < part.across ? b.data.load(b_t ? b.place(n, k) : b.place(k, n)) : 0.0f;
      }
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int h = 0; h < 4; h += 2) {
        if (i >= part.down) continue;
        const int m = part.row + Sums::row(i, h);
        const float left = a.data.load(a_t ? a.place(k, m) : a.place(m, k));
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
          for (int e = 0; e < 2; e++) d.at[i][j][h + e] += left * right[j][e];
      }
  }
}

// Runs load(step, offset) and use(step, offset) for each step, with the byte of shared memory where the step's stage is: the
// copies that load starts go on while earlier steps are used.
constexpr int kStages = 3;
template <class Load, class Use>
SK_DEVICE void pipeline(int steps, int stage_bytes, Load load, Use use) {
  for (int i = 0; i < kStages - 1; i++) {
    if (i < steps) load(i, i * stage_bytes);
    commit_copies();
  }
  for (int i = 0; i < steps; i++) {
    wait_copies<kStages - 2>();
    barrier();  // the copies of all threads are here, and the stage that is loaded next is not in use any more
    const int next = i + kStages - 1;
    if (next < steps) load(next, next % kStages * stage_bytes);
    commit_copies();
    use(i, i % kStages * stage_bytes);
  }
}

// The block's sums in shared memory, in place of the stages: [64 * down, 128], or transposed. Nothing is computed with them
// here, in 64 copies of the code: that takes a loop over the tile, and a fifth of the time to compile.
SK_DEVICE Tile<float> stage_sums(const Sums& d, const Part& part, bool transposed, int down) {
  const Tile<float> tile = {shared_memory<float>(0), (transposed ? kLogTall + down - 1 : kLogWide) - kLogRun<float>};
  barrier();  // nobody reads the operands any more
#pragma unroll
  for (int i = 0; i < 4; i++)
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int row = part.row + Sums::row(i, e), column = part.column + Sums::column(j, e);
        tile.data.store(transposed ? tile.place(column, row) : tile.place(row, column), d.at[i][j][e]);
      }
  barrier();
  return tile;
}

// y's features f0.. (`features` of them, rows of the sums) and rows b0.. = activation(sums + bias), stored along y's contiguous
// dimension.
template <class T>
SK_DEVICE void store_product(const Sums& d, const Part& part, const Matrix<T>& y, int64_t f0, int features, int64_t b0,
                             const T* bias, sk_activation activation, int down) {
  const bool fm = y.stride_feature != 1;
  const Tile<float> tile = stage_sums(d, part, !fm, down);
  const int batch = int(y.batch - b0 < kWide ? y.batch - b0 : kWide);
  const int rows = fm ? features : batch, columns = fm ? batch : features;
  const int64_t stride = fm ? y.stride_feature : y.stride_batch;
  T* const out = &y.at(b0, f0);
  const bool runs = stride % kRun<T> == 0 && reinterpret_cast<uintptr_t>(out) % 16 == 0;
  const int log_runs = tile.shift + kLogRun<float> - kLogRun<T>;  // of a row
#pragma unroll 1
  for (int i = thread(); i < rows << log_runs; i += 128 * down) {
    const int r = i >> log_runs, c = (i & ((1 << log_runs) - 1)) * kRun<T>;
    if (c >= columns) continue;
    Vector<T, kRun<T>> v;
#pragma unroll
    for (int k = 0; k < kRun<T>; k += 4) {
      const auto sums = tile.data.load<Vector<float, 4>>(tile.place(r, c + k));
#pragma unroll
      for (int l = 0; l < 4; l++) {
        const int feature = fm ? r : c + k + l;
        const float b = bias && feature < features ? to_float(bias[f0 + feature]) : 0.0f;
        v.at[k + l] = from_float<T>(activate(activation, sums.at[l] + b));
      }
    }
    if (runs && c + kRun<T> <= columns) {
      store(out + r * stride + c, v);
    } else {
#pragma unroll
      for (int k = 0; k < kRun<T>; k++)
        if (c + k < columns) out[r * stride + c + k] = v.at[k];
    }
  }
}

}  // namespace sk::gpu::groups
