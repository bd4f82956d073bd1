// BSR on the CPU. Compiled once per ISA.
//
// All products run over panels of 64 batch columns (panel.h) and are small dense matrix products whose sums stay in
// registers (bsr_tile.h): one number is broadcast and meets up to 4 vectors. With operands in L1 that reaches 90 to 95 % of
// the FMA peak on AVX-512, with operands in L2 83 to 94 %; whole products lose the rest to packing x or g (1.1 to 3 ns per
// 64 bytes, 2 to 3 transposed) and to writing y or dx (1.2 to 2 ns), which at 95 % sparsity meet 10 to 50 ns of FMAs.
// - Forward: 64 columns of a block row's blocks at a time, whose 16 KB of x serve all rows of the blocks from L1. Finished
//   rows go to y from registers (+4 %), past the caches (panel.h: +20 to 30 % where cores do not share an L3).
// - Backward: one pass over the gradient of y, at most 1024 rows of it at a time, in L2 (512: -3 %). Rows that a block
//   column needs are in L1 for the gradient of x, which reads blocks by columns, and then meet that column's x for the
//   gradient of the values: outer products over the batch, of two panels at once (bsr_backward.h). Blocks narrower than a
//   vector take dot products over the batch: adding up their lanes is a quarter of that time. The gradient of x alone is
//   split over panels, since nothing has to be merged then: each range of columns would pack g anew (+5 % at 95 %).
// - Up to 8 batch rows are dot products along the rows of blocks (bsr_few.h): 4 times as fast as a panel for 1 row, twice
//   for 4, level for 8 (bfloat16: +30 %). So are their gradients (bsr_few_backward.h).
// Tried and dropped: packing the next panel of x, or fetching it or the next gradients, to L1 or L2, while this one is in
// use (level); fetching the next segment of x to L1 (-2 to -14 %: it evicts this one); segments of 32 rows (-3 %); fetching
// weights that are in a cache (-2 to -4 %); copying each segment of x to L1 instead of packing x (+2 % for 128 x 128, -15 %
// for 16 x 16); strips of rows as functions of their own (-4 %); two panels at once for the gradient of x (-4 %); unrolling
// the products (level); on AVX2, batch-major x, g and y as they are, met by vectors of W (+5 %, for a second path of each
// product).

#include "sparsekern/bsr.h"

#include "bsr_backward.h"
#include "bsr_few_backward.h"
#include "bsr_linear.h"
#include "kernels.h"

namespace sk::SK_ISA {

const BsrKernels bsr_kernels = {
    [](const sk_bsr* w, const void* values, const sk_matrix* x, const void* bias, sk_activation activation,
       const sk_matrix* y, sk_dtype dtype, const sk_threads* threads) {
      const auto run = [&](auto* typed) {
        using T = const std::remove_pointer_t<decltype(typed)>;
        linear(*w, static_cast<T*>(values), *x, static_cast<T*>(bias), activation, *y, *threads);
      };
      dtype == SK_BFLOAT16 ? run((bf16*)nullptr) : run((float*)nullptr);
    },
    [](const sk_bsr* w, int64_t batch, const sk_threads* threads) -> int64_t {
      return backward_bytes(*w, batch, *threads);
    },
    [](const sk_bsr* w, const void* values, const sk_matrix* grad, const sk_matrix* x, const sk_matrix* grad_x,
       void* grad_values, void* grad_bias, void* workspace, sk_dtype dtype, const sk_threads* threads) {
      const auto run = [&](auto* typed) {
        using T = std::remove_pointer_t<decltype(typed)>;
        const auto* v = static_cast<const T*>(values);
        auto *const gv = static_cast<T*>(grad_values), *const gb = static_cast<T*>(grad_bias);
        if (grad->batch <= kFewBatch)
          backward_few(*w, v, *grad, x, grad_x, gv, gb, *threads);
        else
          backward<T>(*w, v, *grad, x, grad_x, gv, gb, workspace, *threads);
      };
      dtype == SK_BFLOAT16 ? run((bf16*)nullptr) : run((float*)nullptr);
    },
};

}  // namespace sk::SK_ISA
