// Vectors of float32, one width per ISA, on the compiler's vector extension: no intrinsics, so one source serves every ISA.
// Everything lives in a namespace named after the ISA: the same file is compiled once per ISA, and two versions of one
// inline function must never be merged by the linker.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#ifndef SK_ISA
#error "compile with -DSK_ISA=generic, avx2 or avx512"
#endif

namespace sk::SK_ISA {

#if defined(__AVX512F__) || defined(SK_PLAIN_DOTS)  // the latter: AVX-512's shapes on any CPU
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

// n numbers of type T; shorter ones than the registers serve what has fewer numbers.
template <class T, int n>
struct Vector {
  typedef T type __attribute__((vector_size(n * sizeof(T))));
};
typedef Vector<float, kLanes>::type vec;
typedef Vector<uint32_t, kLanes>::type uvec;
typedef Vector<uint16_t, kLanes>::type hvec;
typedef Vector<float, 4>::type vec4;

struct bf16 {
  uint16_t bits;
};

// Two neighbours: what a 32-bit lane holds for dot instructions.
struct bf16x2 {
  bf16 low, high;
};

inline float to_float(float v) { return v; }
inline float to_float(bf16 v) {
  const uint32_t bits = uint32_t(v.bits) << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

inline vec broadcast(float v) {
  return v - vec{};  // v - 0 is v for every v, so this is one broadcast; v + 0 would add (-0 + 0 is +0)
}

inline vec broadcast(bf16 v) { return broadcast(to_float(v)); }
inline uvec broadcast(bf16x2 v) {
  uint32_t bits;
  memcpy(&bits, &v, 4);
  return bits - uvec{};
}

// A vector of the float whose bits are the low half of `entry`: from a general register, so that one 64-bit load brings a
// weight and where its operand is.
inline vec broadcast_low(uint64_t entry) { return (vec)(uint32_t(entry) - uvec{}); }

template <class V>
inline V load_as(const float* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline vec load(const float* p) { return load_as<vec>(p); }
#if defined(__clang__) || __GNUC__ >= 12
// Each number twice, the lower copy masked off: 2 operations, where the compiler's conversion of whole vectors takes 4.
template <int... I>
inline vec widen(hvec h, std::integer_sequence<int, I...>) {
  return (vec)((uvec)__builtin_shufflevector(h, h, (I / 2)...) & 0xffff0000u);
}
inline vec widen(hvec h) { return widen(h, std::make_integer_sequence<int, 2 * kLanes>{}); }
#else
inline vec widen(hvec h) { return (vec)(__builtin_convertvector(h, uvec) << 16); }
#endif
inline vec load(const bf16* p) {
  hvec h;
  memcpy(&h, p, sizeof h);
  return widen(h);
}

inline uvec load(const bf16x2* p) {
  uvec v;
  memcpy(&v, p, sizeof v);
  return v;
}

inline uvec load_unsigned(const uint32_t* p) {
  uvec v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline uvec load_unsigned(const uint16_t* p) {
  hvec h;
  memcpy(&h, p, sizeof h);
  return __builtin_convertvector(h, uvec);
}

template <class V>
inline void store(float* p, V v) {
  memcpy(p, &v, sizeof v);
}
template <class V>
inline void store(bf16* p, V v) {
  constexpr int n = sizeof(V) / 4;
  using U = typename Vector<uint32_t, n>::type;
  const U u = (U)v;
  const U rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;  // to nearest, ties to even
  const U is_nan = (U)(v != v);
  const auto h = __builtin_convertvector((is_nan & 0x7fc0) | (~is_nan & rounded), typename Vector<uint16_t, n>::type);
  memcpy(p, &h, sizeof h);
}

inline void store(bf16x2* p, uvec v) { memcpy(p, &v, sizeof v); }

// sum + a * b, of pairs both products. Those of bfloat16 are exact in float32: each addition rounds once, in either form and in
// the same order. The instruction takes numbers below 2^-126 for 0 besides, and leaves 0 where a sum falls below it.
inline vec multiply_add(vec a, vec b, vec sum) { return sum + a * b; }
inline vec multiply_add(uvec a, uvec b, vec sum) {
#if defined(__AVX512BF16__)
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));  // the header with its intrinsic takes 0.6 s to compile
  return sum;
#else
  sum += (vec)(a & 0xffff0000u) * (vec)(b & 0xffff0000u);
  return sum + (vec)(a << 16) * (vec)(b << 16);
#endif
}

inline void store_one(float* p, float v) { *p = v; }
inline void store_one(bf16* p, float v) {
  alignas(64) bf16 lanes[kLanes];
  store(lanes, broadcast(v));
  *p = lanes[0];
}

// The first n lanes, 0 <= n <= kLanes; the others are zero and their memory is not touched.
template <class T>
inline vec load_first(const T* p, int64_t n) {
  if (n >= kLanes) return load(p);
  alignas(64) T lanes[kLanes] = {};
  for (int64_t i = 0; i < n; i++) lanes[i] = p[i];
  return load(lanes);
}
template <class T>
inline void store_first(T* p, vec v, int64_t n) {
  if (n >= kLanes) return store(p, v);
  alignas(64) T lanes[kLanes];
  store(lanes, v);
  for (int64_t i = 0; i < n; i++) p[i] = lanes[i];
}

// Lane i of the result is lane index(i) of a, or, past a's n lanes, lane index(i) - n of b.
template <class V, class F, int... I>
inline V shuffle(V a, V b, F index, std::integer_sequence<int, I...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, index(I)...);
#else
  return __builtin_shuffle(a, b, typename Vector<uint32_t, sizeof...(I)>::type{uint32_t(index(I))...});
#endif
}
using Lanes = std::make_integer_sequence<int, kLanes>;

// p[i] = lane i of v in the low half, of `high` in the high half.
inline void store_entries(uint64_t* p, vec v, uvec high) {
  const auto low_half = [](int l) constexpr { return l / 2 + (l & 1) * kLanes; };
  const auto high_half = [](int l) constexpr { return kLanes / 2 + l / 2 + (l & 1) * kLanes; };
  const vec a = shuffle(v, (vec)high, low_half, Lanes{}), b = shuffle(v, (vec)high, high_half, Lanes{});
  memcpy(p, &a, sizeof a);
  memcpy(p + kLanes / 2, &b, sizeof b);
}

// Transposes kLanes x kLanes in registers: log2(kLanes) rounds, each swaps the off-diagonal halves of 2S x 2S blocks.
template <int S>
inline void swap_halves(vec (&m)[kLanes]) {
  for (int i = 0; i < kLanes; i++) {
    if (i & S) continue;
    const vec a = m[i], b = m[i + S];
    m[i] = shuffle(a, b, [](int l) constexpr { return l & S ? kLanes + (l ^ S) : l; }, Lanes{});
    m[i + S] = shuffle(a, b, [](int l) constexpr { return l & S ? kLanes + l : l ^ S; }, Lanes{});
  }
}
inline void transpose(vec (&m)[kLanes]) {
  if constexpr (kLanes == 16) swap_halves<kLanes / 2>(m);
  if constexpr (kLanes >= 8) swap_halves<4>(m);
  swap_halves<2>(m);
  swap_halves<1>(m);
}

// The sums over all lanes of a, b, c and d, vectors of 4, 8 or 16. Shuffles within 16 bytes first, so all four share the
// log-depth tree: 11 operations for 16 lanes, against 28 for four separate sums.
template <class V>
inline vec4 sum4(V a, V b, V c, V d) {
  constexpr int n = sizeof(V) / 4;
  using All = std::make_integer_sequence<int, n>;
  const auto low2 = [](int l) constexpr { return (l & ~3) + (l & 3) / 2 + (l & 1) * n; };
  const auto high2 = [](int l) constexpr { return (l & ~3) + 2 + (l & 3) / 2 + (l & 1) * n; };
  const V ab = shuffle(a, b, low2, All{}) + shuffle(a, b, high2, All{});
  const V cd = shuffle(c, d, low2, All{}) + shuffle(c, d, high2, All{});
  const auto low4 = [](int l) constexpr { return (l & ~3) + (l & 1) + (l & 2) / 2 * n; };
  const auto high4 = [](int l) constexpr { return (l & ~3) + 2 + (l & 1) + (l & 2) / 2 * n; };
  const V abcd = shuffle(ab, cd, low4, All{}) + shuffle(ab, cd, high4, All{});
  vec4 parts[n / 4];
  memcpy(parts, &abcd, sizeof abcd);
  if constexpr (n == 16) return (parts[0] + parts[1]) + (parts[2] + parts[3]);
  if constexpr (n == 8) return parts[0] + parts[1];
  return parts[0];
}

}  // namespace sk::SK_ISA
