// Panels: up to 64 batch columns of a matrix, feature-major and float32, contiguous: panel[feature * stride + column].
// A kernel that multiplies one weight with a whole row of a panel uses full vectors whatever the sparsity is. Packing is
// where batch-major data are transposed (in registers) and bfloat16 data are widened; all formats share it.
#pragma once

#include <cstdlib>
#include <new>
#include <type_traits>

#include "simd.h"
#include "sparsekern/common.h"

namespace sk::SK_ISA {

// 64 floats are 4 AVX-512 or 8 AVX2 accumulators; SSE's 16 registers hold 8 x 4 floats beside the operands.
constexpr int kPanel = kLanes >= 8 ? 64 : 32;

template <class T>
constexpr T min(T a, T b) {
  return a < b ? a : b;
}
template <class T>
inline T max(T a, T b) {
  return a > b ? a : b;
}
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Batch columns [begin, begin + count). Kernels compute `width` >= count columns, a whole number of vectors; panels of one
// batch all have the same `stride`, so that an offset into a panel fits each of them.
struct Slice {
  int64_t begin, count;
  int width, stride;
};

inline int panel_stride(int64_t batch) {
  return int(min<int64_t>(kPanel, max<int64_t>(1, ceil_div(batch, kLanes)) * kLanes));
}

inline Slice slice(int64_t batch, int64_t p) {
  const int64_t begin = p * kPanel, count = min<int64_t>(kPanel, batch - begin);
  return {begin, count, int(ceil_div(count, kLanes) * kLanes), panel_stride(batch)};
}

// Memory of one thread, kept from call to call. Fresh memory would cost page faults, and memory that another core wrote last
// costs more to write than to compute what goes there.
class Scratch {
 public:
  template <class T>
  T* get(int64_t count) {  // never null, so that offsets into it are defined
    const int64_t bytes = max<int64_t>(1, ceil_div(count * int64_t(sizeof(T)), 64)) * 64;
    if (bytes > bytes_) {
      free(data_);
      data_ = aligned_alloc(64, bytes);
      bytes_ = data_ ? bytes : 0;
      if (data_ == nullptr) throw std::bad_alloc();
    }
    return static_cast<T*>(data_);
  }
  ~Scratch() { free(data_); }

