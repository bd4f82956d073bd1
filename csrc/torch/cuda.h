// The CUDA side of the bindings. libtorch_cuda is not linked: the library also loads where there is no GPU.
#pragma once

#include <dlfcn.h>

#include "common.h"

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

}  // namespace sk
