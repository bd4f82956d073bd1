// csrc/cuda/device.h's names on the emulator. Calls say where in the source they stand, by default arguments.
#pragma once

#include <cmath>

#include "emulator.h"

#define SK_KERNEL(...) static void
#define SK_DEVICE [[maybe_unused]] static inline
#define SK_MEMBER
#define SK_SITE(what) \
  emulator::Site { what, file, line }
#define SK_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace sk::gpu {

using Stream = void*;

inline emulator::Block& running() { return *emulator::Block::current(); }
inline int thread() { return running().thread(); }
inline int threads() { return running().threads; }
inline Dim block() { return running().index; }
inline Dim blocks() { return running().grid; }

template <class To, class From>
To same_bits(From v) {
  static_assert(sizeof(To) == sizeof(From), "of one size");
  To to;
  memcpy(&to, &v, sizeof to);
  return to;
}
inline float bits_to_float(uint32_t v) { return same_bits<float>(v); }
inline float half_to_float(uint16_t v) { return float(same_bits<_Float16>(v)); }
inline uint16_t float_to_half(float v) { return same_bits<uint16_t>(_Float16(v)); }
inline uint16_t float_to_bfloat(float v) {
  const uint32_t bits = same_bits<uint32_t>(v);
  if (v != v) return 0x7fff;
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline void barrier(SK_HERE) { running().barrier(SK_SITE("barrier")); }
inline void warp_barrier(SK_HERE) {
  running().exchange(SK_SITE("warp_barrier"), [](void* const*) {}, nullptr);
}

// A warp exchange whose lanes each give a Lane and wait until f has seen all of them.
template <class Lane>
void exchange(emulator::Site site, Lane& own, void (*f)(Lane* const*)) {
  struct Argument {
    Lane* lane;
    void (*f)(Lane* const*);
  } argument = {&own, f};
  running().exchange(
      site,
      [](void* const* arguments) {
        Lane* lanes[kWarp];
        for (int i = 0; i < kWarp; i++) lanes[i] = static_cast<Argument*>(arguments[i])->lane;
        static_cast<Argument*>(arguments[0])->f(lanes);
      },
      &argument);
}

template <class T>
T shuffle(T v, int from, SK_HERE) {
  struct Lane {
    T value, got;
    int from;
  } own = {v, v, from};
  exchange<Lane>(SK_SITE("shuffle"), own, [](Lane* const* lanes) {
    for (int i = 0; i < kWarp; i++) lanes[i]->got = lanes[lanes[i]->from % kWarp]->value;
  });
  return own.got;
}
template <class T>
T shuffle_xor(T v, int mask, SK_HERE) {
  return shuffle(v, (thread() % kWarp) ^ mask, file, line);
}
inline uint32_t votes(bool v, SK_HERE) {
  struct Lane {
    bool value;
    uint32_t all;
  } own = {v, 0};
  exchange<Lane>(SK_SITE("votes"), own, [](Lane* const* lanes) {
    uint32_t all = 0;
    for (int i = 0; i < kWarp; i++) all |= uint32_t(lanes[i]->value) << i;
    for (int i = 0; i < kWarp; i++) lanes[i]->all = all;
  });
  return own.all;
}
inline int popcount(uint32_t v) { return __builtin_popcount(v); }
inline int popcount(uint64_t v) { return __builtin_popcountll(v); }
inline uint32_t bytes_of(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = uint64_t(high) << 32 | low;
  uint32_t found = 0;
  for (int i = 0; i < 4; i++) found |= uint32_t(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return found;
}

template <class T>
class Shared {
 public:
  explicit Shared(uint32_t at) : at_(at) {}
  Shared operator+(int i) const { return Shared(at_ + i * int(sizeof(T))); }
  template <class V = T>
  V load(int i, SK_HERE) const {
    V v;
    memcpy(&v, running().access(address_of(i), sizeof v, false, SK_SITE("load")), sizeof v);
    return v;
  }
  template <class V>
  void store(int i, V v, SK_HERE) const {
    memcpy(running().access(address_of(i), sizeof v, true, SK_SITE("store")), &v, sizeof v);
  }
  uint32_t address() const { return at_; }

 private:
  uint32_t address_of(int i) const { return at_ + i * int(sizeof(T)); }
  uint32_t at_;
};
template <class T>
Shared<T> shared_memory(int offset) {
  return Shared<T>(offset);
}

template <int kBytes = 16, class T>
void copy_async_part(Shared<T> to, const T* from, int bytes, SK_HERE) {
  if (bytes < 0 || bytes > kBytes)
    running().stop("%s: 0 to %d bytes can come from memory, got %d", SK_SITE("copy_async").text().c_str(), kBytes, bytes);
  if (bytes > 0 && reinterpret_cast<uintptr_t>(from) % kBytes)
    running().stop("%s: the source must be aligned to %d bytes", SK_SITE("copy_async").text().c_str(), kBytes);
  running().copy({to.address(), from, kBytes, bytes}, SK_SITE("copy_async"));
}
template <int kBytes = 16, class T>
void copy_async(Shared<T> to, const T* from, bool inside, SK_HERE) {
  copy_async_part<kBytes>(to, from, inside ? kBytes : 0, file, line);
}
inline void commit_copies() { running().commit_copies(); }
template <int kLeft>
void wait_copies() {
  running().wait_copies(kLeft);
}

namespace emulator {

// Row r of matrix i, as lane 8 i + r gives it.
struct MatrixLane {
  uint16_t row[8];
  uint32_t got[4];
};
template <bool kTransposed>
void load_matrices(MatrixLane* const* lanes) {
  for (int l = 0; l < kWarp; l++)
    for (int i = 0; i < 4; i++) {
      const auto number = [&](int j) -> uint32_t {
        const int r = kTransposed ? 2 * (l % 4) + j : l / 4, c = kTransposed ? l / 4 : 2 * (l % 4) + j;
        return lanes[8 * i + r]->row[c];
      };
      lanes[l]->got[i] = number(0) | number(1) << 16;
    }
}

}  // namespace emulator

template <bool kTransposed, class T>
void load_matrices_as(uint32_t (&r)[4], Shared<T> row, emulator::Site site) {
  emulator::MatrixLane own;
  memcpy(own.row, running().access(row.address(), 16, false, site), 16);
  exchange<emulator::MatrixLane>(site, own, emulator::load_matrices<kTransposed>);
  memcpy(r, own.got, sizeof r);
}
template <class T>
void load_matrices(uint32_t (&r)[4], Shared<T> row, SK_HERE) {
  load_matrices_as<false>(r, row, SK_SITE("load_matrices"));
}
template <class T>
void load_matrices_transposed(uint32_t (&r)[4], Shared<T> row, SK_HERE) {
  load_matrices_as<true>(r, row, SK_SITE("load_matrices_transposed"));
}

struct bf16;
struct fp16;
inline float low_number(uint32_t pair, const bf16*) { return bits_to_float(pair << 16); }
inline float low_number(uint32_t pair, const fp16*) { return half_to_float(uint16_t(pair)); }

// Number j of a register that holds a pair.
template <class T>
float number(uint32_t pair, int j) {
  return low_number(j ? pair >> 16 : pair & 0xffff, static_cast<const T*>(nullptr));
}

template <class T>
void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const T*, SK_HERE) {
  struct Lane {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
  } own = {d, a, {b0, b1}};
  exchange<Lane>(SK_SITE("multiply"), own, [](Lane* const* lanes) {
    float left[16][16], right[16][8];
    for (int l = 0; l < kWarp; l++)
      for (int j = 0; j < 2; j++) {
        const int g = l / 4, t = 2 * (l % 4) + j;
        left[g][t] = number<T>(lanes[l]->a[0], j);
        left[g + 8][t] = number<T>(lanes[l]->a[1], j);
        left[g][t + 8] = number<T>(lanes[l]->a[2], j);
        left[g + 8][t + 8] = number<T>(lanes[l]->a[3], j);
        right[t][g] = number<T>(lanes[l]->b[0], j);
        right[t + 8][g] = number<T>(lanes[l]->b[1], j);
      }
    for (int l = 0; l < kWarp; l++)
      for (int i = 0; i < 4; i++)
        for (int k = 0; k < 16; k++) lanes[l]->d[i] += left[l / 4 + i / 2 * 8][k] * right[k][2 * (l % 4) + i % 2];
  });
}

template <int kHalf, class T>
void multiply_sparse(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t metadata, const T*, SK_HERE) {
  struct Lane {
    float* d;
    const uint32_t *a, *b;
    uint32_t metadata;
  } own = {d, a, b, metadata};
  if (thread() % 4 / 2 == kHalf)
    for (int i = 0; i < 32; i += 4)
      if ((metadata >> i & 3) >= (metadata >> (i + 2) & 3))
        running().stop("%s: the positions of metadata %08x must ascend", SK_SITE("multiply_sparse").text().c_str(),
                       metadata);
  exchange<Lane>(SK_SITE("multiply_sparse"), own, [](Lane* const* lanes) {
    float left[16][32] = {}, right[32][8];
    for (int l = 0; l < kWarp; l++) {
      const int g = l / 4, t = l % 4;
      for (int i = 0; i < 8; i++) right[8 * (i / 2) + 2 * t + i % 2][g] = number<T>(lanes[l]->b[i / 2], i % 2);
      // A pair in a's fragment is the 2 of 4 columns: pair t of a's left half, and of its right half.
      for (int i = 0; i < 4; i++) {
        const int row = g + i % 2 * 8, group = t + i / 2 * 4;
        const uint32_t word = lanes[4 * g + 2 * kHalf + group / 4]->metadata >> (i % 2 * 16 + group % 4 * 4);
        for (int j = 0; j < 2; j++) left[row][4 * group + (word >> 2 * j & 3)] = number<T>(lanes[l]->a[i], j);
      }
    }
    for (int l = 0; l < kWarp; l++)
      for (int i = 0; i < 4; i++)
        for (int k = 0; k < 32; k++) lanes[l]->d[i] += left[l / 4 + i / 2 * 8][k] * right[k][2 * (l % 4) + i % 2];
  });
}

// Blocks of a grid run one after the other.
struct Device {
  int multiprocessors = 1, shared_bytes = emulator::Block::kMostShared;
};
inline Device this_device() { return {}; }

// Runs it at once. Returns null, or what was wrong.
template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), Dim grid, int threads, int shared_bytes, Stream, Arguments... arguments) {
  static thread_local std::string error;
  static thread_local emulator::Block block;
  error = block.run(grid, threads, shared_bytes, [&] { kernel(arguments...); });
  return error.empty() ? nullptr : error.c_str();
}

}  // namespace sk::gpu
