// sparsekern::nm_* for torch on NVIDIA GPUs.

#include "sparsekern/nm_cuda.h"

#include "cuda.h"
#include "nm_pattern.h"

namespace sk {
namespace {

struct NmCuda : NmPattern {
  static constexpr CudaFunctions<sk_nm_cuda> kFunctions = {
      sk_nm_linear_cuda_workspace, sk_nm_linear_cuda,  sk_nm_linear_backward_cuda_workspace,
      sk_nm_linear_backward_cuda,  sk_nm_scatter_cuda, sk_nm_gather_cuda};
  sk_nm_cuda w;

  NmCuda(const Checker& check, const Pattern& list, const Sizes& sizes, const Tensor& x)
      : NmPattern(check, list, sizes, x, 2), w{rows, cols, n, m, packed, nullptr, nullptr} {
    w.metadata = metadata(check, "metadata", list[2], sk_nm_metadata_words_cuda(&w), x);
    // Empty where W^T is not 2:4.
    const int64_t words = list[3].numel() > 0 ? sk_nm_transposed_words_cuda(&w) : 0;
    w.transposed = metadata(check, "transposed metadata", list[3], words, x);
  }
};

}  // namespace
}  // namespace sk

SK_REGISTER_CUDA_PRODUCTS(nm, sk::NmCuda)
