// GEMM 1 of srppo_kernels/linear_logprob on sm_90a with the softmax's state in its epilogue: what triton_scan.py's scan
// computes, by TMA and WGMMA. Compiled here, not run: no device was at hand. So no backend chooses it. What can be proved
// without one is: tests/linear_logprob/test_sm90_host.py runs the index arithmetic (sm90_tiles.h) and the scalar maths
// (softmax_state.h) on the host, and README.md in this folder has the budgets and ptxas's figures.
//
//     z = softcap(scale (x W^T + bias)) / temperature            m, s, t of a row and vocabulary group; z_y where it is met
//
// The pipeline. One persistent block an SM; three warp groups:
//
//     producer      | X W | X W | X W | ...   a step of K a slot, [128, 64] each, by TMA; up to 7 slots ahead
//     consumer 0    | multiply tile 0 | absorb it       | multiply tile 1 | absorb it       | ...
//     consumer 1    |                 | multiply tile 0 | absorb it       | multiply tile 1 | ...
//
// Consumer 0 goes through one vocabulary group, consumer 1 through the next, in tiles of 128 x 128 logits that a consumer
// holds in registers, 128 a thread, and never puts in memory. A step is 8 WGMMAs m64n128k16. Tiles of the two alternate, and
// so do the slots that the producer fills for them: the ring's order *is* the ping-pong, and needs no barrier of its own.
// Where absorbing a tile takes less time than its K loop (README.md: D of about 512), the tensor cores see one unbroken row
// of WGMMAs.
//
// A slot has two mbarriers. `full` completes when the producer has arrived and 32 KiB have: the owner's WGMMAs may read.
// `empty` completes when every warp that read the slot has arrived. A warp arrives once the *next* step's WGMMAs are queued
// and those of this one are done, so that the tensor cores never run dry for a release.
//
// Clusters of two blocks work on the same rows and on neighbouring vocabulary groups. Each loads half of the X tile and
// multicasts it into both: 24 KiB from L2 a step instead of 32. A step takes at least 512 cycles, so an SM asks L2 for 48
// bytes a cycle instead of 64. Then `empty` counts the warps of both blocks, and a block leaves when both have finished.
//
// Bits. A (row block, vocabulary group) is one consumer's from its first tile to its last; a row's logits, the order in
// which a thread absorbs them and the order in which a row's four threads are added up depend on neither the number of
// rows, nor the row's place, nor who shares the block. The count of live rows is read on the device and bounds the work.
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "for sm_90a alone, as setup.py compiles it"
#endif

#include "../common/cuda_launch.h"
#include "../common/hopper.h"
#include "../common/tensor_map.h"
#include "sm90_epilogue.h"
#include "sm90_tiles.h"

namespace srppo::sm90 {

constexpr int kThreads = 128 * (1 + kConsumers);
// A launch with 384 threads has 168 registers a thread. The producer's warps hand most of theirs to the consumers', out of
// the same pool: with more than it has, the consumers would wait for ever.
constexpr int kLaunchRegisters = 65536 / kThreads / 8 * 8, kProducerRegisters = 40, kConsumerRegisters = 232;
static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= (1 + kConsumers) * kLaunchRegisters, "the pool");

struct Shared {
  std::uint32_t stages, barriers;

  __device__ std::uint32_t x(int stage) const { return stages + stage * kStageBytes; }
  __device__ std::uint32_t w(int stage) const { return x(stage) + kOperandBytes; }
  __device__ std::uint32_t full(int stage) const { return barriers + stage * 8; }
  __device__ std::uint32_t empty(int stage) const { return barriers + (kStages + stage) * 8; }
};

// Producer ----------------------------------------------------------------------------------------------------------

