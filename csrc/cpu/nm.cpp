// N:M on the CPU. Compiled once per ISA. A few batch rows run on values and packed positions (nm_few.h), more on the CSR
// kernels.

#include "sparsekern/nm.h"

#include "kernels.h"
#include "nm_dots.h"

namespace sk::SK_ISA {
namespace {

template <class T>
void linear(const sk_nm& w, const void* values, const sk_matrix& x, const void* bias, sk_activation activation,
            const sk_matrix& y, const sk_threads& threads) {
  const Groups groups(w.n, w.m);
  const PackedRows<T> rows(values, w.packed, w.csr, groups);
  few_rows(w.csr, x, 0, static_cast<const T*>(bias), activation, y, threads,
           [&](int64_t r0, int64_t r1, float* x_rows, float* sums) {
             dot_rows(groups, rows, r0, r1, x_rows, padded_columns(x.features), padded_batch(x.batch), sums);
           });
}

}  // namespace

template void dot_rows(const Groups&, const PackedRows<float>&, int64_t, int64_t, const float*, int64_t, int64_t, float*);
template void dot_rows(const Groups&, const PackedRows<bf16>&, int64_t, int64_t, const float*, int64_t, int64_t, float*);

const NmKernels nm_kernels = {
    [](const sk_nm* w, const void* values, const sk_matrix* x, const void* bias, sk_activation activation,
       const sk_matrix* y, sk_dtype dtype, const sk_threads* threads) {
      if constexpr (kFewBatch > 0)
        if (x->batch <= kFewBatch) {
          const auto run = dtype == SK_BFLOAT16 ? linear<bf16> : linear<float>;
          return run(*w, values, *x, bias, activation, *y, *threads);
        }
      csr_kernels.linear(&w->csr, values, x, bias, activation, y, dtype, threads);
    },
};

}  // namespace sk::SK_ISA
