// What each ISA's build of a format exports, and how the one for this CPU is found.
#pragma once

#include "sparsekern/bsr.h"
#include "sparsekern/csr.h"
#include "sparsekern/mask.h"
#include "sparsekern/nm.h"
#include "sparsekern/vnm.h"

namespace sk {

struct CsrKernels {
  decltype(&sk_csr_linear) linear;
  decltype(&sk_csr_linear_backward_workspace) linear_backward_workspace;
  decltype(&sk_csr_linear_backward) linear_backward;
};

struct BsrKernels {
  decltype(&sk_bsr_linear) linear;
  decltype(&sk_bsr_linear_backward_workspace) linear_backward_workspace;
  decltype(&sk_bsr_linear_backward) linear_backward;
};

struct NmKernels {
  decltype(&sk_nm_linear) linear;
};

struct VnmKernels {
  decltype(&sk_vnm_linear) linear;
};

struct MaskKernels {
  decltype(&sk_mask_expand) expand;
  decltype(&sk_mask_compress) compress;
  decltype(&sk_mask_linear) linear;
  decltype(&sk_mask_linear_backward) linear_backward;
};

#define SK_DECLARE_ISA(isa)              \
  namespace isa {                        \
  extern const CsrKernels csr_kernels;   \
  extern const BsrKernels bsr_kernels;   \
  extern const NmKernels nm_kernels;     \
  extern const VnmKernels vnm_kernels;   \
  extern const MaskKernels mask_kernels; \
  double fma_peak(double seconds);       \
  }
SK_DECLARE_ISA(generic)
#if defined(__x86_64__)
SK_DECLARE_ISA(avx2)
SK_DECLARE_ISA(avx512)
#endif
#undef SK_DECLARE_ISA

// dots.cpp, and the dot instructions' peak. Kernels for all else are the base ISA's.
#define SK_DECLARE_DOTS(isa)           \
  namespace isa {                      \
  extern const BsrKernels bsr_kernels; \
  extern const NmKernels nm_kernels;   \
  extern const VnmKernels vnm_kernels; \
  double dot_peak(double seconds);     \
  }
SK_DECLARE_DOTS(generic_bf16)
#if defined(__x86_64__)
SK_DECLARE_DOTS(avx512_bf16)
#endif
#undef SK_DECLARE_DOTS

// "avx512+bf16" is AVX-512 with dot instructions for bfloat16.
struct Isa {
  const char* name;
  bool (*supported)();
  const CsrKernels* csr;
  const BsrKernels* bsr;
  const NmKernels* nm;
  const VnmKernels* vnm;
  const MaskKernels* mask;
  double (*fma_peak)(double seconds);
  double (*dot_peak)(double seconds) = nullptr;
};

// The ISA in use.
const Isa& isa();

}  // namespace sk
