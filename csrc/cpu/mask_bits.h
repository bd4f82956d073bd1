// 8 columns of a bit mask at a time: their values into place and back. A byte of the mask picks a permutation from a table.
#pragma once

#include <type_traits>

#include "panel.h"
#include "sparsekern/mask.h"

namespace sk::SK_ISA {
namespace {

#if defined(__AVX2__) && !defined(__clang__)
// Of each byte of a mask: for its 8 columns, which of its values stands there, or -1; for its values, where they stand. As wide
// as the elements: GCC converts short vectors one by one.
template <class T>
struct Permutations {
  T value_of[256][8] = {}, column_of[256][8] = {};
  constexpr Permutations() {
    for (int mask = 0; mask < 256; mask++)
      for (int column = 0, count = 0; column < 8; column++) {
        const bool set = mask >> column & 1;
        value_of[mask][column] = set ? T(count) : T(-1);
        if (set) column_of[mask][count++] = T(column);
      }
  }
};
template <class T>
alignas(64) constexpr Permutations<T> kPermutations;

// v[index[i]], or 0 where index[i] is -1.
template <class T>
[[gnu::always_inline]] inline auto permuted(typename Vector<T, 8>::type v, const T (&index)[8]) {
  typedef typename Vector<T, 8>::type V;
  typedef typename Vector<std::make_signed_t<T>, 8>::type Signed;
  V lanes;
  memcpy(&lanes, index, sizeof lanes);
  return __builtin_shuffle(v, lanes) & ~(V)((Signed)lanes < 0);
}

// to[i] = from[index[i]], or 0 where index[i] is -1.
template <class T>
inline void permute(const T* from, const T (&index)[8], T* to) {
  typename Vector<T, 8>::type v;
  memcpy(&v, from, sizeof v);
  v = permuted(v, index);
  memcpy(to, &v, sizeof v);
}

// The 8-byte elements take the way below, as all do where there are no permutations.
#define SK_PERMUTE(from, table, to) \
  if constexpr (sizeof(T) < 8) return permute(from, kPermutations<T>.table[bits], to)
#else
#define SK_PERMUTE(from, table, to)
#endif

// dense[0..8) = the values from p on where bits are set, else 0. Reads 8 values at most.
template <class T>
inline void expand8(const T* p, uint8_t bits, T* dense) {
  SK_PERMUTE(p, value_of, dense);
  for (int i = 0; i < 8; i++) dense[i] = bits >> i & 1 ? *p++ : T(0);
}

// From p on, those of dense[0..8) whose bits are set, and then anything: 8 values at most.
template <class T>
inline void compress8(const T* dense, uint8_t bits, T* p) {
  SK_PERMUTE(dense, column_of, p);
  for (int i = 0; i < 8; p += bits >> i++ & 1) *p = dense[i];
}
#undef SK_PERMUTE

typedef Vector<float, 8>::type vec8;
typedef Vector<uint32_t, 8>::type uvec8;

inline vec8 load8_floats(const float* p) { return load_as<vec8>(p); }
inline vec8 load8_floats(const bf16* p) {
  Vector<uint16_t, 8>::type h;
  memcpy(&h, p, sizeof h);
  return (vec8)(__builtin_convertvector(h, uvec8) << 16);
}

// The weights of 8 columns. Reads 8 values.
template <class T>
[[gnu::always_inline]] inline vec8 weights8(const T* p, uint8_t bits) {
#if defined(__AVX2__) && !defined(__clang__)
  return (vec8)permuted<uint32_t>((uvec8)load8_floats(p), kPermutations<uint32_t>.value_of[bits]);
#else
  float dense[8];
  for (int i = 0; i < 8; i++) dense[i] = bits >> i & 1 ? to_float(*p++) : 0.0f;
  return load_as<vec8>(dense);
#endif
}

// The gradients v[0..8) of those weights whose bits are set, from p on. Writes 8 values where as many come before `end`.
template <class T>
[[gnu::always_inline]] inline void put8(vec8 v, uint8_t bits, T* p, const T* end) {
#if defined(__AVX2__) && !defined(__clang__)
  uvec8 columns;
  memcpy(&columns, kPermutations<uint32_t>.column_of[bits], sizeof columns);
  const vec8 packed = __builtin_shuffle(v, columns);
#else
  float lanes[8] = {};
  for (int i = 0, n = 0; i < 8; n += bits >> i++ & 1) lanes[n] = v[i];
  const vec8 packed = load_as<vec8>(lanes);
#endif
  if (end - p >= 8) return store(p, packed);
  T part[8];
  store(part, packed);
  for (int i = 0; i < __builtin_popcount(bits); i++) p[i] = part[i];
}

// The bits that are set among the first n bytes.
inline int64_t count_bits(const uint8_t* bits, int64_t n) {
  int64_t count = 0;
  for (; n >= 8; n -= 8, bits += 8) {
    uint64_t word;
    memcpy(&word, bits, 8);
    count += __builtin_popcountll(word);
  }
  for (; n > 0; n--) count += __builtin_popcount(*bits++);
  return count;
}

// Where the values of row r of a mask begin, 0 <= r <= rows.
inline int64_t first_value(const sk_mask& mask, int64_t r) { return r < mask.rows ? mask.row_ptr[r] : mask.nnz; }

// The values of a mask's rows, of which 8 can be read from wherever one stands: the last rows are copied.
template <class T>
class Readable {
 public:
  Readable(const sk_mask& mask, const T* values) : mask_(mask), values_(values), copied_(mask.rows) {
    while (copied_ > 0 && first_value(mask, copied_) + 8 > mask.nnz) copied_--;
    const int64_t first = first_value(mask, copied_);
    copy_ = scratch<Use::kWeights>().template get<T>(mask.nnz - first + 8);
    std::memset(static_cast<void*>(copy_ + (mask.nnz - first)), 0, 8 * sizeof(T));
    if (mask.nnz > first) std::memcpy(static_cast<void*>(copy_), values + first, (mask.nnz - first) * sizeof(T));
    copy_ -= first;
  }
  // From column 8 * byte on.
  const T* row(int64_t r, int64_t byte = 0) const {
    const int64_t before = byte > 0 ? count_bits(bits(r), byte) : 0;
    return (r < copied_ ? values_ : copy_) + first_value(mask_, r) + before;
  }
  const uint8_t* bits(int64_t r) const { return mask_.bits + r * ((mask_.cols + 7) / 8); }

 private:
  const sk_mask& mask_;
  const T* values_;
  T* copy_;
  int64_t copied_;
};

}  // namespace
}  // namespace sk::SK_ISA
