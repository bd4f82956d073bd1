// Random BSR products against a plain loop in float64, for builds with sanitizers: every ISA of this CPU, 1 to 5 threads,
// both layouts, padded strides, exact-size buffers, both dtypes, any set of gradients; what stands past the edge of W is
// NaN.
// bsr_random SEED CASES

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "sparsekern/bsr.h"

namespace {

std::mt19937 rng;
int uniform(int low, int high) { return low + int(rng() % unsigned(high - low + 1)); }

int thread_count = 1;
void parallel_for(int64_t n, sk_parallel_body body, void* context) {
  const int64_t each = (n + thread_count - 1) / thread_count;
  std::vector<std::thread> pool;
  for (int64_t begin = each; begin < n; begin += each)
    pool.emplace_back([=] { body(begin, std::min(n, begin + each), context); });
  body(0, std::min(n, each), context);
  for (std::thread& thread : pool) thread.join();
}

// n numbers of one dtype, in a buffer of exactly that size, aligned as torch's are.
struct Numbers {
  sk_dtype dtype;
  std::unique_ptr<char, decltype(&free)> buffer;
  char* data;
  Numbers(int64_t n, sk_dtype dtype) : dtype(dtype), buffer(allocate(n * size()), &free), data(buffer.get()) {
    std::uniform_real_distribution<float> number(-1.0f, 1.0f);
    for (int64_t i = 0; i < n; i++) set(i, number(rng));
  }
  static char* allocate(int64_t bytes) {
    void* memory = nullptr;
    return posix_memalign(&memory, 64, bytes) ? nullptr : static_cast<char*>(memory);
  }
  int64_t size() const { return dtype == SK_FLOAT32 ? 4 : 2; }
  void set(int64_t i, float v) {
    uint32_t bits;
    memcpy(&bits, &v, 4);
    const uint16_t high = uint16_t(bits >> 16);
    dtype == SK_FLOAT32 ? memcpy(&data[i * 4], &v, 4) : memcpy(&data[i * 2], &high, 2);
  }
  float operator[](int64_t i) const {
    uint32_t bits = 0;
    dtype == SK_FLOAT32 ? memcpy(&bits, &data[i * 4], 4) : memcpy(reinterpret_cast<char*>(&bits) + 2, &data[i * 2], 2);
    float v;
    memcpy(&v, &bits, 4);
    return v;
  }
};

struct Layout {
  int64_t stride, size;
  Layout(int64_t batch, int64_t features, bool feature_major, int padding) {
    const int64_t inner = feature_major ? batch : features, outer = feature_major ? features : batch;
    stride = std::max<int64_t>(2, inner + padding), size = (outer - 1) * stride + inner;
  }
};

struct Matrix {
  Numbers data;
  sk_matrix view;
  Matrix(int64_t batch, int64_t features, bool feature_major, int padding, sk_dtype dtype)
      : data(Layout(batch, features, feature_major, padding).size, dtype) {
    const int64_t stride = Layout(batch, features, feature_major, padding).stride;
    view = {data.data, batch, features, feature_major ? 1 : stride, feature_major ? stride : 1};
  }
  float at(int64_t b, int64_t f) const { return data[b * view.stride_batch + f * view.stride_feature]; }
};

double activation_of(sk_activation activation, double y) {
  switch (activation) {
    case SK_IDENTITY: return y;
    case SK_RELU: return std::max(y, 0.0);
    case SK_GELU: return 0.5 * y * std::erfc(-y * std::sqrt(0.5));
    case SK_SILU: return y / (1.0 + std::exp(-y));
  }
  return NAN;
}

// The largest error as a share of what rounding explains.
double run_case() {
  const char* isas[] = {"generic", "avx2", "avx512", "avx512+bf16", "generic+bf16"};
  sk_set_isa(isas[uniform(0, 4)]);  // one that this CPU lacks leaves the choice as it is
  thread_count = uniform(1, 5);
  const int sides[] = {4, 8, 16, 32, 64, 128};
  const int height = sides[uniform(0, 5)], width = uniform(0, 1) ? height : sides[uniform(0, 5)];
  const bool large = uniform(0, 49) == 0;  // beyond 16 MB of values in float32, few batch rows
  const auto side = [&] { return large ? uniform(2060, 2100) : uniform(1, uniform(0, 5) ? 300 : 1500); };
  const int rows = side(), cols = side();
  // Batches of whole panels are written in another way.
  const int batch = large || uniform(0, 5) == 0 ? uniform(1, large ? 3 : 8)
                    : uniform(0, 2)             ? uniform(1, 80)
                    : uniform(0, 1)             ? 64 * uniform(1, 5)
                                                : uniform(80, 300);
  const sk_dtype dtype = uniform(0, 1) ? SK_FLOAT32 : SK_BFLOAT16;
  const sk_activation activation = sk_activation(uniform(0, 1) ? uniform(0, 3) : 0);
  const double densities[] = {0.0, 0.05, 0.1, 0.3, 1.0}, density = large ? 1.0 : densities[uniform(0, 4)];
  const int block_rows = (rows + height - 1) / height, block_cols = (cols + width - 1) / width;

  const auto ints = [](const std::vector<int32_t>& from) {
    std::unique_ptr<int32_t[]> to(new int32_t[from.size()]);
    std::copy(from.begin(), from.end(), to.get());
    return to;
  };
  std::vector<int32_t> ptr = {0}, column, t_ptr = {0}, t_row, t_block;
  for (int i = 0; i < block_rows; i++) {
    for (int j = 0; j < block_cols; j++)
      if (std::uniform_real_distribution<double>()(rng) < density) column.push_back(j);
    ptr.push_back(int32_t(column.size()));
  }
  for (int j = 0; j < block_cols; j++) {
    for (int i = 0; i < block_rows; i++)
      for (int32_t k = ptr[i]; k < ptr[i + 1]; k++)
        if (column[k] == j) t_row.push_back(i), t_block.push_back(k);
    t_ptr.push_back(int32_t(t_row.size()));
  }
  const int64_t blocks = int64_t(column.size()), size = blocks * height * width;
  const auto p0 = ints(ptr), p1 = ints(column), p2 = ints(t_ptr), p3 = ints(t_row), p4 = ints(t_block);
  const sk_bsr w = {rows, cols, blocks, height, width, p0.get(), p1.get(), p2.get(), p3.get(), p4.get()};
  const sk_threads threads = {thread_count, parallel_for};

  const bool feature_major = uniform(0, 1), with_bias = uniform(0, 1);
  const int needs = uniform(1, 7);  // grad_x, grad_values, grad_bias
  const auto padding = [] { return uniform(0, 1) ? uniform(0, 3) : 0; };
  const Matrix x(batch, cols, feature_major, padding(), dtype), grad(batch, rows, uniform(0, 1), padding(), dtype);
  Matrix y(batch, rows, uniform(0, 1), padding(), dtype), grad_x(batch, cols, feature_major, padding(), dtype);
  Numbers values(size, dtype), bias(rows, dtype), grad_values(size, dtype), grad_bias(rows, dtype);
  const auto each_value = [&](auto f) {  // f(index, row, column, inside W)
    for (int i = 0; i < block_rows; i++)
      for (int32_t k = ptr[i]; k < ptr[i + 1]; k++)
        for (int64_t at = 0; at < height * width; at++) {
          const int64_t r = i * height + at / width, c = column[k] * width + at % width;
          f(int64_t(k) * height * width + at, r, c, r < rows && c < cols);
        }
  };
  each_value([&](int64_t k, int64_t, int64_t, bool inside) {
    if (!inside) values.set(k, NAN);
  });

  sk_bsr_linear(&w, values.data, &x.view, with_bias ? bias.data : nullptr, activation, &y.view, dtype, &threads);
  const int64_t bytes = (sk_bsr_linear_backward_workspace(&w, batch, &threads) + 63) / 64 * 64;
  std::unique_ptr<void, decltype(&free)> workspace(aligned_alloc(64, bytes), &free);
  sk_bsr_linear_backward(&w, needs & 1 ? values.data : nullptr, &grad.view, needs & 2 ? &x.view : nullptr,
                         needs & 1 ? &grad_x.view : nullptr, needs & 2 ? grad_values.data : nullptr,
                         needs & 4 ? grad_bias.data : nullptr, workspace.get(), dtype, &threads);

  double worst = 0.0;
  // float32 sums of at most 2100 terms in any order: 2100 * 2^-24 = 1.3e-4 of the magnitudes at the very worst.
  const auto compare = [&](double got, double sum, double magnitude) {
    const double tolerance = 1.3e-4 * magnitude + (dtype == SK_BFLOAT16 ? std::fabs(sum) / 256 : 0.0) + 1e-30;
    worst = std::max(worst, std::isfinite(got) ? std::fabs(got - sum) / tolerance : 1e9);
  };
  std::vector<double> sum_y(int64_t(batch) * rows), size_y(sum_y), sum_x(int64_t(batch) * cols), size_x(sum_x);
  each_value([&](int64_t k, int64_t r, int64_t c, bool inside) {
    if (!inside) {
      if (needs & 2 && grad_values[k] != 0.0f) worst = 1e9;
      return;
    }
    double sum = 0.0, magnitude = 0.0;
    for (int b = 0; b < batch; b++) {
      const double value = values[k], in = x.at(b, c), g = grad.at(b, r);
      sum_y[int64_t(b) * rows + r] += value * in, size_y[int64_t(b) * rows + r] += std::fabs(value * in);
      sum_x[int64_t(b) * cols + c] += value * g, size_x[int64_t(b) * cols + c] += std::fabs(value * g);
      sum += g * in, magnitude += std::fabs(g * in);
    }
    if (needs & 2) compare(grad_values[k], sum, magnitude);
  });
  for (int b = 0; b < batch; b++) {
    for (int r = 0; r < rows; r++) {
      const double offset = with_bias ? bias[r] : 0.0, sum = sum_y[int64_t(b) * rows + r] + offset;
      // No activation is steeper than 1.13.
      compare(y.at(b, r), activation_of(activation, sum), 1.2 * size_y[int64_t(b) * rows + r] + std::fabs(offset));
    }
    for (int c = 0; c < cols && needs & 1; c++)
      compare(grad_x.at(b, c), sum_x[int64_t(b) * cols + c], size_x[int64_t(b) * cols + c]);
  }
  for (int r = 0; r < rows && needs & 4; r++) {
    double sum = 0.0, magnitude = 0.0;
    for (int b = 0; b < batch; b++) sum += grad.at(b, r), magnitude += std::fabs(grad.at(b, r));
    compare(grad_bias[r], sum, magnitude);
  }
  if (worst > 1.0)
    printf("isa %s, %d x %d in %d x %d, batch %d, density %g, %s, needs %d, %d threads: error %g of the tolerance\n",
           sk_isa(), rows, cols, height, width, batch, density, dtype == SK_FLOAT32 ? "float32" : "bfloat16", needs,
           thread_count, worst);
  return worst;
}

}  // namespace

int main(int argc, char** argv) {
  rng.seed(argc > 1 ? unsigned(atoi(argv[1])) : 0u);
  double worst = 0.0;
  for (int i = 0; i < (argc > 2 ? atoi(argv[2]) : 50); i++) worst = std::max(worst, run_case());
  printf("worst error %g of the tolerance\n", worst);
  return worst > 1.0;
}
