// Tiles of matrices in shared memory, copies into them, and products of them: what the tensor-core kernels share.
//
// Warps divide a block's part of the result; each keeps [16 kDown, 16 kAcross] of it in registers, 64 per lane, as Sums. Tiles are
// copied as memory has them, and ldmatrix transposes on the way to the registers: batch-major and feature-major x, W and W
// transposed run the same code. Per 16 of the sum a warp reads 512 (kDown + kAcross) bytes of shared memory for
// 2 kDown kAcross multiplies of 16 x 8 x 16. In float32 the same tiles meet fused multiply-adds, one by one.
#pragma once

#include "matrix.h"

namespace sk::gpu {

constexpr int kMostThreads = 256;  // of a block

SK_DEVICE int log_of(int power_of_two) { return popcount(uint32_t(power_of_two - 1)); }

// A matrix in shared memory whose rows are 2^log_runs runs of 16 bytes. ldmatrix reads 8 rows at the same run: these must be in
// 8 different 16-byte columns of the 128 bytes that all banks deliver at once. So runs are exchanged within a row, by the row's
// number or, where several rows share the 128 bytes, by that of their 128 bytes.
template <class T>
struct Tile {
  Shared<T> data;
  int log_runs;

  // The number that begins a run, and any number.
  SK_MEMBER int run(int row, int column) const {
    const int bits = log_runs < 3 ? log_runs : 3;
    const int turn = row >> (3 - bits) & ((1 << bits) - 1);
    return ((row << log_runs) + (column >> kLogRun<T> ^ turn)) << kLogRun<T>;
  }
  SK_MEMBER int place(int row, int column) const { return run(row, column) + column % kRun<T>; }
  SK_MEMBER Shared<T> at(int row, int column) const { return data + run(row, column); }
};

// At this byte of shared memory, with 2^log_columns columns.
template <class T>
SK_DEVICE Tile<T> tile_at(int offset, int log_columns) {
  return {shared_memory<T>(offset), log_columns - kLogRun<T>};
}

// Starts to copy to `rows` rows of a tile, 16 bytes at a time: from(r, c, numbers) says where those from (r, c) on come from, and
// how many of them there are: the others become 0.
template <class T, class From>
SK_DEVICE void copy_tile(const Tile<T>& tile, int rows, From from) {
#pragma unroll 4
  for (int i = thread(); i < rows << tile.log_runs; i += threads()) {
    const int r = i >> tile.log_runs, c = (i & ((1 << tile.log_runs) - 1)) << kLogRun<T>;
    int64_t numbers;
    const T* const data = from(r, c, numbers);
    copy_async_part(tile.at(r, c), data, numbers <= 0 ? 0 : numbers < kRun<T> ? int(numbers * sizeof(T)) : 16);
  }
}

// A [batch, features] matrix that runs can be copied from: aligned, one of its strides 1.
template <class T>
struct Operand {
  const T* data;
  int64_t batch, features, stride;
  bool feature_major;

  // The tile at this byte for 2^log_features features of 2^log_batch rows: along memory, as the matrix is.
  SK_MEMBER Tile<T> tile(int offset, int log_features, int log_batch) const {
    return tile_at<T>(offset, feature_major ? log_batch : log_features);
  }

