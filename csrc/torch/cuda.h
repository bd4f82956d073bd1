// The CUDA side of the bindings. libtorch_cuda is not linked: the library also loads where there is no GPU.
//
// With SPARSEKERN_EMULATED, for tests, the same ops take CPU tensors and stand in the namespace sparsekern_emulated: their
// kernels are those of csrc/cuda on tests/emulator.
#pragma once

#include <dlfcn.h>

#include "products.h"

namespace sk {

// torch's current stream on a device, asked of the libtorch_cuda that is loaded already (there is one: a CUDA tensor exists).
inline void* current_cuda_stream(int32_t device) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const Function function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  if (function == nullptr)
    throw std::runtime_error("sparsekern: libtorch_cuda.so is not loaded; is this a CPU-only torch?");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(function(device, &stream));
  return stream;
}

// A GPU's current stream, its memory from torch's allocator, and its errors.
class Gpu {
 public:
  static constexpr bool kFloat16 = true;

  Gpu(const Checker& check, const Tensor& x)
      : check_(check),
        like_(x)
#ifndef SPARSEKERN_EMULATED
        ,
        guard_(x.get_device_index()),
        stream(current_cuda_stream(x.get_device_index()))
#endif
  {
  }

  // For this call: torch hands it out again on the same stream, after what is enqueued here.
  void* workspace(int64_t bytes) {
    if (bytes == 0) return nullptr;
    memory_.push_back(empty_strided(like_, ScalarType::Byte, {bytes}, {1}));
    return memory_.back().mutable_data_ptr();
  }

  // What torch allocates is aligned; a view may not be.
  void aligned(const char* name, const void* data, int bytes) const {
    if (reinterpret_cast<uintptr_t>(data) % bytes)
      check_.fail(name, "aligned to " + std::to_string(bytes) + " bytes", "a view that is not: clone() it");
  }

  void done(const char* error) const {
    if (error != nullptr) throw std::runtime_error(std::string("sparsekern::") + check_.op + ": CUDA says: " + error);
  }

 private:
  const Checker& check_;
  const Tensor& like_;
  std::vector<Tensor> memory_;
#ifndef SPARSEKERN_EMULATED
  torch::stable::accelerator::DeviceGuard guard_;
#endif

 public:
  void* const stream = nullptr;
};

// The C ABI of a format whose matrices are W, as csr_cuda.h has it.
template <class W>
struct CudaFunctions {
  int64_t (*linear_workspace)(const W*, const sk_matrix* x, sk_dtype);
  const char* (*linear)(const W*, const void* values, const sk_matrix* x, const void* bias, sk_activation,
                        const sk_matrix* y, void* workspace, sk_dtype, void* stream);
  int64_t (*backward_workspace)(const W*, const sk_matrix* grad, const sk_matrix* x, sk_dtype);
  const char* (*backward)(const W*, const void* values, const sk_matrix* grad, const sk_matrix* x, const sk_matrix* grad_x,
                          void* grad_values, void* grad_bias, void* workspace, sk_dtype, void* stream);
  const char* (*scatter)(const W*, const void* values, int element_bytes, void* dense, void* stream);
  const char* (*gather)(const W*, const void* dense, int element_bytes, void* values, void* stream);
  int alignment = 1;  // of values, in bytes
};

// A format of products.h from its pattern P, checked: its matrix `w` and its kFunctions.
template <class P>
struct OnGpu : P {
  using Device = Gpu;
  using P::P;

  void linear(const void* values, const sk_matrix* x, const void* bias, sk_activation activation, const sk_matrix* y,
              sk_dtype dtype, Gpu& at) const {
    at.aligned("values", values, f.alignment);
    void* const workspace = at.workspace(f.linear_workspace(&this->w, x, dtype));
    at.done(f.linear(&this->w, values, x, bias, activation, y, workspace, dtype, at.stream));
  }
  void backward(const void* values, const sk_matrix* grad, const sk_matrix* x, const sk_matrix* grad_x, void* grad_values,
                void* grad_bias, sk_dtype dtype, Gpu& at) const {
    at.aligned("values", values, f.alignment);
    void* const workspace = at.workspace(f.backward_workspace(&this->w, grad, x, dtype));
    at.done(f.backward(&this->w, values, grad, x, grad_x, grad_values, grad_bias, workspace, dtype, at.stream));
  }
  void scatter(const void* values, int bytes, void* dense, Gpu& at) const {
    at.done(f.scatter(&this->w, values, bytes, dense, at.stream));
  }
  void gather(const void* dense, int bytes, void* values, Gpu& at) const {
    at.done(f.gather(&this->w, dense, bytes, values, at.stream));
  }

 private:
  static constexpr const auto& f = P::kFunctions;
};

// What sparse tensor cores are told of a pattern: `words` of them, null where there are none.
inline const uint32_t* metadata(const Checker& check, const char* name, const Tensor& t, int64_t words, const Tensor& x) {
  check.tensor(name, t, ScalarType::Int, x, {words});
  return words > 0 ? static_cast<const uint32_t*>(t.const_data_ptr()) : nullptr;
}

}  // namespace sk

#ifdef SPARSEKERN_EMULATED
#define SK_REGISTER_CUDA_PRODUCTS(format, F) SK_REGISTER_PRODUCTS_ON(sparsekern_emulated, CPU, format, sk::OnGpu<F>)
#else
#define SK_REGISTER_CUDA_PRODUCTS(format, F) SK_REGISTER_PRODUCTS_ON(sparsekern, CUDA, format, sk::OnGpu<F>)
#endif
