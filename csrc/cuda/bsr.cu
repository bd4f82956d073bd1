// BSR on NVIDIA GPUs: tensor cores where numbers have 16 bits and blocks at least 16 x 16 (bsr_product.h, bsr_weight.h), plain
// arithmetic elsewhere (bsr_simple.h); scatter and gather.

#include "bsr_simple.h"
#include "bsr_weight.h"
#include "sparsekern/bsr_cuda.h"

namespace {

using namespace sk::gpu;

template <class T>
bool on_tensor_cores(const sk_bsr& w) {
  return sizeof(T) == 2 && w.block_rows >= 16 && w.block_cols >= 16;
}

template <class T>
int64_t input_bytes(const sk_bsr& w, const sk_matrix& x) {
  return on_tensor_cores<T>(w) ? operand_bytes<T>(x) : packed_bytes<T>(x);
}

// x as its kernels take it.
template <class T>
struct Input {
  Operand<T> operand{};
  Packed<T> packed{};

  const char* prepare(const sk_bsr& w, const sk_matrix& x, uint8_t*& workspace, Stream stream) {
    return on_tensor_cores<T>(w) ? sk::gpu::operand(x, false, operand, workspace, stream)
                                 : pack(x, packed, workspace, stream);
  }
};

template <class T>
const char* multiply(const sk_bsr& w, const void* values, bool transposed, const Input<T>& x, const void* bias,
                     sk_activation activation, const sk_matrix& y, Stream stream) {
  const Blocks<T> blocks(w, values, transposed);
  if (blocks.rows == 0) return nullptr;
  if constexpr (sizeof(T) == 2)
    if (on_tensor_cores<T>(w)) return run_product(blocks, x.operand, bias, activation, y, stream);
  return run_simple_product(blocks, x.packed, bias, activation, y, stream);
}

template <class T>
const char* linear(const sk_bsr& w, const void* values, const sk_matrix& x, const void* bias, sk_activation activation,
                   const sk_matrix& y, void* workspace, Stream stream) {
  uint8_t* free = static_cast<uint8_t*>(workspace);
  Input<T> input;
  if (const char* error = input.prepare(w, x, free, stream)) return error;
  return multiply(w, values, false, input, bias, activation, y, stream);
}

template <class T>
const char* backward(const sk_bsr& w, const void* values, const sk_matrix& grad, const sk_matrix* x,
                     const sk_matrix* grad_x, void* grad_values, void* grad_bias, void* workspace, Stream stream) {
  uint8_t* free = static_cast<uint8_t*>(workspace);
  Input<T> g, input;
  const char* error = g.prepare(w, grad, free, stream);
  if (grad_x != nullptr && error == nullptr) error = multiply(w, values, true, g, nullptr, SK_IDENTITY, *grad_x, stream);
  if (grad_values != nullptr && w.blocks > 0 && error == nullptr) {
    error = input.prepare(w, *x, free, stream);
    const Blocks<T> blocks(w, nullptr, false);
    T* const to = static_cast<T*>(grad_values);
    if (error == nullptr && !on_tensor_cores<T>(w))
      error = run_simple_weight_gradient(blocks, w, g.packed, input.packed, to, stream);
    else if (error == nullptr)
      if constexpr (sizeof(T) == 2) error = run_weight_gradient(blocks, w.blocks, g.operand, input.operand, to, stream);
  }
  if (grad_bias != nullptr && w.rows > 0 && error == nullptr) error = sum_batch(grad, kDtype<T>, grad_bias, stream);
  return error;
}

// --- scatter and gather: bound by the dense matrix's bytes ------------------------------------------------------------------

constexpr int kCopyThreads = 256;

// A block of threads takes a block row.
template <class E>
SK_KERNEL(kCopyThreads)
scatter(sk_bsr w, const E* values, E* dense) {
  const int64_t row0 = int64_t(block().x) * w.block_rows, size = w.block_rows * w.block_cols;
  const int64_t rows = w.rows - row0 < w.block_rows ? w.rows - row0 : w.block_rows;
  for (int64_t i = thread(); i < rows * w.cols; i += kCopyThreads) dense[row0 * w.cols + i] = 0;
  barrier();
  const int64_t first = w.block_row_ptr[block().x] * size, end = w.block_row_ptr[block().x + 1] * size;
  for (int64_t i = first + thread(); i < end; i += kCopyThreads) {
    const int64_t r = i % size / w.block_cols, c = w.block_col_idx[i / size] * w.block_cols + i % w.block_cols;
    if (r < rows && c < w.cols) dense[(row0 + r) * w.cols + c] = values[i];
  }
}

template <class E>
SK_KERNEL(kCopyThreads)
gather(sk_bsr w, E* values, const E* dense) {
  const int64_t row0 = int64_t(block().x) * w.block_rows, size = w.block_rows * w.block_cols;
  const int64_t first = w.block_row_ptr[block().x] * size, end = w.block_row_ptr[block().x + 1] * size;
  for (int64_t i = first + thread(); i < end; i += kCopyThreads) {
    const int64_t r = row0 + i % size / w.block_cols, c = w.block_col_idx[i / size] * w.block_cols + i % w.block_cols;
    values[i] = r < w.rows && c < w.cols ? dense[r * w.cols + c] : E(0);
  }
}

template <class Kernel, class V, class D>
const char* copy(Kernel kernel, const sk_bsr& w, V* values, D* dense, Stream stream) {
  if (w.rows == 0) return nullptr;
  return launch(kernel, {unsigned(ceil_div(w.rows, w.block_rows)), 1, 1}, kCopyThreads, 0, stream, w, values, dense);
}

}  // namespace

