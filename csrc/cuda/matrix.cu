// What kernels of all formats share: packing activations, sums over the batch, sums of parts. Compiled once.

#include "matrix.h"

namespace sk::gpu {

namespace {

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
SK_KERNEL(kPackThreads)
part_sums(const float* parts, int count, const T* bias, sk_activation activation, Matrix<T> y) {
  const int64_t i = int64_t(block().x) * kPackThreads + thread(), size = y.batch * y.features;
  if (i >= size) return;
  const int64_t f = i % y.features;
  float total = bias ? to_float(bias[f]) : 0.0f;
  for (int k = 0; k < count; k++) total += parts[k * size + i];
  y.at(i / y.features, f) = from_float<T>(activate(activation, total));
}

}  // namespace

const char* pack_numbers(const sk_matrix& m, int element_bytes, void* to, int64_t columns, Stream stream) {
  if (m.features == 0) return nullptr;
  const auto run = [&](auto zero) {
    using E = decltype(zero);
    const Dim grid = {unsigned(ceil_div(m.features, kPackTile)), limited(ceil_div(columns, kPackTile)), 1};
    const int shared = kPackTile * (kPackTile + 4 / int(sizeof(E))) * int(sizeof(E));
    return launch(pack_tile<E>, grid, kPackThreads, shared, stream, Matrix<const E>(m), static_cast<E*>(to), columns);
  };
  return element_bytes == 2 ? run(uint16_t()) : run(uint32_t());
}

const char* sum_batch(const sk_matrix& x, sk_dtype dtype, void* sums, Stream stream) {
  const int features = x.stride_batch == 1 ? kSumWarps : kWarp;  // of a block
  return with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    return launch(batch_sums<T>, {unsigned(ceil_div(x.features, features)), 1, 1}, kWarp * kSumWarps,
                  kWarp * kSumWarps * int(sizeof(float)), stream, Matrix<const T>(x), static_cast<T*>(sums));
  });
}

const char* sum_parts(const float* parts, int count, const void* bias, sk_activation activation, const sk_matrix& y,
                      sk_dtype dtype, Stream stream) {
  return with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    return launch(part_sums<T>, {unsigned(ceil_div(y.batch * y.features, kPackThreads)), 1, 1}, kPackThreads, 0, stream,
                  parts, count, static_cast<const T*>(bias), activation, Matrix<T>(y));
  });
}

}  // namespace sk::gpu
