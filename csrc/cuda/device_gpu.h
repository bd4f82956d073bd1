// device.h's names for NVIDIA GPUs.
#pragma once

#include <cuda_runtime.h>

// Of a block: its most threads and, if given, how many blocks a multiprocessor is to hold, which bounds the registers.
#define SK_KERNEL(...) static __global__ void __launch_bounds__(__VA_ARGS__)
#define SK_DEVICE static __device__ __forceinline__
#define SK_MEMBER __device__ __forceinline__

namespace sk::gpu {

constexpr int kWarp = 32;

using Stream = cudaStream_t;
using Dim = dim3;

SK_DEVICE int thread() { return int(threadIdx.x); }
SK_DEVICE int threads() { return int(blockDim.x); }
SK_DEVICE Dim block() { return {blockIdx.x, blockIdx.y, blockIdx.z}; }
SK_DEVICE Dim blocks() { return {gridDim.x, gridDim.y, gridDim.z}; }

SK_DEVICE float bits_to_float(uint32_t v) { return __uint_as_float(v); }
// In PTX: CUDA's headers for these types take a second of every file's compilation.
SK_DEVICE float half_to_float(uint16_t v) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v));
  return f;
}
SK_DEVICE uint16_t float_to_half(float v) {
  uint16_t h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(v));
  return h;
}
SK_DEVICE uint16_t float_to_bfloat(float v) {
  uint16_t h;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(v));
  return h;
}

SK_DEVICE void barrier() { __syncthreads(); }
SK_DEVICE void warp_barrier() { __syncwarp(); }
template <class T>
SK_DEVICE T shuffle(T v, int from) {
  return __shfl_sync(0xffffffffu, v, from);
}
template <class T>
SK_DEVICE T shuffle_xor(T v, int mask) {
  return __shfl_xor_sync(0xffffffffu, v, mask);
}
SK_DEVICE uint32_t votes(bool v) { return __ballot_sync(0xffffffffu, v); }
SK_DEVICE int popcount(uint32_t v) { return __popc(v); }
SK_DEVICE int popcount(uint64_t v) { return __popcll(v); }
// The 4 bytes that the selector's hexadecimal digits name, the lowest first: 0 to 3 of `low`, 4 to 7 of `high`.
SK_DEVICE uint32_t bytes_of(uint32_t low, uint32_t high, uint32_t selector) { return __byte_perm(low, high, selector); }

// Numbers in the block's dynamic shared memory.
template <class T>
class Shared {
 public:
  explicit SK_MEMBER Shared(T* p) : p_(p) {}
  SK_MEMBER Shared operator+(int i) const { return Shared(p_ + i); }
  template <class V = T>
  SK_MEMBER V load(int i) const {
    return *reinterpret_cast<const V*>(p_ + i);
  }
  template <class V>
  SK_MEMBER void store(int i, V v) const {
    *reinterpret_cast<V*>(p_ + i) = v;
  }
  SK_MEMBER uint32_t address() const { return uint32_t(__cvta_generic_to_shared(p_)); }

 private:
  T* p_;
};
// Those from `offset` bytes on.
template <class T>
SK_DEVICE Shared<T> shared_memory(int offset) {
  extern __shared__ __align__(128) uint8_t bytes[];
  return Shared<T>(reinterpret_cast<T*>(bytes + offset));
}

// Starts to copy kBytes, 8 or 16, both sides aligned to that, past the registers, and 16 past L1: the first `bytes` from memory,
// of which no others are read, then zeros.
template <int kBytes = 16, class T>
SK_DEVICE void copy_async_part(Shared<T> to, const T* from, int bytes) {
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to.address()), "l"(from), "r"(bytes));
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to.address()), "l"(from), "n"(kBytes), "r"(bytes));
}
// All of them, or zeros if `inside` is false.
template <int kBytes = 16, class T>
SK_DEVICE void copy_async(Shared<T> to, const T* from, bool inside) {
  copy_async_part<kBytes>(to, from, inside ? kBytes : 0);
}
// Groups of a thread's copies since the last group; waits until at most kLeft groups are under way. Other threads see them
// after a barrier.
SK_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;"); }
template <int kLeft>
SK_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// Four 8 x 8 matrices of 16-bit numbers; lane 8 i + r has the address of row r of matrix i. Lane l gets, of each matrix,
// numbers 2 (l % 4) and 2 (l % 4) + 1 of row l / 4; transposed: of column l / 4.
template <class T>
SK_DEVICE void load_matrices(uint32_t (&r)[4], Shared<T> row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row.address()));
}
template <class T>
SK_DEVICE void load_matrices_transposed(uint32_t (&r)[4], Shared<T> row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row.address()));
}

struct bf16;
struct fp16;

// d [16, 8] += a [16, 16] b [16, 8]. Fragments as the PTX manual's m16n8k16: with g = lane / 4 and t = lane % 4,
//   a: pairs of columns 2 t and 2 t + 8 of rows g and g + 8 (row first)    b: pairs of rows 2 t and 2 t + 8 of column g
//   d: columns 2 t and 2 t + 1 of rows g and g + 8
SK_DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const bf16*) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
SK_DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const fp16*) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// d [16, 8] += a [16, 32] b [32, 8], where a holds 2 of each 4 columns, compressed to [16, 16]; its fragment is multiply's, b's
// are pairs of rows 2 t + 8 i in b[i]. `metadata` tells where the 2 stood: 4 bits for 4 columns, the first position lowest, the
// second one above it. Lanes with t / 2 == kHalf give it: that of columns 16 (t % 2) .. + 15, of row g in the lower 16 bits, of
// row g + 8 in the upper ones. Positions that do not ascend are undefined behaviour.
template <int kHalf>
SK_DEVICE void multiply_sparse(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t metadata,
                               const bf16*) {
  asm volatile(
      "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(metadata), "n"(kHalf));
}
template <int kHalf>
SK_DEVICE void multiply_sparse(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t metadata,
                               const fp16*) {
  asm volatile(
      "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(metadata), "n"(kHalf));
}

// The GPU in use: what CUDA knows by heart, so that asking waits for nothing. Zeros where it does not say.
struct Device {
  int capability = 0;  // 90 for 9.0
  int multiprocessors = 0;
  int shared_bytes = 0;  // that a block can have
};
inline Device this_device() {
  int device = 0, major = 0, minor = 0;
  Device found;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  cudaDeviceGetAttribute(&found.multiprocessors, cudaDevAttrMultiProcessorCount, device);
  cudaDeviceGetAttribute(&found.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  found.capability = 10 * major + minor;
  return found;
}

// Its message, or null for none. CUDA forgets it: else the next launch would report it again.
inline const char* taken(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(error);
}

// Enqueues kernel(arguments...) with this many bytes of shared memory per block. Returns null, or CUDA's message.
template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), Dim grid, int threads, int shared_bytes, Stream stream,
                   Arguments... arguments) {
  if (shared_bytes > 48 << 10) {
    // Always the same, as much as there is: with what this launch needs, another thread's could come between and allow less.
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize, this_device().shared_bytes);
    if (error != cudaSuccess) return taken(error);
  }
  kernel<<<grid, threads, shared_bytes, stream>>>(arguments...);
  return taken(cudaGetLastError());
}

}  // namespace sk::gpu
