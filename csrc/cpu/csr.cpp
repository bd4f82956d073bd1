// CSR on the CPU. Compiled once per ISA.
//
// All products run over panels of 64 batch columns (panel.h), so that one weight meets 64 floats: on AVX-512, 4 FMAs with a
// memory operand. What bounds them is L1 loads, one per FMA and one per weight: 5 per weight and panel where the FMA units
// need 4 cycles (Zen 4); a loop of nothing else reaches 78 % of the peak. That needs the operand in L1 and nothing else to
// wait for:
// - Columns are cut into tiles (tile_ptr); 128 columns x 64 floats are 32 KB. All rows pass over one tile before the next:
//   +35 % over rows that roam over a 256 KB panel in L2. The price: accumulators are reloaded once per tile and row.
// - In CSR order a row's weights in a tile lie a whole row apart from the next row's, which no prefetcher follows. So each
//   call first copies W into the order in which it is read, as 8-byte entries (value, offset of its operand in a panel):
//   +30 % (140 -> 185 GFLOP/s of 236, 4096 x 1024 at 80 %), for 2-10 % of the time. An entry is one load, and its value
//   reaches the vector unit from a general register: broadcasting it from memory costs 10 %.
// - The three gradients share one pass: a chunk of the output gradient's panel is packed once and meets both W transposed and
//   x's panel while it is in L2. Out of cache, the products are bound by memory, and this halves their traffic.
// - Threads share nothing that they write: each copies the weights and packs the panels that it needs itself. Where two cores
//   do not share an L3, reading what the other one wrote cost 5 times the copy itself.
// Tried and dropped: visiting rows by length, so that loop exits predict (-10 %: y is then visited at random); panels of 128
// floats (-5 to -10 %); prefetching the weights of 8 rows ahead instead of copying them (+10 % where the copy gives +30 %).

#include "sparsekern/csr.h"

#include <type_traits>

#include "kernels.h"
#include "panel.h"

