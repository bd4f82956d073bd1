// CSR on the CPU. Compiled once per ISA.
//
// All products run over panels of 64 batch columns (panel.h), so that one weight meets 64 floats: on AVX-512, 4 FMAs with a
// memory operand. What bounds them is L1 loads, one per FMA and one per weight: 5 per weight and panel where the FMA units
// need 4 cycles (Zen 4), 78 % of the peak at best. That needs the operand in L1 and nothing else to wait for:
// - Columns are cut into tiles (tile_ptr); 128 columns x 64 floats are 32 KB. All rows pass over one tile before the next:
//   +35 % over rows that roam over a 256 KB panel in L2. The price: accumulators are reloaded once per tile and row.
// - In CSR order a row's weights in a tile lie a whole row apart from the next row's, which no prefetcher follows. So each
//   call first copies W into the order in which it is read, as 8-byte entries (value, offset of its operand in a panel):
//   +30 % (140 -> 185 GFLOP/s of 236, 4096 x 1024 at 80 %), for 2-10 % of the time. An entry is one load, and its value
//   reaches the vector unit from a general register: broadcasting it from memory costs 10 %.
// - The three gradients share one pass: a chunk of the output gradient's panel is packed once and meets both W transposed and
//   x's panel while it is in L2. Out of cache, the products are bound by memory, and this halves their traffic.
// Tried and dropped: visiting rows by length, so that loop exits predict (-10 %: y is then visited at random); panels of 128
// floats (-5 to -10 %); prefetching the weights of 8 rows ahead instead of copying them (+10 % where the copy gives +30 %).

#include "panel.h"

#include <type_traits>

#include "kernels.h"
#include "sparsekern/csr.h"