template <int kCluster>
__device__ void produce(const CUtensorMap& x, const CUtensorMap& w, const ScanParams& p, const Schedule& schedule,
                        const Shared& shared, int rank) {
  constexpr int kShare = kRows / kCluster;  // rows of the X tile that this block loads, for all
  const int steps = (p.width + kDepth - 1) / kDepth;
  Ring ring;
  for (int i = blockIdx.x / kCluster; i < schedule.units(); i += gridDim.x / kCluster) {
    const Unit unit = schedule.unit(i);
    const int tiles_of_1 = schedule.tiles(unit, 1), turns = schedule.tiles(unit, 0) + tiles_of_1;
    for (int at = 0; at < turns; ++at) {
      const Turn turn = Schedule::turn(at, tiles_of_1);
      const int v0 = schedule.group_of(unit, turn.consumer, rank) * p.group + turn.tile * kColumns;
      for (int k = 0; k < steps; ++k, ring.next()) {
        const std::uint32_t full = shared.full(ring.stage), to = shared.x(ring.stage) + rank * kShare * kDepth * 2;
        hopper::wait(shared.empty(ring.stage), ring.phase ^ 1);
        hopper::arrive_expecting(full, kStageBytes);
        const int r0 = unit.block * kRows + rank * kShare;
        if (kCluster == 1) hopper::load_box(to, &x, k * kDepth, r0, full);
        else hopper::load_box_to(to, &x, k * kDepth, r0, full, (1 << kCluster) - 1);
        hopper::load_box(shared.w(ring.stage), &w, k * kDepth, v0, full);
      }
    }
  }
}

// Consumer: K loop ----------------------------------------------------------------------------------------------------

template <int kCluster>
__device__ __forceinline__ void release(const Shared& shared, int stage) {
  const int lane = threadIdx.x % 32;
  if (kCluster == 1) {
    if (lane == 0) hopper::arrive(shared.empty(stage));
  } else if (lane < kCluster) {
    hopper::arrive_at(shared.empty(stage), lane);
  }
}

// acc = X tile times W tile^T over `steps` stages from `ring` on.
template <int kCluster>
__device__ __forceinline__ void multiply(float (&acc)[2][64], const Shared& shared, Ring& ring, int steps) {
  int before = -1;
  for (int step = 0; step < steps; ++step) {
    hopper::wait(shared.full(ring.stage), ring.phase);
    __syncwarp();
    const std::uint64_t a = descriptor(shared.x(ring.stage)), b = descriptor(shared.w(ring.stage));
    hopper::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kDepth; k += kStep) {
#pragma unroll
      for (int half = 0; half < 2; ++half)
        hopper::wgmma_m64n128k16(acc[half], a + advance(half * kHalf, k), b + advance(0, k), step > 0 || k > 0);
    }
    hopper::wgmma_commit();
    hopper::wgmma_wait<1>();  // the step before is done
    if (before >= 0) release<kCluster>(shared, before);
    before = ring.stage;
    ring.next();
  }
  hopper::wgmma_wait<0>();
  hopper::pin(acc[0]);
  hopper::pin(acc[1]);
  release<kCluster>(shared, before);
}

// Consumer -------------------------------------------------------------------------------------------------------------

template <bool kPlain, bool kKeep, int kCluster>
__device__ void consume(const ScanParams& p, const Schedule& schedule, const Shared& shared, int rank, int live, int consumer) {
  const int thread = threadIdx.x % 128, steps = (p.width + kDepth - 1) / kDepth;
  Ring ring;
  for (int i = blockIdx.x / kCluster; i < schedule.units(); i += gridDim.x / kCluster) {
    const Unit unit = schedule.unit(i);
    const int group = schedule.group_of(unit, consumer, rank);
    const int tiles_of_1 = schedule.tiles(unit, 1), turns = schedule.tiles(unit, 0) + tiles_of_1;
    int at = 0;  // turns of the unit that lie behind the ring's place
    ThreadRows rows;
    rows.first = unit.block * kRows + first_row(thread);
    rows.live = live;
#pragma unroll
    for (int slot = 0; slot < kThreadRows; ++slot) {
      rows.state[slot] = RowState{};
      const std::int64_t target = rows.is_live(slot) ? p.targets[rows.first + row_offset(slot)] : -1;
      rows.target[slot] = target < p.vocab ? static_cast<int>(target) : -1;  // a shard may see another's targets
    }
    for (int tile = 0; tile < schedule.tiles(unit, consumer); ++tile) {
      float acc[2][64];
      const int place = Schedule::place({consumer, tile}, tiles_of_1);
      ring.skip((place - at) * steps);
      at = place + 1;
      multiply<kCluster>(acc, shared, ring, steps);
      absorb_tile<kPlain, kKeep>(acc, rows, thread, group * p.group + tile * kColumns, p);
    }
    ring.skip((turns - at) * steps);
    if (group >= schedule.groups()) continue;
    const std::int64_t plane = static_cast<std::int64_t>(schedule.groups()) * p.n;
#pragma unroll
    for (int slot = 0; slot < kThreadRows; ++slot) {
      RowState state = rows.state[slot];
      state.s = quad_sum(state.s);
      state.t = quad_sum(state.t);
      state = softmax::finished(state);
      if (thread % 4 != 0 || !rows.is_live(slot)) continue;
      float* out = p.state + static_cast<std::int64_t>(group) * p.n + rows.first + row_offset(slot);
      out[0] = state.m;
      out[plane] = state.s;
      out[2 * plane] = state.t;
    }
  }
}