namespace sk::SK_ISA {
namespace {

constexpr int kPrefetchRows = 8;
constexpr int64_t kL1Floats = 8192;         // 32 KB
constexpr int64_t kChunkFloats = 1 << 16;   // 256 KB: 1024 rows of a panel, several of which fit a 1 MB L2
constexpr int64_t kChunkEntries = 1 << 16;  // 512 KB of values and columns: what is copied at once

inline int64_t row_begin(const sk_csr& w, int64_t r) { return r < w.rows ? w.tile_ptr[r] : w.nnz; }

// W transposed: its tiles, but no column indices.
sk_csr transposed(const sk_csr& w) {
  return {w.cols, w.rows, w.nnz, w.t_tiles, w.tiles, nullptr, w.t_tile_ptr, w.tile_ptr, nullptr};
}

// Columns per tile: the smallest 128 * 2^k that makes w.tiles tiles.
int64_t tile_width(const sk_csr& w) {
  int64_t width = 128;
  while (ceil_div(w.cols, width) > w.tiles) width *= 2;
  return width;
}

// How many of the pattern's tiles to take at once: as many as fit L1.
int64_t tile_group(const sk_csr& w, int stride) {
  return max<int64_t>(1, kL1Floats / (min(tile_width(w), w.cols + 1) * stride));
}

// How a product is split over threads: `groups` of panels x `ranges` of rows or columns of W, a task each.
struct Split {
  int64_t groups, ranges;
};

// The split of least time for the busiest thread. A task takes `panel` + `panel_part` / ranges for each of its panels and
// `once` / ranges once; each group beyond the first costs `merge`. Any unit of time.
Split split_work(int64_t panels, int threads, int64_t least_ranges, int64_t most_ranges, double panel, double panel_part,
                 double once, double merge) {
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

// First row of range i of n, so that ranges have about equal work: entries, and 4 more per row for its accumulators.
int64_t range_begin(const sk_csr& w, int64_t i, int64_t n) {
  if (i == n) return w.rows;
  const double target = (double(w.nnz) + 4.0 * w.rows) * i / n;
  int64_t low = 0, high = w.rows;
  while (low < high) {
    const int64_t mid = (low + high) / 2;
    if (double(row_begin(w, mid)) + 4.0 * mid < target)
      low = mid + 1;
    else
      high = mid;
  }
  return low;
}

// Calls f with the number of vectors in `width` as a compile-time constant.
template <class F>
void with_vectors(int width, F f) {
  switch (width / kLanes) {
    case 1: return f(std::integral_constant<int, 1>{});
    case 2: return f(std::integral_constant<int, 2>{});
    case 3: return f(std::integral_constant<int, 3>{});
    case 4: return f(std::integral_constant<int, 4>{});
#if !defined(__AVX512F__)
    case 5: return f(std::integral_constant<int, 5>{});
    case 6: return f(std::integral_constant<int, 6>{});
    case 7: return f(std::integral_constant<int, 7>{});
    case 8: return f(std::integral_constant<int, 8>{});
#endif
  }
}

// --- W in reading order -------------------------------------------------------------------------------------------------

// A weight and where its operand is: float32 bits below, float offset into a panel (column * stride) above.
using Entry = uint64_t;

inline Entry entry(float value, uint32_t offset) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits | uint64_t(offset) << 32;
}

// Copies the entries of rows [r0, r1) to entries + row_begin(r0) on: for each group of tiles, row by row.
template <class T>
void pack_rows(const sk_csr& w, const T* values, int64_t group, int64_t r0, int64_t r1, int stride, Entry* entries) {
  Entry* out = entries + row_begin(w, r0);
  const Entry* out_end = entries + row_begin(w, r1);
  for (int64_t t = 0; t < w.tiles; t += group) {
    const int32_t* begins = w.tile_ptr + t * w.rows;
    const int32_t* ends = w.tile_ptr + min(t + group, w.tiles) * w.rows;
    for (int64_t r = r0; r < r1; r++) {
      if (const int64_t ahead = r + kPrefetchRows; ahead < r1) {
        __builtin_prefetch(values + begins[ahead]);
        __builtin_prefetch(w.col_idx + begins[ahead]);
      }
      const int64_t k = begins[r], n = ends[r] - k;
      if (k + n + kLanes <= w.nnz && out + n + kLanes <= out_end) {
        // Whole vectors: what is written past n is overwritten by the next row.
        for (int64_t i = 0; i < n; i += kLanes) {
          uvec columns;
          memcpy(&columns, w.col_idx + k + i, sizeof columns);
          store_entries(out + i, load(values + k + i), columns * uint32_t(stride));
        }
      } else {
        for (int64_t i = 0; i < n; i++)
          out[i] = entry(to_float(values[k + i]), uint32_t(w.col_idx[k + i]) * uint32_t(stride));
      }
      out += n;
    }
  }
}

// Copies the entries in column tiles [t0, t1), transposed, to their slots: block by block of W, a tile of rows x a tile of
// columns, whose 8 * nnz bytes stay in L1; within a block by column, rows ascending. starts[(t - t0) * wt.tiles + i] becomes
// the offset of the entries of column tile t and row tile i. Slots are computed once per pattern: finding them here by a
// counting sort, in place of keeping 4 bytes per nonzero, takes 2.5 times as long.
template <class T>
void pack_transposed(const sk_csr& w, const sk_csr& wt, const T* values, int64_t t0, int64_t t1, int stride, Entry* entries,
                     int32_t* starts) {
  const int64_t width = tile_width(w), t_width = tile_width(wt);
  int32_t at = int32_t(row_begin(wt, min(t0 * width, wt.rows)));
  for (int64_t t = t0; t < t1; t++) {
    const int32_t* begins = w.tile_ptr + t * w.rows;
    const int32_t* ends = begins + w.rows;
    for (int64_t i = 0; i < wt.tiles; i++) {
      *starts++ = at;
      for (int64_t r = i * t_width; r < min((i + 1) * t_width, w.rows); r++) {
        if (const int64_t ahead = r + kPrefetchRows; ahead < w.rows) {
          __builtin_prefetch(values + begins[ahead]);
          __builtin_prefetch(w.t_slot + begins[ahead]);
        }
        for (int32_t k = begins[r]; k < ends[r]; k++)
          entries[w.t_slot[k]] = entry(to_float(values[k]), uint32_t(r * stride));
        at += ends[r] - begins[r];
      }
    }
  }
}

// --- forward ------------------------------------------------------------------------------------------------------------

// y rows [r0, r1) += (or, for the first tile, = bias +) their entries in tiles [t, u), for a panel of NV vectors.
// Returns the entry after the last one used.
template <int NV, class T>
const Entry* linear_rows(const sk_csr& w, const Entry* entry, int64_t t, int64_t u, int64_t r0, int64_t r1, const float* x,
                         const T* bias, int stride, float* y) {
  const int32_t* begins = w.tile_ptr + t * w.rows;
  const int32_t* ends = w.tile_ptr + u * w.rows;
  for (int64_t r = r0; r < r1; r++, y += stride) {
    const Entry* end = entry + (ends[r] - begins[r]);
    vec acc[NV];
    if (t == 0) {
      const vec b = bias ? broadcast(to_float(bias[r])) : vec{};
      for (int j = 0; j < NV; j++) acc[j] = b;
    } else {
      if (entry == end) continue;
      for (int j = 0; j < NV; j++) acc[j] = load(y + j * kLanes);
    }
    for (; entry < end; entry++) {
      const vec v = broadcast_low(*entry);
      const float* operand = x + (*entry >> 32);
      for (int j = 0; j < NV; j++) acc[j] += v * load(operand + j * kLanes);
    }
    for (int j = 0; j < NV; j++) store(y + j * kLanes, acc[j]);
  }
  return entry;
}

// Rows [r0, r1) of y for one panel. In the last tile, finished rows leave at once, kLanes at a time: their stores drain
// while the next rows compute.
template <int NV, class T>
void linear_panel(const sk_csr& w, const Entry* entry, int64_t group, int64_t r0, int64_t r1, const float* x, const T* bias,
                  const sk_matrix& y, Slice s, float* y_panel) {
  int64_t t = 0;
  for (; t + group < w.tiles; t += group)
    entry = linear_rows<NV>(w, entry, t, t + group, r0, r1, x, bias, s.stride, y_panel);
  for (int64_t r = r0; r < r1; r += kLanes) {
    const int64_t end = min(r + kLanes, r1);
    float* rows = y_panel + (r - r0) * s.stride;
    prefetch_unpack<T>(y, r, end, s);
    entry = linear_rows<NV>(w, entry, t, w.tiles, r, end, x, bias, s.stride, rows);
    unpack<T>(y, r, end, s, rows);
  }
}

// A batch of at most kLanes: copying W would cost as much as multiplying with it, so it is read in place, whole rows at a
// time: their bytes bound it, and the hardware prefetches them. x's panel, one vector wide, is in L2; in tiles that fit L1 it
// took twice as long at 95 %, with W out of cache.
template <class T>
void linear_few(const sk_csr& w, const T* values, int64_t r0, int64_t r1, const float* x, const T* bias, const sk_matrix& y,
                Slice s, float* y_panel) {
  for (int64_t r = r0; r < r1; r++) {
    vec sum[4] = {bias ? broadcast(to_float(bias[r])) : vec{}};  // 4: to hide the FMA latency
    int64_t k = row_begin(w, r);
    const int64_t end = row_begin(w, r + 1);
    for (; k + 4 <= end; k += 4)
      for (int i = 0; i < 4; i++)
        sum[i] += broadcast(to_float(values[k + i])) * load(x + int64_t(w.col_idx[k + i]) * kLanes);
    for (; k < end; k++) sum[0] += broadcast(to_float(values[k])) * load(x + int64_t(w.col_idx[k]) * kLanes);
    store(y_panel + (r - r0) * kLanes, (sum[0] + sum[1]) + (sum[2] + sum[3]));
  }
  unpack<T>(y, r0, r1, s, y_panel);
}

// One batch row: a dot product per row of W, x gathered from L1. Scalar: 0.34 ns per weight on Zen 4, bound by its 3 loads,
// where gather instructions take 0.38, and the compiler's own vectors of four inserts (turned off for this file) 0.72.
template <class T>
void linear_single(const sk_csr& w, const T* values, int64_t r0, int64_t r1, const float* x, const T* bias,
                   const sk_matrix& y) {
  constexpr int kSums = 8;  // FMA latency 4 x 2 per cycle
  T* data = static_cast<T*>(y.data);
  for (int64_t r = r0; r < r1; r++) {
    int64_t k = row_begin(w, r);
    const int64_t end = row_begin(w, r + 1);
    float sum[kSums] = {};
    for (; k + kSums <= end; k += kSums)
      for (int i = 0; i < kSums; i++) sum[i] += to_float(values[k + i]) * x[w.col_idx[k + i]];
    for (; k < end; k++) sum[0] += to_float(values[k]) * x[w.col_idx[k]];
    for (int i = 1; i < kSums; i++) sum[0] += sum[i];
    store_one(data + r * y.stride_feature, sum[0] + (bias ? to_float(bias[r]) : 0.0f));
  }
}

Split forward_split(const sk_csr& w, int64_t batch, int threads) {
  const double columns = panel_stride(batch);
  return split_work(ceil_div(batch, kPanel), threads, 1, max<int64_t>(1, w.rows), columns * w.cols * kFloatCost,
                    columns * (w.rows * kFloatCost + w.nnz * kColumnCost), batch <= kLanes ? 0.0 : w.nnz * kEntryCost, 0.0);
}

template <class T>
void linear(const sk_csr& w, const T* values, const sk_matrix& x, const T* bias, const sk_matrix& y,
            const sk_threads& threads) {
  const int stride = panel_stride(x.batch);
  const int64_t panels = ceil_div(x.batch, kPanel), group = tile_group(w, stride);
  const Split split = forward_split(w, x.batch, threads.threads);
  const bool few = x.batch <= kLanes;
  // Rows at a time: a chunk's accumulators, and its weights while they are copied, fit L2.
  const int64_t chunk = max<int64_t>(kLanes, min(kChunkFloats / stride, kChunkEntries * w.rows / max<int64_t>(1, w.nnz)));
  parallel_for(threads, split.groups * split.ranges, 2.0 * x.batch * (w.nnz + w.rows), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; task++) {
      const int64_t g = task / split.ranges, range = task % split.ranges;
      const int64_t first_row = range_begin(w, range, split.ranges), last_row = range_begin(w, range + 1, split.ranges);
      const int64_t first = g * panels / split.groups, last = (g + 1) * panels / split.groups;
      const int64_t first_entry = row_begin(w, first_row), count = few ? 0 : row_begin(w, last_row) - first_entry;
      Entry* const entries = scratch<Use::kWeights>().get<Entry>(count) - first_entry;
      for (int64_t r = first_row; !few && r < last_row; r += chunk)
        pack_rows(w, values, group, r, min(r + chunk, last_row), stride, entries);
      float* const x_panel = scratch<Use::kInput>().get<float>(w.cols * stride);
      float* const y_panel = scratch<Use::kOutput>().get<float>(chunk * stride);
      for (int64_t p = first; p < last; p++) {
        const Slice s = slice(x.batch, p);
        if (x.batch > 1)
          pack<T>(x, 0, w.cols, s, x_panel);
        else
          for (int64_t f = 0; f < w.cols; f++) x_panel[f] = to_float(static_cast<const T*>(x.data)[f * x.stride_feature]);
        for (int64_t r0 = first_row; r0 < last_row; r0 += chunk) {
          const int64_t r1 = min(r0 + chunk, last_row);
          if (x.batch == 1)
            linear_single(w, values, r0, r1, x_panel, bias, y);
          else if (few)
            linear_few(w, values, r0, r1, x_panel, bias, y, s, y_panel);
          else
            with_vectors(s.width, [&](auto nv) {
              linear_panel<nv()>(w, entries + row_begin(w, r0), group, r0, r1, x_panel, bias, y, s, y_panel);
            });
        }
      }
    }
  });
}

