#include "linear.cuh"

#include <algorithm>
#include <array>
#include <iterator>
#include <mutex>

#include "../errors.h"
#include "linear_kernel.cuh"
#include "runtime.h"

// Launches of linear_kernel: the boxes of its tensors, and for a dense linear who does what. Result
// tiles come in whole rounds over the clusters; the other items go first to the clusters whose last
// round is empty.
namespace megalora::cuda {
namespace {

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                            const cuuint64_t*, const cuuint32_t*, const cuuint32_t*,
                            CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                            CUtensorMapFloatOOBfill);

// From the driver, which this library is not linked with.
Encode encoder() {
  static const Encode found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult status;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                           cudaEnableDefault, &status));
    check_that(status == cudaDriverEntryPointSuccess,
               "the CUDA driver has no cuTensorMapEncodeTiled: it is older than CUDA 12");
    return reinterpret_cast<Encode>(function);
  }();
  return found;
}

// Boxes of box_rows x 64 of a contiguous bf16 [rows, columns]; zeros beyond its sides.
CUtensorMap boxes(const void* base, int64_t rows, int64_t columns, uint32_t box_rows) {
  CUtensorMap map;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t stride[1] = {static_cast<cuuint64_t>(columns) * 2};
  const cuuint32_t box[2] = {64, box_rows}, steps[2] = {1, 1};
  const CUresult status =
      encoder()(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(base), sizes, stride,
                box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  check_that(status == CUDA_SUCCESS, "cuTensorMapEncodeTiled returns ", static_cast<int>(status),
             " for a bfloat16 tensor [", rows, ", ", columns, "] at ", base);
  return map;
}

int tiles_of(int64_t size, int64_t tile) { return static_cast<int>((size + tile - 1) / tile); }

// Costs in steps of a result, measured on an H200: of a step of a thin item or a gradient, and of
// an item's beginning and end.
constexpr double kThinCost = 0.4, kGradientCost = 0.85, kItemCost = 2;

int most_tiles(int64_t n, int64_t experts) { return static_cast<int>(n / kRows + experts); }

// Gives items to clusters: each to the one that has least to do, the longer ones first.
Plan make_plan(int clusters, int results, double result_cost, int thins, double thin_cost,
               int gradients, double gradient_cost) {
  double load[kMostClusters];
  int thin[kMostClusters] = {}, gradient[kMostClusters] = {};
  for (int c = 0; c < clusters; ++c) {
    load[c] = result_cost * ((results - c + clusters - 1) / clusters);
  }
  const auto give = [&](int count, double cost, int* to) {
    for (int item = 0; item < count; ++item) {
      const int least = static_cast<int>(std::min_element(load, load + clusters) - load);
      load[least] += cost;
      ++to[least];
    }
  };
  const bool thin_first = thin_cost > gradient_cost;
  if (thin_first) {
    give(thins, thin_cost, thin);
  }
  give(gradients, gradient_cost, gradient);
  if (!thin_first) {
    give(thins, thin_cost, thin);
  }
  Plan plan{};
  for (int c = 0; c < clusters; ++c) {
    plan.thin[c + 1] = static_cast<uint16_t>(plan.thin[c] + thin[c]);
    plan.gradient[c + 1] = static_cast<uint16_t>(plan.gradient[c] + gradient[c]);
  }
  return plan;
}

using Kernel = void (*)(Call);

// Allows the kernel its shared memory, once on each device.
template <Kernel KERNEL>
void allow() {
  static std::array<std::once_flag, kMostGpus> allowed;
  std::call_once(allowed.at(current_device()), [] {
    check(cudaFuncSetAttribute(KERNEL, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(sizeof(Shared))));
  });
}

cudaLaunchConfig_t launch_of(int clusters, Stream stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(2 * clusters);
  config.blockDim = dim3(kLinearThreads);
  config.dynamicSmemBytes = sizeof(Shared);
  config.stream = stream;
  return config;
}

// Clusters that this GPU runs at once.
int most_clusters() {
  constexpr Kernel kAny = linear_kernel<false, false, 16>;
  static std::array<std::once_flag, kMostGpus> asked;
  static std::array<int, kMostGpus> found;
  const int device = current_device();
  std::call_once(asked.at(device), [device] {
    allow<kAny>();
    cudaLaunchAttribute pairs{};
    pairs.id = cudaLaunchAttributeClusterDimension;
    pairs.val.clusterDim = {2, 1, 1};
    cudaLaunchConfig_t config = launch_of(kMostClusters, nullptr);
    config.attrs = &pairs;
    config.numAttrs = 1;
    int clusters = 0;
    check(cudaOccupancyMaxActiveClusters(&clusters, kAny, &config));
    found.at(device) = std::min(clusters, kMostClusters);
  });
  return found.at(device);
}

// What both directions and all experts have in common. The columns and the depth are the result's.
void set_sizes(Call& call, const Sizes& sizes, int64_t columns, int64_t depth) {
  call.rows = static_cast<int>(sizes.n);
  call.columns = static_cast<int>(columns);
  call.depth = static_cast<int>(depth);
  call.r = static_cast<int>(sizes.r);
  call.ranks = static_cast<int>(sizes.ranks);
  call.row_tiles = tiles_of(sizes.n, kRows);
  call.column_tiles = tiles_of(columns, kColumns);
  call.thin_chunks = tiles_of(sizes.r, 64);
  call.weights = static_cast<const CUtensorMap*>(sizes.maps);
  call.ends = sizes.ends;
  call.experts = static_cast<int>(sizes.experts);
  call.most_tiles = most_tiles(sizes.n, sizes.experts);
}

void set_gradients(Call& call, const Backward& b) {
  const int columns = call.ends == nullptr ? kDenseGradientColumns : kExpertGradientColumns;
  Gradients& g = call.gradients;
  g.d_a = b.d_a;
  g.d_b = b.d_b;
  g.blocks_a = tiles_of(b.sizes.i, columns);
  g.blocks_b = tiles_of(b.sizes.o, columns);
  g.items_a = g.blocks_a * call.thin_chunks;
  g.items_b = g.blocks_b * call.thin_chunks;
  g.i = static_cast<int>(b.sizes.i);
  g.o = static_cast<int>(b.sizes.o);
  g.rank = static_cast<int>(b.rank);
  g.period = static_cast<int>(b.period);
  g.num_segments = b.num_segments;
  for (int p = 0; p < b.num_segments; ++p) {
    g.segment[p] = static_cast<int>(b.segment[p]);
  }
}

// A dense plan's clusters wait for each other: they start all at once or not at all. Experts' items
// are drawn in an order in which none waits for a later one, by the clusters that run: these need
// not be all.
template <bool BACKWARD, bool EXPERTS, int LAST_DEPTH>
void launch(const Call& call, int clusters, Stream stream) {
  constexpr Kernel kKernel = linear_kernel<BACKWARD, EXPERTS, LAST_DEPTH>;
  allow<kKernel>();
  cudaLaunchAttribute together{};
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  cudaLaunchConfig_t config = launch_of(clusters, stream);
  config.attrs = &together;
  config.numAttrs = EXPERTS ? 0 : 1;
  check(cudaLaunchKernelEx(&config, kKernel, call));
}

template <bool BACKWARD>
void launch_dense(Call& call, Stream stream) {
  const int results = call.row_tiles * call.column_tiles;
  const int thins = call.row_tiles * call.thin_chunks;
  const int gradients = call.gradients.items_a + call.gradients.items_b;
  const int clusters = std::min(most_clusters(), results + thins + gradients);
  const double steps = tiles_of(call.depth, kDepth);
  call.plan = make_plan(clusters, results, steps + tiles_of(call.r, kDepth) + kItemCost, thins,
                        kThinCost * steps + kItemCost, gradients,
                        kGradientCost * tiles_of(call.rows, 2 * kTokens) + kItemCost);
  if (call.r <= 16) {
    launch<BACKWARD, false, 16>(call, clusters, stream);
  } else if (call.r <= 32) {
    launch<BACKWARD, false, 32>(call, clusters, stream);
  } else {
    launch<BACKWARD, false, 64>(call, clusters, stream);
  }
}

// Thin items come two rounds of results ahead of those that wait for them.
template <bool BACKWARD>
void launch_experts(Call& call, Stream stream) {
  const int clusters = most_clusters();
  const int results = (call.row_tiles / call.experts + 1) * call.column_tiles;  // of one expert
  call.ahead = std::clamp(tiles_of(2 * clusters, results), 1, kMostAhead);
  if (call.r <= 16) {
    launch<BACKWARD, true, 16>(call, clusters, stream);
  } else {
    launch<BACKWARD, true, 64>(call, clusters, stream);
  }
}

template <bool BACKWARD>
void launch(Call& call, Stream stream) {
  call.ends == nullptr ? launch_dense<BACKWARD>(call, stream)
                       : launch_experts<BACKWARD>(call, stream);
}

}  // namespace

