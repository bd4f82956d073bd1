// `sparsekern._native`: the kernels on numpy arrays, on one thread, with a chosen ISA. For tests and microbenchmarks.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "sparsekern/csr.h"

namespace py = pybind11;

namespace {

using Floats = py::array_t<float, py::array::c_style | py::array::forcecast>;
using Arrays = std::vector<py::array>;

const sk_threads kOneThread = {1, [](int64_t n, sk_parallel_body body, void* context) { body(0, n, context); }};

// Runs with another ISA until the end of the scope.
class IsaScope {
 public:
  explicit IsaScope(const std::string& isa) : before_(sk_isa()) {
    if (!isa.empty() && sk_set_isa(isa.c_str()) != 0)
      throw py::value_error("isa must be one that this CPU has, got \"" + isa + "\"");
  }
  ~IsaScope() { sk_set_isa(before_.c_str()); }

 private:
  std::string before_;
};

struct Workspace {
  explicit Workspace(int64_t bytes) : data(std::aligned_alloc(64, (bytes / 64 + 1) * 64)) {
    if (data == nullptr) throw std::bad_alloc();
  }
  ~Workspace() { std::free(data); }
  Workspace(const Workspace&) = delete;
  void* data;
};

sk_matrix matrix(const Floats& a) {
  if (a.ndim() != 2) throw py::value_error("x and grad must be float32 [batch, features]");
  const int64_t batch = a.shape(0), features = a.shape(1);
  float* data = const_cast<float*>(a.data());
  if (features > 1) return {data, batch, features, features, 1};
  return {data, batch, features, 1, batch > 1 ? batch : 2};  // one column: exactly one stride may be 1
}

// The list that CSR.tensors() makes, as arrays.
sk_csr csr(const Arrays& pattern) {
  const auto require = [](bool ok) {
    if (!ok) throw py::value_error("pattern must be the 6 arrays of CSR.tensors()");
  };
  require(pattern.size() == 6);
  const auto ints = [&](size_t i, int dims) {
    require(py::isinstance<py::array_t<int32_t, py::array::c_style>>(pattern[i]) && pattern[i].ndim() == dims);
    return static_cast<const int32_t*>(pattern[i].data());
  };
  const int32_t *row_ptr = ints(0, 1), *tile_ptr = ints(3, 2), *t_tile_ptr = ints(4, 2), *t_slot = ints(5, 1);
  const py::array& columns = pattern[2];
  const bool narrow = py::isinstance<py::array_t<uint16_t, py::array::c_style>>(columns);
  if (!narrow) ints(2, 1);
  const int64_t nnz = columns.size(), rows = pattern[3].shape(1), cols = pattern[4].shape(1);
  require(pattern[3].shape(0) >= 2 && pattern[4].shape(0) >= 2 && pattern[5].size() == nnz);
  require(pattern[0].size() == rows + 1 && row_ptr[rows] == nnz);
  return {rows,     cols,       nnz,   pattern[3].shape(0) - 1, pattern[4].shape(0) - 1, columns.data(), narrow ? 2 : 4,
          tile_ptr, t_tile_ptr, t_slot};
}

Floats csr_linear(const Floats& x, const Floats& values, const Arrays& pattern, const std::string& isa) {
  const IsaScope scope(isa);
  const sk_matrix input = matrix(x);
  const sk_csr w = csr(pattern);
  if (input.features != w.cols || values.size() != w.nnz) throw py::value_error("x must be [batch, in], values [nnz]");
  Floats y({input.batch, w.rows});
  const sk_matrix output = matrix(y);
  sk_csr_linear(&w, values.data(), &input, nullptr, SK_IDENTITY, &output, SK_FLOAT32, &kOneThread);
  return y;
}

py::tuple csr_linear_backward(const Floats& grad, const Floats& x, const Floats& values, const Arrays& pattern,
                              const std::string& isa) {
  const IsaScope scope(isa);
  const sk_matrix g = matrix(grad), input = matrix(x);
  if (g.batch != input.batch || g.batch < 1) throw py::value_error("grad and x must have the same batch of at least 1");
  const sk_csr w = csr(pattern);
  if (input.features != w.cols || g.features != w.rows || values.size() != w.nnz)
    throw py::value_error("grad must be [batch, out], x [batch, in], values [nnz]");
  Floats grad_x({g.batch, w.cols}), grad_values(w.nnz), grad_bias(w.rows);
  const sk_matrix output = matrix(grad_x);
  const Workspace scratch(sk_csr_linear_backward_workspace(&w, g.batch, &kOneThread));
  sk_csr_linear_backward(&w, values.data(), &g, &input, &output, grad_values.mutable_data(), grad_bias.mutable_data(),
                         scratch.data, SK_FLOAT32, &kOneThread);
  return py::make_tuple(grad_x, grad_values, grad_bias);
}

// GFLOP/s of `threads` cores at once: the ceiling of the roofline.
double peak(double (*of_one)(double), int threads, double seconds) {
  if (threads < 1) throw py::value_error("threads must be at least 1, got " + std::to_string(threads));
  std::vector<double> rates(threads);
  std::vector<std::thread> pool;
  for (int i = 1; i < threads; i++) pool.emplace_back([&rates, i, of_one, seconds] { rates[i] = of_one(seconds); });
  rates[0] = of_one(seconds);
  for (std::thread& thread : pool) thread.join();
  double sum = 0.0;
  for (double rate : rates) sum += rate;
  return sum;
}

double fma_peak(int threads, double seconds) { return peak(sk_fma_peak, threads, seconds); }
double dot_peak(int threads, double seconds) { return peak(sk_dot_peak, threads, seconds); }

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Developer access to the kernels: numpy arrays, one thread, any ISA.";
  m.def("isa", &sk_isa);
  m.def("csr_linear", &csr_linear, py::arg("x"), py::arg("values"), py::arg("pattern"), py::arg("isa") = "",
        "x [batch, in] float32 times W^T, with values [nnz] and the arrays of CSR.tensors().");
  m.def("csr_linear_backward", &csr_linear_backward, py::arg("grad"), py::arg("x"), py::arg("values"), py::arg("pattern"),
        py::arg("isa") = "", "The gradients of x, values and bias.");
  m.def("fma_peak", &fma_peak, py::arg("threads") = 1, py::arg("seconds") = 0.05, py::call_guard<py::gil_scoped_release>(),
        "Float32 FMA rate in GFLOP/s of `threads` cores at once.");
  m.def("dot_peak", &dot_peak, py::arg("threads") = 1, py::arg("seconds") = 0.05, py::call_guard<py::gil_scoped_release>(),
        "Likewise, that of bfloat16 dot instructions; 0 where the ISA in use has none.");
}
