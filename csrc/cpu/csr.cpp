// CSR on the CPU. Compiled once per ISA.
//
// Both products run over panels of 64 batch columns (panel.h), so that one weight meets 64 floats: on AVX-512, 4 FMAs with a
// memory operand. What bounds them is L1 loads, one per FMA and one per weight: 5 per weight and panel where the FMA units
// need 4 cycles (Zen 4), 78 % of the peak at best. That needs the operand in L1 and nothing else to wait for:
// - Columns are cut into tiles (tile_ptr); 128 columns x 64 floats are 32 KB. All rows pass over one tile before the next:
//   +35 % over rows that roam over a 256 KB panel in L2. The price: accumulators are reloaded once per tile and row.
// - In CSR order a row's weights in a tile lie a whole row apart from the next row's, which no prefetcher follows. So each
//   call first copies W into the order in which it is read, as 8-byte entries (value, offset of its operand in a panel):
//   +30 % (140 -> 185 GFLOP/s of 236, 4096 x 1024 at 80 %), for 2-5 % of the time at batch 256. An entry is one load, and
//   its value reaches the vector unit from a general register: broadcasting it from memory costs 10 %.
// - A transposed pattern gathers its values in the same copy, from a tile's rows of W, which L2 holds.
// Tried and dropped: visiting rows by length, so that loop exits predict (-10 %: y is then visited at random); panels of 128
// floats (-5 to -10 %); prefetching the weights of 8 rows ahead instead of copying (+10 % where the copy gives +30 %).

#include "panel.h"

#include <type_traits>

#include "kernels.h"
#include "sparsekern/csr.h"

