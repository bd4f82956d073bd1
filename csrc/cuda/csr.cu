// CSR on NVIDIA GPUs: the forward product, simple and right. Tuned kernels take its place.
//
// One warp owns one row of W and kBatch rows of x: lanes stride over the row's entries, so col_idx and values are read
// coalesced and once per kBatch outputs; x is gathered through L2, which bounds the kernel (4 bytes per FMA).

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "sparsekern/csr_cuda.h"

namespace {

constexpr int kWarp = 32;
constexpr int kWarpsPerBlock = 4;
constexpr int kBatch = 8;

__device__ float to_float(float v) { return v; }
__device__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ void store(float* p, float v) { *p = v; }
__device__ void store(__nv_bfloat16* p, float v) { *p = __float2bfloat16_rn(v); }

// As torch.nn.functional's relu, gelu (exact) and silu.
__device__ float activate(sk_activation activation, float v) {
  switch (activation) {
    case SK_RELU: return v < 0.0f ? 0.0f : v;  // NaN stays
    case SK_GELU: return 0.5f * v * (1.0f + erff(v * 0.70710678f));
    case SK_SILU: return v / (1.0f + expf(-v));
    default: return v;
  }
}

struct Matrix {
  int64_t batch, stride_batch, stride_feature;
};

template <class T>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock)
    linear(int64_t rows, const int32_t* row_ptr, const int32_t* col_idx, const T* values, const T* x, Matrix xm,
           const T* bias, sk_activation activation, T* y, Matrix ym) {
  const int lane = threadIdx.x % kWarp;
  const int64_t row = int64_t(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp;
  if (row >= rows) return;
  const int32_t begin = row_ptr[row], end = row_ptr[row + 1];
  for (int64_t b0 = int64_t(blockIdx.y) * kBatch; b0 < xm.batch; b0 += int64_t(gridDim.y) * kBatch) {
    float sum[kBatch] = {};
    for (int32_t k = begin + lane; k < end; k += kWarp) {
      const float v = to_float(values[k]);
      const T* column = x + col_idx[k] * xm.stride_feature;
#pragma unroll
      for (int i = 0; i < kBatch; i++)
        if (b0 + i < xm.batch) sum[i] += v * to_float(column[(b0 + i) * xm.stride_batch]);
    }
#pragma unroll
    for (int i = 0; i < kBatch; i++)
      for (int offset = kWarp / 2; offset > 0; offset /= 2) sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], offset);
#pragma unroll
    for (int i = 0; i < kBatch; i++)
      if (lane == i && b0 + i < xm.batch)
        store(y + (b0 + i) * ym.stride_batch + row * ym.stride_feature,
              activate(activation, sum[i] + (bias ? to_float(bias[row]) : 0.0f)));
  }
}

template <class T>
void launch(int64_t rows, const int32_t* row_ptr, const int32_t* col_idx, const void* values, const sk_matrix& x,
            const void* bias, sk_activation activation, const sk_matrix& y, cudaStream_t stream) {
  const int64_t groups = (x.batch + kBatch - 1) / kBatch;
  const dim3 grid(unsigned((rows + kWarpsPerBlock - 1) / kWarpsPerBlock), unsigned(groups < 65535 ? groups : 65535));
  linear<T><<<grid, kWarp * kWarpsPerBlock, 0, stream>>>(
      rows, row_ptr, col_idx, static_cast<const T*>(values), static_cast<const T*>(x.data),
      Matrix{x.batch, x.stride_batch, x.stride_feature}, static_cast<const T*>(bias), activation, static_cast<T*>(y.data),
      Matrix{y.batch, y.stride_batch, y.stride_feature});
}

}  // namespace

const char* sk_csr_linear_cuda(int64_t rows, const int32_t* row_ptr, const int32_t* col_idx, const void* values,
                               const sk_matrix* x, const void* bias, sk_activation activation, const sk_matrix* y,
                               sk_dtype dtype, void* stream) {
  if (rows == 0 || x->batch == 0) return nullptr;
  (dtype == SK_BFLOAT16 ? launch<__nv_bfloat16> : launch<float>)(rows, row_ptr, col_idx, values, *x, bias, activation, *y,
                                                                 static_cast<cudaStream_t>(stream));
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
