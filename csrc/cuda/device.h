// The device functions that kernels are written with: threads, shared memory, asynchronous copies, matrix instructions.
// Compiled by nvcc they are the hardware's; the tests compile the same kernels for a CPU, which checks what they do (see
// tests/emulator). So kernels use these names for whatever threads do together, and plain C++ for the rest.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "sparsekern/common.h"

#ifdef __CUDACC__
#include "device_gpu.h"
#else
#include "device_cpu.h"  // tests/emulator
#endif

namespace sk::gpu {

SK_DEVICE int lane() { return thread() % kWarp; }
SK_DEVICE int warp() { return thread() / kWarp; }

// Storage types of numbers that kernels compute with in float32.
struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

SK_DEVICE float to_float(float v) { return v; }
SK_DEVICE float to_float(bf16 v) { return bits_to_float(uint32_t(v.bits) << 16); }
SK_DEVICE float to_float(fp16 v) { return half_to_float(v.bits); }

// Round to nearest, ties to even.
template <class T>
SK_DEVICE T from_float(float v) {
  if constexpr (std::is_same_v<T, bf16>)
    return {float_to_bfloat(v)};
  else if constexpr (std::is_same_v<T, fp16>)
    return {float_to_half(v)};
  else
    return v;
}

// n consecutive numbers that move as one: a load or store of n * sizeof(T) bytes, aligned to that.
template <class T, int n>
struct alignas(n * sizeof(T)) Vector {
  T at[n];
};

// The sum over the lanes of a warp, in all of them.
SK_DEVICE float warp_sum(float v) {
  for (int i = kWarp / 2; i > 0; i /= 2) v += shuffle_xor(v, i);
  return v;
}

// The sums over the lanes of a warp of n numbers, n a power of two: that of v[i] in lanes i, i + n, ... Each step halves what
// a lane still sums: 2 n shuffles at most, where n times warp_sum takes 5 n.
template <int n, int m>
SK_DEVICE float warp_sums(float (&v)[m]) {
  static_assert(n <= m && m <= kWarp, "the first n of v");
  if constexpr (n == 1) {
    for (int i = m; i < kWarp; i *= 2) v[0] += shuffle_xor(v[0], i);
    return v[0];
  } else {
    const bool upper = lane() & (n / 2);
#pragma unroll
    for (int i = 0; i < n / 2; i++) {
      const float keep = upper ? v[i + n / 2] : v[i], give = upper ? v[i] : v[i + n / 2];
      v[i] = keep + shuffle_xor(give, n / 2);
    }
    return warp_sums<n / 2>(v);
  }
}

// As torch.nn.functional's relu, gelu (exact) and silu.
SK_DEVICE float activate(sk_activation activation, float v) {
  switch (activation) {
    case SK_RELU: return v < 0.0f ? 0.0f : v;  // NaN stays
    case SK_GELU: return 0.5f * v * (1.0f + erff(v * 0.70710678f));
    case SK_SILU: return v / (1.0f + expf(-v));
    default: return v;
  }
}

template <class T>
constexpr sk_dtype kDtype = std::is_same_v<T, float>  ? SK_FLOAT32
                            : std::is_same_v<T, bf16> ? SK_BFLOAT16
                                                      : SK_FLOAT16;

// f(T()) for the type T that numbers of `dtype` have in kernels.
template <class F>
const char* with_type(sk_dtype dtype, F f) {
  switch (dtype) {
    case SK_FLOAT32: return f(float());
    case SK_BFLOAT16: return f(bf16());
    case SK_FLOAT16: return f(fp16());
  }
  return "unknown dtype";
}

// f(E()) for the unsigned integer E of 2, 4 or 8 bytes.
template <class F>
const char* with_element(int bytes, F f) {
  return bytes == 2 ? f(uint16_t()) : bytes == 4 ? f(uint32_t()) : f(uint64_t());
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A grid's second dimension for n blocks: kernels loop where that is fewer.
constexpr unsigned limited(int64_t n) { return unsigned(n < 65535 ? n : 65535); }

}  // namespace sk::gpu
