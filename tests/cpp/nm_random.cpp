// Random N:M and V:N:M products, and the same ones by CSR, against a plain loop in float64, for builds with sanitizers:
// every ISA of this CPU, 1 to 5 threads, both data types and layouts, all activations, exact-size buffers. Columns of x
// that W does not use are NaN, some rows of x too, and one number of x is infinite: none may reach what does not use it.
// nm_random SEED CASES

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <set>
#include <thread>
#include <vector>

#include "sparsekern/nm.h"
#include "sparsekern/vnm.h"

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

// An exact-size copy on the heap, so that a sanitizer sees what is read past its end.
template <class T>
std::unique_ptr<T[]> exact(const std::vector<T>& v) {
  std::unique_ptr<T[]> copy(new T[v.size()]);
  std::copy(v.begin(), v.end(), copy.get());
  return copy;
}

// Floats, stored as one of the two types.
struct Numbers {
  sk_dtype dtype;
  std::unique_ptr<uint8_t[]> data;
  Numbers(sk_dtype dtype, int64_t size) : dtype(dtype), data(new uint8_t[size * bytes()]) {
    for (int64_t i = 0; i < size; i++) set(i, number());
  }
  int bytes() const { return dtype == SK_BFLOAT16 ? 2 : 4; }
  void set(int64_t i, float v) {  // bfloat16 are the upper halves of floats
    char raw[4];
    memcpy(raw, &v, 4);
    memcpy(&data[i * bytes()], raw + 4 - bytes(), bytes());
  }
  float at(int64_t i) const {
    char raw[4] = {};
    memcpy(raw + 4 - bytes(), &data[i * bytes()], bytes());
    float v;
    memcpy(&v, raw, 4);
    return v;
  }
};

struct Matrix {
  int64_t outer, inner, stride;
  bool feature_major;
  Numbers numbers;
  sk_matrix view;
  Matrix(sk_dtype dtype, int batch, int features, bool feature_major)
      : outer(feature_major ? features : batch),
        inner(feature_major ? batch : features),
        stride(std::max<int64_t>(2, inner + uniform(0, 3))),
        feature_major(feature_major),
        numbers(dtype, (outer - 1) * stride + inner),
        view{numbers.data.get(), batch, features, feature_major ? 1 : stride, feature_major ? stride : 1} {}
  int64_t offset(int64_t b, int64_t f) const { return b * view.stride_batch + f * view.stride_feature; }
};

struct Spec {
  int v, n, m;  // v = 0: N:M
};
const Spec kSpecs[] = {{0, 2, 4},  {0, 1, 4},    {0, 3, 4},  {0, 2, 8}, {0, 4, 8},  {0, 8, 16}, {0, 1, 2},
                       {0, 5, 7},  {0, 1, 16},   {0, 1, 1},  {0, 2, 3}, {0, 7, 9},  {0, 3, 8},  {0, 15, 16},
                       {64, 2, 8}, {128, 2, 16}, {32, 2, 5}, {4, 2, 4}, {32, 1, 6}, {16, 3, 7}, {12, 4, 9}};

// n of [0, c), ascending.
std::vector<int> choose(int n, int c) {
  std::set<int> chosen;
  while (int(chosen.size()) < n) chosen.insert(uniform(0, c - 1));
  return {chosen.begin(), chosen.end()};
}

double activated(sk_activation activation, double y) {
  if (y == -INFINITY && activation != SK_IDENTITY) return 0.0;  // the limit of all of them
  switch (activation) {
    case SK_RELU: return y > 0.0 || y != y ? y : 0.0;
    case SK_GELU: return 0.5 * y * std::erfc(-y * std::sqrt(0.5));
    case SK_SILU: return y / (1.0 + std::exp(-y));
    default: return y;
  }
}

// W without its values, in both forms.
struct Pattern {
  int rows, cols;
  std::vector<int32_t> row_ptr = {0}, columns, selected;
  std::vector<uint8_t> packed;

  Pattern(Spec s, int rows, int cols) : rows(rows), cols(cols) {
    const int bits = s.v > 0 || s.m <= 4 ? 2 : 4;
    for (int r = 0; r < rows; r++) {
      std::vector<int> positions;
      if (s.v > 0 && r % s.v == 0)
        for (int c0 = 0; c0 < cols; c0 += s.m) {
          const std::vector<int> chosen = choose(std::min(4, cols - c0), std::min(s.m, cols - c0));
          for (int i = 0; i < 4; i++) selected.push_back(c0 + chosen[std::min<size_t>(i, chosen.size() - 1)]);
        }
      for (int c0 = 0, g = 0; c0 < cols; c0 += s.m, g++) {
        const int c = std::min(s.m, cols - c0);
        for (const int p : choose(std::min(s.n, c), s.v > 0 ? std::min(4, c) : c)) {
          positions.push_back(p);
          columns.push_back(s.v > 0 ? selected[(r / s.v * ((cols + s.m - 1) / s.m) + g) * 4 + p] : c0 + p);
        }
      }
      row_ptr.push_back(int32_t(columns.size()));
      std::vector<uint8_t> bytes((positions.size() * bits + 31) / 32 * 4);
      for (size_t i = 0; i < positions.size(); i++) bytes[i * bits / 8] |= uint8_t(positions[i] << i * bits % 8);
      packed.insert(packed.end(), bytes.begin(), bytes.end());
    }
  }
};

