// y = activation(x W^T + bias) for 2:4 (and 1:2) weights on Hopper: CUTLASS's sparse collective, which runs `wgmma` on tiles that
// clusters of two blocks fetch together. Y^T = W X^T, for it is the left operand that may be sparse: values are that operand as
// they are stored, and the metadata of groups.h is laid out as CUTLASS's tensor E.

// In this order; and not collective_builder.hpp and gemm_universal.hpp of gemm, which bring what every other GPU has.
// clang-format off
#include <cute/tensor.hpp>
#include <cutlass/cutlass.h>
#include <cutlass/gemm/collective/collective_mma_decl.hpp>
#include <cutlass/gemm/collective/collective_builder_decl.hpp>
#include <cutlass/gemm/collective/sm90_sparse_mma_tma_gmma_ss_warpspecialized.hpp>
#include <cutlass/gemm/collective/builders/sm90_sparse_gmma_builder.inl>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal_decl.h>
#include <cutlass/gemm/kernel/sm90_gemm_tma_warpspecialized_cooperative.hpp>
#include <cutlass/device_kernel.h>
// clang-format on

#include "nm_hopper.h"

namespace sk::gpu::groups {

namespace {

// What the epilogue does with sums, of which it has an array at a time.
struct Activation {
  sk_activation kind;
};
template <class T>
struct Activate {
  using Arguments = Activation;
};
template <class T, int n>
struct Activate<cutlass::Array<T, n>> {
  using Arguments = Activation;
  CUTLASS_DEVICE cutlass::Array<T, n> operator()(const cutlass::Array<T, n>& sums, const Activation& a) const {
    cutlass::Array<T, n> result;
#pragma unroll
    for (int i = 0; i < n; i++) result[i] = activate(a.kind, sums[i]);
    return result;
  }
};

template <class T>
struct Collective {
  static constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;
  using Batch = cutlass::layout::ColumnMajor;  // [features, batch], features together: what torch calls batch-major
  using Tile = cute::Shape<cute::Int<kHopperTall>, cute::Int<kHopperWide>, cute::_128>;
  using Cluster = cute::Shape<cute::_2, cute::_1, cute::_1>;
  template <class... Nodes>
  using Tree = cutlass::epilogue::fusion::Sm90EVT<Nodes...>;
  using Bias = cutlass::epilogue::fusion::Sm90ColBroadcast<0, Tile, T, float, cute::Stride<cute::_1, cute::_0, int64_t>, 1>;
  using Sum = Tree<cutlass::epilogue::fusion::Sm90Compute<cutlass::plus, float, float, kRound>,
                   cutlass::epilogue::fusion::Sm90AccFetch, Bias>;
  using Result = Tree<cutlass::epilogue::fusion::Sm90Compute<Activate, T, float, kRound>, Sum>;
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassSparseTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, Batch, kRun<T>, T, Batch, kRun<T>,
      cutlass::epilogue::TmaWarpSpecializedCooperative, Result>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassSparseTensorOp, T, cutlass::layout::RowMajor, kRun<T>, T, Batch, kRun<T>,
      float, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<int(sizeof(typename Epilogue::SharedStorage))>,
      cutlass::gemm::KernelTmaWarpSpecializedCooperative>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue>;
};

template <class T>
const char* run(const Groups& w, const void* values, const sk_matrix& x, const void* bias, sk_activation activation,
                const sk_matrix& y, Stream stream) {
  using Mainloop = typename Collective<T>::Mainloop;
  using Kernel = typename Collective<T>::Kernel;
  const auto shape = cute::make_shape(int(w.rows), int(x.batch), w.cols, 1);
  typename Kernel::Arguments arguments{cutlass::gemm::GemmUniversalMode::kGemm,
                                       shape,
                                       {static_cast<const T*>(values),
                                        Mainloop::SparseConfig::fill_layoutA(shape),
                                        static_cast<const T*>(x.data),
                                        {x.stride_batch, cute::_1(), 0},
                                        reinterpret_cast<const uint8_t*>(w.metadata),
                                        Mainloop::SparseConfig::fill_layoutE(shape)},
                                       {{}, nullptr, {}, static_cast<T*>(y.data), {cute::_1(), y.stride_batch, 0}}};
  arguments.epilogue.thread = {{{}, {static_cast<const T*>(bias), T(0), {}}, {}}, {activation}};
  cudaGetDevice(&arguments.hw_info.device_id);
  arguments.hw_info.sm_count = this_device().multiprocessors;
  if (!Kernel::can_implement(arguments)) return "CUTLASS refuses this product";
  auto parameters = Kernel::to_underlying_arguments(arguments, nullptr);

  auto* const kernel = cutlass::device_kernel<Kernel>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Kernel::SharedStorageSize);
  if (error != cudaSuccess) return taken(error);
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {2, 1, 1};
  cudaLaunchConfig_t launch = {};
  launch.gridDim = Kernel::get_grid_shape(parameters), launch.blockDim = Kernel::get_block_shape();
  launch.dynamicSmemBytes = Kernel::SharedStorageSize, launch.stream = stream;
  launch.attrs = &cluster, launch.numAttrs = 1;
  return taken(cudaLaunchKernelEx(&launch, kernel, parameters));
}

// A matrix whose rows TMA can fetch: 16 bytes aligned, features together.
bool fits_tma(const sk_matrix& m) {
  return m.stride_feature == 1 && m.stride_batch % 8 == 0 && m.batch < INT32_MAX && aligned(m.data, 16);
}

}  // namespace

bool hopper_runs(const Groups& w, const void* values, const sk_matrix& x, const sk_matrix& y, sk_dtype dtype) {
  if (dtype == SK_FLOAT32 || !w.compressed() || w.selected || !w.metadata || w.cols == 0) return false;
  if (w.cols % 16 || w.rows % 8 || !aligned(values, 16) || !aligned(w.metadata, 16) || !fits_tma(x) || !fits_tma(y))
    return false;
  const Device device = this_device();
  if (device.capability != 90) return false;  // code for 9.0a runs on no other GPU
  // Faster than linear_tile, 4 : 3 by the arithmetic of cost_gpu.py, where the product fills as much of its waves of tiles, which
  // few rows of x do not: 14336 x 4096 with one takes 17 us there, and would take 37 here. Clusters have two tiles of rows.
  const int64_t tiles = ceil_div(w.rows, 2 * kHopperTall) * 2 * ceil_div(x.batch, kHopperWide);
  const int64_t waves = ceil_div(tiles, device.multiprocessors);
  return 4 * w.rows * x.batch >= 3 * waves * device.multiprocessors * kHopperTall * kHopperWide;
}

const char* hopper_linear(const Groups& w, const void* values, const sk_matrix& x, const void* bias,
                          sk_activation activation, const sk_matrix& y, sk_dtype dtype, void* stream) {
  const auto run_with = dtype == SK_FLOAT16 ? run<cutlass::half_t> : run<cutlass::bfloat16_t>;
  return run_with(w, values, x, bias, activation, y, Stream(stream));
}

}  // namespace sk::gpu::groups
