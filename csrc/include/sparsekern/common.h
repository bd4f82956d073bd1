/* Types shared by the C ABI of all kernels. Plain C, no torch. */
#ifndef SPARSEKERN_COMMON_H
#define SPARSEKERN_COMMON_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Storage types. Arithmetic and accumulation are float32 for all. float16 is for GPUs alone. */
typedef enum { SK_FLOAT32 = 0, SK_BFLOAT16 = 1, SK_FLOAT16 = 2 } sk_dtype;

/* What is applied to y before it is stored: y, max(y, 0), y Phi(y) with the normal distribution function Phi, y / (1 + e^-y). */
typedef enum { SK_IDENTITY = 0, SK_RELU = 1, SK_GELU = 2, SK_SILU = 3 } sk_activation;

/* A [batch, features] matrix, one of whose strides is 1:
 * batch-major (stride_feature == 1) or feature-major (stride_batch == 1). Strides count elements. */
typedef struct {
  void* data;
  int64_t batch;
  int64_t features;
  int64_t stride_batch;
  int64_t stride_feature;
} sk_matrix;

/* How a kernel runs in parallel: parallel_for splits [0, n) into at most `threads` contiguous ranges and calls
 * body(begin, end, context) on each. The ranges may run one after another, so a body never waits for another one. */
typedef void (*sk_parallel_body)(int64_t begin, int64_t end, void* context);
typedef struct {
  int threads;
  void (*parallel_for)(int64_t n, sk_parallel_body body, void* context);
} sk_threads;

/* The instruction set in use: "generic", "avx2", "avx512" or "avx512+bf16", with dot instructions for bfloat16. It is the best
 * one that the CPU has, or what the environment variable SPARSEKERN_ISA names when the library is loaded. */
const char* sk_isa(void);

/* Why SPARSEKERN_ISA cannot be honoured (unknown, or this CPU lacks it), else NULL. */
const char* sk_isa_error(void);

/* Use `isa` from now on. Returns 0, or -1 where it is unknown or this CPU lacks it. For tests and microbenchmarks. */
int sk_set_isa(const char* isa);

/* Float32 FMA rate of one core in GFLOP/s, measured for about `seconds` with the ISA in use: registers only. */
double sk_fma_peak(double seconds);

/* Likewise, that of bfloat16 dot instructions; 0 where the ISA in use has none. */
double sk_dot_peak(double seconds);

#ifdef __cplusplus
}
#endif
#endif
