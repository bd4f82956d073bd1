// 2:4 products on Hopper's `wgmma`, where the library was built with CUTLASS (see CMakeLists.txt).
#pragma once

#include "groups.h"

namespace sk::gpu::groups {

constexpr int kHopperTall = 128, kHopperWide = 256;  // rows of W and of x in a block's tile

#ifdef SPARSEKERN_CUTLASS
// Whether it runs this product, and should.
bool hopper_runs(const Groups& w, const void* values, const sk_matrix& x, const sk_matrix& y, sk_dtype dtype);
const char* hopper_linear(const Groups& w, const void* values, const sk_matrix& x, const void* bias,
                          sk_activation activation, const sk_matrix& y, sk_dtype dtype, void* stream);
#else
inline bool hopper_runs(const Groups&, const void*, const sk_matrix&, const sk_matrix&, sk_dtype) { return false; }
inline const char* hopper_linear(const Groups&, const void*, const sk_matrix&, const void*, sk_activation, const sk_matrix&,
                                 sk_dtype, void*) {
  return "built without CUTLASS";
}
#endif

}  // namespace sk::gpu::groups