 private:
  void* data_ = nullptr;
  int64_t bytes_ = 0;
};

// Rows of a feature-major matrix lie a batch apart, which no hardware prefetcher follows. Fetched to L2, a cache line of a
// matrix in memory takes 2.7 ns, to L1 3.1, unaided 4 to 6.
constexpr int64_t kPrefetchFeatures = 16;

// Stores past the caches. Whole cache lines only, half of one at a time at least.
#if defined(__clang__)
inline void stream(float* p, vec v) { __builtin_nontemporal_store(v, reinterpret_cast<vec*>(p)); }
#elif defined(__AVX512F__)
inline void stream(float* p, vec v) { __builtin_ia32_movntps512(p, v); }
#elif defined(__AVX2__)
inline void stream(float* p, vec v) { __builtin_ia32_movntps256(p, v); }
#else
inline void stream(float* p, vec v) { store(p, v); }
#endif

// Makes them visible to other threads before whatever is stored later.
inline void finish_streams() {
#if defined(__x86_64__)
  __builtin_ia32_sfence();
#endif
}

// Whether unpack writes features [begin, ..) of these batch columns with stream. Two threads' panels share the rows of a
// feature-major matrix, and each takes some of the other's lines, by its prefetcher, just before they are written. Where
// two cores do not share an L3, a line so takes 4 to 27 ns, streamed 1.2 to 2: BSR products gain 20 to 30 %, more if the
// other core reads y at once. Where they do, they gain 2 to 10 %, and lose 1 to 5 % if y is read at once, 20 % if it has
// only 64 KB.
constexpr int64_t kStreamBytes = 256 << 10;
template <class T>
inline bool streams(const sk_matrix& m, int64_t begin, Slice s) {
  if (!std::is_same_v<T, float> || kLanes < 8 || m.batch * m.features * int64_t(sizeof(T)) < kStreamBytes) return false;
  const bool feature_major = m.stride_batch == 1;
  if (!feature_major && kLanes < 16) return false;  // lines are written a vector of features at a time
  return reinterpret_cast<uintptr_t>(m.data) % 64 == 0 &&
         ((feature_major ? m.stride_feature | s.begin | s.count : m.stride_batch | begin) & 15) == 0;
}

// This thread's scratch memory for one use. All products share it, so that less of it competes for the caches.
enum class Use { kWeights, kStarts, kInput, kOutput, kGradient };
template <Use use>
Scratch& scratch() {
  static thread_local Scratch memory;
  return memory;
}

// panel[(f - begin) * s.stride + c] = m[batch s.begin + c, f] for features [begin, end); columns past s.count are zero.
template <class T>
[[gnu::noinline]] void pack(const sk_matrix& m, int64_t begin, int64_t end, Slice s, float* panel) {
  const T* data = static_cast<const T*>(m.data) + s.begin * m.stride_batch + begin * m.stride_feature;
  const int64_t features = end - begin;
  if (m.stride_batch == 1) {
    for (int64_t f = 0; f < features; f++, data += m.stride_feature, panel += s.stride) {
      const T* const ahead = data + kPrefetchFeatures * m.stride_feature;
      if (s.count == kPanel)  // a loop of constant length
        for (int c = 0; c < kPanel; c += kLanes) {
          __builtin_prefetch(ahead + c, 0, 2);
          store(panel + c, load(data + c));
        }
      else
        for (int c = 0; c < s.width; c += kLanes) {
          __builtin_prefetch(ahead + c, 0, 2);
          store(panel + c, load_first(data + c, max<int64_t>(0, s.count - c)));
        }
    }
    return;
  }
  for (int64_t f = 0; f < features; f += kLanes) {
    const int64_t n = min<int64_t>(kLanes, features - f);
    for (int c = 0; c < s.width; c += kLanes) {
      vec block[kLanes];
      // kLanes rows are more streams than the hardware prefetcher follows: 2 cache lines ahead gives +15 %.
      for (int i = 0; i < kLanes; i++) __builtin_prefetch(data + (c + i) * m.stride_batch + f + 32);
      for (int i = 0; i < kLanes; i++)
        block[i] = c + i < s.count ? load_first(data + (c + i) * m.stride_batch + f, n) : vec{};
      transpose(block);
      for (int i = 0; i < n; i++) store(panel + (f + i) * s.stride + c, block[i]);
    }
  }
}

// The reverse: m[batch s.begin + c, f] = panel[(f - begin) * s.stride + c] for features [begin, end), c < s.count.
template <class T>
[[gnu::noinline]] void unpack(const sk_matrix& m, int64_t begin, int64_t end, Slice s, const float* panel) {
  T* data = static_cast<T*>(m.data) + s.begin * m.stride_batch + begin * m.stride_feature;
  const int64_t features = end - begin;
  const bool past = streams<T>(m, begin, s);
  const auto put = [&](T* to, vec v, int64_t n) __attribute__((always_inline)) {
    if constexpr (std::is_same_v<T, float>)
      if (past && n >= kLanes) return stream(to, v);
    store_first(to, v, n);
  };
  if (m.stride_batch == 1) {
    for (int64_t f = 0; f < features; f++)
      for (int64_t c = 0; c < s.count; c += kLanes)
        put(data + f * m.stride_feature + c, load(panel + f * s.stride + c), s.count - c);
    return;
  }
  for (int64_t f = 0; f < features; f += kLanes) {
    const int64_t n = min<int64_t>(kLanes, features - f);
    for (int c = 0; c < s.count; c += kLanes) {
      vec block[kLanes];
      for (int i = 0; i < kLanes; i++) block[i] = i < n ? load(panel + (f + i) * s.stride + c) : vec{};
      transpose(block);
      for (int i = 0; i < min<int64_t>(kLanes, s.count - c); i++) put(data + (c + i) * m.stride_batch + f, block[i], n);
    }
  }
}

// Fetches, for writing, what unpack of the same arguments will write. Inlined, because GCC takes a function that only
// prefetches for one without effects, and removes its calls.
template <class T>
[[gnu::always_inline]] inline void prefetch_unpack(const sk_matrix& m, int64_t begin, int64_t end, Slice s) {
  if (streams<T>(m, begin, s)) return;
  const T* data = static_cast<const T*>(m.data) + s.begin * m.stride_batch + begin * m.stride_feature;
  constexpr int kLine = 64 / sizeof(T);
  if (m.stride_batch == 1) {
    for (int64_t f = 0; f < end - begin; f++)
      for (int64_t c = 0; c < s.count; c += kLine) __builtin_prefetch(data + f * m.stride_feature + c, 1);
  } else {
    for (int64_t c = 0; c < s.count; c++) __builtin_prefetch(data + c * m.stride_batch, 1);
  }
}

// sums[r] (+)= the sum of the panel's row r, for `rows` rows.
inline void sum_rows(int64_t rows, Slice s, const float* panel, bool add, float* sums) {
  for (int64_t r = 0; r < rows; r += 4) {
    vec row[4] = {};
    for (int i = 0; i < min<int64_t>(4, rows - r); i++)
      for (int c = 0; c < s.width; c += kLanes) row[i] += load(panel + (r + i) * s.stride + c);
    const vec4 total = sum4(row[0], row[1], row[2], row[3]);
    for (int i = 0; i < min<int64_t>(4, rows - r); i++) sums[r + i] = (add ? sums[r + i] : 0.0f) + total[i];
  }
}

// Calls body(begin, end) on ranges of [0, n), in parallel unless the whole work is below what waking a thread costs
// (about 5 us, 100 kFLOP).
template <class F>
void parallel_for(const sk_threads& threads, int64_t n, double flops, F body) {
  if (n <= 0) return;
  const auto run = [&](int64_t begin, int64_t end) {
    body(begin, end);
    finish_streams();
  };
  if (threads.threads <= 1 || n == 1 || flops < 1e5) return run(int64_t(0), n);
  threads.parallel_for(
      n, [](int64_t begin, int64_t end, void* f) { (*static_cast<decltype(run)*>(f))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&run)));
}

