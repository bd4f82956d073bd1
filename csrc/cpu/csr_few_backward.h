// The gradients of csr_linear for a few batch rows. As in csr_few.h, W is read in place, whole rows at a time: one pass
// over a row's entries computes both
//
//   grad_values[k] = sum over b of grad[b, r] x[b, column]    and    grad_x[:, column] += values[k] grad[:, r],
//
// so that every weight, index and gradient of a weight moves once. Threads share the rows; each sums grad_x in a panel of
// its own, and the panels are added up at the end. csr.cpp has the figures.
//
// One batch row is bound by memory: 14 bytes per float32 weight with 16-bit columns, 4 of them because a line of
// grad_values is fetched before it is written. In the caches it takes 1.5 cycles per weight, for 1.25 stores. More rows are
// bound by their arithmetic, 4.5 cycles for 16, no matter whether the panel fits L1 or L2. Tried and dropped: tiles of
// columns whose panel fits L1 (1.3 to 2.5 times as long: the prefetchers lose a row's short pieces, and explicit prefetches
// bring back half of it); 32 rows at once (1.2 to 1.7 times two passes of 16: that panel leaves L2); scalar arithmetic for
// one row (+50 %); asking at run time which gradients are wanted (+20 % for one row, +5 % for more).
#pragma once

#include "csr_few.h"