// --- backward -----------------------------------------------------------------------------------------------------------

// dot(row, x's column cols[i]) for i < M, over one panel; the lanes of i >= M are zero.
template <int NV, int M>
[[gnu::always_inline]] inline vec4 dots(const vec (&row)[NV], const int32_t* cols, int stride, const float* x) {
  vec acc[4] = {};
  for (int i = 0; i < M; i++) {
    const float* column = x + int64_t(cols[i]) * stride;
    acc[i] = row[0] * load(column);
    for (int j = 1; j < NV; j++) acc[i] += row[j] * load(column + j * kLanes);
  }
  return sum4(acc[0], acc[1], acc[2], acc[3]);
}

// Adds (or, without kAdd, stores) dot(g's row r, x's column cols[k]) over one panel to the next sum, for the entries of rows
// [r0, r1) in tile t, in that order. Returns the sum after the last one. g's row stays in registers; four entries share one
// reduction. The rest of a row's entries gets code of its own: padding them to four costs 15 % at 90 % sparsity.
template <int NV, bool kAdd>
float* weight_rows(const sk_csr& w, int64_t t, int64_t r0, int64_t r1, int stride, const float* g, const float* x,
                   float* sums) {
  const int32_t* begins = w.tile_ptr + t * w.rows;
  const int32_t* ends = begins + w.rows;
  const int32_t* cols = w.col_idx;
  for (int64_t r = r0; r < r1; r++, g += stride) {
    if (const int64_t ahead = r + kPrefetchRows; ahead < r1) __builtin_prefetch(cols + begins[ahead]);
    int32_t k = begins[r];
    const int32_t end = ends[r];
    if (k == end) continue;
    vec row[NV];
    for (int j = 0; j < NV; j++) row[j] = load(g + j * kLanes);
    for (; k + 4 <= end; k += 4, sums += 4) {
      vec4 total = dots<NV, 4>(row, cols + k, stride, x);
      if (kAdd) {
        vec4 old;
        memcpy(&old, sums, sizeof old);
        total += old;
      }
      memcpy(sums, &total, sizeof total);
    }
    if (k == end) continue;
    const vec4 total = end - k == 3   ? dots<NV, 3>(row, cols + k, stride, x)
                       : end - k == 2 ? dots<NV, 2>(row, cols + k, stride, x)
                                      : dots<NV, 1>(row, cols + k, stride, x);
    for (int i = 0; k < end; i++, k++, sums++) *sums = (kAdd ? *sums : 0.0f) + total[i];
  }
  return sums;
}

