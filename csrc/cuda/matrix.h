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

template <class T>
constexpr int kLogRun = sizeof(T) == 2 ? 3 : 2;
template <class T>
constexpr int kRun = 1 << kLogRun<T>;  // numbers of 16 bytes, the most that a thread moves as one

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

// matrix.cu: to [features, columns] = m in its layout, zeros past the batch; the sum over the batch of each feature.
const char* pack_numbers(const sk_matrix& m, int element_bytes, void* to, int64_t columns, Stream stream);
const char* sum_batch(const sk_matrix& x, sk_dtype dtype, void* sums, Stream stream);
// y = activation(the sum of the parts + bias), always in the same order: where blocks divided the terms of a product, each
// part [batch, features] of y.
const char* sum_parts(const float* parts, int count, const void* bias, sk_activation activation, const sk_matrix& y,
                      sk_dtype dtype, Stream stream);

// `to` = m, in place if that can be, else in the workspace, which goes on after it.
template <class T>
const char* pack(const sk_matrix& m, Packed<T>& to, uint8_t*& workspace, Stream stream) {
  if (is_packed<T>(m)) {
    to = {static_cast<const T*>(m.data), m.features, m.batch, m.stride_feature};
    return nullptr;
  }
  const int64_t columns = ceil_div(m.batch, kPack) * kPack;
  to = {reinterpret_cast<const T*>(workspace), m.features, columns, columns};
  void* const out = workspace;
  workspace += packed_bytes<T>(m);
  return pack_numbers(m, sizeof(T), out, columns, stream);
}

}  // namespace sk::gpu
