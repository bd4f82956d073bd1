// V:N:M on the CPU. Compiled once per ISA. For a few batch rows, the columns of x that V rows of W select are gathered
// once; each of the rows is then an N:4 row on them (nm_few.h). More batch rows run on the CSR kernels.

#include "sparsekern/vnm.h"

#include "kernels.h"
#include "nm_few.h"

namespace sk::SK_ISA {
namespace {

// selected_x[b * stride + i] = x[b * x_stride + selected[i]] for i < count, a multiple of 4, and b < batch.
void gather(const float* x, int64_t x_stride, const int32_t* selected, int64_t count, int64_t batch, int64_t stride,
            float* selected_x) {
  for (int64_t b = 0; b < batch; b++, x += x_stride, selected_x += stride)
    for (int64_t i = 0; i < count; i += 4) {
      const vec4 group = {x[selected[i]], x[selected[i + 1]], x[selected[i + 2]], x[selected[i + 3]]};
      memcpy(selected_x + i, &group, sizeof group);
    }
}

// A number that is gathered meets v * n / 4 weights on average. At 2 of them (4:2:4) the CSR kernels took half the time at
// batch 1, at 32 (64:2:8) 1.1 times (AVX2) to 2 times (AVX-512) as long. 8 lies between.
constexpr int64_t kLeastReuse = 8;

template <class T>
void linear(const sk_vnm& w, const void* values, const sk_matrix& x, const void* bias, sk_activation activation,
            const sk_matrix& y, const sk_threads& threads) {
  const Groups groups(w.n, 4);
  const PackedRows<T> rows(values, w.packed, w.csr, groups);
  const int64_t batch = padded_batch(x.batch), x_stride = padded_columns(x.features);
  const int64_t count = ceil_div(w.csr.cols, w.m) * 4, stride = padded_columns(count);
  few_rows(w.csr, x, batch * stride, static_cast<const T*>(bias), activation, y, threads,
           [&](int64_t r0, int64_t r1, float* x_rows, float* sums) {
             float* const selected_x = x_rows + batch * x_stride;
             for (int64_t r = r0, end; r < r1; r = end) {
               end = min((r / w.v + 1) * w.v, r1);
               gather(x_rows, x_stride, w.selected + r / w.v * count, count, batch, stride, selected_x);
               dot_rows(groups, rows, r, end, selected_x, stride, batch, sums + r - r0);
             }
           });
}

}  // namespace

const VnmKernels vnm_kernels = {
    [](const sk_vnm* w, const void* values, const sk_matrix* x, const void* bias, sk_activation activation,
       const sk_matrix* y, sk_dtype dtype, const sk_threads* threads) {
      if constexpr (kFewBatch > 0)
        if (x->batch <= kFewBatch && w->v * w->n >= 4 * kLeastReuse) {
          const auto run = dtype == SK_BFLOAT16 ? linear<bf16> : linear<float>;
          return run(*w, values, *x, bias, activation, *y, *threads);
        }
      csr_kernels.linear(&w->csr, values, x, bias, activation, y, dtype, threads);
    },
};

}  // namespace sk::SK_ISA