const char* sk_bsr_scatter_cuda(const sk_bsr* w, const void* values, int element_bytes, void* dense, void* stream) {
  return with_element(element_bytes, [&](auto zero) {
    using E = decltype(zero);
    return copy(scatter<E>, *w, static_cast<const E*>(values), static_cast<E*>(dense), Stream(stream));
  });
}

const char* sk_bsr_gather_cuda(const sk_bsr* w, const void* dense, int element_bytes, void* values, void* stream) {
  return with_element(element_bytes, [&](auto zero) {
    using E = decltype(zero);
    return copy(gather<E>, *w, static_cast<E*>(values), static_cast<const E*>(dense), Stream(stream));
  });
}

int64_t sk_bsr_linear_cuda_workspace(const sk_bsr* w, const sk_matrix* x, sk_dtype dtype) {
  return dtype == SK_FLOAT32 ? input_bytes<float>(*w, *x) : input_bytes<bf16>(*w, *x);
}

const char* sk_bsr_linear_cuda(const sk_bsr* w, const void* values, const sk_matrix* x, const void* bias,
                               sk_activation activation, const sk_matrix* y, void* workspace, sk_dtype dtype,
                               void* stream) {
  return with_type(dtype, [&](auto zero) {
    return linear<decltype(zero)>(*w, values, *x, bias, activation, *y, workspace, Stream(stream));
  });
}

int64_t sk_bsr_linear_backward_cuda_workspace(const sk_bsr* w, const sk_matrix* grad, const sk_matrix* x, sk_dtype dtype) {
  const auto bytes = dtype == SK_FLOAT32 ? input_bytes<float> : input_bytes<bf16>;
  return bytes(*w, *grad) + (x ? bytes(*w, *x) : 0);
}

const char* sk_bsr_linear_backward_cuda(const sk_bsr* w, const void* values, const sk_matrix* grad, const sk_matrix* x,
                                        const sk_matrix* grad_x, void* grad_values, void* grad_bias, void* workspace,
                                        sk_dtype dtype, void* stream) {
  return with_type(dtype, [&](auto zero) {
    return backward<decltype(zero)>(*w, values, *grad, x, grad_x, grad_values, grad_bias, workspace, Stream(stream));
  });
}
