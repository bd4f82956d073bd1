// The run-time choice of the instruction set, and the C ABI that forwards to it.

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>

#include "kernels.h"

namespace sk {
namespace {

// Best first, compiled for x86-64-v4 and x86-64-v3. No CPU has the features that are asked for here without the rest of its
// level.
#if defined(__x86_64__)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

const Isa kIsas[] = {
#if defined(__x86_64__)
    {"avx512+bf16", [] { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }, &avx512::csr_kernels,
     &avx512_bf16::bsr_kernels, &avx512_bf16::nm_kernels, &avx512_bf16::vnm_kernels, &avx512::mask_kernels,
     avx512::fma_peak, avx512_bf16::dot_peak},
    {"avx512", has_avx512, &avx512::csr_kernels, &avx512::bsr_kernels, &avx512::nm_kernels, &avx512::vnm_kernels,
     &avx512::mask_kernels, avx512::fma_peak},
    {"avx2",
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"); },
     &avx2::csr_kernels, &avx2::bsr_kernels, &avx2::nm_kernels, &avx2::vnm_kernels, &avx2::mask_kernels, avx2::fma_peak},
#endif
    {"generic", [] { return true; }, &generic::csr_kernels, &generic::bsr_kernels, &generic::nm_kernels,
     &generic::vnm_kernels, &generic::mask_kernels, generic::fma_peak},
#if defined(SK_PLAIN_DOTS)  // for tests, by name only: the kernels for dot instructions without one
    {"generic+bf16", [] { return true; }, &generic::csr_kernels, &generic_bf16::bsr_kernels, &generic_bf16::nm_kernels,
     &generic_bf16::vnm_kernels, &generic::mask_kernels, generic::fma_peak},
#endif
};

const Isa* find(const char* name) {
  for (const Isa& candidate : kIsas)
    if (candidate.supported() && (name == nullptr || strcmp(name, candidate.name) == 0)) return &candidate;
  return nullptr;
}

struct Choice {
  std::atomic<const Isa*> isa;
  std::string error;
  Choice() {
    const char* wanted = getenv("SPARSEKERN_ISA");
    if (wanted != nullptr && *wanted == '\0') wanted = nullptr;
    const Isa* found = find(wanted);
    if (found == nullptr) {
      error = "SPARSEKERN_ISA must name an instruction set of this CPU (";
      for (const Isa& candidate : kIsas)
        if (candidate.supported()) error += std::string(candidate.name) + (&candidate == std::end(kIsas) - 1 ? "" : ", ");
      error += std::string("), got \"") + wanted + "\"";
      found = find(nullptr);
    }
    isa = found;
  }
};

Choice& choice() {
  static Choice instance;
  return instance;
}

}  // namespace

const Isa& isa() { return *choice().isa.load(std::memory_order_relaxed); }

}  // namespace sk

extern "C" {

const char* sk_isa(void) { return sk::isa().name; }

const char* sk_isa_error(void) { return sk::choice().error.empty() ? nullptr : sk::choice().error.c_str(); }

int sk_set_isa(const char* name) {
  const sk::Isa* found = sk::find(name);
  if (found == nullptr || name == nullptr) return -1;
  sk::choice().isa = found;
  return 0;
}

double sk_fma_peak(double seconds) { return sk::isa().fma_peak(seconds); }

double sk_dot_peak(double seconds) { return sk::isa().dot_peak ? sk::isa().dot_peak(seconds) : 0.0; }

void sk_csr_linear(const sk_csr* w, const void* values, const sk_matrix* x, const void* bias, sk_activation activation,
                   const sk_matrix* y, sk_dtype dtype, const sk_threads* threads) {
  sk::isa().csr->linear(w, values, x, bias, activation, y, dtype, threads);
}

int64_t sk_csr_linear_backward_workspace(const sk_csr* w, int64_t batch, const sk_threads* threads) {
  return sk::isa().csr->linear_backward_workspace(w, batch, threads);
}

void sk_csr_linear_backward(const sk_csr* w, const void* values, const sk_matrix* grad, const sk_matrix* x,
                            const sk_matrix* grad_x, void* grad_values, void* grad_bias, void* workspace, sk_dtype dtype,
                            const sk_threads* threads) {
  sk::isa().csr->linear_backward(w, values, grad, x, grad_x, grad_values, grad_bias, workspace, dtype, threads);
}

void sk_bsr_linear(const sk_bsr* w, const void* values, const sk_matrix* x, const void* bias, sk_activation activation,
                   const sk_matrix* y, sk_dtype dtype, const sk_threads* threads) {
  sk::isa().bsr->linear(w, values, x, bias, activation, y, dtype, threads);
}

int64_t sk_bsr_linear_backward_workspace(const sk_bsr* w, int64_t batch, const sk_threads* threads) {
  return sk::isa().bsr->linear_backward_workspace(w, batch, threads);
}

void sk_bsr_linear_backward(const sk_bsr* w, const void* values, const sk_matrix* grad, const sk_matrix* x,
                            const sk_matrix* grad_x, void* grad_values, void* grad_bias, void* workspace, sk_dtype dtype,
                            const sk_threads* threads) {
  sk::isa().bsr->linear_backward(w, values, grad, x, grad_x, grad_values, grad_bias, workspace, dtype, threads);
}

void sk_nm_linear(const sk_nm* w, const void* values, const sk_matrix* x, const void* bias, sk_activation activation,
                  const sk_matrix* y, sk_dtype dtype, const sk_threads* threads) {
  sk::isa().nm->linear(w, values, x, bias, activation, y, dtype, threads);
}

void sk_vnm_linear(const sk_vnm* w, const void* values, const sk_matrix* x, const void* bias, sk_activation activation,
                   const sk_matrix* y, sk_dtype dtype, const sk_threads* threads) {
  sk::isa().vnm->linear(w, values, x, bias, activation, y, dtype, threads);
}

void sk_mask_expand(const sk_mask* mask, const void* values, int element_bytes, void* dense, const sk_threads* threads) {
  sk::isa().mask->expand(mask, values, element_bytes, dense, threads);
}

void sk_mask_compress(const sk_mask* mask, const void* dense, int element_bytes, void* values, const sk_threads* threads) {
  sk::isa().mask->compress(mask, dense, element_bytes, values, threads);
}

void sk_mask_linear(const sk_mask* w, const void* values, const sk_matrix* x, const void* bias, sk_activation activation,
                    const sk_matrix* y, sk_dtype dtype, const sk_threads* threads) {
  sk::isa().mask->linear(w, values, x, bias, activation, y, dtype, threads);
}

void sk_mask_linear_backward(const sk_mask* w, const void* values, const sk_matrix* grad, const sk_matrix* x,
                             const sk_matrix* grad_x, void* grad_values, void* grad_bias, sk_dtype dtype,
                             const sk_threads* threads) {
  sk::isa().mask->linear_backward(w, values, grad, x, grad_x, grad_values, grad_bias, dtype, threads);
}

}  // extern "C"
