// CSR on NVIDIA GPUs: forward, and as the same kernels on W transposed, the gradient of x; the gradient of the values; scatter
// and gather. Few rows of x: csr_few.h. Many: csr_many.h. Both read x feature-major, packed if it is not (matrix.h): that costs
// reading and writing x once, where gathering from a batch-major one would move a 32-byte sector per number.

#include "csr_dots.h"
#include "csr_few.h"
#include "csr_many.h"
#include "sparsekern/csr_cuda.h"

namespace {

using namespace sk::gpu;

template <class T>
const char* product(const Rows<T>& w, const Packed<T>& x, const void* bias, sk_activation activation, const sk_matrix& y,
                    Stream stream) {
  if (w.rows == 0) return nullptr;
  const auto run = x.columns <= kFewBatch ? run_few<T> : run_many<T>;
  return run(w, x, static_cast<const T*>(bias), activation, Matrix<T>(y), stream);
}

template <class T>
int64_t linear_workspace(const sk_matrix& x) {
  return x.batch == 1 ? 0 : packed_bytes<T>(x);
}

template <class T>
const char* linear(const sk_csr_cuda& w, const void* values, const sk_matrix& x, const void* bias, sk_activation activation,
                   const sk_matrix& y, void* workspace, Stream stream) {
  Packed<T> input = {static_cast<const T*>(x.data), x.features, 1, x.stride_feature};  // a single row needs no packing
  uint8_t* free = static_cast<uint8_t*>(workspace);
  if (x.batch > 1)
    if (const char* error = pack(x, input, free, stream)) return error;
  return product(Rows<T>(w.rows, w.row_ptr, w.col_idx, nullptr, values), input, bias, activation, y, stream);
}

template <class T>
const char* backward(const sk_csr_cuda& w, const void* values, const sk_matrix& grad, const sk_matrix* x,
                     const sk_matrix* grad_x, void* grad_values, void* grad_bias, void* workspace, Stream stream) {
  uint8_t* free = static_cast<uint8_t*>(workspace);
  Packed<T> g, input;
  const char* error = pack(grad, g, free, stream);
  if (grad_x != nullptr && error == nullptr)
    error = product(Rows<T>(w.cols, w.t_row_ptr, w.t_col_idx, w.t_slot, values), g, nullptr, SK_IDENTITY, *grad_x, stream);
  if (grad_values != nullptr && w.nnz > 0 && error == nullptr) {
    error = pack(*x, input, free, stream);
    const Rows<T> rows(w.rows, w.row_ptr, w.col_idx, nullptr, nullptr);
    if (error == nullptr) error = run_dots(rows, w.nnz, g, input, static_cast<T*>(grad_values), stream);
  }
  if (grad_bias != nullptr && w.rows > 0 && error == nullptr) error = sum_batch(grad, kDtype<T>, grad_bias, stream);
  return error;
}

// --- scatter and gather: a warp per row, bound by the dense matrix's bytes --------------------------------------------------

constexpr int kCopyWarps = 8;

template <class E>
SK_KERNEL(kWarp* kCopyWarps)
scatter(int64_t rows, int64_t cols, const int32_t* row_ptr, const int32_t* col_idx, const E* values, E* dense) {
  const int64_t row = int64_t(block().x) * kCopyWarps + warp();
  if (row >= rows) return;
  for (int64_t c = lane(); c < cols; c += kWarp) dense[row * cols + c] = 0;
  warp_barrier();
  const int64_t end = row_ptr[row + 1];
  for (int64_t k = row_ptr[row] + lane(); k < end; k += kWarp) dense[row * cols + col_idx[k]] = values[k];
}

template <class E>
SK_KERNEL(kWarp* kCopyWarps)
gather(int64_t rows, int64_t cols, const int32_t* row_ptr, const int32_t* col_idx, E* values, const E* dense) {
  const int64_t row = int64_t(block().x) * kCopyWarps + warp();
  if (row >= rows) return;
  const int64_t end = row_ptr[row + 1];
  for (int64_t k = row_ptr[row] + lane(); k < end; k += kWarp) values[k] = dense[row * cols + col_idx[k]];
}

template <class Kernel, class V, class D>
const char* copy(Kernel kernel, const sk_csr_cuda& w, V* values, D* dense, Stream stream) {
  if (w.rows == 0) return nullptr;
  return launch(kernel, {unsigned(ceil_div(w.rows, kCopyWarps)), 1, 1}, kWarp * kCopyWarps, 0, stream, w.rows, w.cols,
                w.row_ptr, w.col_idx, values, dense);
}

}  // namespace

const char* sk_csr_scatter_cuda(const sk_csr_cuda* w, const void* values, int element_bytes, void* dense, void* stream) {
  return with_element(element_bytes, [&](auto zero) {
    using E = decltype(zero);
    return copy(scatter<E>, *w, static_cast<const E*>(values), static_cast<E*>(dense), Stream(stream));
  });
}

const char* sk_csr_gather_cuda(const sk_csr_cuda* w, const void* dense, int element_bytes, void* values, void* stream) {
  return with_element(element_bytes, [&](auto zero) {
    using E = decltype(zero);
    return copy(gather<E>, *w, static_cast<E*>(values), static_cast<const E*>(dense), Stream(stream));
  });
}

int64_t sk_csr_linear_cuda_workspace(const sk_csr_cuda*, const sk_matrix* x, sk_dtype dtype) {
  return dtype == SK_FLOAT32 ? linear_workspace<float>(*x) : linear_workspace<bf16>(*x);
}

const char* sk_csr_linear_cuda(const sk_csr_cuda* w, const void* values, const sk_matrix* x, const void* bias,
                               sk_activation activation, const sk_matrix* y, void* workspace, sk_dtype dtype,
                               void* stream) {
  return with_type(dtype, [&](auto zero) {
    return linear<decltype(zero)>(*w, values, *x, bias, activation, *y, workspace, Stream(stream));
  });
}

int64_t sk_csr_linear_backward_cuda_workspace(const sk_csr_cuda*, const sk_matrix* grad, const sk_matrix* x,
                                              sk_dtype dtype) {
  const auto bytes = dtype == SK_FLOAT32 ? packed_bytes<float> : packed_bytes<bf16>;
  return bytes(*grad) + (x ? bytes(*x) : 0);
}

const char* sk_csr_linear_backward_cuda(const sk_csr_cuda* w, const void* values, const sk_matrix* grad, const sk_matrix* x,
                                        const sk_matrix* grad_x, void* grad_values, void* grad_bias, void* workspace,
                                        sk_dtype dtype, void* stream) {
  return with_type(dtype, [&](auto zero) {
    return backward<decltype(zero)>(*w, values, *grad, x, grad_x, grad_values, grad_bias, workspace, Stream(stream));
  });
}
