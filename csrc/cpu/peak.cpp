// The roofline's ceiling: how many FMAs, or dot instructions, one core retires, from registers alone. Compiled once per ISA.

#include <chrono>

#include "kernels.h"
#include "simd.h"

namespace sk::SK_ISA {
namespace {

// GFLOP/s of sum = step(sum), of `flops` each.
template <class F>
double peak(double seconds, double flops, F step) {
  using Clock = std::chrono::steady_clock;
  constexpr int kChains = 12;  // FMA latency 4 x 2 per cycle needs 8 independent sums; 12 leave room for jitter
  constexpr int kSteps = 10000;
  vec sums[kChains] = {};
  double best = 0.0;
  const auto start = Clock::now();
  do {
    const auto begin = Clock::now();
    for (int i = 0; i < kSteps; i++) {
      for (vec& sum : sums) sum = step(sum);
#if defined(__x86_64__)
      for (vec& sum : sums) asm volatile("" : "+v"(sum));  // keep all chains, in registers
#else
      for (vec& sum : sums) asm volatile("" : "+w"(sum));
#endif
    }
    const double time = std::chrono::duration<double>(Clock::now() - begin).count();
    const double rate = flops * kChains * kSteps / time / 1e9;
    if (rate > best) best = rate;
  } while (std::chrono::duration<double>(Clock::now() - start).count() < seconds);
  return best;
}

}  // namespace

#if defined(__AVX512BF16__)
double dot_peak(double seconds) {
  const uvec tiny = broadcast(bf16x2{{0x3080}, {0x3080}});  // 2^-30: sums stay finite
  return peak(seconds, 4.0 * kLanes, [&](vec sum) { return multiply_add(tiny, tiny, sum); });
}
#else
double fma_peak(double seconds) {
  const vec scale = broadcast(0.999f), add = broadcast(1e-3f);
  return peak(seconds, 2.0 * kLanes, [&](vec sum) { return sum * scale + add; });
}
#endif

}  // namespace sk::SK_ISA
