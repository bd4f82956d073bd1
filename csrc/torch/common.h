// What the torch bindings of all formats share: argument checks, allocation, threads. No arithmetic here.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "sparsekern/common.h"

namespace sk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Double: return "float64";
    case ScalarType::Byte: return "uint8";
    case ScalarType::UInt16: return "uint16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    default: return "another dtype";
  }
}

// "int64 [12, 3] on cpu": what an argument was, for error messages.
inline std::string describe(const Tensor& tensor) {
  std::ostringstream out;
  out << dtype_name(tensor.scalar_type()) << " [";
  for (int64_t d = 0; d < tensor.dim(); d++) out << (d ? ", " : "") << tensor.size(d);
  out << "] on " << (tensor.is_cpu() ? "cpu" : tensor.is_cuda() ? "cuda" : "another device");
  return out.str();
}

// Throws "sparsekern::<op>: <name> must be <rule>, got <what it was>".
struct Checker {
  const char* op;

  void require(bool ok, const char* name, const std::string& rule, const Tensor& got) const {
    if (!ok) fail(name, rule, describe(got));
  }
  [[noreturn]] void fail(const char* name, const std::string& rule, const std::string& got) const {
    throw std::runtime_error(std::string("sparsekern::") + op + ": " + name + " must be " + rule + ", got " + got);
  }

  // A contiguous tensor of this dtype, device (x's) and 1-D or 2-D shape; size -1 fits any.
  void tensor(const char* name, const Tensor& t, ScalarType type, const Tensor& x, std::vector<int64_t> shape) const {
    bool ok = t.scalar_type() == type && same_device(t, x) && t.dim() == int64_t(shape.size());
    for (size_t d = 0; ok && d < shape.size(); d++) ok = shape[d] < 0 || t.size(d) == shape[d];
    if (ok && t.is_contiguous()) return;
    std::ostringstream rule;
    rule << "contiguous " << dtype_name(type) << " [";
    for (size_t d = 0; d < shape.size(); d++) {
      rule << (d ? ", " : "");
      shape[d] < 0 ? rule << "any" : rule << shape[d];
    }
    rule << "] on " << (x.is_cpu() ? "cpu" : "x's device");
    fail(name, rule.str(), ok ? describe(t) + ", not contiguous" : describe(t));
  }

  bool same_device(const Tensor& a, const Tensor& b) const {
    return a.is_cpu() == b.is_cpu() && a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index();
  }

  sk_dtype dtype(const char* name, const Tensor& t, bool float16) const {
    const ScalarType type = t.scalar_type();
    if (float16 && type == ScalarType::Half) return SK_FLOAT16;
    require(type == ScalarType::Float || type == ScalarType::BFloat16, name,
            float16 ? "float32, bfloat16 or float16" : "float32 or bfloat16", t);
    return type == ScalarType::BFloat16 ? SK_BFLOAT16 : SK_FLOAT32;
  }

  // A [batch, features] matrix that the kernels can read: one of its strides is 1, its rows or columns do not overlap.
  sk_matrix matrix(const char* name, const Tensor& t, int64_t features) const {
    require(t.dim() == 2 && t.size(1) == features, name, "[batch, " + std::to_string(features) + "]", t);
    const int64_t batch = t.size(0), s0 = t.stride(0), s1 = t.stride(1);
    const bool batch_major = (s1 == 1 || features <= 1) && (s0 >= features || batch <= 1);
    const bool feature_major = (s0 == 1 || batch <= 1) && (s1 >= batch || features <= 1);
    if (!batch_major && !feature_major && batch * features > 0)
      fail(name, "batch-major (strides (>= features, 1)) or feature-major (strides (1, >= batch))",
           "strides (" + std::to_string(s0) + ", " + std::to_string(s1) + ")");
    sk_matrix m = {t.data_ptr(), batch, features, s0, s1};
    // A stride is arbitrary where its size is at most 1: give it the value that keeps exactly one stride at 1.
    if (batch_major && !(feature_major && s0 == 1 && batch > 1)) {
      m.stride_feature = 1;
      if (batch <= 1) m.stride_batch = features > 1 ? features : 2;
    } else {
      m.stride_batch = 1;
      if (features <= 1) m.stride_feature = batch > 1 ? batch : 2;
    }
    return m;
  }
};

// Uninitialized, on like's device.
inline Tensor empty_strided(const Tensor& like, ScalarType type, std::vector<int64_t> sizes, std::vector<int64_t> strides) {
  int32_t dtype = 0, device_type = 0, device_index = 0;
  dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), dtype,
                                                         device_type, device_index, &handle));
  return Tensor(handle);
}

// Uninitialized [batch, features] in the layout of `like`: feature-major in, feature-major out. The Python fakes say the same.
inline Tensor empty_matrix(const Tensor& like, int64_t batch, int64_t features) {
  const bool feature_major = like.stride(0) == 1 && like.stride(1) != 1;
  if (feature_major) return empty_strided(like, like.scalar_type(), {batch, features}, {1, batch > 1 ? batch : 1});
  return empty_strided(like, like.scalar_type(), {batch, features}, {features > 1 ? features : 1, 1});
}

// Uninitialized and contiguous.
inline Tensor empty_tensor(const Tensor& like, const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * (sizes[d] > 1 ? sizes[d] : 1);
  return empty_strided(like, like.scalar_type(), sizes, strides);
}

// Scratch memory for one call, 64-byte aligned. It is kept for the next one, a buffer per calling thread: fresh memory costs
// page faults, 5 % of a training step.
inline void* kept_memory(int64_t bytes) {
  static thread_local std::unique_ptr<void, decltype(&std::free)> kept(nullptr, &std::free);
  static thread_local int64_t size = 0;
  if (bytes > size) {
    kept.reset();
    size = 0;
    kept.reset(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
    if (kept == nullptr) throw std::bad_alloc();
    size = bytes;
  }
  return kept.get();
}

// torch's own threads: one pool, so no oversubscription, and torch.set_num_threads rules.
inline sk_threads torch_threads() {
  uint32_t count = 1;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_get_num_threads(&count));
  return {int(count), [](int64_t n, sk_parallel_body body, void* context) {
            STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, n, 1, body, context));
          }};
}

}  // namespace sk