  // Starts to copy to it rows b0.. of the features feature(0), feature(1), ...; zeros for those that are not below `features`.
  // Of a batch-major matrix features come in runs.
  template <class Feature>
  SK_MEMBER void copy(int offset, int log_features, int64_t b0, int log_batch, Feature feature) const {
    const Tile<T> to = tile(offset, log_features, log_batch);
    if (feature_major)
      copy_tile(to, 1 << log_features, [&](int r, int c, int64_t& numbers) {
        const int64_t f = feature(r);
        numbers = f < features ? batch - b0 - c : 0;
        return data + f * stride + b0 + c;
      });
    else
      copy_tile(to, 1 << log_batch, [&](int r, int c, int64_t& numbers) {
        const int64_t f = feature(c);
        numbers = b0 + r < batch ? features - f : 0;
        return data + (b0 + r) * stride + f;
      });
  }
};

template <class T>
bool is_operand(const sk_matrix& m, bool feature_major) {
  if (feature_major && m.stride_feature == 1) return false;
  const int64_t stride = m.stride_feature == 1 ? m.stride_batch : m.stride_feature;
  return aligned(m.data, 16) && (stride % kRun<T> == 0 || (m.stride_feature == 1 && m.batch == 1));
}

// Bytes of workspace that operand() takes.
template <class T>
int64_t operand_bytes(const sk_matrix& m, bool feature_major = false) {
  return is_operand<T>(m, feature_major) ? 0 : packed_bytes<T>(m);
}

// `to` = m, feature-major if that is asked for: in place if that can be, else packed into the workspace, which goes on after it.
template <class T>
const char* operand(const sk_matrix& m, bool feature_major, Operand<T>& to, uint8_t*& workspace, Stream stream) {
  const bool fm = m.stride_feature != 1;
  to = {static_cast<const T*>(m.data), m.batch, m.features, fm ? m.stride_feature : m.stride_batch, fm};
  if (is_operand<T>(m, feature_major)) return nullptr;
  Packed<T> packed;
  const char* const error = pack(m, packed, workspace, stream);
  to = {packed.data, m.batch, m.features, packed.stride, true};
  return error;
}

// The 16 x 16 numbers of a tile from (row, column) on, in registers as ldmatrix gives them, transposed or not: 8 x 8 ones, down
// first or across first.
template <class T>
SK_DEVICE void load_fragment(uint32_t (&r)[4], const Tile<T>& tile, int row, int column, bool down_first, bool transposed) {
  const int second = lane() / 8 % 2 * 8, third = lane() / 16 * 8;
  const Shared<T> from = tile.at(row + lane() % 8 + (down_first ? second : third), column + (down_first ? third : second));
  if (transposed)
    load_matrices_transposed(r, from);
  else
    load_matrices(r, from);
}

// A fragment [16, 16] of a: rows m.., columns k.. of a tile that holds a, or a transposed.
template <class T>
SK_DEVICE void load_left(uint32_t (&r)[4], const Tile<T>& a, bool transposed, int m, int k) {
  load_fragment(r, a, transposed ? k : m, transposed ? m : k, !transposed, transposed);
}

// Two fragments [16, 8] of b: rows k.., columns n.. and n + 8.. of a tile that holds b, or b transposed.
template <class T>
SK_DEVICE void load_right(uint32_t (&r)[4], const Tile<T>& b, bool transposed, int k, int n) {
  load_fragment(r, b, transposed ? n : k, transposed ? k : n, !transposed, !transposed);
}

// A block's sums in shared memory: rows of `pitch` numbers, 4 more than there are columns against bank conflicts.
constexpr int kResultPad = 4;
struct Results {
  Shared<float> data;
  int pitch;

  SK_MEMBER float one(int row, int column) const { return data.load(row * pitch + column); }
  SK_MEMBER Vector<float, 4> four(int row, int column) const { return data.load<Vector<float, 4>>(row * pitch + column); }
};

// Bytes of shared memory for the results of a block, also transposed.
constexpr int results_bytes(int rows, int columns) {
  return (rows * columns + kResultPad * (rows > columns ? rows : columns)) * int(sizeof(float));
}

// The numbers of a warp, [16 kDown, 16 kAcross], as the [16, 8] results of multiplies. They are those from (row, column) on of the
// block's, of which the first 16 down and 16 across reach into the matrix.
template <int kDown, int kAcross>
struct Sums {
  float at[kDown][2 * kAcross][4] = {};
  int row, column, down, across;

  // Of a block that has this many rows and columns of the matrix, and `warps` warps side by side.
  SK_MEMBER Sums(int warps, int64_t rows, int64_t columns)
      : row(warp() / warps * 16 * kDown), column(warp() % warps * 16 * kAcross) {
    down = count(rows - row, kDown), across = down > 0 ? count(columns - column, kAcross) : 0;
  }

  static SK_MEMBER int row_of(int i, int e) { return 16 * i + e / 2 * 8 + lane() / 4; }
  static SK_MEMBER int column_of(int j, int e) { return 8 * j + lane() % 4 * 2 + e % 2; }

  // += a b over `depth` columns of a; a_t and b_t tell that the tiles hold a and b transposed.
  template <class T>
  SK_MEMBER void add(const Tile<T>& a, bool a_t, const Tile<T>& b, bool b_t, int depth) {
    if (across == 0) return;
#pragma unroll 1
    for (int k = 0; k < depth; k += 16) {
      // What is past the last row or column is multiplied, but not loaded: skipping it too takes 10 registers.
      uint32_t left[kDown][4] = {}, right[4] = {};
#pragma unroll
      for (int i = 0; i < kDown; i++)
        if (i < down) load_left(left[i], a, a_t, row + 16 * i, k);
#pragma unroll
      for (int j = 0; j < kAcross; j++) {
        if (j < across) load_right(right, b, b_t, k, column + 16 * j);
#pragma unroll
        for (int i = 0; i < kDown; i++) {
          multiply(at[i][2 * j], left[i], right[0], right[1], static_cast<const T*>(nullptr));
          multiply(at[i][2 * j + 1], left[i], right[2], right[3], static_cast<const T*>(nullptr));
        }
      }
    }
  }

