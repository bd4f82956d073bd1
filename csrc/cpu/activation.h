// Activations, applied in place to finished float32 values of y.
#pragma once

#include "simd.h"
#include "sparsekern/common.h"

namespace sk::SK_ISA {
namespace {

typedef int32_t ivec __attribute__((vector_size(kLanes * 4)));

// p_0 + p_1 t + p_2 t^2 + ...
template <int N>
[[gnu::always_inline]] inline vec polynomial(const float (&p)[N], vec t) {
  vec sum = broadcast(p[N - 1]);
  for (int i = N - 2; i >= 0; i--) sum = sum * t + p[i];
  return sum;
}

// scale * e^(low - high) for 0 <= high <= 120 and a tiny low. The exponent is split in two: 2^n alone may be below the
// normal numbers where the product is not.
[[gnu::always_inline]] inline vec scaled_exp(vec scale, vec high, vec low) {
  constexpr float kRound = 0x1.8p23f;  // floats near this one are whole numbers
  const vec shifted = kRound - high * 0x1.715476p0f, n = shifted - kRound;
  const vec r = low - ((high + n * 0x1.62e4p-1f) + n * 0x1.7f7d1cp-20f);  // ln 2 in two parts: n times the first is exact
  // e^r for |r| <= ln(2) / 2: its Taylor series, to 2^-27.
  const vec e = polynomial({1.0f, 1.0f, 1 / 2.0f, 1 / 6.0f, 1 / 24.0f, 1 / 120.0f, 1 / 720.0f, 1 / 5040.0f}, r);
  const ivec exponent = __builtin_convertvector(n, ivec), half = exponent >> 1;
  return scale * e * (vec)((half + 127) << 23) * (vec)((exponent - half + 127) << 23);
}

// a Phi(-a) for a >= 0, Phi the normal distribution function: a e^(-a^2 / 2) t P(t) with t = 1 / (1 + 0.35 a). P is the
// minimax polynomial of degree 8 for a <= 14.5 (relative error 2^-25); from there on the product is 0. a^2 is split so that
// its larger part is exact, as else its rounding alone would cost up to 100 ulp.
[[gnu::always_inline]] inline vec gelu_tail(vec a) {
  const vec t = 1.0f / (1.0f + 0.35f * a);
  const vec p = polynomial({0.139621302f, 0.139863521f, 0.119821288f, 0.105552509f, -0.0232123733f, 0.159319744f,
                            -0.25583905f, 0.144030958f, -0.0291578937f},
                           t);
  const vec high = (vec)((uvec)a & 0xfffff000u);
  return scaled_exp(a * t * p, high * high * 0.5f, (a - high) * (a + high) * -0.5f);
}

// a / (1 + e^a) for a >= 0.
[[gnu::always_inline]] inline vec silu_tail(vec a) {
  const vec e = scaled_exp(broadcast(1.0f), a, vec{});
  return scaled_exp(a / (1.0f + e), a, vec{});
}

// gelu and silu are max(x, 0) - tail(|x|). |x| is cut where the tail is 0 in float32, so that infinities have their limits;
// NaN is kept by max(x, 0).
template <class F>
[[gnu::always_inline]] inline void apply(float* v, int64_t n, float cut, F tail) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const vec x = load(v + i), magnitude = x < 0.0f ? -x : x;
    store(v + i, (x < 0.0f ? vec{} : x) - tail(magnitude < cut ? magnitude : broadcast(cut)));
  }
}

// Replaces n floats by their activation; n is a multiple of kLanes. The largest errors, measured on every third float
// (subnormal ones included) without FMA: 7.6 ulp for gelu, which is 2.6e-7 |x|, and 3.3 ulp for silu.
[[maybe_unused]] void activate(sk_activation activation, float* v, int64_t n) {
  switch (activation) {
    case SK_IDENTITY: return;
    case SK_RELU: return apply(v, n, 0.0f, [](vec) { return vec{}; });
    case SK_GELU: return apply(v, n, 14.5f, gelu_tail);
    case SK_SILU: return apply(v, n, 110.0f, silu_tail);
  }
}

}  // namespace
}  // namespace sk::SK_ISA
