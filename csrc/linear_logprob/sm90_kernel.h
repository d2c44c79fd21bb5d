// GEMM 1 of srppo_kernels/linear_logprob on sm_90a with the softmax's state in its epilogue: what triton_scan.py's scan
// computes, by TMA and WGMMA. README.md in this folder has the budgets, ptxas's figures and what was measured.
//
//     z = softcap(scale (x W^T + bias)) / temperature            m, s, t of a row and vocabulary group; z_y where it is met
//
// The pipeline. One persistent block an SM; three warp groups:
//
//     producer      | X W | X W | X W | ...   a step of K a slot, X [128, 64] and W [192, 64], by TMA; up to 5 slots ahead
//     consumer 0    | multiply rows 0 to 63 of the tile            | absorb them | of the next tile ...
//     consumer 1        | multiply rows 64 to 127                      | absorb them | ...
//
// A step is 4 WGMMAs m64n192k16 of each consumer. Consumer 1 starts kLead steps late and stays behind: while one absorbs, the
// other has the tensor cores to itself, as far as the slots go that both have to release.
//
// Accuracy. Tensor cores truncate their accumulator after every 16 of K: at D = 4096 a GEMM that leaves all of K to them has
// log-probs off by 4e-5 to 1e-4. So a thread has two sets of 96 registers: tensor cores add up 512 of K in one, and that is
// added to the other, rounded to nearest. While one consumer adds, the other multiplies.
//
// A slot has two mbarriers. `full` completes when the producer has arrived and 40 KiB have: WGMMAs may read. `empty`
// completes when every warp that read the slot has arrived. A warp arrives once the *next* step's WGMMAs are queued and those
// of this one are done, so that the tensor cores never run dry for a release.
//
// Clusters of two blocks work on neighbouring row blocks and the same vocabulary group. Each loads half of the W tile and
// multicasts it into both: 28 KiB from L2 a step instead of 40. Then `empty` counts the warps of both blocks, and a block
// leaves when both have finished.
//
// Bits. A (row block, vocabulary group) is one block's from its first tile to its last; a row's logits, the order in
// which a thread absorbs them and the order in which a row's four threads are added up depend on neither the number of
// rows, nor the row's place, nor who shares the block. The count of live rows is read on the device and bounds the work.
//
// Written against srppo::hopper alone: sm90.cu has it from common/hopper.h, and tests/linear_logprob/sm90_emulator.h has the
// same functions in plain C++, so that the host can run this file.
#pragma once

#include "sm90_epilogue.h"
#include "sm90_tiles.h"

namespace srppo::sm90 {

constexpr int kThreads = 128 * (1 + kConsumers);
// A launch with 384 threads has 168 registers a thread. The producer's warps hand most of theirs to the consumers', out of
// the same pool: with more than it has, the consumers would wait for ever.
constexpr int kLaunchRegisters = 65536 / kThreads / 8 * 8, kProducerRegisters = 40, kConsumerRegisters = 232;
static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= (1 + kConsumers) * kLaunchRegisters, "the pool");
constexpr int kLead = 2;  // steps
static_assert(kLead < kStages, "consumer 0 gets no further than the slots that consumer 1 has not released");

struct Shared {
  std::uint32_t stages, kept, barriers;

  __device__ std::uint32_t x(int stage) const { return stages + stage * kStageBytes; }
  __device__ std::uint32_t w(int stage) const { return x(stage) + kXBytes; }
  __device__ std::uint32_t full(int stage) const { return barriers + stage * 8; }
  __device__ std::uint32_t empty(int stage) const { return barriers + (kStages + stage) * 8; }
  __device__ std::uint32_t start() const { return barriers + 2 * kStages * 8; }
};

// Producer ----------------------------------------------------------------------------------------------------------

