// Values into a dense weight and back along a bit mask, 8 columns at a time: a byte of the mask picks a permutation from a
// table (mask_bits.h). Compiled once per ISA.
//
// 1/8 byte of mask is read per weight, in place of 2 bytes of column per value, and 8 columns take about 4 cycles, where
// following the columns takes 3 per value: 2 to 4 times as fast at densities of 35 to 90 %, and about as fast as a memcpy of
// the dense weight. Stores past the caches did not help: the product that follows reads W.
//
// The products expand W in registers (mask_few.h, up to 8 batch rows) or in L1 (mask_tiles.h) instead. Against torch's sgemm with W
// in place, 1024 x 1024 at a density of 50 %, 2 threads of Zen 3, batch 4 / 8 / 16 / 64 / 256: y 2.1 / 1.9 / 1.4 / 1.6 / 1.1, grad_x 1.5
// / 1.2 / 1.0 / 1.35 / 1.0, gradient of the values 1.4 / 1.0 / 0.8 / 1.0 / 1.2, which saves the time to scatter and gather besides: as
// long as a product with 2 to 4 rows, each. One batch row: 0.64, 0.9, 0.9.

#include "kernels.h"
#include "mask_bits.h"
#include "mask_few.h"
#include "mask_tiles.h"

namespace sk::SK_ISA {
namespace {

constexpr int64_t kSerial = 1 << 15;  // fewer weights take less time than waking a thread

// Over rows [begin, end): eight(where in the dense weight, bits, the first of their values) for 8 columns at a time, as long as
// 8 values are left in these rows, and one(where, the value) for each other column that has one, or with null where it has none.
template <class T, class Eight, class One>
inline void each_column(const sk_mask& mask, T* values, int64_t begin, int64_t end, Eight eight, One one) {
  const int64_t cols = mask.cols, stride = (cols + 7) / 8;
  const auto start = [&](int64_t r) { return values + first_value(mask, r); };
  T* const last = start(end);
  for (int64_t r = begin; r < end; r++) {
    const uint8_t* const bits = mask.bits + r * stride;
    const int64_t at = r * cols;
    T* p = start(r);
    int64_t i = 0;
    for (const int64_t whole = cols / 8; i < whole && last - p >= 8; i++) {
      const uint8_t byte = bits[i];  // once: the stores could be to it, for all the compiler knows
      eight(at + 8 * i, byte, p);
      p += __builtin_popcount(byte);
    }
    for (int64_t c = 8 * i; c < cols; c++) {
      const bool set = bits[c / 8] >> c % 8 & 1;
      one(at + c, set ? p : nullptr);
      p += set;
    }
  }
}

template <class T>
void expand_rows(const sk_mask& mask, const void* values, void* dense, int64_t begin, int64_t end) {
  T* const out = static_cast<T*>(dense);
  each_column(
      mask, static_cast<const T*>(values), begin, end,
      [out](int64_t at, uint8_t bits, const T* p) { expand8(p, bits, out + at); },
      [out](int64_t at, const T* p) { out[at] = p ? *p : T(0); });
}

template <class T>
void compress_rows(const sk_mask& mask, const void* dense, void* values, int64_t begin, int64_t end) {
  const T* const in = static_cast<const T*>(dense);
  each_column(
      mask, static_cast<T*>(values), begin, end, [in](int64_t at, uint8_t bits, T* p) { compress8(in + at, bits, p); },
      [in](int64_t at, T* p) {
        if (p) *p = in[at];
      });
}

template <class F>
void each_range(const sk_mask& mask, const sk_threads* threads, F f) {
  if (threads->threads <= 1 || mask.rows * mask.cols < kSerial) return f(int64_t(0), mask.rows);
  threads->parallel_for(
      mask.rows, [](int64_t begin, int64_t end, void* body) { (*static_cast<F*>(body))(begin, end); }, &f);
}

void expand(const sk_mask* mask, const void* values, int element_bytes, void* dense, const sk_threads* threads) {
  each_range(*mask, threads, [&](int64_t begin, int64_t end) {
    (element_bytes == 2   ? expand_rows<uint16_t>
     : element_bytes == 4 ? expand_rows<uint32_t>
                          : expand_rows<uint64_t>)(*mask, values, dense, begin, end);
  });
}

void compress(const sk_mask* mask, const void* dense, int element_bytes, void* values, const sk_threads* threads) {
  each_range(*mask, threads, [&](int64_t begin, int64_t end) {
    (element_bytes == 2   ? compress_rows<uint16_t>
     : element_bytes == 4 ? compress_rows<uint32_t>
                          : compress_rows<uint64_t>)(*mask, dense, values, begin, end);
  });
}

// Calls f(begin, end) on about equal parts of [0, n) in parallel, which begin at multiples of `unit`; `flops` is all their work.
template <class F>
void each_part(const sk_threads& threads, int64_t n, int64_t unit, double flops, F f) {
  const int64_t units = ceil_div(n, unit), parts = max<int64_t>(1, min<int64_t>(threads.threads, units));
  const auto begin_of = [&](int64_t i) { return min(units * i / parts * unit, n); };
  parallel_for(threads, parts, flops, [&](int64_t begin, int64_t end) { f(begin_of(begin), begin_of(end)); });
}

template <class T>
void linear(const sk_mask& w, const T* values, const sk_matrix& x, const T* bias, sk_activation activation,
            const sk_matrix& y, const sk_threads& threads) {
  each_part(threads, w.rows, kTileRows, 2.0 * x.batch * w.rows * w.cols, [&](int64_t r0, int64_t r1) {
    if (x.batch > kMaskFew) return mask_linear_rows(w, values, r0, r1, x, bias, activation, y);
    with_mask_few(x.batch, [&](auto nb) { mask_linear_few<nb()>(w, values, r0, r1, x, bias, activation, y); });
  });
}

template <class T>
void backward(const sk_mask& w, const T* values, const sk_matrix& grad, const sk_matrix* x, const sk_matrix* grad_x,
              T* grad_values, T* grad_bias, const sk_threads& threads) {
  const double flops = 2.0 * grad.batch * w.rows * w.cols;
  if (grad_x != nullptr)
    each_part(threads, ceil_div(w.cols, 8), 1, flops, [&](int64_t k0, int64_t k1) {
      if (grad.batch > kMaskFew) return mask_input_columns(w, values, 8 * k0, min(8 * k1, w.cols), grad, *grad_x);
      with_mask_few(grad.batch, [&](auto nb) { mask_input_few<nb()>(w, values, k0, k1, grad, *grad_x); });
    });
  if (grad_values != nullptr || grad_bias != nullptr)  // a pattern of no values has a bias
    each_part(threads, w.rows, kTileRows, flops, [&](int64_t r0, int64_t r1) {
      if (grad.batch > kMaskFew) return mask_values_rows(w, r0, r1, grad, *x, grad_values, grad_bias);
      with_mask_few(grad.batch, [&](auto nb) { mask_values_few<nb()>(w, r0, r1, grad, *x, grad_values, grad_bias); });
    });
}

// f(a null pointer to the type of values).
template <class F>
void with_type(sk_dtype dtype, F f) {
  dtype == SK_BFLOAT16 ? f(static_cast<bf16*>(nullptr)) : f(static_cast<float*>(nullptr));
}

}  // namespace

const MaskKernels mask_kernels = {
    expand,
    compress,
    [](const sk_mask* w, const void* values, const sk_matrix* x, const void* bias, sk_activation activation,
       const sk_matrix* y, sk_dtype dtype, const sk_threads* threads) {
      with_type(dtype, [&](auto* typed) {
        using T = const std::remove_pointer_t<decltype(typed)>;
        linear(*w, static_cast<T*>(values), *x, static_cast<T*>(bias), activation, *y, *threads);
      });
    },
    [](const sk_mask* w, const void* values, const sk_matrix* grad, const sk_matrix* x, const sk_matrix* grad_x,
       void* grad_values, void* grad_bias, sk_dtype dtype, const sk_threads* threads) {
      with_type(dtype, [&](auto* typed) {
        using T = std::remove_pointer_t<decltype(typed)>;
        backward(*w, static_cast<const T*>(values), *grad, x, grad_x, static_cast<T*>(grad_values),
                 static_cast<T*>(grad_bias), *threads);
      });
    },
};

}  // namespace sk::SK_ISA