// sums[r] (+)= the sum of g's row r over one panel, for `rows` rows.
template <int NV>
void sum_rows(int64_t rows, int stride, const float* g, bool add, float* sums) {
  for (int64_t r = 0; r < rows; r += 4) {
    vec row[4] = {};
    for (int i = 0; i < min<int64_t>(4, rows - r); i++)
      for (int j = 0; j < NV; j++) row[i] += load(g + (r + i) * stride + j * kLanes);
    const vec4 total = sum4(row[0], row[1], row[2], row[3]);
    for (int i = 0; i < min<int64_t>(4, rows - r); i++) sums[r + i] = (add ? sums[r + i] : 0.0f) + total[i];
  }
}

// The backward pass is split into groups of panels x ranges of W's column tiles. Each group sums the gradients of values and
// bias in memory of its own; each range packs the gradient of y anew.
struct BackwardPlan {
  Split split;
  int64_t panels, chunk, chunks, value_floats, bias_floats;

  BackwardPlan(const sk_csr& w, int64_t batch, int threads) {
    const sk_csr wt = transposed(w);
    const int stride = panel_stride(batch);
    panels = ceil_div(batch, kPanel);
    // A range's panels of x and of its gradient, up to 384 KB each, stay in L2.
    split = split_work(panels, threads, ceil_div(w.cols * stride, kChunkFloats * 3 / 2), w.tiles,
                       stride * w.rows * kFloatCost, stride * (2 * w.cols * kFloatCost + 2 * w.nnz * kColumnCost),
                       w.nnz * kEntryCost * 3, w.nnz * kFloatCost * 2);
    // Rows of W at a time, about 512 where tiles are narrower: whole tiles, equally many.
    const int64_t t_width = tile_width(wt);
    chunk = ceil_div(ceil_div(w.rows, ceil_div(w.rows, max<int64_t>(512, t_width))), t_width) * t_width;
    chunks = ceil_div(w.rows, chunk);
    value_floats = ceil_div(w.nnz + kLanes, 16) * 16;
    bias_floats = ceil_div(w.rows + kLanes, 16) * 16;
  }

