// Products in bfloat16 with more than a few batch rows, on instructions that multiply pairs of bfloat16 and add up in float32
// (AVX-512 BF16). Everything else is the base ISA's.
// - BSR: the kernels of bsr.cpp, over pairs of numbers that are neighbours along the sum: two columns of W forward, two rows
//   of W for the gradient of x, two batch rows for that of the values.
// - 2:4 and V:2:M, forward: the two weights of a group (groups_dots.h). Their gradients run on the CSR kernels, on float32
//   panels: that of the values, whose sums run along the batch, could take pairs too.
//
// On Zen 4 such an instruction takes as long as an FMA and does twice as much (465 GFLOP/s measured against 230), on as many
// registers, with as many loads: BSR's strips of rows should take half the time, and panels half the stores to pack. Products
// of which FMAs were 60 to 85 % of the time would gain 1.4 to 1.7 times: expected, not yet measured.

#include "bsr_backward.h"
#include "bsr_linear.h"
#include "groups_dots.h"
#include "kernels.h"

namespace sk::SK_ISA {

const BsrKernels bsr_kernels = {
    [](const sk_bsr* w, const void* values, const sk_matrix* x, const void* bias, sk_activation activation,
       const sk_matrix* y, sk_dtype dtype, const sk_threads* threads) {
      if (dtype != SK_BFLOAT16 || x->batch <= kFewBatch)
        return SK_BASE::bsr_kernels.linear(w, values, x, bias, activation, y, dtype, threads);
      linear(*w, static_cast<const bf16x2*>(values), *x, static_cast<const bf16*>(bias), activation, *y, *threads);
    },
    [](const sk_bsr* w, int64_t batch, const sk_threads* threads) -> int64_t {
      return max(SK_BASE::bsr_kernels.linear_backward_workspace(w, batch, threads), backward_bytes(*w, batch, *threads));
    },
    [](const sk_bsr* w, const void* values, const sk_matrix* grad, const sk_matrix* x, const sk_matrix* grad_x,
       void* grad_values, void* grad_bias, void* workspace, sk_dtype dtype, const sk_threads* threads) {
      if (dtype != SK_BFLOAT16 || grad->batch <= kFewBatch)
        return SK_BASE::bsr_kernels.linear_backward(w, values, grad, x, grad_x, grad_values, grad_bias, workspace, dtype,
                                                    threads);
      backward<bf16x2>(*w, static_cast<const bf16*>(values), *grad, x, grad_x, static_cast<bf16*>(grad_values),
                       static_cast<bf16*>(grad_bias), workspace, *threads);
    },
};

const NmKernels nm_kernels = {
    [](const sk_nm* w, const void* values, const sk_matrix* x, const void* bias, sk_activation activation,
       const sk_matrix* y, sk_dtype dtype, const sk_threads* threads) {
      if (dtype != SK_BFLOAT16 || x->batch <= kFewBatch || w->n != 2 || w->m != 4)
        return SK_BASE::nm_kernels.linear(w, values, x, bias, activation, y, dtype, threads);
      const PairGroups groups = {w->csr,          static_cast<const bf16*>(values), w->packed, nullptr,
                                 kTileRowsAtOnce, ceil_div(w->csr.cols, 4)};
      linear(groups, *x, static_cast<const bf16*>(bias), activation, *y, *threads);
    },
};

const VnmKernels vnm_kernels = {
    [](const sk_vnm* w, const void* values, const sk_matrix* x, const void* bias, sk_activation activation,
       const sk_matrix* y, sk_dtype dtype, const sk_threads* threads) {
      if (dtype != SK_BFLOAT16 || x->batch <= kFewBatch || w->n != 2 || w->v < kLeastTileRows)
        return SK_BASE::vnm_kernels.linear(w, values, x, bias, activation, y, dtype, threads);
      const PairGroups groups = {w->csr, static_cast<const bf16*>(values), w->packed, w->selected,
                                 w->v,   ceil_div(w->csr.cols, w->m)};
      linear(groups, *x, static_cast<const bf16*>(bias), activation, *y, *threads);
    },
};

}  // namespace sk::SK_ISA