// Blocks -----------------------------------------------------------------------------------------------------------------

template <bool kPlain, bool kKeep, int kCluster>
__global__ void __launch_bounds__(kThreads, 1)
    scan_gemm_kernel(const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap w,
                     const __grid_constant__ ScanParams p) {
  extern __shared__ std::uint8_t memory[];
  const std::uint32_t base = (hopper::shared_address(memory) + kAlignment - 1) / kAlignment * kAlignment;
  const Shared shared{base, base + kStages * kStageBytes};
  const int rank = kCluster == 1 ? 0 : hopper::cluster_rank(), live = *p.count;
  const Schedule schedule{(live + kRows - 1) / kRows, p.vocab, p.group, kCluster};
  if (threadIdx.x == 0) {
    hopper::prefetch(&x);
    hopper::prefetch(&w);
    for (int stage = 0; stage < kStages; ++stage) {
      hopper::barrier_init(shared.full(stage), 1);
      hopper::barrier_init(shared.empty(stage), 4 * kCluster);  // the warps of one consumer in each block
    }
    hopper::barrier_init_fence();
  }
  __syncwarp();
  if (kCluster == 1) __syncthreads();
  else hopper::cluster_sync();

  const int group = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0);  // warp-uniform, and known to be
  if (group == 0) {
    hopper::shrink_registers<kProducerRegisters>();
    if (threadIdx.x == 0) produce<kCluster>(x, w, p, schedule, shared, rank);
  } else {
    hopper::grow_registers<kConsumerRegisters>();
    consume<kPlain, kKeep, kCluster>(p, schedule, shared, rank, live, group - 1);
  }
  __syncwarp();
  if (kCluster > 1) hopper::cluster_sync();  // the other block may still arrive at barriers of this one
}

template <bool kPlain, bool kKeep, int kCluster>
void launch(const CUtensorMap& x, const CUtensorMap& w, const ScanParams& p, int blocks, cudaStream_t stream) {
  const auto kernel = scan_gemm_kernel<kPlain, kKeep, kCluster>;
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {kCluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kSharedBytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, x, w, p));
}