template <int kCluster>
__device__ void produce(const CUtensorMap& x, const CUtensorMap& w, const ScanParams& p, const Schedule& schedule,
                        const Shared& shared, int rank) {
  constexpr int kShare = kColumns / kCluster;  // rows of the W tile that this block loads, for all
  const int steps = (p.width + kDepth - 1) / kDepth;
  Ring ring;
  for (int i = blockIdx.x / kCluster; i < schedule.units(); i += gridDim.x / kCluster) {
    const Unit unit = schedule.unit(i);
    const int r0 = (unit.block + rank) * kRows, tiles = schedule.tiles(unit);
    for (int tile = 0; tile < tiles; ++tile) {
      const int v0 = unit.group * p.group + tile * kColumns + rank * kShare;
      for (int k = 0; k < steps; ++k, ring.next()) {
        const std::uint32_t full = shared.full(ring.stage), to = shared.w(ring.stage) + rank * kShare * kDepth * 2;
        hopper::wait(shared.empty(ring.stage), ring.phase ^ 1);
        hopper::arrive_expecting(full, kStageBytes);
        hopper::load_box(shared.x(ring.stage), &x, k * kDepth, r0, full);
        if (kCluster == 1) hopper::load_box(to, &w, k * kDepth, v0, full);
        else hopper::load_box_to(to, &w, k * kDepth, v0, full, (1 << kCluster) - 1);
      }
    }
  }
}

// Consumer -----------------------------------------------------------------------------------------------------------

template <int kCluster>
__device__ __forceinline__ void release(const Shared& shared, int stage) {
  const int lane = threadIdx.x % 32;
  if (kCluster == 1) {
    if (lane == 0) hopper::arrive(shared.empty(stage));
  } else if (lane < kCluster) {
    hopper::arrive_at(shared.empty(stage), lane);
  }
}

// Queues the WGMMAs of one step, once its slot is full; with kFirst they begin a sum.
template <bool kFirst>
__device__ __forceinline__ void multiply_step(float (&acc)[kLogits], const Shared& shared, const Ring& ring, int consumer) {
  hopper::wait(shared.full(ring.stage), ring.phase);
  __syncwarp();
  const std::uint32_t stage = descriptor(shared.stages) + ring.stage * (kStageBytes / 16);
  const std::uint32_t a = stage + advance(consumer * kHalf, 0), b = stage + kXBytes / 16;
  hopper::wgmma_fence();
  hopper::wgmma_m64n192k16<kFirst, kDescriptorHigh>(acc, a, b);
#pragma unroll
  for (int k = kStep; k < kDepth; k += kStep)
    hopper::wgmma_m64n192k16<false, kDescriptorHigh>(acc, a + advance(0, k), b + advance(0, k));
  hopper::wgmma_commit();
}

// sum = this consumer's rows of the X tile times W tile^T, over `steps` stages from `ring` on. `signal`: the step that lets the
// other consumer start, or -1.
template <int kCluster>
__device__ __forceinline__ void multiply(float (&sum)[kLogits], const Shared& shared, Ring& ring, int steps, int consumer,
                                         int signal) {
#pragma unroll
  for (int i = 0; i < kLogits; ++i) sum[i] = 0.0f;
  for (int done = 0; done < steps; done += kBlockSteps) {
    float acc[kLogits];
    const int until = steps - done < kBlockSteps ? steps : done + kBlockSteps;
    multiply_step<true>(acc, shared, ring, consumer);
    if (done == signal && threadIdx.x % 32 == 0) hopper::arrive(shared.start());
    int before = ring.stage;
    ring.next();
    for (int step = done + 1; step < until; ++step) {
      multiply_step<false>(acc, shared, ring, consumer);
      if (step == signal && threadIdx.x % 32 == 0) hopper::arrive(shared.start());
      hopper::wgmma_wait<1>();  // the step before is done
      release<kCluster>(shared, before);
      before = ring.stage;
      ring.next();
    }
    hopper::wgmma_wait<0>();
    hopper::pin(acc);
    release<kCluster>(shared, before);
#pragma unroll
    for (int i = 0; i < kLogits; ++i) sum[i] += acc[i];
  }
}

