// CSR on the CPU. Compiled once per ISA.
//
// Both kernels run over panels of 64 batch columns (panel.h), so that one weight meets 64 floats: 1 broadcast and, on
// AVX-512, 4 FMAs with a memory operand. What bounds them is therefore L1 loads, one per FMA and one per weight: on
// Zen 4, 5.5 cycles per weight and panel against 4 of pure FMA, 73-79 % of the peak. That needs the operand in L1:
// - columns are cut into tiles (tile_ptr), 128 columns x 64 floats = 32 KB, and all rows pass over one tile before the next:
//   +35 % over rows that roam over a 256 KB panel in L2. Accumulators are then reloaded once per tile and row;
// - a row's weights in a tile lie a whole row apart in memory, which no hardware prefetcher follows: prefetching them
//   8 rows ahead gave +10 %;
// - tried and dropped: visiting the rows of a tile by length, so that loop exits predict (-10 %: y is then visited at random);
//   16-bit column offsets (no gain: index loads are not what bounds); 128-float panels (equal at 80 %, -15 % at 95 %).

#include "panel.h"

#include "kernels.h"
#include "sparsekern/csr.h"

namespace sk::SK_ISA {
namespace {

constexpr int kPrefetchRows = 8;
constexpr int64_t kL1Floats = 8192;       // 32 KB
constexpr int64_t kChunkFloats = 1 << 16;  // 256 KB: a chunk of y's rows, beside a panel of x in a 1 MB L2

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

// How many row chunks: enough that a chunk's accumulators fit L2 and all threads have equally many (panel, chunk) tasks.
int64_t chunk_count(const sk_csr& w, int64_t panels, int width, int threads) {
  int64_t chunks = max<int64_t>(1, ceil_div(w.rows * width, kChunkFloats));
  if (panels * chunks < 4 * threads)
    while (panels * chunks % threads != 0) chunks++;
  return min(chunks, max<int64_t>(1, w.rows));
}

// How many of the pattern's tiles to take at once for panels of `width`: as many as fit L1.
int64_t tile_group(const sk_csr& w, int width) {
  const int64_t tile_floats = ceil_div(w.cols, w.tiles) * width;
  return max<int64_t>(1, kL1Floats / max<int64_t>(1, tile_floats));
}

// y rows [r0, r1) += (or, for the first tile, = bias +) the entries in tiles [t, u), for a panel of NV vectors.
template <int NV, class T>
void linear_rows(const sk_csr& w, const T* values, int64_t t, int64_t u, int64_t r0, int64_t r1, const float* x,
                 const T* bias, float* y) {
  constexpr int kWidth = NV * kLanes;
  const int32_t* begins = w.tile_ptr + t * w.rows;
  const int32_t* ends = w.tile_ptr + u * w.rows;
  const int32_t* cols = w.col_idx;
  for (int64_t r = r0; r < r1; r++, y += kWidth) {
    if (const int64_t ahead = r + kPrefetchRows; ahead < r1) {
      __builtin_prefetch(values + begins[ahead]);
      __builtin_prefetch(cols + begins[ahead]);
    }
    int32_t k = begins[r];
    const int32_t end = ends[r];
    vec acc[NV];
    if (t == 0) {
      const vec b = bias ? broadcast(to_float(bias[r])) : vec{};
      for (int j = 0; j < NV; j++) acc[j] = b;
    } else {
      if (k == end) continue;
      for (int j = 0; j < NV; j++) acc[j] = load(y + j * kLanes);
    }
    for (; k < end; k++) {
      const vec v = broadcast(to_float(values[k]));
      const float* column = x + int64_t(cols[k]) * kWidth;
      for (int j = 0; j < NV; j++) acc[j] += v * load(column + j * kLanes);
    }
    for (int j = 0; j < NV; j++) store(y + j * kLanes, acc[j]);
  }
}

// One batch row: a dot product per row of W, x gathered from L1. Scalar, because on Zen 4 and older a gather costs
// as much as its loads; four sums hide the FMA latency. Bound by 3 loads per weight, about 1.3 cycles.
template <class T>
void linear_single(const sk_csr& w, const T* values, int64_t r0, int64_t r1, const float* x, const T* bias, float* y) {
  for (int64_t r = r0; r < r1; r++) {
    int64_t k = row_begin(w, r);
    const int64_t end = row_end(w, r);
    float sum[4] = {};
    for (; k + 4 <= end; k += 4)
      for (int i = 0; i < 4; i++) sum[i] += to_float(values[k + i]) * x[w.col_idx[k + i]];
    for (; k < end; k++) sum[0] += to_float(values[k]) * x[w.col_idx[k]];
    y[r - r0] = (bias ? to_float(bias[r]) : 0.0f) + ((sum[0] + sum[1]) + (sum[2] + sum[3]));
  }
}

template <class T>
void linear_panel(const sk_csr& w, const T* values, int64_t r0, int64_t r1, int width, const float* x, const T* bias,
                  float* y) {
  const int64_t group = tile_group(w, width);
  for (int64_t t = 0; t < w.tiles; t += group) {
    const int64_t u = min(t + group, w.tiles);
    switch (width / kLanes) {
      case 1: linear_rows<1>(w, values, t, u, r0, r1, x, bias, y); break;
      case 2: linear_rows<2>(w, values, t, u, r0, r1, x, bias, y); break;
      case 3: linear_rows<3>(w, values, t, u, r0, r1, x, bias, y); break;
      case 4: linear_rows<4>(w, values, t, u, r0, r1, x, bias, y); break;
#if !defined(__AVX512F__)
      case 5: linear_rows<5>(w, values, t, u, r0, r1, x, bias, y); break;
      case 6: linear_rows<6>(w, values, t, u, r0, r1, x, bias, y); break;
      case 7: linear_rows<7>(w, values, t, u, r0, r1, x, bias, y); break;
      case 8: linear_rows<8>(w, values, t, u, r0, r1, x, bias, y); break;
#endif
    }
  }
}

template <class T>
void linear(const sk_csr& w, const T* values, const int32_t* perm, const sk_matrix& x, const T* bias, const sk_matrix& y,
            void* workspace, const sk_threads& threads) {
  if (perm != nullptr) {
    T* own = static_cast<T*>(workspace);
    parallel_for(threads, w.nnz, 4.0 * w.nnz, [=](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; k++) own[k] = values[perm[k]];
    });
    values = own;
  }
  const int64_t panels = ceil_div(x.batch, kPanel);
  const int first_width = x.batch > 0 ? slice(x.batch, 0).width : kLanes;
  const int64_t chunks = chunk_count(w, panels, first_width, threads.threads);
  const double flops = 2.0 * x.batch * (w.nnz + w.rows);
  parallel_for(threads, panels * chunks, flops, [&](int64_t begin, int64_t end) {
    static thread_local Scratch x_scratch, y_scratch;
    float* x_panel = x_scratch.floats(w.cols * first_width);
    int64_t packed = -1;
    for (int64_t task = begin; task < end; task++) {
      const int64_t p = task / chunks, c = task % chunks;
      const int64_t r0 = chunk_begin(w, c, chunks), r1 = chunk_begin(w, c + 1, chunks);
      float* y_panel = y_scratch.floats((r1 - r0) * first_width);
      Slice s = slice(x.batch, p);
      if (x.batch == 1) s.width = 1;
      if (p != packed) {
        if (s.width == 1)
          for (int64_t f = 0; f < w.cols; f++)
            x_panel[f] = to_float(static_cast<const T*>(x.data)[f * x.stride_feature]);
        else
          pack<T>(x, 0, w.cols, s, x_panel);
        packed = p;
      }
      if (s.width == 1) {
        linear_single(w, values, r0, r1, x_panel, bias, y_panel);
        for (int64_t r = r0; r < r1; r++) store_one(static_cast<T*>(y.data) + r * y.stride_feature, y_panel[r - r0]);
      } else {
        linear_panel(w, values, r0, r1, s.width, x_panel, bias, y_panel);
        unpack<T>(y, r0, r1, s, y_panel);
      }
    }
  });
}

// sums[k] (+)= dot(g's row r, x's row cols[k]) over one panel, for the entries of rows [r0, r1) in tile t.
// g's row stays in registers; four entries share one reduction (sum4).
template <int NV, bool kAdd>
void weight_rows(const sk_csr& w, int64_t t, int64_t r0, int64_t r1, const float* g, const float* x, float* sums) {
  constexpr int kWidth = NV * kLanes;
  const int32_t* begins = w.tile_ptr + t * w.rows;
  const int32_t* ends = begins + w.rows;
  const int32_t* cols = w.col_idx;
  for (int64_t r = r0; r < r1; r++, g += kWidth) {
    if (const int64_t ahead = r + kPrefetchRows; ahead < r1) {
      __builtin_prefetch(sums + begins[ahead], 1);
      __builtin_prefetch(cols + begins[ahead]);
    }
    const int32_t begin = begins[r], end = ends[r];
    if (begin == end) continue;
    vec row[NV];
    for (int j = 0; j < NV; j++) row[j] = load(g + j * kLanes);
    for (int32_t k = begin; k < end; k += 4) {
      const int n = min(4, end - k);
      vec acc[4];
      for (int i = 0; i < 4; i++) {
        const float* column = x + int64_t(cols[i < n ? k + i : k]) * kWidth;
        acc[i] = row[0] * load(column);
        for (int j = 1; j < NV; j++) acc[i] += row[j] * load(column + j * kLanes);
      }
      const vec4 total = sum4(acc[0], acc[1], acc[2], acc[3]);
      if (n == 4) {
        vec4 old = {};
        if (kAdd) memcpy(&old, sums + k, sizeof old);
        old += total;
        memcpy(sums + k, &old, sizeof old);
      } else {
        for (int i = 0; i < n; i++) sums[k + i] = (kAdd ? sums[k + i] : 0.0f) + total[i];
      }
    }
  }
}

template <bool kAdd>
void weight_panel(const sk_csr& w, int64_t r0, int64_t r1, int width, const float* g, const float* x, float* sums) {
  for (int64_t t = 0; t < w.tiles; t++) switch (width / kLanes) {
      case 1: weight_rows<1, kAdd>(w, t, r0, r1, g, x, sums); break;
      case 2: weight_rows<2, kAdd>(w, t, r0, r1, g, x, sums); break;
      case 3: weight_rows<3, kAdd>(w, t, r0, r1, g, x, sums); break;
      case 4: weight_rows<4, kAdd>(w, t, r0, r1, g, x, sums); break;
#if !defined(__AVX512F__)
      case 5: weight_rows<5, kAdd>(w, t, r0, r1, g, x, sums); break;
      case 6: weight_rows<6, kAdd>(w, t, r0, r1, g, x, sums); break;
      case 7: weight_rows<7, kAdd>(w, t, r0, r1, g, x, sums); break;
      case 8: weight_rows<8, kAdd>(w, t, r0, r1, g, x, sums); break;
#endif
    }
}

int64_t padded_batch(int64_t batch) { return ceil_div(batch, kLanes) * kLanes; }

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
  const int64_t chunks = chunk_count(w, 1, kPanel, threads.threads);
  parallel_for(threads, chunks, 2.0 * x.batch * w.nnz, [&](int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    for (int64_t c = begin; c < end; c++) {
      const int64_t r0 = chunk_begin(w, c, chunks), r1 = chunk_begin(w, c + 1, chunks);
      float* g = scratch.floats((r1 - r0) * kPanel);
      for (int64_t p = 0; p < panels; p++) {
        const Slice s = slice(x.batch, p);
        pack<T>(grad, r0, r1, s, g);
        (p == 0 ? weight_panel<false> : weight_panel<true>)(w, r0, r1, s.width, g, x_panels + p * kPanel * w.cols, sums);
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