  // The sums of each group, and where those of each (chunk, tile) begin.
  int64_t bytes(const sk_csr& w) const {
    return split.groups * (value_floats + bias_floats) * sizeof(float) + chunks * w.tiles * sizeof(int32_t);
  }
};

template <class T>
void backward(const sk_csr& w, const T* values, const sk_matrix& grad, const sk_matrix* x, const sk_matrix* grad_x,
              T* grad_values, T* grad_bias, void* workspace, const sk_threads& threads) {
  const sk_csr wt = transposed(w);
  const BackwardPlan plan(w, grad.batch, threads.threads);
  const int64_t groups = plan.split.groups, ranges = plan.split.ranges, chunk = plan.chunk;
  const int stride = panel_stride(grad.batch);
  const int64_t width = tile_width(w), t_width = tile_width(wt);
  const auto value_sums = [&](int64_t g) {
    return static_cast<float*>(workspace) + g * (plan.value_floats + plan.bias_floats);
  };
  const auto bias_sums = [&](int64_t g) { return value_sums(g) + plan.value_floats; };
  int32_t* const sum_starts =
      reinterpret_cast<int32_t*>(value_sums(groups));  // of each (chunk, tile): the same in all groups
  const auto first_tile = [&](int64_t range) { return range * w.tiles / ranges; };
  const auto column = [&](int64_t tile) { return min(tile * width, w.cols); };

  parallel_for(threads, groups * ranges, 4.0 * grad.batch * (w.nnz + w.rows), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; task++) {
      const int64_t g = task / ranges, range = task % ranges;
      const int64_t t0 = first_tile(range), t1 = first_tile(range + 1), c0 = column(t0), c1 = column(t1);
      const int64_t first = g * plan.panels / groups, last = (g + 1) * plan.panels / groups;
      const int64_t first_entry = row_begin(wt, c0), count = row_begin(wt, c1) - first_entry;
      Entry* const entries = scratch<Use::kWeights>().get<Entry>(grad_x ? count : 0) - first_entry;
      int32_t* const starts = scratch<Use::kStarts>().get<int32_t>((t1 - t0) * wt.tiles);
      if (grad_x != nullptr) pack_transposed(w, wt, values, t0, t1, stride, entries, starts);
      float* const g_panel = scratch<Use::kOutput>().get<float>(min(chunk, w.rows) * stride);
      float* const x_panel = scratch<Use::kInput>().get<float>((c1 - c0) * stride);
      float* const grad_x_panel = scratch<Use::kGradient>().get<float>((c1 - c0) * stride);
      for (int64_t p = first; p < last; p++) {
        const Slice s = slice(grad.batch, p);
        // Sums stand in the order in which they are visited: range by range, chunk by chunk, tile by tile, row by row.
        float* sums = value_sums(g) + row_begin(wt, c0);
        if (grad_values != nullptr) pack<T>(*x, c0, c1, s, x_panel);
        for (int64_t r0 = 0; r0 < w.rows; r0 += chunk) {
          const int64_t r1 = min(r0 + chunk, w.rows);
          pack<T>(grad, r0, r1, s, g_panel);
          with_vectors(s.width, [&](auto nv) {
            if (grad_bias != nullptr && range == 0) sum_rows<nv()>(r1 - r0, stride, g_panel, p != first, bias_sums(g) + r0);
            // A tile of g stays in L1 while all columns pass over it.
            for (int64_t i = r0 / t_width; grad_x != nullptr && i * t_width < r1; i++)
              for (int64_t t = t0; t < t1; t++) {
                float* const y = grad_x_panel + (column(t) - c0) * stride;
                linear_rows<nv(), T>(wt, entries + starts[(t - t0) * wt.tiles + i], i, i + 1, column(t), column(t + 1),
                                     g_panel - r0 * stride, nullptr, stride, y);
                if (i + 1 == wt.tiles) unpack<T>(*grad_x, column(t), column(t + 1), s, y);
              }
            // A tile of x stays in L1 while the chunk's rows pass over it.
            for (int64_t t = t0; grad_values != nullptr && t < t1; t++) {
              if (task < ranges && p == first) sum_starts[r0 / chunk * w.tiles + t] = int32_t(sums - value_sums(g));
              sums = (p == first ? weight_rows<nv(), false> : weight_rows<nv(), true>)(w, t, r0, r1, stride, g_panel,
                                                                                       x_panel - c0 * stride, sums);
            }
          });
        }
      }
    }
  });

  // Sum the groups in a fixed order, and put the sums where they belong: whole chunks of rows per thread, because two threads
  // that write to one cache line of grad_values cost more than reading what the other one summed.
  const auto sum_groups = [&](auto part, int64_t at) {
    vec total = load(part(0) + at);
    for (int64_t g = 1; g < groups; g++) total += load(part(g) + at);
    return total;
  };
  if (grad_values != nullptr)
    parallel_for(threads, plan.chunks * w.tiles, 2.0 * groups * w.nnz, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t t = i % w.tiles, r0 = i / w.tiles * chunk;
        int64_t at = sum_starts[i];
        for (int64_t r = r0; r < min(r0 + chunk, w.rows); r++) {
          const int64_t k = w.tile_ptr[t * w.rows + r], n = w.tile_ptr[(t + 1) * w.rows + r] - k;
          for (int64_t j = 0; j < n; j += kLanes) store_first(grad_values + k + j, sum_groups(value_sums, at + j), n - j);
          at += n;
        }
      }
    });
  if (grad_bias != nullptr)
    for (int64_t r = 0; r < w.rows; r += kLanes) store_first(grad_bias + r, sum_groups(bias_sums, r), w.rows - r);
}

}  // namespace

