// y = activation(x W^T + bias) along a bit mask, for few rows of x: W is read as 1 bit per weight and its values, each once, and
// expanded straight into the registers that tensor cores multiply.
//
// A warp owns 16 rows of W and a range of columns. The order of a sum is free, so the 4 lanes of a row share 128 columns as 32
// neighbours each, not as the tensor core's fragments do: a lane's values are then a run in memory, which begins where a popcount of
// the bits before says, and it takes one after the other.
//
// What bounds it, 4096 x 4096 on an H200, whose bytes of W take 2.2 us at 80 % sparsity and 1.4 at 90 %: instructions. 5 per weight
// for its load, an increment, half a zero and half a merge, and its bit; as many for copies of bits, values and x and their addresses,
// 8.8 to 10.6 as ptxas makes them for sm_90: 5.0 to 6.0 us. Then loads of 2 bytes from shared memory, of those lanes whose bit is
// set, which meet in its banks: 1.4 cycles for 32 weights at 80 %, 1.1 at 90 %, 2.3 at 50 %, so 3.8, 3.1 and 5.8 us with x. A tile of
// W in shared memory that values are scattered into costs more: to write its zeros and to read it back takes 4000 cycles of 128
// bytes per multiprocessor, 2.3 us, and stores that meet in banks 0.8 at 90 %, 1.6 at 80 %, beside a loop over bits that lanes leave
// at different times. From 32 rows of x on the reading of x bounds it, 4 cycles per 512 weights and 8 rows.
//
// Bits and x come by steps of 128 columns, x for all warps that share its columns.
#pragma once

#include "mask_rows.h"
#include "mask_values.h"

namespace sk::gpu {

constexpr int kFewMaskWarps = 8, kWarpRows16 = 16;
constexpr int kLogMostTokens = 6, kMostTokens = 1 << kLogMostTokens;  // rows of x that share what is expanded
constexpr int kFewStages = 2;
constexpr int kBitsBytes = kFewMaskWarps * kWarpRows16 * kMaskStep / 8;  // of a stage
constexpr int kBitsAt = kFewMaskWarps * kWarpRows16 * kRingBytes, kInputAt = kBitsAt + kFewStages * kBitsBytes;

// Rows of x in shared memory, for a step of a warp's columns: a lane reads the 16 bytes of its columns 8 i .. 8 i + 7 of a row,
// a warp 8 rows, 512 bytes in one piece.
template <class T>
struct Input {
  Shared<T> data;
  int log_tokens;

  SK_MEMBER Shared<T> at(int i, int token, int t) const { return data + (((i << log_tokens) + token) * 4 + t) * 8; }

  // Starts to copy columns c0.. of rows b0.. of x, by `count` threads; this is the n-th. 4 neighbours write 64 bytes, and
  // threads at a distance of 8 read the halves of a sector.
  SK_MEMBER void copy(const Packed<T>& x, int64_t c0, int64_t b0, int n, int count) const {
#pragma unroll 1
    for (int i = n; i < 16 << log_tokens; i += count) {
      const int t = i & 3, rest = i >> 4, run = rest >> (log_tokens - 1) << 1 | (i >> 3 & 1);
      const int token = (rest & ((1 << (log_tokens - 1)) - 1)) << 1 | (i >> 2 & 1);
      const int64_t c = c0 + t * (kMaskStep / 4) + run * 8, b = b0 + token;
      copy_async(at(run, token, t), x.at(b, c), b < x.features && c < x.columns);
    }
  }
};

// What a block makes of the product: `rows` of W times 2^log_tokens rows of x, over part block().y of the columns.
struct FewBlocks {
  int log_down, log_tokens, splits;
  int64_t row_blocks;

