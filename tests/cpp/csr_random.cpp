// Random CSR products against a plain loop in float64, for builds with sanitizers: every ISA of this CPU, 1 to 5 threads, both
// dtypes and layouts, padded strides, any of the gradients, exact-size buffers.  csr_random SEED CASES

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "sparsekern/csr.h"
#include "sparsekern/mask.h"

namespace {

std::mt19937 rng;
int uniform(int low, int high) { return low + int(rng() % unsigned(high - low + 1)); }
float number() { return std::uniform_real_distribution<float>(-1.0f, 1.0f)(rng); }

int thread_count = 1;
void parallel_for(int64_t n, sk_parallel_body body, void* context) {
  const int64_t each = (n + thread_count - 1) / thread_count;
  std::vector<std::thread> pool;
  for (int64_t begin = each; begin < n; begin += each)
    pool.emplace_back([=] { body(begin, std::min(n, begin + each), context); });
  body(0, std::min(n, each), context);
  for (std::thread& thread : pool) thread.join();
}

// Random numbers of a dtype; bfloat16 is the upper half of a little-endian float32.
class Numbers {
 public:
  Numbers(int64_t n, sk_dtype dtype) : size_(dtype == SK_BFLOAT16 ? 2 : 4), data_(new char[n * size_]) {
    for (int64_t i = 0; i < n; i++) {
      const float value = number();
      memcpy(&data_[i * size_], reinterpret_cast<const char*>(&value) + 4 - size_, size_);
    }
  }
  float operator[](int64_t i) const {
    float value = 0.0f;
    memcpy(reinterpret_cast<char*>(&value) + 4 - size_, &data_[i * size_], size_);
    return value;
  }
  void* get() const { return data_.get(); }

 private:
  int64_t size_;
  std::unique_ptr<char[]> data_;
};

class Matrix {
 public:
  Matrix(int64_t batch, int64_t features, sk_dtype dtype)
      : view(layout(batch, features)),
        data_((batch - 1) * view.stride_batch + (features - 1) * view.stride_feature + 1, dtype) {
    view.data = data_.get();
  }
  float at(int64_t b, int64_t f) const { return data_[b * view.stride_batch + f * view.stride_feature]; }
  sk_matrix view;