const CsrKernels csr_kernels = {
    [](const sk_csr* w, const void* values, const sk_matrix* x, const void* bias, const sk_matrix* y, sk_dtype dtype,
       const sk_threads* threads) {
      const auto run = [&](auto* typed) {
        using T = const std::remove_pointer_t<decltype(typed)>;
        linear(*w, static_cast<T*>(values), *x, static_cast<T*>(bias), *y, *threads);
      };
      dtype == SK_BFLOAT16 ? run((bf16*)nullptr) : run((float*)nullptr);
    },
    [](const sk_csr* w, int64_t batch, const sk_threads* threads) -> int64_t {
      return BackwardPlan(*w, batch, threads->threads).bytes(*w);
    },
    [](const sk_csr* w, const void* values, const sk_matrix* grad, const sk_matrix* x, const sk_matrix* grad_x,
       void* grad_values, void* grad_bias, void* workspace, sk_dtype dtype, const sk_threads* threads) {
      const auto run = [&](auto* typed) {
        using T = std::remove_pointer_t<decltype(typed)>;
        backward(*w, static_cast<const T*>(values), *grad, x, grad_x, static_cast<T*>(grad_values),
                 static_cast<T*>(grad_bias), workspace, *threads);
      };
      dtype == SK_BFLOAT16 ? run((bf16*)nullptr) : run((float*)nullptr);
    },
};

}  // namespace sk::SK_ISA
