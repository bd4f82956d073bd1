// sparsekern::vnm_* for torch on NVIDIA GPUs.

#include "sparsekern/vnm_cuda.h"

#include "cuda.h"
#include "vnm_pattern.h"

namespace sk {
namespace {

struct VnmCuda : VnmPattern {
  static constexpr CudaFunctions<sk_vnm_cuda> kFunctions = {
      sk_vnm_linear_cuda_workspace, sk_vnm_linear_cuda,  sk_vnm_linear_backward_cuda_workspace,
      sk_vnm_linear_backward_cuda,  sk_vnm_scatter_cuda, sk_vnm_gather_cuda};
  sk_vnm_cuda w;

  VnmCuda(const Checker& check, const Pattern& list, const Sizes& sizes, const Tensor& x)
      : VnmPattern(check, list, sizes, x, 1), w{rows, cols, v, n, m, selected, packed, nullptr} {
    w.metadata = metadata(check, "metadata", list[4], sk_vnm_metadata_words_cuda(&w), x);
  }
};

}  // namespace
}  // namespace sk

SK_REGISTER_CUDA_PRODUCTS(vnm, sk::VnmCuda)