bool linear_is_built() {
  constexpr int kArchitectures[] = {__CUDA_ARCH_LIST__};
  return std::ranges::find(kArchitectures, 900) != std::end(kArchitectures);
}

int64_t linear_words(int64_t n, int64_t experts) {
  return 2 * most_tiles(n, experts) + experts + 2;
}

void linear_forward(const Forward& f, Stream stream) {
  const Sizes& s = f.sizes;
  Call call{};
  set_sizes(call, s, s.o, s.i);
  call.wide = boxes(f.x, s.n, s.i, kBlockRows);
  call.result = boxes(f.y, s.n, s.o, 64);
  call.projector = boxes(f.lora_A, s.experts * s.ranks, s.i, 64);
  call.thin = boxes(f.s, s.n, s.r, kBlockRows);
  call.low_rank = boxes(f.lora_B, s.experts * s.o, s.r, 128);
  if (s.ends == nullptr) {
    call.weight = boxes(f.weight, s.o, s.i, 128);
  }
  call.projector_rows = call.ranks;
  call.low_rank_rows = call.columns;
  call.thin_out = static_cast<bf16*>(f.s);
  call.result_out = static_cast<bf16*>(f.y);
  call.thin_scale = f.scale;
  call.words = f.words;
  launch<false>(call, stream);
}

