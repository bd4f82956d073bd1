// CSR on NVIDIA GPUs: the forward product, simple and right. Tuned kernels take its place.
//
// One warp owns one row of W and kBatch rows of x: lanes stride over the row's entries, so col_idx and values are read
// coalesced and once per kBatch outputs; x is gathered through L2, which bounds the kernel (4 bytes per FMA).

#include "device.h"
#include "sparsekern/csr_cuda.h"

namespace {

using namespace sk::gpu;

constexpr int kWarpsPerBlock = 4;
constexpr int kBatch = 8;

// A [batch, features] matrix.
template <class T>
struct Matrix {
  T* data;
  int64_t batch, stride_batch, stride_feature;

  explicit Matrix(const sk_matrix& m)
      : data(static_cast<T*>(m.data)), batch(m.batch), stride_batch(m.stride_batch), stride_feature(m.stride_feature) {}
};

template <class T>
SK_KERNEL(kWarp* kWarpsPerBlock)
linear(int64_t rows, const int32_t* row_ptr, const int32_t* col_idx, const T* values, Matrix<const T> x, const T* bias,
       sk_activation activation, Matrix<T> y) {
  const int64_t row = int64_t(block().x) * kWarpsPerBlock + warp();
  if (row >= rows) return;
  const int32_t begin = row_ptr[row], end = row_ptr[row + 1];
  for (int64_t b0 = int64_t(block().y) * kBatch; b0 < x.batch; b0 += int64_t(blocks().y) * kBatch) {
    float sum[kBatch] = {};
    for (int32_t k = begin + lane(); k < end; k += kWarp) {
      const float v = to_float(values[k]);
      const T* const column = x.data + col_idx[k] * x.stride_feature;
#pragma unroll
      for (int i = 0; i < kBatch; i++)
        if (b0 + i < x.batch) sum[i] += v * to_float(column[(b0 + i) * x.stride_batch]);
    }
#pragma unroll
    for (int i = 0; i < kBatch; i++) {
      sum[i] = warp_sum(sum[i]);
      if (lane() == i && b0 + i < x.batch)
        y.data[(b0 + i) * y.stride_batch + row * y.stride_feature] =
            from_float<T>(activate(activation, sum[i] + (bias ? to_float(bias[row]) : 0.0f)));
    }
  }
}

template <class T>
const char* run(int64_t rows, const int32_t* row_ptr, const int32_t* col_idx, const void* values, const sk_matrix& x,
                const void* bias, sk_activation activation, const sk_matrix& y, void* stream) {
  const int64_t groups = (x.batch + kBatch - 1) / kBatch;
  const Dim grid = {unsigned((rows + kWarpsPerBlock - 1) / kWarpsPerBlock), unsigned(groups < 65535 ? groups : 65535), 1};
  return launch(linear<T>, grid, kWarp * kWarpsPerBlock, 0, Stream(stream), rows, row_ptr, col_idx,
                static_cast<const T*>(values), Matrix<const T>(x), static_cast<const T*>(bias), activation, Matrix<T>(y));
}

}  // namespace

const char* sk_csr_linear_cuda(int64_t rows, const int32_t* row_ptr, const int32_t* col_idx, const void* values,
                               const sk_matrix* x, const void* bias, sk_activation activation, const sk_matrix* y,
                               sk_dtype dtype, void* stream) {
  if (rows == 0 || x->batch == 0) return nullptr;
  return (dtype == SK_BFLOAT16 ? run<bf16> : run<float>)(rows, row_ptr, col_idx, values, *x, bias, activation, *y, stream);
}
