// The values of rows of W as a warp's 4 lanes per row read them along a bit mask: through shared memory into registers.
//
// A row's values are a run of memory, which begins anywhere. They come through a ring of 16-byte runs, which is filled as far as it
// is free: 264 values, at 80 % sparsity 1300 columns of them, are under way at once, and a sector of memory is read by one warp.
#pragma once

#include "gemm.h"

namespace sk::gpu {

constexpr int kMaskStep = 128;  // columns that the lanes of a row take at a time, 32 neighbours each
// A step takes up to 16 runs and the next one, which must be on its way, as many; a part of a run goes before them. 37 runs per row
// let the 8 rows of a fragment begin in different banks.
constexpr int kRingRuns = 33, kRing = kRingRuns * 8;
constexpr int kMirrored = 4;  // runs that stand once more after the last one: a lane's 32 numbers never wrap
constexpr int kRingBytes = (kRingRuns + kMirrored) * 16;

// What is left of a row's values, which 4 lanes copy and read.
template <class T>
struct RowValues {
  Shared<T> ring;
  const T *values, *from;  // of W, before which nothing is read; the aligned run that the first number is in
  int at, end;             // the present step's first number and the end, counted from there
  int place;               // in the ring, of the former
  int next, slot;          // the run that this lane copies next, and its place in the ring

  SK_MEMBER RowValues(Shared<T> memory, const T* all, int first, int last) : ring(memory), values(all) {
    const int before = first < last ? int(reinterpret_cast<uintptr_t>(all + first) % 16 / sizeof(T)) : 0;
    from = all + first - before;
    at = place = before, end = before + (last - first);
    next = slot = lane() % 4;
  }

  SK_MEMBER void copy(int to) const {
    const T* const run = from + next * 8;
    const int left = end - next * 8;
    if (run >= values) return copy_async_part(ring + to * 8, run, (left < 8 ? left : 8) * int(sizeof(T)));
    // The first run of values that are not aligned themselves.
#pragma unroll 1
    for (int i = 0; i < 8 && i < left; i++)
      if (run + i >= values) ring.store(to * 8 + i, run[i]);
  }

  // Starts to copy what the ring has room for.
  SK_MEMBER void fill() {
    const int runs = (end + 7) / 8, room = at / 8 + kRingRuns, limit = runs < room ? runs : room;
#pragma unroll 1
    for (; next < limit; next += 4) {
      copy(slot);
      if (slot < kMirrored) copy(slot + kRingRuns);
      slot = slot + 4 < kRingRuns ? slot + 4 : slot + 4 - kRingRuns;
    }
  }

  // The lane's numbers in this step, whose bits are these: the first of them; then those of the next step are up.
  SK_MEMBER Shared<T> begin(const Vector<uint32_t, 4>& bits) {
    const int t = lane() % 4;
    int before = 0, all = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int count = popcount(bits.at[i]);
      before += i < t ? count : 0, all += count;
    }
    const int first = place + before;
    at += all, place += all;
    if (place >= kRing) place -= kRing;
    return ring + (first < kRing ? first : first - kRing);
  }
};

// The numbers of 16 columns from `p` on, which moves, as row `half` of 4 left fragments: columns 4 q .. 4 q + 3 in fragment q.
template <class T>
SK_DEVICE void expand(Shared<T>& p, uint32_t bits, uint32_t (&fragments)[4][4], int half) {
#pragma unroll
  for (int c = 0; c < 16; c++) {
    uint32_t& pair = fragments[c / 4][half + c % 4 / 2 * 2];
    if (c % 2 == 0) pair = 0;
    if (!(bits >> c & 1)) continue;
    const uint32_t number = p.template load<uint16_t>(0);
    pair = c % 2 == 0 ? number : bytes_of(pair, number, 0x5410);
    p = p + 1;
  }
}

}  // namespace sk::gpu
