// GEMM 1 of srppo_kernels/linear_logprob on sm_90a with the softmax's state in its epilogue: what triton_scan.py's scan
// computes, by TMA and WGMMA. Compiled, and run on the host under an emulator (tests/linear_logprob/test_sm90_host.py); not run
// on a device, as none was at hand, and so only where backend="sm90" asks for it. README.md in this folder has the budgets, ptxas's figures and
// what is left for a device to show.
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
// holds in registers, 128 a thread, and never puts in memory. A step is 8 WGMMAs m64n128k16. Where absorbing a tile takes less
// time than its K loop (README.md: from D of about 256 on), the tensor cores see one unbroken row of WGMMAs.
//
// A slot has two mbarriers. `full` completes when the producer has arrived and 32 KiB have: the owner's WGMMAs may read.
// `empty` completes when every warp that read the slot has arrived. A warp arrives once the *next* step's WGMMAs are queued
// and those of this one are done, so that the tensor cores never run dry for a release.
//
// A consumer that has queued its tile's last WGMMA hands over to the other, at the mbarrier `turn`. Without that, one that
// comes early would wait for a slot's use after next and take the use before it for that: a parity tells no lap from the one
// before the last.
//
// Clusters of two blocks work on the same rows and on neighbouring vocabulary groups. Each loads half of the X tile and
// multicasts it into both: 24 KiB from L2 a step instead of 32. A step takes at least 512 cycles, so an SM asks L2 for 48
// bytes a cycle instead of 64. Then `empty` counts the warps of both blocks, and a block leaves when both have finished.
//
// Bits. A (row block, vocabulary group) is one consumer's from its first tile to its last; a row's logits, the order in
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

struct Shared {
  std::uint32_t stages, barriers;

  __device__ std::uint32_t x(int stage) const { return stages + stage * kStageBytes; }
  __device__ std::uint32_t w(int stage) const { return x(stage) + kOperandBytes; }
  __device__ std::uint32_t full(int stage) const { return barriers + stage * 8; }
  __device__ std::uint32_t empty(int stage) const { return barriers + (kStages + stage) * 8; }
  __device__ std::uint32_t turn(int consumer) const { return barriers + (2 * kStages + consumer) * 8; }
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

// acc = X tile times W tile^T over `steps` stages from `ring` on; with the last step queued, the turn is the `other`'s.
template <int kCluster>
__device__ __forceinline__ void multiply(float (&acc)[2][64], const Shared& shared, Ring& ring, int steps, bool hand_over,
                                         int other) {
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
  if (hand_over && threadIdx.x % 32 == 0) hopper::arrive(shared.turn(other));
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
  bool my_turn = consumer == 0;
  std::uint32_t turn_phase = 0;
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
      const Turn turn{consumer, tile};
      const int place = Schedule::place(turn, tiles_of_1);
      ring.skip((place - at) * steps);
      at = place + 1;
      if (!my_turn) {  // whoever has handed over waits to get the turn back
        hopper::wait(shared.turn(consumer), turn_phase);
        turn_phase ^= 1;
      }
      my_turn = !Schedule::hands_over(turn, tiles_of_1);
      multiply<kCluster>(acc, shared, ring, steps, !my_turn, 1 - consumer);
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

// Block ------------------------------------------------------------------------------------------------------------------

// What a thread of the kernel does; `memory` has room for kSharedBytes.
template <bool kPlain, bool kKeep, int kCluster>
__device__ __forceinline__ void scan_block(const CUtensorMap& x, const CUtensorMap& w, const ScanParams& p, void* memory) {
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
    for (int consumer = 0; consumer < kConsumers; ++consumer) hopper::barrier_init(shared.turn(consumer), 4);
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

}  // namespace srppo::sm90