template <bool kPlain, bool kKeep, int kCluster>
__device__ void consume(const CUtensorMap& kept, const ScanParams& p, const Schedule& schedule, const Shared& shared, int rank,
                        int live, int consumer) {
  const int thread = threadIdx.x % 128, steps = (p.width + kDepth - 1) / kDepth;
  const Keeper keeper{&kept, shared.kept + (consumer * 4 + thread / 32) * kKeptBytes};
  Ring ring;
  int signal = consumer == 0 ? (kLead < steps ? kLead : steps - 1) : -1;  // once, in the first tile
  if (consumer == 1 && static_cast<int>(blockIdx.x) / kCluster < schedule.units()) hopper::wait(shared.start(), 0);
  for (int i = blockIdx.x / kCluster; i < schedule.units(); i += gridDim.x / kCluster) {
    const Unit unit = schedule.unit(i);
    const int tiles = schedule.tiles(unit);
    ThreadRows rows;
    rows.first = (unit.block + rank) * kRows + consumer * kHalf + first_row(thread);
    rows.live = live;
#pragma unroll
    for (int slot = 0; slot < kThreadRows; ++slot) {
      rows.state[slot] = RowState{p.reference[rows.first + row_offset(slot)]};
      const std::int64_t target = rows.is_live(slot) ? p.targets[rows.first + row_offset(slot)] : -1;
      rows.target[slot] = target < p.vocab ? static_cast<int>(target) : -1;  // a shard may see another's targets
    }
    for (int tile = 0; tile < tiles; ++tile) {
      float z[kLogits];
      multiply<kCluster>(z, shared, ring, steps, consumer, signal);
      signal = -1;
      absorb_tile<kPlain, kKeep>(z, rows, thread, unit.group * p.group + tile * kColumns, p, keeper);
    }
    const std::int64_t plane = static_cast<std::int64_t>(schedule.groups()) * p.n;
#pragma unroll
    for (int slot = 0; slot < kThreadRows; ++slot) {
      RowState state = rows.state[slot];
      state.s = quad_sum(state.s);
      state.t = quad_sum(state.t);
      if (thread % 4 != 0 || !rows.is_live(slot)) continue;
      float* out = p.state + static_cast<std::int64_t>(unit.group) * p.n + rows.first + row_offset(slot);
      out[0] = state.m;
      out[plane] = state.s;
      out[2 * plane] = state.t;
    }
  }
  if (kKeep) hopper::wait_until_read();  // shared memory is there until then
}

// Block ------------------------------------------------------------------------------------------------------------------

// What a thread of the kernel does; `memory` has room for kSharedBytes.
template <bool kPlain, bool kKeep, int kCluster>
__device__ __forceinline__ void scan_block(const CUtensorMap& x, const CUtensorMap& w, const CUtensorMap& kept,
                                           const ScanParams& p, void* memory) {
  const std::uint32_t base =
      hopper::computed_once((hopper::shared_address(memory) + kAlignment - 1) / kAlignment * kAlignment);
  const std::uint32_t kept_at = base + kStages * kStageBytes;
  const Shared shared{base, kept_at, kept_at + 4 * kConsumers * kKeptBytes};
  const int rank = kCluster == 1 ? 0 : hopper::cluster_rank(), live = *p.count;
  const Schedule schedule{(live + kRows - 1) / kRows, p.vocab, p.group, kCluster};
  if (threadIdx.x == 0) {
    hopper::prefetch(&x);
    hopper::prefetch(&w);
    if (kKeep) hopper::prefetch(&kept);
    for (int stage = 0; stage < kStages; ++stage) {
      hopper::barrier_init(shared.full(stage), 1);
      hopper::barrier_init(shared.empty(stage), 4 * kConsumers * kCluster);  // the consumers' warps in every block
    }
    hopper::barrier_init(shared.start(), 4);
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
    consume<kPlain, kKeep, kCluster>(kept, p, schedule, shared, rank, live, group - 1);
  }
  __syncwarp();
  if (kCluster > 1) hopper::cluster_sync();  // the other block may still arrive at barriers of this one
}

}  // namespace srppo::sm90
