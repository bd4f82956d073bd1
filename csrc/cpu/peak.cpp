// The roofline's ceiling: how many FMAs one core retires, from registers alone. Compiled once per ISA.

#include <chrono>

#include "kernels.h"
#include "simd.h"

namespace sk::SK_ISA {

double fma_peak(double seconds) {
  using Clock = std::chrono::steady_clock;
  constexpr int kChains = 12;  // FMA latency 4 x 2 per cycle needs 8 independent sums; 12 leave room for jitter
  constexpr int kSteps = 10000;
  vec sums[kChains] = {};
  vec scale = broadcast(0.999f), add = broadcast(1e-3f);
  double best = 0.0;
  const auto start = Clock::now();
  do {
    const auto begin = Clock::now();
    for (int step = 0; step < kSteps; step++) {
      for (int i = 0; i < kChains; i++) sums[i] = sums[i] * scale + add;
#if defined(__x86_64__)
      for (int i = 0; i < kChains; i++) asm volatile("" : "+v"(sums[i]));  // keep all chains, in registers
#else
      for (int i = 0; i < kChains; i++) asm volatile("" : "+w"(sums[i]));
#endif
    }
    const double time = std::chrono::duration<double>(Clock::now() - begin).count();
    const double rate = 2.0 * kLanes * kChains * kSteps / time / 1e9;
    if (rate > best) best = rate;
  } while (std::chrono::duration<double>(Clock::now() - start).count() < seconds);
  return best;
}

}  // namespace sk::SK_ISA