namespace sk::SK_ISA {
namespace {

// More than kLanes batch rows take a pass for each kLanes. Copying W as csr_backward.h does takes longer than two passes
// (1.7 to 2.7 times where W has millions of nonzeros, 0.8 to 1.9 for 50 to 500 thousand), and, for large W, longer than
// four (1.2 to 1.7 times).
constexpr int64_t kLargeWeight = 3 << 18;  // nonzeros; 8 MB of what moves
inline int64_t few_backward_rows(const sk_csr& w, sk_dtype dtype) {
  if (dtype == SK_BFLOAT16) return kLanes;  // a second pass would add to sums that are rounded
  return (w.nnz > kLargeWeight ? 4 : 2) * kLanes;
}

// Entries. The streams of W compete with the panel for the hardware prefetcher, which fetches them too late: explicit
// prefetches save 20 to 30 % of the time of one batch row, 10 % of more, where W is not in L2.
constexpr int64_t kFewAhead = 256;

template <int n>
using Count = std::integral_constant<int, n>;

inline vec4 load4(const float* p) { return load_as<vec4>(p); }
inline vec4 load4(const bf16* p) {
  Vector<uint16_t, 4>::type numbers;
  memcpy(&numbers, p, sizeof numbers);
  return (vec4)(__builtin_convertvector(numbers, uvec4) << 16);
}

// The first of several passes stores its gradient of the weights, the others add to it.
template <int M, class T>
[[gnu::always_inline]] inline void put(vec4 sums, bool add, T* out) {
  if (add)
    for (int i = 0; i < M; i++) sums[i] += to_float(out[i]);
  if constexpr (M == 4)
    store(out, sums);
  else
    for (int i = 0; i < M; i++) store_one(out + i, sums[i]);
}

// Entries k to k + M of a row whose gradient of y is grad[0 .. W). The panel has 2 W floats for each column: x's W numbers,
// then the W sums of its gradient, one or two cache lines. Dot products are summed in vectors of 8, so that most of what
// sum4 does takes half the time that it takes with 16: 6 % of the whole.
template <int W, int M, bool kInput, bool kValues, class I, class T>
[[gnu::always_inline]] inline void few_entries(const T* values, const I* columns, int64_t k, const float* grad, bool add,
                                               float* panel, T* grad_values) {
  using V = typename Vector<float, W>::type;
  constexpr int kPart = W < 8 ? W : 8;
  using Part = typename Vector<float, kPart>::type;
  float* column[M];
  for (int i = 0; i < M; i++) column[i] = panel + int64_t(columns[k + i]) * (2 * W);
  if constexpr (kValues) {
    Part dots[4] = {};
    for (int i = 0; i < M; i++)
      for (int b = 0; b < W; b += kPart) dots[i] += load_as<Part>(grad + b) * load_as<Part>(column[i] + b);
    put<M>(sum4(dots[0], dots[1], dots[2], dots[3]), add, grad_values + k);
  }
  if constexpr (kInput) {  // a row's columns differ: all loads may precede all stores
    V sums[M];
    for (int i = 0; i < M; i++) sums[i] = load_as<V>(column[i] + W) + (to_float(values[k + i]) - V{}) * load_as<V>(grad);
    for (int i = 0; i < M; i++) store(column[i] + W, sums[i]);
  }
}

// Fetches what entries k + kFewAhead on need.
template <bool kInput, bool kValues, class I, class T>
[[gnu::always_inline]] inline void fetch_entries(const T* values, const I* columns, int64_t k, T* grad_values) {
  __builtin_prefetch(columns + k + kFewAhead);
  if constexpr (kInput) __builtin_prefetch(values + k + kFewAhead);
  if constexpr (kValues) __builtin_prefetch(grad_values + k + kFewAhead, 1);
}

// Row r of W, whose gradient of y is grad[0 .. W).
template <int W, bool kInput, bool kValues, class I, class T>
void few_row(const sk_csr& w, const T* values, int64_t r, const float* grad, bool add, float* panel, T* grad_values) {
  const I* const columns = static_cast<const I*>(w.columns);
  int64_t k = row_begin(w, r);
  const int64_t end = row_begin(w, r + 1);
  float g[W];  // a copy stays in registers, since no store can change it
  memcpy(g, grad, sizeof g);
  const auto entries = [&](auto count) __attribute__((always_inline)) {
    few_entries<W, count(), kInput, kValues>(values, columns, k, g, add, panel, grad_values);
    k += count();
  };
  while (k + 8 <= end) {
    fetch_entries<kInput, kValues>(values, columns, k, grad_values);
    entries(Count<4>{});
    entries(Count<4>{});
  }
  if (k + 4 <= end) entries(Count<4>{});
  switch (end - k) {
    case 3: return entries(Count<3>{});
    case 2: return entries(Count<2>{});
    case 1: return entries(Count<1>{});
  }
}

// The same for one batch row: a column's x and sum move as one number of 8 bytes.
template <bool kInput, bool kValues, class I, class T>
void single_row(const sk_csr& w, const T* values, int64_t r, const float* g, bool add, float* panel, T* grad_values) {
  const I* const columns = static_cast<const I*>(w.columns);
  const float grad = *g;
  int64_t k = row_begin(w, r);
  const int64_t end = row_begin(w, r + 1);
  using Pairs = Vector<double, 2>::type;
  using Four = std::make_integer_sequence<int, 4>;
  const auto pair = [&](uint32_t column) {
    double numbers;
    memcpy(&numbers, panel + 2 * int64_t(column), sizeof numbers);
    return numbers;
  };
  const auto set_pair = [&](uint32_t column, double numbers) {
    memcpy(panel + 2 * int64_t(column), &numbers, sizeof numbers);
  };
  for (; k + 8 <= end; k += 8) {
    fetch_entries<kInput, kValues>(values, columns, k, grad_values);
    const Columns<I> c(columns + k);
    for (int i = 0; i < 8; i += 4) {
      const vec4 low = (vec4)Pairs{pair(c[i]), pair(c[i + 1])}, high = (vec4)Pairs{pair(c[i + 2]), pair(c[i + 3])};
      if constexpr (kValues)
        put<4>(shuffle(low, high, [](int l) constexpr { return 2 * l; }, Four{}) * grad, add, grad_values + k + i);
      if constexpr (kInput) {
        const vec4 terms = load4(values + k + i) * grad;
        const vec4 first = shuffle(terms, vec4{}, [](int l) constexpr { return l % 2 ? l / 2 : 4; }, Four{});
        const vec4 last = shuffle(terms, vec4{}, [](int l) constexpr { return l % 2 ? 2 + l / 2 : 4; }, Four{});
        const Pairs low_sums = (Pairs)(low + first), high_sums = (Pairs)(high + last);
        set_pair(c[i], low_sums[0]);
        set_pair(c[i + 1], low_sums[1]);
        set_pair(c[i + 2], high_sums[0]);
        set_pair(c[i + 3], high_sums[1]);
      }
    }
  }
  for (; k < end; k++) {
    float* const column = panel + 2 * int64_t(columns[k]);
    if constexpr (kValues) put<1>(vec4{column[0] * grad}, add, grad_values + k);
    if constexpr (kInput) column[1] += to_float(values[k]) * grad;
  }
}

// out[r] = the sum of g's row r, W floats, for `rows` rows; or that is added.
template <int W, class T>
void sum_batch(const float* g, int64_t rows, bool add, T* out) {
  for (int64_t r = 0; r < rows; r += 4, g += 4 * W) {
    vec4 sums;
    if constexpr (W == 1) {
      sums = load_as<vec4>(g);
    } else {
      using V = typename Vector<float, W>::type;
      sums = sum4(load_as<V>(g), load_as<V>(g + W), load_as<V>(g + 2 * W), load_as<V>(g + 3 * W));
    }
    for (int i = 0; i < min<int64_t>(4, rows - r); i++)
      store_one(out + r + i, sums[i] + (add ? to_float(out[r + i]) : 0.0f));
  }
}

// How the passes are split over threads: ranges of rows with a panel each, of which the workspace consists.
struct FewPlan {
  int64_t ranges, floats;