 private:
  static sk_matrix layout(int64_t batch, int64_t features) {
    const bool feature_major = uniform(0, 1);
    const int64_t stride = std::max<int64_t>(2, (feature_major ? batch : features) + uniform(0, 3));
    return {nullptr, batch, features, feature_major ? 1 : stride, feature_major ? stride : 1};
  }
  Numbers data_;
};

int64_t tile_width(int64_t rows, int64_t cols, int64_t nnz) {  // as in formats/csr.py
  int64_t width = 128;
  while (width < 1024 && nnz * width < 8 * rows * cols) width *= 2;
  return width;
}

// Whether values go into a dense weight and back along a mask as they do along the columns.
bool mask_holds(const sk_csr& w, const sk_threads& threads) {
  const auto bytes = [](int64_t n) {
    std::unique_ptr<char[]> made(new char[n]);
    for (int64_t i = 0; i < n; i++) made[i] = char(rng());
    return made;
  };
  const int size = 2 << uniform(0, 2);
  const int64_t dense_bytes = w.rows * w.cols * size, value_bytes = w.nnz * size;
  const auto bits = bytes(w.rows * ((w.cols + 7) / 8)), values = bytes(value_bytes), weight = bytes(dense_bytes);
  const auto expanded = bytes(dense_bytes), scattered = bytes(dense_bytes), compressed = bytes(value_bytes);
  const auto gathered = bytes(value_bytes);
  sk_mask_bits(&w, reinterpret_cast<uint8_t*>(bits.get()), &threads);
  const sk_mask mask = {w.rows, w.cols, w.nnz, reinterpret_cast<uint8_t*>(bits.get()), w.tile_ptr};
  sk_mask_expand(&mask, values.get(), size, expanded.get(), &threads);
  sk_csr_scatter(&w, values.get(), size, scattered.get(), &threads);
  sk_mask_compress(&mask, weight.get(), size, compressed.get(), &threads);
  sk_csr_gather(&w, weight.get(), size, gathered.get(), &threads);
  return !memcmp(expanded.get(), scattered.get(), dense_bytes) && !memcmp(compressed.get(), gathered.get(), value_bytes);
}

// The largest error beyond the rounding of results to their dtype, relative to the sum of the absolute values of what was
// added up.
double run_case() {
  const char* isas[] = {"generic", "avx2", "avx512"};
  sk_set_isa(isas[uniform(0, 2)]);  // one that this CPU lacks leaves the choice as it is
  thread_count = uniform(1, 5);
  const sk_dtype dtype = uniform(0, 2) ? SK_FLOAT32 : SK_BFLOAT16;
  const int rows = uniform(1, uniform(0, 5) ? 300 : 2000), cols = uniform(1, uniform(0, 5) ? 300 : 2600);
  const int batches[] = {1, 4, 16, 70, 400}, batch = uniform(1, batches[uniform(0, 4)]);  // few rows: kernels of their own
  const bool need_x = uniform(0, 3), need_values = uniform(0, 3), need_bias = uniform(0, 3);
  const double densities[] = {0.0, 0.01, 0.05, 0.1, 0.3, 1.0}, density = densities[uniform(0, 5)];
  std::vector<int32_t> row_ptr = {0}, columns;
  for (int r = 0; r < rows; r++) {
    if (uniform(0, 9) > 0)
      for (int c = 0; c < cols; c++)
        if (std::uniform_real_distribution<double>()(rng) < density) columns.push_back(c);
    row_ptr.push_back(int32_t(columns.size()));
  }
  const int64_t nnz = int64_t(columns.size()), width = tile_width(rows, cols, nnz);
  const int64_t tiles = (cols + width - 1) / width, t_tiles = (rows + width - 1) / width;
  const auto ints = [](int64_t n) { return std::unique_ptr<int32_t[]>(new int32_t[n]); };
  auto col_idx = ints(nnz), tile_ptr = ints((tiles + 1) * rows), t_tile_ptr = ints((t_tiles + 1) * cols), slot = ints(nnz);
  std::copy(columns.begin(), columns.end(), col_idx.get());
  sk_csr_derive(rows, cols, width, width, row_ptr.data(), col_idx.get(), tile_ptr.get(), t_tile_ptr.get(), slot.get());
  const std::unique_ptr<uint16_t[]> narrow(new uint16_t[nnz]);
  std::copy(columns.begin(), columns.end(), narrow.get());
  const bool wide = uniform(0, 1);
  const void* indices = wide ? static_cast<const void*>(col_idx.get()) : narrow.get();
  const sk_csr w = {rows, cols, nnz, tiles, t_tiles, indices, wide ? 4 : 2, tile_ptr.get(), t_tile_ptr.get(), slot.get()};
  const sk_threads threads = {thread_count, parallel_for};
  if (!mask_holds(w, threads)) return 1.0;
  const bool with_bias = uniform(0, 1);
  const Matrix x(batch, cols, dtype), grad(batch, rows, dtype), y(batch, rows, dtype), grad_x(batch, cols, dtype);
  const Numbers values(nnz, dtype), bias(rows, dtype), grad_values(nnz, dtype), grad_bias(rows, dtype);

  sk_csr_linear(&w, values.get(), &x.view, with_bias ? bias.get() : nullptr, SK_IDENTITY, &y.view, dtype, &threads);
  const int64_t bytes = (sk_csr_linear_backward_workspace(&w, batch, &threads) + 63) / 64 * 64;
  std::unique_ptr<void, decltype(&free)> workspace(aligned_alloc(64, bytes), &free);
  memset(workspace.get(), 0xff, bytes);  // NaN
  sk_csr_linear_backward(&w, need_x ? values.get() : nullptr, &grad.view, need_values ? &x.view : nullptr,
                         need_x ? &grad_x.view : nullptr, need_values ? grad_values.get() : nullptr,
                         need_bias ? grad_bias.get() : nullptr, workspace.get(), dtype, &threads);

  double worst = 0.0;
  const auto compare = [&](double got, double sum, double magnitude) {
    const double rounding = dtype == SK_BFLOAT16 ? std::ldexp(std::fabs(got), -8) : 0.0;
    worst = std::max(worst, std::isfinite(got) ? (std::fabs(got - sum) - rounding) / (magnitude + 1e-30) : 1.0);
  };
  std::vector<double> dx(int64_t(batch) * cols), dx_size(dx), dw(nnz), dw_size(dw);
  for (int b = 0; b < batch; b++)
    for (int r = 0; r < rows; r++) {
      double sum = with_bias ? bias[r] : 0.0, size = std::fabs(sum);
      for (int32_t k = row_ptr[r]; k < row_ptr[r + 1]; k++) {
        const int64_t c = columns[k], i = int64_t(b) * cols + c;
        const double term = double(values[k]) * x.at(b, c), to_x = double(grad.at(b, r)) * values[k];
        const double to_w = double(grad.at(b, r)) * x.at(b, c);
        sum += term, size += std::fabs(term);
        dx[i] += to_x, dx_size[i] += std::fabs(to_x);
        dw[k] += to_w, dw_size[k] += std::fabs(to_w);
      }
      compare(y.at(b, r), sum, size);
    }
  for (int b = 0; need_x && b < batch; b++)
    for (int c = 0; c < cols; c++) compare(grad_x.at(b, c), dx[int64_t(b) * cols + c], dx_size[int64_t(b) * cols + c]);
  for (int64_t k = 0; need_values && k < nnz; k++) compare(grad_values[k], dw[k], dw_size[k]);
  for (int r = 0; need_bias && r < rows; r++) {
    double sum = 0.0, size = 0.0;
    for (int b = 0; b < batch; b++) sum += grad.at(b, r), size += std::fabs(grad.at(b, r));
    compare(grad_bias[r], sum, size);
  }
  if (worst >
      1e-4)  // float32 sums of at most 2600 terms in any order: 2600 * 2^-24 = 1.6e-4 of the magnitudes at the very worst
    printf("isa %s, %d x %d, batch %d, density %g, dtype %d, gradients %d%d%d, %d threads: error %g\n", sk_isa(), rows,
           cols, batch, density, dtype, need_x, need_values, need_bias, thread_count, worst);
  return worst;
}

}  // namespace

int main(int argc, char** argv) {
  rng.seed(argc > 1 ? unsigned(atoi(argv[1])) : 0u);
  double worst = 0.0;
  for (int i = 0; i < (argc > 2 ? atoi(argv[2]) : 50); i++) worst = std::max(worst, run_case());
  printf("worst error %g\n", worst);
  return worst > 1e-4;
}
