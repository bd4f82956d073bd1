// Products of 16-bit matrices on tensor cores: tiles in shared memory, their asynchronous copies, and what a warp does with them.
#pragma once

#include "matrix.h"

namespace sk::gpu {

constexpr int kDepth = 32;                        // of a step, at most: along the dimension that is summed over
constexpr int kStages = 4;                        // steps under way
constexpr int kWarpRows = 32, kWarpColumns = 64;  // of the result, that a warp holds in 64 registers
constexpr int kMostWarps = 8;                     // of a block: 128 x 128 of the result

// A matrix in shared memory whose rows are 1 << log_chunks chunks of 8 numbers, 2 chunks at least. Chunks are swizzled, so that
// 8 rows of one column of chunks, which load_matrices reads at once, lie in different banks.
template <class T>
struct Tile {
  Shared<T> data;
  int log_chunks;

  SK_MEMBER Shared<T> chunk(int row, int c) const {
    const int bits = log_chunks < 3 ? log_chunks : 3;
    return data + (((row << log_chunks) + (c ^ ((row >> (3 - bits)) & ((1 << bits) - 1)))) << 3);
  }
};

SK_DEVICE int log_of(int power_of_two) { return popcount(uint32_t(power_of_two - 1)); }

// 16 bytes of which the first `numbers`, if any, come from memory: the rest are zeros.
template <class T>
SK_DEVICE void copy_chunk(Shared<T> to, const T* from, int64_t numbers) {
  copy_async_part(to, from, numbers <= 0 ? 0 : numbers < 8 ? 2 * int(numbers) : 16);
}

// Starts to copy `rows` rows to a tile; what is past `inside_rows` or `inside_columns` becomes 0.
template <class T>
SK_DEVICE void copy_tile(const Tile<T>& tile, int rows, int threads, const T* from, int64_t pitch, int64_t inside_rows,
                         int64_t inside_columns) {
#pragma unroll 1
  for (int i = thread(); i < rows << tile.log_chunks; i += threads) {
    const int row = i >> tile.log_chunks, c = i & ((1 << tile.log_chunks) - 1);
    copy_chunk(tile.chunk(row, c), from + row * pitch + c * 8, row < inside_rows ? inside_columns - c * 8 : 0);
  }
}

// The left operand's 16 x 16 part at (m, k); `along`: the tile's rows run along k, else they are the k.
template <class T>
SK_DEVICE void load_left(uint32_t (&a)[4], const Tile<T>& tile, bool along, int m, int k) {
  const int r = lane() % 8, low = lane() / 8 % 2, high = lane() / 16;
  if (along)
    load_matrices(a, tile.chunk(m + r + 8 * low, k / 8 + high));
  else
    load_matrices_transposed(a, tile.chunk(k + r + 8 * high, m / 8 + low));
}

// The right operand's 16 x 16 part at (k, n), as two of 8 columns each.
template <class T>
SK_DEVICE void load_right(uint32_t (&b)[4], const Tile<T>& tile, bool along, int n, int k) {
  const int r = lane() % 8, low = lane() / 8 % 2, high = lane() / 16;
  if (along)
    load_matrices(b, tile.chunk(n + r + 8 * high, k / 8 + low));
  else
    load_matrices_transposed(b, tile.chunk(k + r + 8 * low, n / 8 + high));
}

// A warp's part of the result.
struct Sums {
  float d[2][8][4] = {};

  // += left [m, depth] right [depth, n], from (m0, n0) of the tiles on; of its 32 x 64 results those in the first `rows` and
  // `columns`, rounded up to 16, are wanted.
  template <class T>
  SK_MEMBER void add(const Tile<T>& left, bool left_along, const Tile<T>& right, bool right_along, int depth, int m0,
                     int n0, int rows, int columns) {
#pragma unroll 1
    for (int k = 0; k < depth; k += 16) {
      uint32_t a[2][4] = {}, b[4] = {};
      load_left(a[0], left, left_along, m0, k);
      if (rows > 16) load_left(a[1], left, left_along, m0 + 16, k);
#pragma unroll
      for (int j = 0; j < 4; j++) {
        // What is not wanted is multiplied, but not loaded: skipping it too takes 10 registers, and there are none left.
        if (columns > 16 * j) load_right(b, right, right_along, n0 + 16 * j, k);
#pragma unroll
        for (int i = 0; i < 2; i++) {
          multiply(d[i][2 * j], a[i], b[0], b[1], static_cast<const T*>(nullptr));
          multiply(d[i][2 * j + 1], a[i], b[2], b[3], static_cast<const T*>(nullptr));
        }
      }
    }
  }

  // Result (m, n) to number m * m_pitch + n * n_pitch.
  SK_MEMBER void store(Shared<float> to, int m_pitch, int n_pitch, int m0, int n0, int rows, int columns) const {
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int j = 0; j < 8; j++) {
        if (rows <= 16 * i || columns <= j / 2 * 16) continue;
#pragma unroll
        for (int q = 0; q < 4; q++) {
          const int m = m0 + 16 * i + lane() / 4 + q / 2 * 8, n = n0 + 8 * j + lane() % 4 * 2 + q % 2;
          to.store(m * m_pitch + n * n_pitch, d[i][j][q]);
        }
      }
  }
};

// A matrix of 16-bit numbers that chunks can be copied from: aligned, one of its strides 1.
template <class T>
struct Operand {
  const T* data;
  int64_t batch, features, pitch;
  bool feature_major;
};

template <class T>
bool is_operand(const sk_matrix& m) {
  const int64_t pitch = m.stride_feature == 1 ? m.stride_batch : m.stride_feature;
  return aligned(m.data, 16) && (pitch % 8 == 0 || (m.stride_feature == 1 && m.batch == 1));
}

template <class T>
int64_t operand_bytes(const sk_matrix& m) {
  return is_operand<T>(m) ? 0 : packed_bytes<T>(m);
}

// `to` = m, in place if that can be, else packed into the workspace, which goes on after it.
template <class T>
const char* operand(const sk_matrix& m, Operand<T>& to, uint8_t*& workspace, Stream stream) {
  const bool feature_major = m.stride_feature != 1;
  to = {static_cast<const T*>(m.data), m.batch, m.features, feature_major ? m.stride_feature : m.stride_batch,
        feature_major};
  if (is_operand<T>(m)) return nullptr;
  Packed<T> packed;
  const char* error = pack(m, packed, workspace, stream);
  to = {packed.data, m.batch, m.features, packed.stride, true};
  return error;
}

}  // namespace sk::gpu