  FewPlan(const sk_csr& w, int64_t batch, int threads) {
    ranges = max<int64_t>(1, min<int64_t>(threads, w.rows));
    with_few_width(min<int64_t>(batch, kLanes), [&](auto width) {
      floats = ceil_div(w.cols * 2 * width() + kLanes, 16) * 16;  // pack moves whole vectors
    });
  }
  int64_t bytes() const { return ranges * floats * sizeof(float); }
};

// A row of W with one of those above.
template <class T>
using RowFunction = void (*)(const sk_csr& w, const T* values, int64_t r, const float* grad, bool add, float* panel,
                             T* grad_values);

// That for the gradients that are asked for, null for none.
template <int W, class T, class I>
RowFunction<T> row_function(const I*, bool input, bool values) {
  const auto with = [](auto kInput, auto kValues) -> RowFunction<T> {
    if constexpr (W == 1)
      return single_row<kInput(), kValues(), I, T>;
    else
      return few_row<W, kInput(), kValues(), I, T>;
  };
  if (input) return values ? with(std::true_type{}, std::true_type{}) : with(std::true_type{}, std::false_type{});
  return values ? with(std::false_type{}, std::true_type{}) : nullptr;
}

// Rows [r0, r1) of W and batch rows `batch`, at most W of them: grad_x's sums in `panel`, the others' where they belong.
template <int W, class T>
void backward_rows(const sk_csr& w, const T* values, RowFunction<T> row, const sk_matrix& grad, const sk_matrix* x,
                   Slice batch, int64_t r0, int64_t r1, float* panel, T* grad_values, T* grad_bias) {
  if (grad_values == nullptr)
    memset(panel, 0, w.cols * 2 * W * sizeof(float));
  else  // the sums are batch columns past the last one, which pack sets to zero
    pack<T>(*x, 0, w.cols, {batch.begin, batch.count, max(kLanes, 2 * W), 2 * W}, panel);
  float* const g = scratch<Use::kOutput>().get<float>((kFewRows + 3) * W + kLanes);
  const bool add = batch.begin > 0;
  for (; r0 < r1; r0 += kFewRows) {
    const int64_t end = min(r0 + kFewRows, r1);
    pack<T>(grad, r0, end, batch, g);
    if (grad_bias != nullptr) sum_batch<W>(g, end - r0, add, grad_bias + r0);
    for (int64_t r = r0; row != nullptr && r < end; r++) row(w, values, r, g + (r - r0) * W, add, panel, grad_values);
  }
}

// Columns [c0, c1) of grad_x = the sums of all panels, for batch rows `batch`. Numbers of x are added up with them, and not
// used.
template <int W, class T>
void sum_panels(const float* panels, const FewPlan& plan, const sk_matrix& grad_x, Slice batch, int64_t c0, int64_t c1) {
  float* const sums = scratch<Use::kOutput>().get<float>(kFewRows * 2 * W + kLanes);
  for (; c0 < c1; c0 += kFewRows) {
    const int64_t end = min(c0 + kFewRows, c1);
    for (int64_t j = 0; j < (end - c0) * 2 * W; j += kLanes) {
      const float* const part = panels + c0 * 2 * W + j;
      vec total = load(part);
      for (int64_t i = 1; i < plan.ranges; i++) total += load(part + i * plan.floats);
      store(sums + j, total);
    }
    unpack<T>(grad_x, c0, end, {batch.begin, batch.count, kLanes, 2 * W}, sums + W);
  }
}

template <class T>
void backward_few(const sk_csr& w, const T* values, const sk_matrix& grad, const sk_matrix* x, const sk_matrix* grad_x,
                  T* grad_values, T* grad_bias, void* workspace, const sk_threads& threads) {
  const FewPlan plan(w, grad.batch, threads.threads);
  const int64_t ranges = plan.ranges;
  float* const panels = static_cast<float*>(workspace);
  const auto pass = [&](auto width, int64_t begin, int64_t count) {
    constexpr int W = width();
    const Slice batch = {begin, count, kLanes, W};
    RowFunction<T> row = nullptr;
    with_columns(w, [&](auto* columns) { row = row_function<W, T>(columns, grad_x != nullptr, grad_values != nullptr); });
    parallel_for(threads, ranges, 4.0 * count * (w.nnz + w.rows), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; i++)
        backward_rows<W>(w, values, row, grad, x, batch, range_begin(w, i, ranges), range_begin(w, i + 1, ranges),
                         panels + i * plan.floats, grad_values, grad_bias);
    });
    if (grad_x != nullptr)
      parallel_for(threads, ceil_div(w.cols, kFewRows), 2.0 * ranges * W * w.cols, [&](int64_t first, int64_t last) {
        sum_panels<W, T>(panels, plan, *grad_x, batch, first * kFewRows, min(last * kFewRows, w.cols));
      });
  };
  for (int64_t begin = 0; begin < grad.batch; begin += kLanes) {
    const int64_t count = min<int64_t>(kLanes, grad.batch - begin);
    with_few_width(count, [&](auto width) { pass(width, begin, count); });
  }
}

}  // namespace
}  // namespace sk::SK_ISA
