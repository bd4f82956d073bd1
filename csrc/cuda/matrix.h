// Activations on the GPU, and bringing them into the layout that gathering kernels read: feature-major, so that what a
// nonzero meets, a column of W for many rows of x, is one run of memory.
#pragma once

#include "device.h"

namespace sk::gpu {

// A [batch, features] matrix.
template <class T>
struct Matrix {
  T* data;
  int64_t batch, features, stride_batch, stride_feature;

  Matrix(T* at, const sk_matrix& m)
      : data(at), batch(m.batch), features(m.features), stride_batch(m.stride_batch), stride_feature(m.stride_feature) {}
  explicit Matrix(const sk_matrix& m) : Matrix(static_cast<T*>(m.data), m) {}
  SK_MEMBER T& at(int64_t b, int64_t f) const { return data[b * stride_batch + f * stride_feature]; }
};

constexpr int kPack = 8;  // numbers that move as one: 16 bytes of them where they have 16 bits

// A [features, batch] matrix: rows begin aligned to kPack numbers and have `columns` of them, a multiple of kPack; those past
// the batch are 0.
template <class T>
struct Packed {
  const T* data;
  int64_t features, columns, stride;

  SK_MEMBER const T* at(int64_t f, int64_t b) const { return data + f * stride + b; }
};

template <class V, class T>
SK_DEVICE V load(const T* from) {
  return *reinterpret_cast<const V*>(from);
}
template <class T, class V>
SK_DEVICE void store(T* to, const V& v) {
  *reinterpret_cast<V*>(to) = v;
}
inline bool aligned(const void* p, int64_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

constexpr int kPackTile = 64, kPackThreads = 256;

// Through a tile in shared memory, since the two sides run along different dimensions: threads follow the contiguous one of x,
// then write kPack numbers each. A row of the tile is one bank longer than 64 numbers: no conflicts on either side.
template <class T>
SK_KERNEL(kPackThreads)
pack_tile(Matrix<const T> x, T* to, int64_t columns) {
  constexpr int kRow = kPackTile + 4 / int(sizeof(T));
  const Shared<T> tile = shared_memory<T>(0);  // [batch, feature]
  const int64_t f0 = int64_t(block().x) * kPackTile;
  for (int64_t b0 = int64_t(block().y) * kPackTile; b0 < columns; b0 += int64_t(blocks().y) * kPackTile) {
    for (int i = thread(); i < kPackTile * kPackTile; i += kPackThreads) {
      const int fast = i % kPackTile, slow = i / kPackTile;
      const int b = x.stride_batch == 1 ? fast : slow, f = x.stride_batch == 1 ? slow : fast;
      tile.store(b * kRow + f, b0 + b < x.batch && f0 + f < x.features ? x.at(b0 + b, f0 + f) : T{});
    }
    barrier();
    for (int i = thread(); i < kPackTile * kPackTile / kPack; i += kPackThreads) {
      // A warp writes 4 runs of each of 8 features: 64 bytes at a time at least.
      const int run = i % 4 + i / 256 * 4, f = i / 4 % kPackTile;
      if (f0 + f >= x.features || b0 + run * kPack >= columns) continue;
      Vector<T, kPack> v;
#pragma unroll
      for (int j = 0; j < kPack; j++) v.at[j] = tile.load((run * kPack + j) * kRow + f);
      store(to + (f0 + f) * columns + b0 + run * kPack, v);
    }
    barrier();
  }
}

// The unsigned integer of a type's size: what kernels that only move numbers take.
template <class T>
using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;

template <class T>
bool is_packed(const sk_matrix& m) {
  return m.stride_batch == 1 && m.batch % kPack == 0 && m.stride_feature % kPack == 0 && aligned(m.data, kPack * sizeof(T));
}

// Bytes of workspace that pack() takes, a multiple of 256.
template <class T>
int64_t packed_bytes(const sk_matrix& m) {
  if (is_packed<T>(m)) return 0;
  return ceil_div(m.features * ceil_div(m.batch, kPack) * kPack * sizeof(T), 256) * 256;
}

// `to` = m, in place if that can be, else in the workspace, which goes on after it.
template <class T>
const char* pack(const sk_matrix& m, Packed<T>& to, uint8_t*& workspace, Stream stream) {
  if (is_packed<T>(m)) {
    to = {static_cast<const T*>(m.data), m.features, m.batch, m.stride_feature};
    return nullptr;
  }
  const int64_t columns = ceil_div(m.batch, kPack) * kPack;
  Bits<T>* const out = reinterpret_cast<Bits<T>*>(workspace);
  workspace += packed_bytes<T>(m);
  to = {reinterpret_cast<const T*>(out), m.features, columns, columns};
  if (m.features == 0) return nullptr;
  const Dim grid = {unsigned(ceil_div(m.features, kPackTile)), limited(ceil_div(columns, kPackTile)), 1};
  const int shared = kPackTile * (kPackTile + 4 / int(sizeof(T))) * int(sizeof(T));
  return launch(pack_tile<Bits<T>>, grid, kPackThreads, shared, stream, Matrix<const Bits<T>>(m), out, columns);
}

constexpr int kSumWarps = 8;  // of a block

// The sum over the batch of each feature. Along a feature-major x a warp takes a feature; of a batch-major one a lane does, and
// the warps take turns along the batch.
template <class T>
SK_KERNEL(kWarp* kSumWarps)
batch_sums(Matrix<const T> x, T* sums) {
  const Shared<float> parts = shared_memory<float>(0);
  const bool along = x.stride_batch == 1;
  const int64_t f = along ? int64_t(block().x) * kSumWarps + warp() : int64_t(block().x) * kWarp + lane();
  float sum = 0.0f;
  if (f < x.features)
    for (int64_t b = along ? lane() : warp(); b < x.batch; b += along ? kWarp : kSumWarps) sum += to_float(x.at(b, f));
  if (along) {
    sum = warp_sum(sum);
    if (lane() == 0 && f < x.features) sums[f] = from_float<T>(sum);
    return;
  }
  parts.store(thread(), sum);
  barrier();
  if (warp() != 0 || f >= x.features) return;
  for (int i = 1; i < kSumWarps; i++) sum += parts.load(i * kWarp + lane());
  sums[f] = from_float<T>(sum);
}

template <class T>
const char* sum_batch(const Matrix<const T>& x, void* sums, Stream stream) {
  const int features = x.stride_batch == 1 ? kSumWarps : kWarp;  // of a block
  return launch(batch_sums<T>, {unsigned(ceil_div(x.features, features)), 1, 1}, kWarp * kSumWarps,
                kWarp * kSumWarps * int(sizeof(float)), stream, x, static_cast<T*>(sums));
}

}  // namespace sk::gpu
