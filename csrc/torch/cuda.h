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

  // Kernels load blocks of values as vectors. What torch allocates is aligned; a view may not be.
  void aligned(const char* name, const void* data) const {
    if (reinterpret_cast<uintptr_t>(data) % 16) check_.fail(name, "aligned to 16 bytes", "a view that is not: clone() it");
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

}  // namespace sk

#ifdef SPARSEKERN_EMULATED
#define SK_REGISTER_CUDA_PRODUCTS(format, F) SK_REGISTER_PRODUCTS_ON(sparsekern_emulated, CPU, format, F)
#else
#define SK_REGISTER_CUDA_PRODUCTS(format, F) SK_REGISTER_PRODUCTS_ON(sparsekern, CUDA, format, F)
#endif
