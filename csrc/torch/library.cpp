// Facts about the library, as ops without tensors.

#include "common.h"

namespace sk {
namespace {

std::string isa() { return sk_isa(); }
std::string isa_error() { return sk_isa_error() ? sk_isa_error() : ""; }
#ifdef SPARSEKERN_CUTLASS
bool cutlass() { return true; }
#else
bool cutlass() { return false; }
#endif

}  // namespace
}  // namespace sk

STABLE_TORCH_LIBRARY_FRAGMENT(sparsekern, m) {
  m.def("isa() -> str");
  m.def("isa_error() -> str");
  m.def("cutlass() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&sk::isa));
  m.impl("isa_error", TORCH_BOX(&sk::isa_error));
  m.impl("cutlass", TORCH_BOX(&sk::cutlass));
}