// First row of range i of n, so that ranges have about equal work: work(r) is that of the rows before r.
template <class F>
int64_t balanced_begin(int64_t rows, int64_t i, int64_t n, F work) {
  if (i == n) return rows;
  const double target = work(rows) * double(i) / double(n);
  int64_t low = 0, high = rows;
  while (low < high) {
    const int64_t mid = (low + high) / 2;
    if (work(mid) < target)
      low = mid + 1;
    else
      high = mid;
  }
  return low;
}

// How a product is split over threads: `groups` of panels x `ranges` of rows or columns of W, a task each.
struct Split {
  int64_t groups, ranges;
};

// The split of least time for the busiest thread. A task takes `panel` + `panel_part` / ranges for each of its panels and
// `once` / ranges once; each group beyond the first costs `merge`. Any unit of time.
inline Split split_work(int64_t panels, int threads, int64_t least_ranges, int64_t most_ranges, double panel,
                        double panel_part, double once, double merge) {
  Split best = {1, 1};
  double least = -1.0;
  for (int64_t groups = 1; groups <= max<int64_t>(1, min<int64_t>(panels, threads)); groups++) {
    const int64_t ranges = max<int64_t>(1, min(max(ceil_div(threads, groups), least_ranges), most_ranges));
    const double task = ceil_div(panels, groups) * (panel + panel_part / ranges) + once / ranges;
    const double time = ceil_div(groups * ranges, threads) * task + (groups - 1) * merge;
    if (least < 0.0 || time < least) least = time, best = {groups, ranges};
  }
  return best;
}

// Costs for split_work, in ns on one core of Zen 4; only their ratios matter.
constexpr double kFloatCost = 0.2;     // pack or unpack one float
constexpr double kEntryCost = 0.35;    // copy one entry, 3 times that transposed
constexpr double kColumnCost = 0.017;  // one weight x one batch column

// Calls f with the number of vectors in `width` as a compile-time constant.
template <class F>
void with_vectors(int width, F f) {
  switch (width / kLanes) {
    case 1: return f(std::integral_constant<int, 1>{});
    case 2: return f(std::integral_constant<int, 2>{});
    case 3: return f(std::integral_constant<int, 3>{});
    case 4: return f(std::integral_constant<int, 4>{});
#if !defined(__AVX512F__) && !defined(SK_PLAIN_DOTS)
    case 5: return f(std::integral_constant<int, 5>{});
    case 6: return f(std::integral_constant<int, 6>{});
    case 7: return f(std::integral_constant<int, 7>{});
    case 8: return f(std::integral_constant<int, 8>{});
#endif
  }
}

}  // namespace sk::SK_ISA