namespace sk::SK_ISA {
namespace {

constexpr int kPrefetchRows = 8;
constexpr int64_t kL1Floats = 8192;        // 32 KB
constexpr int64_t kChunkFloats = 1 << 16;  // 256 KB: a chunk of y's rows, beside a panel of x in a 1 MB L2
constexpr int64_t kChunkEntries = 1 << 16;  // 256 KB as values and columns, 256 KB as entries

inline int64_t row_begin(const sk_csr& w, int64_t r) { return w.tile_ptr[r]; }
inline int64_t row_end(const sk_csr& w, int64_t r) { return w.tile_ptr[w.tiles * w.rows + r]; }

// First row of chunk c of `chunks`, so that chunks have about equal work: entries, and 4 more per row for its accumulators.
int64_t chunk_begin(const sk_csr& w, int64_t c, int64_t chunks) {
  const double total = double(w.nnz) + 4.0 * w.rows, target = total * c / chunks;
  int64_t low = 0, high = w.rows;
  while (low < high) {
    const int64_t mid = (low + high) / 2;
    if (double(row_begin(w, mid)) + 4.0 * mid < target)
      low = mid + 1;
    else
      high = mid;
  }
  return c == chunks ? w.rows : low;
}

// How many row chunks: enough that a chunk's accumulators, and its weights while they are copied, fit L2, and that all
// threads have equally many chunks.
int64_t chunk_count(const sk_csr& w, int width, int threads) {
  int64_t chunks = max(ceil_div(w.rows * width, kChunkFloats), ceil_div(w.nnz, kChunkEntries));
  chunks = ceil_div(max<int64_t>(1, chunks), threads) * threads;
  return min(chunks, max<int64_t>(1, w.rows));
}

// How many of the pattern's tiles to take at once for panels of `width`: as many as fit L1.
int64_t tile_group(const sk_csr& w, int width) {
  const int64_t tile_floats = ceil_div(w.cols, w.tiles) * width;
  return max<int64_t>(1, kL1Floats / max<int64_t>(1, tile_floats));
}

// A weight and where its operand is: float32 bits below, float offset into a panel (column * stride) above.
using Entry = uint64_t;

// The entries of rows [r0, r1), tile by tile and row by row, to out .. out + (their number).
template <class T>
void pack_entries(const sk_csr& w, const T* values, const int32_t* perm, int64_t group, int64_t r0, int64_t r1, int stride,
                  Entry* out) {
  const Entry* out_end = out + (r1 == w.rows ? w.nnz : row_begin(w, r1)) - row_begin(w, r0);
  for (int64_t t = 0; t < w.tiles; t += group) {
    const int32_t* begins = w.tile_ptr + t * w.rows;
    const int32_t* ends = w.tile_ptr + min(t + group, w.tiles) * w.rows;
    for (int64_t r = r0; r < r1; r++) {
      if (const int64_t ahead = r + kPrefetchRows; ahead < r1) {
        __builtin_prefetch((perm ? static_cast<const void*>(perm + begins[ahead]) : values + begins[ahead]));
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

// One to kLanes batch rows: copying W would cost as much as multiplying with it, so W is read in place and whole rows at a
// time. A panel is one vector wide. Bound by 3 loads per weight, about 1.3 cycles.
template <class T>
void linear_few(const sk_csr& w, const T* values, const int32_t* perm, int64_t r0, int64_t r1, const float* x, const T* bias,
                const sk_matrix& y, Slice s, float* y_panel) {
  for (int64_t r = r0; r < r1; r += kLanes) {
    const int64_t end = min(r + kLanes, r1);
    for (int64_t i = r; i < end; i++) {
      vec acc[2] = {bias ? broadcast(to_float(bias[i])) : vec{}, vec{}};
      for (int64_t k = row_begin(w, i); k < row_end(w, i); k++)
        acc[k & 1] += broadcast(to_float(values[perm ? perm[k] : k])) * load(x + int64_t(w.col_idx[k]) * kLanes);
      store(y_panel + (i - r) * kLanes, acc[0] + acc[1]);
    }
    unpack<T>(y, r, end, s, y_panel);
  }
}

// One batch row: a dot product per row of W, x gathered from L1. Scalar, because on Zen 4 and older a gather costs
// as much as its loads; four sums hide the FMA latency. Bound by 3 loads per weight, about 1.3 cycles.
template <class T>
void linear_single(const sk_csr& w, const T* values, const int32_t* perm, int64_t r0, int64_t r1, const float* x,
                   const T* bias, const sk_matrix& y) {
  T* data = static_cast<T*>(y.data);
  for (int64_t r = r0; r < r1; r++) {
    int64_t k = row_begin(w, r);
    const int64_t end = row_end(w, r);
    float sum[4] = {};
    const auto term = [&](int64_t k) { return to_float(values[perm ? perm[k] : k]) * x[w.col_idx[k]]; };
    for (; k + 4 <= end; k += 4)
      for (int i = 0; i < 4; i++) sum[i] += term(k + i);
    for (; k < end; k++) sum[0] += term(k);
    store_one(data + r * y.stride_feature,
              (bias ? to_float(bias[r]) : 0.0f) + ((sum[0] + sum[1]) + (sum[2] + sum[3])));
  }
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

template <class T>
void linear(const sk_csr& w, const T* values, const int32_t* perm, const sk_matrix& x, const T* bias, const sk_matrix& y,
            void* workspace, const sk_threads& threads) {
  const int stride = panel_stride(x.batch);
  const int64_t panels = ceil_div(x.batch, kPanel), chunks = chunk_count(w, stride, threads.threads);
  const int64_t group = tile_group(w, stride);
  const bool few = x.batch <= kLanes;
  const double flops = 2.0 * x.batch * (w.nnz + w.rows);
  Entry* entries = static_cast<Entry*>(workspace);
  if (!few)
    parallel_for(threads, chunks, flops, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; c++) {
        const int64_t r0 = chunk_begin(w, c, chunks), r1 = chunk_begin(w, c + 1, chunks);
        if (r0 < r1) pack_entries(w, values, perm, group, r0, r1, stride, entries + row_begin(w, r0));
      }
    });
  parallel_for(threads, panels * chunks, flops, [&](int64_t begin, int64_t end) {
    static thread_local Scratch x_scratch, y_scratch;
    float* x_panel = x_scratch.floats(w.cols * stride);
    int64_t packed = -1;
    for (int64_t task = begin; task < end; task++) {
      const int64_t p = task / chunks, c = task % chunks;
      const int64_t r0 = chunk_begin(w, c, chunks), r1 = chunk_begin(w, c + 1, chunks);
      if (r0 == r1) continue;
      float* y_panel = y_scratch.floats((few ? kLanes : r1 - r0) * stride);
      const Slice s = slice(x.batch, p);
      if (x.batch == 1) {
        for (int64_t f = 0; f < w.cols; f++) x_panel[f] = to_float(static_cast<const T*>(x.data)[f * x.stride_feature]);
        linear_single(w, values, perm, r0, r1, x_panel, bias, y);
        continue;
      }
      if (p != packed) pack<T>(x, 0, w.cols, s, x_panel);
      packed = p;
      if (few)
        linear_few(w, values, perm, r0, r1, x_panel, bias, y, s, y_panel);
      else
        with_vectors(s.width, [&](auto nv) {
          linear_panel<nv()>(w, entries + row_begin(w, r0), group, r0, r1, x_panel, bias, y, s, y_panel);
        });
    }
  });
}

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

// Floats per feature in all panels of a batch.
int64_t padded_batch(int64_t batch) { return ceil_div(batch, kPanel) * panel_stride(batch); }

template <class T>
void backward_weight(const sk_csr& w, const sk_matrix& grad, const sk_matrix& x, T* grad_values, void* workspace,
                     const sk_threads& threads) {
  // All of x is packed first, in parallel; then each thread owns rows, so no two threads add to one value.
  float* x_panels = static_cast<float*>(workspace);
  float* sums = x_panels + padded_batch(x.batch) * w.cols;
  if constexpr (sizeof(T) == sizeof(float)) sums = reinterpret_cast<float*>(grad_values);
  const int64_t panels = ceil_div(x.batch, kPanel);
  if (panels == 0) memset(sums, 0, w.nnz * sizeof(float));
  parallel_for(threads, panels, 1.0 * x.batch * w.cols, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; p++) pack<T>(x, 0, w.cols, slice(x.batch, p), x_panels + p * kPanel * w.cols);
  });
  const int stride = panel_stride(x.batch);
  const int64_t chunks = chunk_count(w, stride, threads.threads);
  parallel_for(threads, chunks, 2.0 * x.batch * w.nnz, [&](int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    for (int64_t c = begin; c < end; c++) {
      const int64_t r0 = chunk_begin(w, c, chunks), r1 = chunk_begin(w, c + 1, chunks);
      float* g = scratch.floats((r1 - r0) * stride);
      for (int64_t p = 0; p < panels; p++) {
        const Slice s = slice(x.batch, p);
        pack<T>(grad, r0, r1, s, g);
        const float* x_panel = x_panels + p * kPanel * w.cols;
        with_vectors(s.width, [&](auto nv) {
          for (int64_t t = 0; t < w.tiles; t++)
            (p == 0 ? weight_rows<nv(), false> : weight_rows<nv(), true>)(w, t, r0, r1, s.stride, g, x_panel, sums);
        });
      }
    }
  });
  if constexpr (sizeof(T) != sizeof(float))
    parallel_for(threads, ceil_div(w.nnz, kLanes), 2.0 * w.nnz, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin * kLanes; k < min(end * kLanes, w.nnz); k += kLanes)
        store_first(grad_values + k, load_first(sums + k, w.nnz - k), w.nnz - k);
    });
}

}  // namespace