  SK_MEMBER int rows() const { return kWarpRows16 << log_down; }
  SK_MEMBER int ways() const { return kFewMaskWarps >> log_down; }  // warps that divide the columns
  int shared_bytes() const { return kInputAt + kFewStages * ((kFewMaskWarps >> log_down) * kMaskStep * 2 << log_tokens); }
};

// parts: [splits, batch, rows] sums, where there are several; else null.
template <class T>
SK_KERNEL(kMostThreads, 2)
mask_few(Mask w, const T* values, Packed<T> x, const T* bias, sk_activation activation, Matrix<T> y, FewBlocks f,
         float* parts) {
  const int in_way = warp() & ((1 << f.log_down) - 1), way = warp() >> f.log_down;
  const int64_t row0 = int64_t(block().x) % f.row_blocks * f.rows(), b0 = int64_t(block().x) / f.row_blocks << f.log_tokens;
  const int64_t warp_row = row0 + in_way * kWarpRows16;
  const int64_t part = int64_t(block().y) * f.ways() + way, all = int64_t(f.splits) * f.ways();
  const int64_t first = part * w.spans / all, last = (part + 1) * w.spans / all;
  const int steps = int(last - first);
  const int tiles = int(x.features - b0 < 1 << f.log_tokens ? (x.features - b0 + 7) / 8 : 1 << (f.log_tokens - 3));

  const auto row_values = [&](int half) {
    const int r = half * 8 + lane() / 4;
    const int64_t row = warp_row + r;
    const bool inside = row < w.rows && first < last;
    return RowValues<T>(shared_memory<T>((warp() * kWarpRows16 + r) * kRingBytes), values, inside ? w.start(row, first) : 0,
                        inside ? w.start(row, last) : 0);
  };
  RowValues<T> upper = row_values(0), lower = row_values(1);
  const auto bits = [&](int stage) {
    return shared_memory<uint32_t>(kBitsAt + stage * kBitsBytes + warp() * (kBitsBytes / kFewMaskWarps));
  };
  const auto input = [&](int stage) {
    const int way_bytes = kMaskStep * int(sizeof(T)) << f.log_tokens;
    return Input<T>{shared_memory<T>(kInputAt + (stage * f.ways() + way) * way_bytes), f.log_tokens};
  };

  float sum[kMostTokens / 8][4] = {};
  pipeline<kFewStages>(
      int((w.spans + all - 1) / all),  // the most that a warp has
      [&](int step, int stage) {
        if (step >= steps) return;
        if (lane() < kWarpRows16) {
          const bool inside = warp_row + lane() < w.rows;
          copy_async(bits(stage) + lane() * 4, w.bits(inside ? warp_row + lane() : 0, first + step), inside);
        }
        upper.fill();
        lower.fill();
        input(stage).copy(x, (first + step) * kMaskStep, b0, in_way * kWarp + lane(), kWarp << f.log_down);
      },
      [&](int step, int stage) {
        if (step >= steps) return;
        const Vector<uint32_t, 4> above = bits(stage).template load<Vector<uint32_t, 4>>(lane() / 4 * 4);
        const Vector<uint32_t, 4> below = bits(stage).template load<Vector<uint32_t, 4>>(lane() / 4 * 4 + 32);
        Shared<T> p = upper.begin(above), q = lower.begin(below);
        uint32_t upper_bits = bits(stage).load(lane());
        uint32_t lower_bits = bits(stage).load(lane() + 32);
        Shared<T> run = input(stage).at(0, lane() / 4, lane() % 4);
#pragma unroll 1
        for (int i = 0; i < kMaskStep / 64; i++) {
          uint32_t left[4][4];
          expand(p, upper_bits, left, 0);
          expand(q, lower_bits, left, 1);
          upper_bits >>= 16, lower_bits >>= 16;
#pragma unroll
          for (int half = 0; half < 2; half++) {
#pragma unroll
            for (int j = 0; j < kMostTokens / 8; j++) {
              if (j > 0 && j >= tiles) break;
              const auto right = run.template load<Vector<uint32_t, 4>>(j * 256);
              multiply(sum[j], left[2 * half], right.at[0], right.at[1], static_cast<const T*>(nullptr));
              multiply(sum[j], left[2 * half + 1], right.at[2], right.at[3], static_cast<const T*>(nullptr));
            }
            run = run + (32 << f.log_tokens);
          }
        }
      });

  // The warps' sums in place of the rings, added up in order.
  barrier();
  const Results results = {shared_memory<float>(0), (1 << f.log_tokens) + kResultPad};
#pragma unroll
  for (int j = 0; j < kMostTokens / 8; j++) {
    if (j >= tiles) continue;
#pragma unroll
    for (int e = 0; e < 4; e++)
      results.data.store((warp() * kWarpRows16 + e / 2 * 8 + lane() / 4) * results.pitch + 8 * j + lane() % 4 * 2 + e % 2,
                         sum[j][e]);
  }
  barrier();
#pragma unroll 1
  for (int i = thread(); i < f.rows() << f.log_tokens; i += threads()) {
    const int r = i & (f.rows() - 1), token = i >> (4 + f.log_down);
    if (row0 + r >= w.rows || b0 + token >= y.batch) continue;
    float total = results.one(r, token);
    for (int k = 1; k < f.ways(); k++) total += results.one(k * f.rows() + r, token);
    if (parts)
      parts[(int64_t(block().y) * y.batch + b0 + token) * w.rows + row0 + r] = total;
    else
      y.at(b0 + token, row0 + r) = from_float<T>(activate(activation, total + (bias ? to_float(bias[row0 + r]) : 0.0f)));
  }
}

constexpr int kEnoughBlocks = 128;  // for the 108 to 132 multiprocessors of the GPUs that this is for

// How the product is divided. Higher blocks read x less often: they have 16 rows of W for up to 4 of x, and 128 for more than 32,
// so that x passes L2 with at most half the bytes of a dense W. The columns are divided among the warps of a block, and among
// blocks as well where these would be too few, which takes a second kernel.
inline FewBlocks few_blocks(const Mask& w, int64_t batch) {
  FewBlocks f = {};
  f.log_down = batch <= 4 ? 0 : batch <= 16 ? 1 : batch <= 32 ? 2 : 3;
  while (f.log_down < 3 && kFewMaskWarps >> f.log_down > w.spans) f.log_down++;
  f.log_tokens = 3;
  while (f.log_tokens < kLogMostTokens && 1 << f.log_tokens < batch) f.log_tokens++;
  f.row_blocks = ceil_div(w.rows, kWarpRows16 << f.log_down);
  const int64_t blocks = f.row_blocks * ceil_div(batch, kMostTokens), most = w.spans / (kFewMaskWarps >> f.log_down);
  const int64_t wanted = blocks < kEnoughBlocks ? ceil_div(kEnoughBlocks, blocks) : 1;
  f.splits = int(wanted < most ? wanted : most > 1 ? most : 1);
  return f;
}

// x as rows that begin aligned: packed where it is feature-major or not aligned, as the transpose of what pack() makes.
inline sk_matrix transposed(const sk_matrix& m) { return {m.data, m.features, m.batch, m.stride_feature, m.stride_batch}; }

inline int64_t parts_bytes(const Mask& w, int64_t batch) {
  const int splits = w.rows > 0 ? few_blocks(w, batch).splits : 1;
  return splits > 1 ? splits * batch * w.rows * int64_t(sizeof(float)) : 0;
}

template <class T>
int64_t mask_few_workspace(const Mask& w, const sk_matrix& x) {
  return packed_bytes<T>(transposed(x)) + parts_bytes(w, x.batch);
}

template <class T>
const char* run_mask_few(const Mask& w, const void* values, const sk_matrix& x, const void* bias, sk_activation activation,
                         const sk_matrix& y, void* workspace, Stream stream) {
  uint8_t* free = static_cast<uint8_t*>(workspace);
  Packed<T> rows = {nullptr, x.batch, 0, 0};
  if (w.cols > 0)
    if (const char* error = pack(transposed(x), rows, free, stream)) return error;
  static_assert(SK_MASK_SPAN == kMaskStep, "a step's values begin with a span");
  const FewBlocks f = few_blocks(w, x.batch);
  const int64_t blocks = f.row_blocks * ceil_div(x.batch, kMostTokens);
  if (blocks > INT32_MAX) return "the batch is too large: more than 2^31 - 1 blocks of threads";
  float* const parts = f.splits > 1 ? reinterpret_cast<float*>(free) : nullptr;
  const T* const b = static_cast<const T*>(bias);
  const char* const error = launch(mask_few<T>, {unsigned(blocks), unsigned(f.splits), 1}, kMostThreads, f.shared_bytes(),
                                   stream, w, static_cast<const T*>(values), rows, b, activation, Matrix<T>(y), f, parts);
  if (error != nullptr || parts == nullptr) return error;
  return sum_parts(parts, f.splits, bias, activation, y, kDtype<T>, stream);
}

}  // namespace sk::gpu
