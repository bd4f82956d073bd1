// sparsekern::bsr_* for torch on NVIDIA GPUs.

#include "sparsekern/bsr_cuda.h"

#include "bsr_pattern.h"
#include "cuda.h"

namespace sk {
namespace {

struct BsrCuda : BsrPattern {
  static constexpr CudaFunctions<sk_bsr> kFunctions = {
      sk_bsr_linear_cuda_workspace,
      sk_bsr_linear_cuda,
      sk_bsr_linear_backward_cuda_workspace,
      sk_bsr_linear_backward_cuda,
      sk_bsr_scatter_cuda,
      sk_bsr_gather_cuda,
      16,  // blocks of values are loaded as vectors
  };
  using BsrPattern::BsrPattern;
};

}  // namespace
}  // namespace sk

SK_REGISTER_CUDA_PRODUCTS(bsr, sk::BsrCuda)