namespace sk::SK_ISA {
namespace {

constexpr int kPrefetchRows = 8;
constexpr int64_t kL1Floats = 8192;         // 32 KB
constexpr int64_t kChunkFloats = 1 << 16;   // 256 KB: a panel or a chunk of its rows, several of which fit a 1 MB L2
constexpr int64_t kChunkEntries = 1 << 16;  // 512 KB of values and columns: what is copied at once

inline int64_t row_begin(const sk_csr& w, int64_t r) { return r < w.rows ? w.tile_ptr[r] : w.nnz; }

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

// How many row chunks: enough that a chunk's accumulators, and its weights while they are copied, fit L2, and that all
// threads have equally many.
int64_t chunk_count(const sk_csr& w, int stride, int threads) {
  const int64_t chunks = max(ceil_div(w.rows * stride, kChunkFloats), ceil_div(w.nnz, kChunkEntries));
  return min(ceil_div(max<int64_t>(1, chunks), threads) * threads, max<int64_t>(1, w.rows));
}

// First row of chunk c of `chunks`, so that chunks have about equal work: entries, and 4 more per row for its accumulators.
int64_t chunk_begin(const sk_csr& w, int64_t c, int64_t chunks) {
  if (c == chunks) return w.rows;
  const double target = (double(w.nnz) + 4.0 * w.rows) * c / chunks;
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

// Copies the entries of rows [r0, r1), for each group of tiles row by row, to `out`. Entry k has the value values[perm[k]],
// or values[k] without perm. starts[i], if given, becomes the offset from `base` of group i's entries.
template <class T>
void pack_entries(const sk_csr& w, const T* values, const int32_t* perm, int64_t group, int64_t r0, int64_t r1, int stride,
                  Entry* base, int32_t* starts) {
  Entry* out = base + row_begin(w, r0);
  const Entry* out_end = base + row_begin(w, r1);
  for (int64_t t = 0; t < w.tiles; t += group) {
    if (starts != nullptr) *starts++ = int32_t(out - base);
    const int32_t* begins = w.tile_ptr + t * w.rows;
    const int32_t* ends = w.tile_ptr + min(t + group, w.tiles) * w.rows;
    for (int64_t r = r0; r < r1; r++) {
      if (const int64_t ahead = r + kPrefetchRows; ahead < r1) {
        if (perm != nullptr)
          __builtin_prefetch(perm + begins[ahead]);
        else
          __builtin_prefetch(values + begins[ahead]);
        __builtin_prefetch(w.col_idx + begins[ahead]);
      }
      const int64_t k = begins[r], n = ends[r] - k;
      if (perm == nullptr && k + n + kLanes <= w.nnz && out + n + kLanes <= out_end) {
        // Whole vectors: what is written past n is overwritten by the next row.
        for (int64_t i = 0; i < n; i += kLanes) {
          uvec columns;
          memcpy(&columns, w.col_idx + k + i, sizeof columns);
          store_entries(out + i, load(values + k + i), columns * uint32_t(stride));
        }
      } else {
        for (int64_t i = 0; i < n; i++) {
          const float value = to_float(values[perm ? perm[k + i] : k + i]);
          uint32_t bits;
          memcpy(&bits, &value, sizeof bits);
          out[i] = bits | uint64_t(uint32_t(w.col_idx[k + i] * stride)) << 32;
        }
      }
      out += n;
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
    entry = linear_rows<NV>(w, entry, t, w.tiles, r, end, x, bias, s.stride, rows);
    unpack<T>(y, r, end, s, rows);
  }
}

// A batch of at most kLanes: copying W would cost as much as multiplying with it, so it is read in place.
// Bound by 3 loads per weight, about 1.3 cycles.
template <class T>
void linear_few(const sk_csr& w, const T* values, int64_t group, int64_t r0, int64_t r1, const float* x, const T* bias,
                const sk_matrix& y, Slice s, float* y_panel) {
  for (int64_t t = 0; t < w.tiles; t += group) {
    const int32_t* begins = w.tile_ptr + t * w.rows;
    const int32_t* ends = w.tile_ptr + min(t + group, w.tiles) * w.rows;
    for (int64_t r = r0; r < r1; r++) {
      float* row = y_panel + (r - r0) * kLanes;
      vec acc[2] = {t > 0 ? load(row) : bias ? broadcast(to_float(bias[r])) : vec{}, vec{}};
      for (int64_t k = begins[r]; k < ends[r]; k++)
        acc[k & 1] += broadcast(to_float(values[k])) * load(x + int64_t(w.col_idx[k]) * kLanes);
      store(row, acc[0] + acc[1]);
    }
  }
  unpack<T>(y, r0, r1, s, y_panel);
}

// One batch row: a dot product per row of W, x gathered from L1. Scalar, because on Zen 4 and older a gather costs
// as much as its loads; four sums hide the FMA latency. Bound by 3 loads per weight, about 1.3 cycles.
template <class T>
void linear_single(const sk_csr& w, const T* values, int64_t r0, int64_t r1, const float* x, const T* bias,
                   const sk_matrix& y) {
  T* data = static_cast<T*>(y.data);
  for (int64_t r = r0; r < r1; r++) {
    int64_t k = row_begin(w, r);
    const int64_t end = row_begin(w, r + 1);
    float sum[4] = {};
    for (; k + 4 <= end; k += 4)
      for (int i = 0; i < 4; i++) sum[i] += to_float(values[k + i]) * x[w.col_idx[k + i]];
    for (; k < end; k++) sum[0] += to_float(values[k]) * x[w.col_idx[k]];
    store_one(data + r * y.stride_feature,
              (bias ? to_float(bias[r]) : 0.0f) + ((sum[0] + sum[1]) + (sum[2] + sum[3])));
  }
}

template <class T>
void linear(const sk_csr& w, const T* values, const sk_matrix& x, const T* bias, const sk_matrix& y, void* workspace,
            const sk_threads& threads) {
  const int stride = panel_stride(x.batch);
  const int64_t panels = ceil_div(x.batch, kPanel), chunks = chunk_count(w, stride, threads.threads);
  const int64_t group = tile_group(w, stride);
  const bool few = x.batch <= kLanes;
  const double flops = 2.0 * x.batch * (w.nnz + w.rows);
  Entry* entries = static_cast<Entry*>(workspace);
  if (!few)
    parallel_for(threads, chunks, flops, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; c++)
        pack_entries<T>(w, values, nullptr, group, chunk_begin(w, c, chunks), chunk_begin(w, c + 1, chunks), stride, entries,
                        nullptr);
    });
  parallel_for(threads, panels * chunks, flops, [&](int64_t begin, int64_t end) {
    static thread_local Scratch x_scratch, y_scratch;
    float* x_panel = x_scratch.floats(w.cols * stride);
    int64_t packed = -1;
    for (int64_t task = begin; task < end; task++) {
      const int64_t p = task / chunks, c = task % chunks;
      const int64_t r0 = chunk_begin(w, c, chunks), r1 = chunk_begin(w, c + 1, chunks);
      float* y_panel = y_scratch.floats((r1 - r0) * stride);
      const Slice s = slice(x.batch, p);
      if (p != packed && x.batch > 1) pack<T>(x, 0, w.cols, s, x_panel);
      if (p != packed && x.batch == 1)
        for (int64_t f = 0; f < w.cols; f++) x_panel[f] = to_float(static_cast<const T*>(x.data)[f * x.stride_feature]);
      packed = p;
      if (x.batch == 1)
        linear_single(w, values, r0, r1, x_panel, bias, y);
      else if (few)
        linear_few(w, values, group, r0, r1, x_panel, bias, y, s, y_panel);
      else
        with_vectors(s.width, [&](auto nv) {
          linear_panel<nv()>(w, entries + row_begin(w, r0), group, r0, r1, x_panel, bias, y, s, y_panel);
        });
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

// sums[k] (+)= dot(g's row r, x's column cols[k]) over one panel, for the entries of rows [r0, r1) in tile t.
// g's row stays in registers; four entries share one reduction. The rest of a row's entries gets code of its own: padding
// them to four costs 15 % at 90 % sparsity.
template <int NV, bool kAdd>
void weight_rows(const sk_csr& w, int64_t t, int64_t r0, int64_t r1, int stride, const float* g, const float* x,
                 float* sums) {
  const int32_t* begins = w.tile_ptr + t * w.rows;
  const int32_t* ends = begins + w.rows;
  const int32_t* cols = w.col_idx;
  for (int64_t r = r0; r < r1; r++, g += stride) {
    if (const int64_t ahead = r + kPrefetchRows; ahead < r1) {
      __builtin_prefetch(sums + begins[ahead], 1);
      __builtin_prefetch(cols + begins[ahead]);
    }
    int32_t k = begins[r];
    const int32_t end = ends[r];
    if (k == end) continue;
    vec row[NV];
    for (int j = 0; j < NV; j++) row[j] = load(g + j * kLanes);
    for (; k + 4 <= end; k += 4) {
      vec4 total = dots<NV, 4>(row, cols + k, stride, x);
      if (kAdd) {
        vec4 old;
        memcpy(&old, sums + k, sizeof old);
        total += old;
      }
      memcpy(sums + k, &total, sizeof total);
    }
    if (k == end) continue;
    const vec4 total = end - k == 3   ? dots<NV, 3>(row, cols + k, stride, x)
                       : end - k == 2 ? dots<NV, 2>(row, cols + k, stride, x)
                                      : dots<NV, 1>(row, cols + k, stride, x);
    for (int i = 0; k + i < end; i++) sums[k + i] = (kAdd ? sums[k + i] : 0.0f) + total[i];
  }
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

// Cuts the backward pass into groups of panels x ranges of W's column tiles, a task each. Each group but the first sums the
// gradients of values and bias in memory of its own, added up at the end; each range packs the gradient of y anew. Of the
// splits that keep all threads busy, the one that moves the fewest bytes.
struct BackwardPlan {
  int64_t panels, groups, ranges, group_floats, tile_groups, t_group;

  BackwardPlan(const sk_csr& w, const sk_csr& wt, int64_t batch, int threads) {
    const int stride = panel_stride(batch);
    panels = ceil_div(batch, kPanel);
    // A range's panels of x and of its gradient, up to 384 KB each, stay in L2.
    const int64_t least_ranges = ceil_div(w.cols * stride, kChunkFloats * 3 / 2);
    double least = -1.0;
    for (int64_t g = 1; g <= max<int64_t>(1, min<int64_t>(panels, threads)); g++) {
      const int64_t r = max<int64_t>(1, min(max(least_ranges, ceil_div(threads, g)), w.tiles));
      const double idle = double(ceil_div(panels, g)) * ceil_div(g * r, threads) * threads / (double(panels) * r);
      const double bytes = 12.0 * (g - 1) * w.nnz + 8.0 * r * batch * w.rows;
      const double cost = idle * (2.0 * batch * w.nnz + bytes);  // about 1 byte costs 1 FLOP
      if (least < 0.0 || cost < least) least = cost, groups = g, ranges = r;
    }
    group_floats = ceil_div(w.nnz, 16) * 16 + ceil_div(w.rows, 16) * 16;
    t_group = tile_group(wt, max(1, stride));
    tile_groups = ceil_div(wt.tiles, t_group);
  }

  int64_t bytes(const sk_csr& w) const {
    return groups * group_floats * sizeof(float) + w.nnz * sizeof(Entry) + w.tiles * tile_groups * sizeof(int32_t);
  }
};

template <class T>
void backward(const sk_csr& w, const sk_csr& wt, const int32_t* perm, const T* values, const sk_matrix& grad,
              const sk_matrix* x, const sk_matrix* grad_x, T* grad_values, T* grad_bias, void* workspace,
              const sk_threads& threads) {
  const BackwardPlan plan(w, wt, grad.batch, threads.threads);
  const int stride = panel_stride(grad.batch);
  const int64_t width = tile_width(w), t_rows = tile_width(wt) * plan.t_group;
  const double flops = 2.0 * grad.batch * (w.nnz + w.rows);
  float* const sums = static_cast<float*>(workspace);
  Entry* const entries = reinterpret_cast<Entry*>(sums + plan.groups * plan.group_floats);
  int32_t* const starts = reinterpret_cast<int32_t*>(entries + w.nnz);
  // Group 0 sums float32 gradients where they belong.
  constexpr bool in_place = std::is_same_v<T, float>;
  const auto value_sums = [&](int64_t g) {
    return in_place && g == 0 ? reinterpret_cast<float*>(grad_values) : sums + g * plan.group_floats;
  };
  const auto bias_sums = [&](int64_t g) {
    return in_place && g == 0 ? reinterpret_cast<float*>(grad_bias)
                              : sums + g * plan.group_floats + ceil_div(w.nnz, 16) * 16;
  };
  const auto column = [&](int64_t tile) { return min(tile * width, w.cols); };

  // W transposed, in blocks of one tile of columns x one group of tiles of rows: the values that a block gathers lie in L1.
  if (grad_x != nullptr)
    parallel_for(threads, w.tiles, flops, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t++)
        pack_entries(wt, values, perm, plan.t_group, column(t), column(t + 1), stride, entries, starts + t * plan.tile_groups);
    });

  parallel_for(threads, plan.groups * plan.ranges, flops, [&](int64_t begin, int64_t end) {
    static thread_local Scratch g_scratch, x_scratch, grad_x_scratch;
    const int64_t rows_at_once = max<int64_t>(1, 512 / t_rows) * t_rows;
    for (int64_t task = begin; task < end; task++) {
      const int64_t g = task / plan.ranges, range = task % plan.ranges;
      const int64_t t0 = range * w.tiles / plan.ranges, t1 = (range + 1) * w.tiles / plan.ranges;
      const int64_t c0 = column(t0), c1 = column(t1);
      float* const g_panel = g_scratch.floats(min(rows_at_once, w.rows) * stride);
      float* const x_panel = x_scratch.floats((c1 - c0) * stride);
      float* const grad_x_panel = grad_x_scratch.floats((c1 - c0) * stride);
      const int64_t first = g * plan.panels / plan.groups, last = (g + 1) * plan.panels / plan.groups;
      for (int64_t p = first; p < last; p++) {
        const Slice s = slice(grad.batch, p);
        if (grad_values != nullptr) pack<T>(*x, c0, c1, s, x_panel);
        for (int64_t r0 = 0; r0 < w.rows; r0 += rows_at_once) {
          const int64_t r1 = min(r0 + rows_at_once, w.rows);
          pack<T>(grad, r0, r1, s, g_panel);
          with_vectors(s.width, [&](auto nv) {
            if (grad_bias != nullptr && range == 0) sum_rows<nv()>(r1 - r0, stride, g_panel, p != first, bias_sums(g) + r0);
            // A tile of g stays in L1 while all columns pass over it.
            for (int64_t i = r0 / t_rows; grad_x != nullptr && i * t_rows < r1; i++)
              for (int64_t t = t0; t < t1; t++) {
                float* const y = grad_x_panel + (column(t) - c0) * stride;
                linear_rows<nv(), T>(wt, entries + starts[t * plan.tile_groups + i], i * plan.t_group,
                                     min((i + 1) * plan.t_group, wt.tiles), column(t), column(t + 1), g_panel - r0 * stride,
                                     nullptr, stride, y);
                if (i + 1 == plan.tile_groups) unpack<T>(*grad_x, column(t), column(t + 1), s, y);
              }
            // A tile of x stays in L1 while the chunk's rows pass over it.
            for (int64_t t = t0; grad_values != nullptr && t < t1; t++)
              (p == first ? weight_rows<nv(), false> : weight_rows<nv(), true>)(w, t, r0, r1, stride, g_panel,
                                                                              x_panel - c0 * stride, value_sums(g));
          });
        }
      }
    }
  });

  // Sum the groups, in a fixed order.
  const auto finish = [&](auto part, T* out, int64_t count) {
    if (in_place && plan.groups == 1) return;
    parallel_for(threads, ceil_div(count, kLanes), 2.0 * plan.groups * count, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin * kLanes; k < min(end * kLanes, count); k += kLanes) {
        vec total = load_first(part(0) + k, count - k);
        for (int64_t g = 1; g < plan.groups; g++) total += load(part(g) + k);
        store_first(out + k, total, count - k);
      }
    });
  };
  if (grad_values != nullptr) finish(value_sums, grad_values, w.nnz);
  if (grad_bias != nullptr) finish(bias_sums, grad_bias, w.rows);
}

}  // namespace

const CsrKernels csr_kernels = {
    [](const sk_csr* w, int64_t batch) -> int64_t { return batch <= kLanes ? 0 : w->nnz * int64_t(sizeof(Entry)); },
    [](const sk_csr* w, const void* values, const sk_matrix* x, const void* bias, const sk_matrix* y, void* workspace,
       sk_dtype dtype, const sk_threads* threads) {
      const auto run = [&](auto* typed) {
        using T = const std::remove_pointer_t<decltype(typed)>;
        linear(*w, static_cast<T*>(values), *x, static_cast<T*>(bias), *y, workspace, *threads);
      };
      dtype == SK_BFLOAT16 ? run((bf16*)nullptr) : run((float*)nullptr);
    },
    [](const sk_csr* w, const sk_csr* wt, int64_t batch, const sk_threads* threads) -> int64_t {
      return BackwardPlan(*w, *wt, batch, threads->threads).bytes(*w);
    },
    [](const sk_csr* w, const sk_csr* wt, const int32_t* perm, const void* values, const sk_matrix* grad, const sk_matrix* x,
       const sk_matrix* grad_x, void* grad_values, void* grad_bias, void* workspace, sk_dtype dtype,
       const sk_threads* threads) {
      const auto run = [&](auto* typed) {
        using T = std::remove_pointer_t<decltype(typed)>;
        backward(*w, *wt, perm, static_cast<const T*>(values), *grad, x, grad_x, static_cast<T*>(grad_values),
                 static_cast<T*>(grad_bias), workspace, *threads);
      };
      dtype == SK_BFLOAT16 ? run((bf16*)nullptr) : run((float*)nullptr);
    },
};

}  // namespace sk::SK_ISA
