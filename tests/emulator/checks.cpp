// Kernels with mistakes that a GPU would not report, and some without: one line each, "name: ok" or what the emulator says.

#include <cstdio>
#include <vector>

#include "device.h"

namespace {

using namespace sk::gpu;

constexpr int kThreads = 64, kBytes = 256;  // of a block

SK_DEVICE Shared<float> numbers() { return shared_memory<float>(0); }

// --- without mistakes -----------------------------------------------------------------------------------------------------

SK_KERNEL(kThreads) reversed(const float* x, float* y) {
  numbers().store(thread(), x[thread()]);
  barrier();
  y[block().x * kThreads + thread()] = numbers().load(kThreads - 1 - thread());
}

SK_KERNEL(kThreads) summed(const float* x, float* y) { y[thread()] = warp_sum(x[thread()]); }

SK_KERNEL(kThreads) ordered_by_the_warp(const float* x, float* y) {
  numbers().store(thread(), x[thread()]);
  warp_barrier();
  y[thread()] = numbers().load(thread() ^ 1);
  warp_barrier();
  numbers().store(thread() ^ 3, 1.0f);
}

SK_KERNEL(kThreads) copied(const float* x, float* y) {
  if (thread() < 16) copy_async(numbers() + 4 * thread(), x + 4 * thread(), thread() < 8);
  commit_copies();
  wait_copies<0>();
  barrier();
  y[thread()] = numbers().load(thread());
}

SK_KERNEL(kThreads) copied_in_part(const float* x, float* y) {
  if (thread() < 16) copy_async_part(numbers() + 4 * thread(), x + 4 * thread(), 4);
  commit_copies();
  wait_copies<0>();
  barrier();
  y[thread()] = numbers().load(thread()) - (thread() % 4 == 0 ? x[thread()] : 0.0f);
}

SK_KERNEL(kThreads) one_warp_exchanges(const float* x, float* y) {
  if (warp() == 1) y[thread()] = shuffle(x[thread()], 5);
  barrier();
}

// y = 0, the difference of A B for A [16, 16] and B [16, 8], A's left half, by the tensor cores' instruction and one by one.
SK_KERNEL(kThreads) multiplied(const float* x, float* y) {
  const Shared<bf16> halves = shared_memory<bf16>(0);  // of A, each [16, 8]
  const auto number = [&](int r, int c) { return x[(3 * r + 5 * c) % 17]; };
  for (int i = thread(); i < 256; i += kThreads) halves.store(i, from_float<bf16>(number(i / 8 % 16, i / 128 * 8 + i % 8)));
  barrier();
  if (warp() == 0) {
    uint32_t a[4], b[4];
    load_matrices(a, halves + lane() * 8);
    load_matrices_transposed(b, halves + (lane() % 16) * 8);  // 8 columns, twice
    float d[4] = {};
    multiply(d, a, b[0], b[1], static_cast<const bf16*>(nullptr));
    for (int i = 0; i < 4; i++) {
      const int r = lane() / 4 + i / 2 * 8, c = 2 * (lane() % 4) + i % 2;
      float sum = 0.0f;
      for (int k = 0; k < 16; k++) sum += number(r, k) * number(k, c);
      y[4 * lane() + i] = sum - d[i];
    }
  }
}

// The same for A [16, 32] with 2 of each 4 columns, whose metadata either half of the lanes gives: y is 0 too.
SK_KERNEL(kThreads) multiplied_sparse(const float* x, float* y) {
  if (warp() != 0) return;
  const int g = lane() / 4, t = lane() % 4;
  const auto number = [&](int r, int c) { return x[(3 * r + 5 * c) % 17]; };
  const auto pair = [&](int r, int c) {
    return uint32_t(from_float<bf16>(number(r, c)).bits) | uint32_t(from_float<bf16>(number(r, c + 1)).bits) << 16;
  };
  const auto column_pair = [&](int r, int c) {
    return uint32_t(from_float<bf16>(number(r, c)).bits) | uint32_t(from_float<bf16>(number(r + 1, c)).bits) << 16;
  };
  const auto first = [](int r, int group) { return (r + group) % 3; };
  const auto second = [](int r, int group) { return 3 - (r + 2 * group) % (3 - (r + group) % 3); };
  uint32_t a[4], b[4], metadata = 0;
  for (int i = 0; i < 4; i++) {
    a[i] = pair(g + i % 2 * 8, 2 * t + i / 2 * 8);
    b[i] = column_pair(2 * t + 8 * i, g);
  }
  for (int i = 0; i < 8; i++) {
    const int r = g + i / 4 * 8, group = t % 2 * 4 + i % 4;
    metadata |= uint32_t(first(r, group) | second(r, group) << 2) << (4 * i);
  }
  float d[4] = {};
  multiply_sparse<0>(d, a, b, t < 2 ? metadata : 0, static_cast<const bf16*>(nullptr));
  multiply_sparse<1>(d, a, b, t < 2 ? 0 : metadata, static_cast<const bf16*>(nullptr));
  for (int i = 0; i < 4; i++) {
    const int r = g + i / 2 * 8, c = 2 * t + i % 2;
    float sum = 0.0f;
    for (int k = 0; k < 16; k++) {
      const int group = k / 2, row = 4 * group + (k % 2 ? second(r, group) : first(r, group));
      sum += 2.0f * number(r, k) * number(row, c);
    }
    y[4 * lane() + i] = sum - d[i];
  }
}

// --- with one -------------------------------------------------------------------------------------------------------------

SK_KERNEL(kThreads) missing_barrier_before_a_read(const float* x, float* y) {
  numbers().store(thread(), x[thread()]);
  barrier();
  numbers().store(thread(), x[thread()] + 1.0f);
  y[thread()] = numbers().load((thread() + 32) % kThreads);
}

SK_KERNEL(kThreads) missing_barrier_before_a_write(const float* x, float* y) {
  numbers().store(thread(), x[thread()]);
  barrier();
  y[thread()] = numbers().load((thread() + 32) % kThreads);
  numbers().store(thread(), 0.0f);
}

SK_KERNEL(kThreads) lanes_race(const float* x, float* y) {
  numbers().store(thread(), x[thread()]);
  y[thread()] = numbers().load(thread() / 2);
}

SK_KERNEL(kThreads) two_writers(const float* x, float*) { numbers().store(thread() / 2, x[thread()]); }

SK_KERNEL(kThreads) unwritten(const float*, float* y) { y[thread()] = numbers().load(3); }

SK_KERNEL(kThreads) out_of_bounds(const float* x, float*) { numbers().store(thread() + 1, x[0]); }

SK_KERNEL(kThreads) misaligned(const float*, float*) {
  numbers().store(2 * thread() % 32 + 1, Vector<float, 2>{{1.0f, 2.0f}});
}

SK_KERNEL(kThreads) some_threads_at_the_barrier(const float*, float*) {
  if (thread() < 40) barrier();
}

SK_KERNEL(kThreads) threads_at_two_barriers(const float*, float*) {
  if (thread() < 32)
    barrier();
  else
    barrier();
}

SK_KERNEL(kThreads) some_lanes_exchange(const float* x, float* y) {
  if (lane() < 3) y[thread()] = shuffle(x[thread()], 0);
}

SK_KERNEL(kThreads) lanes_in_two_exchanges(const float* x, float* y) {
  if (lane() < 3)
    y[thread()] = shuffle(x[thread()], 0);
  else
    y[thread()] = votes(true);
}

SK_KERNEL(kThreads) copy_not_waited_for(const float* x, float* y) {
  if (thread() < 16) copy_async(numbers() + 4 * thread(), x + 4 * thread(), true);
  commit_copies();
  barrier();
  y[thread()] = numbers().load(thread());
}

SK_KERNEL(kThreads) copy_not_waited_for_at_the_end(const float* x, float*) {
  if (thread() < 16) copy_async(numbers() + 4 * thread(), x + 4 * thread(), true);
  commit_copies();
}

SK_KERNEL(kThreads) copy_seen_without_a_barrier(const float* x, float* y) {
  if (thread() < 16) copy_async(numbers() + 4 * thread(), x + 4 * thread(), true);
  commit_copies();
  wait_copies<0>();
  y[thread()] = numbers().load((thread() + 8) % 32);
}

SK_KERNEL(kThreads) metadata_does_not_ascend(const float*, float* y) {
  const uint32_t a[4] = {}, b[4] = {};
  float d[4] = {};
  multiply_sparse<0>(d, a, b, 0x44444484, static_cast<const fp16*>(nullptr));
  multiply_sparse<1>(d, a, b, 0x44445444, static_cast<const fp16*>(nullptr));
  y[thread()] = d[0];
}

SK_KERNEL(kThreads) copy_from_an_odd_address(const float* x, float*) { copy_async(numbers(), x + 1, true); }

void run(const char* name, void (*kernel)(const float*, float*), int threads = kThreads, int bytes = kBytes,
         bool zeros = false) {
  std::vector<float> x(kThreads), y(2 * kThreads);
  for (int i = 0; i < kThreads; i++) x[i] = float(i);
  const char* error = launch(kernel, {2}, threads, bytes, nullptr, x.data(), y.data());
  for (float v : y)
    if (zeros && v != 0.0f && error == nullptr) error = "wrong numbers";
  printf("%s: %s\n", name, error ? error : "ok");
}

}  // namespace

int main() {
#define RUN(kernel) run(#kernel, kernel)
  RUN(reversed), RUN(summed), RUN(ordered_by_the_warp), RUN(copied), RUN(one_warp_exchanges);
  run("copied_in_part", copied_in_part, kThreads, kBytes, true);
  run("multiplied", multiplied, kThreads, 512, true);
  run("multiplied_sparse", multiplied_sparse, kThreads, 0, true);
  RUN(missing_barrier_before_a_read), RUN(missing_barrier_before_a_write), RUN(lanes_race), RUN(two_writers);
  RUN(unwritten), RUN(out_of_bounds), RUN(misaligned), RUN(some_threads_at_the_barrier), RUN(threads_at_two_barriers);
  RUN(some_lanes_exchange), RUN(lanes_in_two_exchanges), RUN(copy_not_waited_for), RUN(copy_not_waited_for_at_the_end);
  RUN(copy_seen_without_a_barrier), RUN(copy_from_an_odd_address), RUN(metadata_does_not_ascend);
  run("half_a_warp", summed, 16);
  run("too_many_threads", summed, 2048);
  run("too_much_shared_memory", reversed, kThreads, 256 << 10);
  run("reversed again", reversed);  // an error leaves nothing behind
}