void linear_backward(const Backward& b, Stream stream) {
  const Sizes& s = b.sizes;
  Call call{};
  set_sizes(call, s, s.i, s.o);
  call.wide = boxes(b.dy, s.n, s.o, kBlockRows);
  call.result = boxes(b.dx, s.n, s.i, 64);
  call.projector = boxes(b.lora_B, s.experts * s.o, s.r, 64);
  call.thin = boxes(b.ds, s.n, s.r, kBlockRows);
  call.low_rank = boxes(b.lora_A, s.experts * s.ranks, s.i, 64);
  call.other_wide = boxes(b.x, s.n, s.i, kTokens);
  call.other_thin = boxes(b.s, s.n, s.r, kTokens);
  if (s.ends == nullptr) {
    call.weight = boxes(b.weight, s.o, s.i, 64);
  }
  call.projector_rows = call.depth;
  call.low_rank_rows = call.ranks;
  call.thin_out = static_cast<bf16*>(b.ds);
  call.result_out = static_cast<bf16*>(b.dx);
  call.thin_scale = b.scale;
  call.words = b.words;
  set_gradients(call, b);
  launch<true>(call, stream);
}

int64_t bytes_of_maps(int64_t experts) {
  return experts * static_cast<int64_t>(sizeof(CUtensorMap));
}

void make_maps(void* maps, const void* const* weights, int64_t experts, int64_t o, int64_t i,
               bool backward) {
  for (int64_t e = 0; e < experts; ++e) {
    static_cast<CUtensorMap*>(maps)[e] = boxes(weights[e], o, i, backward ? 64 : 128);
  }
}

}  // namespace megalora::cuda