const CsrKernels csr_kernels = {
    [](const sk_csr* w, int64_t batch) -> int64_t { return batch <= kLanes ? 0 : w->nnz * int64_t(sizeof(Entry)); },
    [](const sk_csr* w, const void* values, const int32_t* perm, const sk_matrix* x, const void* bias,
       const sk_matrix* y, void* workspace, sk_dtype dtype, const sk_threads* threads) {
      if (dtype == SK_BFLOAT16)
        linear(*w, static_cast<const bf16*>(values), perm, *x, static_cast<const bf16*>(bias), *y, workspace, *threads);
      else
        linear(*w, static_cast<const float*>(values), perm, *x, static_cast<const float*>(bias), *y, workspace, *threads);
    },
    [](const sk_csr* w, int64_t batch, sk_dtype dtype) -> int64_t {
      return 4 * (padded_batch(batch) * w->cols + (dtype == SK_BFLOAT16 ? w->nnz : 0));
    },
    [](const sk_csr* w, const sk_matrix* grad, const sk_matrix* x, void* grad_values, void* workspace, sk_dtype dtype,
       const sk_threads* threads) {
      if (dtype == SK_BFLOAT16)
        backward_weight(*w, *grad, *x, static_cast<bf16*>(grad_values), workspace, *threads);
      else
        backward_weight(*w, *grad, *x, static_cast<float*>(grad_values), workspace, *threads);
    },
};

}  // namespace sk::SK_ISA