  SK_MEMBER void add(const Tile<float>& a, bool a_t, const Tile<float>& b, bool b_t, int depth) {
#pragma unroll 1
    for (int k = 0; k < depth; k++) {
      float right[2 * kAcross][2];
#pragma unroll
      for (int j = 0; j < 2 * kAcross; j++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const int n = column + column_of(j, e);
          right[j][e] = j / 2 < across ? b.data.load(b_t ? b.place(n, k) : b.place(k, n)) : 0.0f;
        }
#pragma unroll
      for (int i = 0; i < kDown; i++)
#pragma unroll
        for (int h = 0; h < 4; h += 2) {
          if (i >= down) continue;
          const int m = row + row_of(i, h);
          const float left = a.data.load(a_t ? a.place(k, m) : a.place(m, k));
#pragma unroll
          for (int j = 0; j < 2 * kAcross; j++)
#pragma unroll
            for (int e = 0; e < 2; e++) at[i][j][h + e] += left * right[j][e];
        }
    }
  }

  // The sums of all warps in shared memory, in place of the operands: of a block's `columns` columns or, stored transposed, of as
  // many rows. Nothing is computed with them here, in 64 copies of the code: that takes a loop over the results, and a fifth of
  // the time to compile.
  SK_MEMBER Results stage(bool transposed, int columns) const {
    const Results to = {shared_memory<float>(0), columns + kResultPad};
    const int m_pitch = transposed ? 1 : to.pitch, n_pitch = transposed ? to.pitch : 1;
    barrier();  // nobody reads the operands any more
#pragma unroll
    for (int i = 0; i < kDown; i++)
#pragma unroll
      for (int j = 0; j < 2 * kAcross; j++) {
        if (i >= down || j / 2 >= across) continue;
#pragma unroll
        for (int e = 0; e < 4; e++)
          to.data.store((row + row_of(i, e)) * m_pitch + (column + column_of(j, e)) * n_pitch, at[i][j][e]);
      }
    barrier();
    return to;
  }

 private:
  static SK_MEMBER int count(int64_t left, int most) {
    return left <= 0 ? 0 : left >= 16 * most ? most : int(left + 15) / 16;
  }
};

// Runs load(step, stage) and use(step, stage) for steps first .. last - 1, with the number of the stage in shared memory where the
// step's operands are: the copies that load starts go on while earlier steps are used. One loop, also for the first loads: the code
// of load stands there once.
template <int kStages, class Load, class Use>
SK_DEVICE void pipeline(int first, int last, Load load, Use use) {
#pragma unroll 1
  for (int i = first + 1 - kStages; i < last; i++) {
    wait_copies<kStages - 2>();
    barrier();  // the copies of all threads are here, and the stage that is loaded next is not in use any more
    const int next = i + kStages - 1;
    if (next < last) load(next, next % kStages);
    commit_copies();
    if (i >= first) use(i, i % kStages);
  }
}
template <int kStages, class Load, class Use>
SK_DEVICE void pipeline(int steps, Load load, Use use) {
  pipeline<kStages>(0, steps, load, use);
}

// y's features f0.. and rows b0.. = activation(sums + bias), stored 4 at a time along y's contiguous dimension: the first `features`
// rows of a block's sums, and those of its 2^log_batch columns that y has. Or the sums alone to `part`, for sum_parts().
template <class T, int kDown, int kAcross>
SK_DEVICE void store_product(const Sums<kDown, kAcross>& d, int log_features, int log_batch, const Matrix<T>& y, int64_t f0,
                             int features, int64_t b0, const T* bias, sk_activation activation, float* part = nullptr) {
  const bool fm = part == nullptr && y.stride_feature != 1;
  const int log_runs = (fm ? log_batch : log_features) - 2;  // of a row, of 4 numbers
  const Results results = d.stage(!fm, 1 << (fm ? log_batch : log_features));
  const int batch = int(y.batch - b0 < 1 << log_batch ? y.batch - b0 : 1 << log_batch);
  const int rows = fm ? features : batch, columns = fm ? batch : features;
  const int64_t stride = fm ? y.stride_feature : y.stride_batch;
  T* const out = &y.at(b0, f0);
  part += part ? b0 * y.features + f0 : 0;
  const bool together = stride % 4 == 0 && reinterpret_cast<uintptr_t>(out) % (4 * sizeof(T)) == 0;
#pragma unroll 1
  for (int i = thread(); i < rows << log_runs; i += threads()) {
    const int r = i >> log_runs, c = (i & ((1 << log_runs) - 1)) * 4;
    if (c >= columns) continue;
    const Vector<float, 4> sums = results.four(r, c);
    if (part != nullptr) {
      for (int k = 0; k < 4 && c + k < columns; k++) part[r * y.features + c + k] = sums.at[k];
      continue;
    }
    Vector<T, 4> v;
#pragma unroll
    for (int k = 0; k < 4; k++) {
      const int feature = fm ? r : c + k;
      const float b = bias && feature < features ? to_float(bias[f0 + feature]) : 0.0f;
      v.at[k] = from_float<T>(activate(activation, sums.at[k] + b));
    }
    if (together && c + 4 <= columns) {
      store(out + r * stride + c, v);
    } else {
#pragma unroll
      for (int k = 0; k < 4; k++)
        if (c + k < columns) out[r * stride + c + k] = v.at[k];
    }
  }
}

}  // namespace sk::gpu