bool run_case() {
  const char* isas[] = {"generic", "avx2", "avx512", "avx512+bf16", "generic+bf16"};
  sk_set_isa(isas[uniform(0, 4)]);  // one that this CPU lacks leaves the choice as it is
  thread_count = uniform(1, 5);
  const Spec spec = kSpecs[uniform(0, int(std::size(kSpecs)) - 1)];
  const int rows = uniform(1, uniform(0, 3) ? 200 : 700), cols = uniform(1, uniform(0, 3) ? 200 : 1500),
            batch = uniform(1, 20);
  const sk_dtype dtype = uniform(0, 1) ? SK_BFLOAT16 : SK_FLOAT32;
  const sk_activation activation = sk_activation(uniform(0, 3));
  const bool feature_major = uniform(0, 1), with_bias = uniform(0, 1), narrow = uniform(0, 1);
  const sk_threads threads = {thread_count, parallel_for};

  const Pattern pattern(spec, rows, cols);
  const int64_t nnz = int64_t(pattern.columns.size()), width = 1024;
  const int64_t tiles = (cols + width - 1) / width, t_tiles = (rows + width - 1) / width;
  const auto columns = exact(pattern.columns);
  const auto columns16 = exact(std::vector<uint16_t>(pattern.columns.begin(), pattern.columns.end()));
  const auto selected = exact(pattern.selected);
  const auto packed = exact(pattern.packed);
  const auto tile_ptr = exact(std::vector<int32_t>((tiles + 1) * rows)), slot = exact(std::vector<int32_t>(nnz));
  const auto t_tile_ptr = exact(std::vector<int32_t>((t_tiles + 1) * cols));
  sk_csr_derive(rows, cols, width, width, pattern.row_ptr.data(), columns.get(), tile_ptr.get(), t_tile_ptr.get(),
                slot.get());
  sk_csr csr = {};
  csr.rows = rows, csr.cols = cols, csr.nnz = nnz, csr.tiles = tiles, csr.t_tiles = t_tiles;
  csr.columns = narrow ? static_cast<const void*>(columns16.get()) : columns.get(), csr.column_bytes = narrow ? 2 : 4;
  csr.tile_ptr = tile_ptr.get(), csr.t_tile_ptr = t_tile_ptr.get(), csr.t_slot = slot.get();

  Matrix x(dtype, batch, cols, feature_major);
  Matrix y(dtype, batch, rows, feature_major), y_csr(dtype, batch, rows, feature_major);
  const Numbers values(dtype, nnz), bias(dtype, rows);
  std::vector<bool> used(cols);
  for (const int32_t c : pattern.columns) used[c] = true;
  const int bad_row = uniform(0, 2) ? -1 : uniform(0, batch - 1);
  for (int b = 0; b < batch; b++)
    for (int c = 0; c < cols; c++)
      if (!used[c] || b == bad_row) x.numbers.set(x.offset(b, c), NAN);
  const int hot_row = uniform(0, batch - 1), hot_column = cols - 1 - uniform(0, std::min(cols, 20) - 1);
  x.numbers.set(x.offset(hot_row, hot_column), INFINITY);

  const void* const bias_data = with_bias ? bias.data.get() : nullptr;
  if (spec.v > 0) {
    const sk_vnm w = {csr, spec.v, spec.n, spec.m, selected.get(), packed.get()};
    sk_vnm_linear(&w, values.data.get(), &x.view, bias_data, activation, &y.view, dtype, &threads);
  } else {
    const sk_nm w = {csr, spec.n, spec.m, packed.get()};
    sk_nm_linear(&w, values.data.get(), &x.view, bias_data, activation, &y.view, dtype, &threads);
  }
  sk_csr_linear(&csr, values.data.get(), &x.view, bias_data, activation, &y_csr.view, dtype, &threads);

  bool ok = true;
  for (int b = 0; b < batch && ok; b++)
    for (int r = 0; r < rows && ok; r++) {
      double sum = with_bias ? bias.at(r) : 0.0, size = std::fabs(sum);
      for (int32_t k = pattern.row_ptr[r]; k < pattern.row_ptr[r + 1]; k++) {
        const double term = double(values.at(k)) * x.numbers.at(x.offset(b, pattern.columns[k]));
        sum += term, size += std::fabs(term);
      }
      const double want = activated(activation, sum);
      // Float32 sums in any order: 1e-5 is 170 roundings, more than the error of at most 1500 terms grows to. bfloat16
      // results are rounded to 8 bits.
      const double tolerance =
          1e-5 * (std::isfinite(size) ? size : 0.0) + (dtype == SK_BFLOAT16 ? std::fabs(want) / 256 : 0.0);
      for (const Matrix* result : {&y, &y_csr}) {
        const double got = result->numbers.at(result->offset(b, r));
        if (std::isnan(want) ? std::isnan(got) : got == want || std::fabs(got - want) <= tolerance) continue;
        printf(
            "isa %s, %d:%d:%d%s, %d x %d, batch %d, %s, %s-major, activation %d, %d threads: y[%d, %d] must be %g, got "
            "%g\n",
            sk_isa(), spec.v, spec.n, spec.m, result == &y ? "" : " as CSR", rows, cols, batch,
            dtype == SK_BFLOAT16 ? "bfloat16" : "float32", feature_major ? "feature" : "batch", activation, thread_count, b,
            r, want, got);
        ok = false;
      }
    }
  return ok;
}

}  // namespace

int main(int argc, char** argv) {
  rng.seed(argc > 1 ? unsigned(atoi(argv[1])) : 0u);
  const int cases = argc > 2 ? atoi(argv[2]) : 100;
  int failed = 0;
  for (int i = 0; i < cases; i++) failed += !run_case();
  printf("%d of %d cases failed\n", failed, cases);
  return failed > 0;
}