template <int kCluster>
void choose(const CUtensorMap& x, const CUtensorMap& w, const ScanParams& p, int blocks, cudaStream_t stream) {
  const bool plain = !p.bias && !p.inverse_temperatures && p.softcap == 0.0f;
  if (plain && p.kept) launch<true, true, kCluster>(x, w, p, blocks, stream);
  else if (plain) launch<true, false, kCluster>(x, w, p, blocks, stream);
  else if (p.kept) launch<false, true, kCluster>(x, w, p, blocks, stream);
  else launch<false, false, kCluster>(x, w, p, blocks, stream);
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

CUtensorMap boxes(const Tensor& matrix, int box_rows, const char* name) {
  STD_TORCH_CHECK(matrix.is_cuda() && matrix.dim() == 2 && matrix.stride(1) == 1 &&
                      matrix.scalar_type() == ScalarType::BFloat16 && matrix.size(1) > 0 &&
                      reinterpret_cast<std::uintptr_t>(matrix.const_data_ptr()) % 16 == 0 && matrix.stride(0) % 8 == 0,
                  "srppo_native: ", name, " must be a bf16 CUDA matrix with contiguous rows at multiples of 16 bytes");
  return bf16_boxes(matrix.const_data_ptr(), matrix.size(0), matrix.size(1), matrix.stride(0), box_rows, kDepth);
}

// Fills state and target_logits of the first *count rows, and kept and kept_max if given. Where a row's target is in no group
// (a shard of the vocabulary), its target_logits entry is left as it was.
void scan(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& targets,
          const std::optional<Tensor>& inverse_temperatures, const Tensor& count, double scale, double softcap,
          double inverse_temperature, std::int64_t group, std::int64_t cluster, const Tensor& state,
          const Tensor& target_logits, const std::optional<Tensor>& kept, const std::optional<Tensor>& kept_max) {
  const int device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const std::int64_t n = x.size(0), vocab = weight.size(0);
  STD_TORCH_CHECK(attribute(cudaDevAttrComputeCapabilityMajor, device) == 9, "srppo_native: this scan is for sm_90 alone");
  STD_TORCH_CHECK(weight.size(1) == x.size(1), "srppo_native: x and weight have different widths");
  STD_TORCH_CHECK(group > 0 && group % kColumns == 0 && (cluster == 1 || cluster == 2),
                  "srppo_native: group must be a multiple of ", kColumns, ", and cluster 1 or 2");
  STD_TORCH_CHECK(n < (1LL << 31) - 2 * kRows && vocab < (1LL << 31) - 8 * group,
                  "srppo_native: rows and vocabulary entries are counted in 32 bits");
  if (n == 0 || vocab == 0) return;
  const std::int64_t groups = (vocab + group - 1) / group;
  ScanParams p{};
  p.bias = device_data<float>(bias, ScalarType::Float, vocab, "bias");
  p.targets = device_data<std::int64_t>(targets, ScalarType::Long, n, "targets");
  p.inverse_temperatures = device_data<float>(inverse_temperatures, ScalarType::Float, n, "inverse_temperatures");
  p.count = device_data<int>(count, ScalarType::Int, 1, "count");
  p.state = const_cast<float*>(device_data<float>(state, ScalarType::Float, 3 * groups * n, "state"));
  p.target_logits = const_cast<float*>(device_data<float>(target_logits, ScalarType::Float, n, "target_logits"));
  if (kept) {
    const std::int64_t parts = (vocab + kPart - 1) / kPart;
    STD_TORCH_CHECK(kept->is_cuda() && kept->scalar_type() == ScalarType::BFloat16 && kept->dim() == 2 &&
                        kept->size(0) >= n && kept->size(1) == vocab && kept->stride(1) == 1 && vocab % 2 == 0 &&
                        kept->stride(0) % 2 == 0 && reinterpret_cast<std::uintptr_t>(kept->const_data_ptr()) % 4 == 0,
                    "srppo_native: kept must be a bf16 CUDA matrix [n, V], V even, with contiguous rows at multiples of 4 bytes");
    STD_TORCH_CHECK(kept_max && kept_max->is_cuda() && kept_max->scalar_type() == ScalarType::Float &&
                        kept_max->dim() == 2 && kept_max->size(0) >= n && kept_max->size(1) >= parts &&
                        kept_max->stride(1) == 1,
                    "srppo_native: kept_max must be a float32 CUDA matrix with ", parts, " columns or more");
    p.kept = static_cast<__nv_bfloat16*>(kept->mutable_data_ptr());
    p.kept_max = static_cast<float*>(kept_max->mutable_data_ptr());
    p.stride_kept = kept->stride(0);
    p.stride_max = kept_max->stride(0);
  }
  p.n = static_cast<int>(n);
  p.width = static_cast<int>(x.size(1));
  p.vocab = static_cast<int>(vocab);
  p.group = static_cast<int>(group);
  p.scale = static_cast<float>(scale);
  p.softcap = static_cast<float>(softcap);
  p.inverse_softcap = softcap == 0.0 ? 0.0f : static_cast<float>(1.0 / softcap);
  p.inverse_temperature = static_cast<float>(inverse_temperature);

  const int wide = static_cast<int>(cluster);
  const CUtensorMap x_boxes = boxes(x, kRows / wide, "x"), w_boxes = boxes(weight, kColumns, "weight");
  const Schedule most{static_cast<int>((n + kRows - 1) / kRows), p.vocab, p.group, wide};
  const int clusters = attribute(cudaDevAttrMultiProcessorCount, device) / wide;
  const int blocks = wide * (clusters < most.units() ? clusters : most.units());
  if (wide == 1) choose<1>(x_boxes, w_boxes, p, blocks, current_stream(x));
  else choose<2>(x_boxes, w_boxes, p, blocks, current_stream(x));
}

}  // namespace srppo::sm90

STABLE_TORCH_LIBRARY_FRAGMENT(srppo_native, m) {
  m.def(
      "linear_logprob_scan_sm90(Tensor x, Tensor weight, Tensor? bias, Tensor targets, Tensor? inverse_temperatures, "
      "Tensor count, float scale, float softcap, float inverse_temperature, int group, int cluster, Tensor(a!) state, "
      "Tensor(b!) target_logits, Tensor(c!)? kept, Tensor(d!)? kept_max) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(srppo_native, CUDA, m) { m.impl("linear_logprob_scan_sm90", TORCH_BOX(&srppo::sm90::scan)); }
