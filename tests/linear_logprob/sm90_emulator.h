// Runs csrc/linear_logprob/sm90_kernel.h, as it is, on the host: srppo::hopper in plain C++, a coroutine a CUDA thread, and a
// scheduler that takes warps and TMA loads in random order.
//
// It is as late as the hardware may be. A TMA load lands whenever the scheduler says, in any order. A WGMMA reads shared
// memory and writes its accumulators only when its group is waited for, so that a slot that is released too early has been
// overwritten by then, and a result that is read too early is not there. Shared memory is addressed in bytes, swizzled by TMA
// on the way in and by WGMMA's descriptor on the way out. If nothing can run and no load is in flight, that is a deadlock.
//
// What it takes from the PTX ISA on trust: the mbarrier's phases, the descriptor's fields, the accumulator's layout. The last
// two, test_sm90_tables.py compares with Triton's.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <vector>

#define __device__
#define __forceinline__ inline

struct Index {
  int x;
};
Index threadIdx, blockIdx, gridDim;  // not static: they change under a thread whenever it waits

struct CUtensorMap {
  std::uint16_t* data;
  int rows, columns, row_stride, box_rows, box_columns;
};

struct __nv_bfloat16 {
  std::uint16_t bits;
};
struct __nv_bfloat162 {
  __nv_bfloat16 low, high;
};
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return {static_cast<std::uint16_t>(x != x ? 0x7fc0u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)}; }
inline float widen(std::uint16_t half) {
  const std::uint32_t bits = std::uint32_t{half} << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
template <class T>
T __ldg(const T* from) {
  return *from;
}

namespace emulator {

constexpr int kBlockThreads = 384, kMemory = 227 * 1024, kStack = 64 * 1024;

struct Barrier {
  int count = 0, pending = 0, bytes = 0;
  long completed = 0;
  void settle() {
    if (pending == 0 && bytes == 0) {
      ++completed;
      pending = count;
    }
  }
};

// Where `size` threads wait for each other, and what they bring.
struct Meeting {
  int size = 0, arrived = 0;
  long generation = 0;
  std::uint32_t values[2][32] = {};  // their bits
};

struct Block {
  std::vector<std::uint8_t> memory = std::vector<std::uint8_t>(kMemory, 0xff);  // NaN until something is loaded
  std::vector<Barrier> barriers = std::vector<Barrier>(kMemory / 8);
  std::vector<Meeting> warps = std::vector<Meeting>(kBlockThreads / 32, Meeting{32});
  Meeting all{kBlockThreads};
  int rank = 0;
};

struct Wgmma {
  float* d;
  std::uint64_t a, b;
  bool accumulate;
  int group;
};

struct Store {  // of a box, from shared memory
  const CUtensorMap* map;
  int x, y;
  std::uint32_t from;
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  Block* block = nullptr;
  int index = 0, groups = 0;  // WGMMA groups committed
  std::deque<Wgmma> pending;
  std::vector<Store> stores, uncommitted;
  const Barrier* barrier = nullptr;  // waits for a phase of this parity
  unsigned parity = 0;
  const Meeting* meeting = nullptr;  // waits for this generation to end
  long generation = 0;
  bool finished = false;

  bool can_run() const {
    if (finished) return false;
    if (barrier) return (barrier->completed & 1) != parity;  // the phase under way has the other parity
    return !meeting || meeting->generation > generation;
  }
};

struct Load {
  std::uint32_t to, barrier;
  const CUtensorMap* map;
  int x, y;
  unsigned blocks;
};

std::vector<std::unique_ptr<Block>> blocks;  // of the cluster that runs
std::vector<std::unique_ptr<Thread>> threads;
std::vector<Load> loads;  // in flight
Meeting cluster;
Thread* current;
ucontext_t scheduler;
int faults;

void pause() { swapcontext(&current->context, &scheduler); }

void meet(Meeting& meeting) {
  current->generation = meeting.generation;
  if (++meeting.arrived == meeting.size) {
    meeting.arrived = 0;
    ++meeting.generation;
    return;
  }
  current->meeting = &meeting;
  pause();
  current->meeting = nullptr;
}

template <class T>
T shuffle(T value, int lane) {
  Meeting& warp = current->block->warps[current->index / 32];
  static_assert(sizeof value == 4);
  std::uint32_t(&values)[32] = warp.values[warp.generation & 1];
  std::memcpy(&values[current->index % 32], &value, 4);
  meet(warp);
  std::memcpy(&value, &values[lane], 4);
  return value;
}

unsigned ballot(bool value) {
  Meeting& warp = current->block->warps[current->index / 32];
  std::uint32_t(&values)[32] = warp.values[warp.generation & 1];
  values[current->index % 32] = value;
  meet(warp);
  unsigned bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= values[lane] << lane;
  return bits;
}

// Byte of an element of a box in shared memory: rows of 128 bytes, or of 64, swizzled.
std::uint32_t swizzled(const CUtensorMap& map, std::uint32_t base, int row, int column) {
  const std::uint32_t at = base + (row * map.box_columns + column) * 2;
  return at ^ (at >> 7 & (map.box_columns == 64 ? 7 : 3)) << 4;
}

// As late as it may be, a store reads shared memory when it is waited for.
void read_stores() {
  faults += !current->uncommitted.empty();
  for (const Store& store : current->stores)
    for (int r = 0; r < store.map->box_rows; ++r)
      for (int c = 0; c < store.map->box_columns; ++c) {
        if (store.y + r >= store.map->rows || store.x + c >= store.map->columns) continue;
        std::memcpy(&store.map->data[std::int64_t{store.y + r} * store.map->row_stride + store.x + c],
                    &current->block->memory.at(swizzled(*store.map, store.from, r, c)), 2);
      }
  current->stores.clear();
}

void land(const Load& load) {
  for (auto& block : blocks) {
    if (!(load.blocks >> block->rank & 1)) continue;
    for (int r = 0; r < load.map->box_rows; ++r)
      for (int c = 0; c < load.map->box_columns; ++c) {
        const bool inside = load.y + r < load.map->rows && load.x + c < load.map->columns;
        const std::uint16_t value =
            inside ? load.map->data[std::int64_t{load.y + r} * load.map->row_stride + load.x + c] : std::uint16_t{0};
        std::memcpy(&block->memory[swizzled(*load.map, load.to, r, c)], &value, 2);
      }
    Barrier& barrier = block->barriers[load.barrier / 8];
    barrier.bytes -= load.map->box_rows * load.map->box_columns * 2;
    barrier.settle();
  }
}

// Element (row, k) of a K-major operand with a 128-byte swizzle.
float element(std::uint64_t descriptor, int row, int k) {
  const std::uint32_t start = (descriptor & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
  faults += descriptor >> 62 != 1;
  std::uint32_t at = start + row / 8 * stride + row % 8 * 128 + k * 2;
  at ^= (at >> 7 & 7) << 4;
  std::uint16_t value;
  std::memcpy(&value, &current->block->memory.at(at), 2);
  return widen(value);
}

void execute(const Wgmma& op) {
  const int thread = current->index % 128, row = thread / 32 * 16 + thread % 32 / 4, column = thread % 4 * 2;
  float a[2][16], b[16];
  for (int i = 0; i < 2; ++i)
    for (int k = 0; k < 16; ++k) a[i][k] = element(op.a, row + 8 * i, k);
  for (int j = 0; j < 48; ++j) {
    for (int k = 0; k < 16; ++k) b[k] = element(op.b, j / 2 * 8 + column + j % 2, k);
    for (int i = 0; i < 2; ++i) {
      float& d = op.d[j / 2 * 4 + i * 2 + j % 2];
      float sum = op.accumulate ? d : 0.0f;
      for (int k = 0; k < 16; ++k) sum += a[i][k] * b[k];
      d = sum;
    }
  }
}

}  // namespace emulator

template <class T>
T __shfl_xor_sync(unsigned, T value, int by) {
  return emulator::shuffle(value, emulator::current->index % 32 ^ by);
}
inline int __shfl_sync(unsigned, int value, int lane) { return emulator::shuffle(value, lane); }
inline unsigned __ballot_sync(unsigned, bool value) { return emulator::ballot(value); }
inline void __syncwarp() { emulator::meet(emulator::current->block->warps[emulator::current->index / 32]); }
inline void __syncthreads() { emulator::meet(emulator::current->block->all); }

namespace srppo::hopper {

using emulator::current;

inline emulator::Barrier& at(std::uint32_t barrier, int rank) { return emulator::blocks[rank]->barriers[barrier / 8]; }
inline std::uint32_t computed_once(std::uint32_t number) { return number; }
inline float from_here(float number) { return number; }
inline std::uint32_t shared_address(const void*) { return 16; }  // aligned to no more than it must be
inline void barrier_init(std::uint32_t barrier, int count) { at(barrier, current->block->rank) = {count, count}; }
inline void barrier_init_fence() {}
inline void arrive_at(std::uint32_t barrier, int rank) {
  emulator::Barrier& b = at(barrier, rank);
  emulator::faults += --b.pending < 0;
  b.settle();
}
inline void arrive(std::uint32_t barrier) { arrive_at(barrier, current->block->rank); }
inline void arrive_expecting(std::uint32_t barrier, int bytes) {
  at(barrier, current->block->rank).bytes += bytes;
  arrive(barrier);
}
inline void wait(std::uint32_t barrier, std::uint32_t parity) {
  current->barrier = &at(barrier, current->block->rank);
  current->parity = parity;
  emulator::pause();
  current->barrier = nullptr;
}
inline void store_matrices(std::uint32_t row, std::uint32_t m0, std::uint32_t m1, std::uint32_t m2, std::uint32_t m3) {
  const std::uint32_t words[4] = {m0, m1, m2, m3};
  const int lane = current->index % 32;
  for (int i = 0; i < 4; ++i)
    std::memcpy(&current->block->memory.at(emulator::shuffle(row, i * 8 + lane / 4) + lane % 4 * 4), &words[i], 4);
}
inline void fence_async() {}
inline void store_box_if(bool stores, const CUtensorMap* map, int x, int y, std::uint32_t from) {
  if (stores) current->uncommitted.push_back({map, x, y, from});
}
inline void commit_stores() {
  current->stores.insert(current->stores.end(), current->uncommitted.begin(), current->uncommitted.end());
  current->uncommitted.clear();
}
inline void wait_until_read() { emulator::read_stores(); }
inline void wait_until_stored() { emulator::read_stores(); }
inline int cluster_rank() { return current->block->rank; }
inline void cluster_sync() { emulator::meet(emulator::cluster); }
inline void prefetch(const CUtensorMap*) {}
inline void load_box_to(std::uint32_t to, const CUtensorMap* map, int x, int y, std::uint32_t barrier, std::uint16_t blocks) {
  emulator::loads.push_back({to, barrier, map, x, y, blocks});
}
inline void load_box(std::uint32_t to, const CUtensorMap* map, int x, int y, std::uint32_t barrier) {
  load_box_to(to, map, x, y, barrier, static_cast<std::uint16_t>(1 << current->block->rank));
}
template <int kCount>
void shrink_registers() {}
template <int kCount>
void grow_registers() {}
inline void wgmma_fence() {}
inline void wgmma_commit() { ++current->groups; }
template <bool kFirst, std::uint32_t kHigh>
void wgmma_m64n192k16(float (&d)[96], std::uint32_t a, std::uint32_t b) {
  current->pending.push_back({d, std::uint64_t{kHigh} << 32 | a, std::uint64_t{kHigh} << 32 | b, !kFirst, current->groups});
}
template <int kPending>
void wgmma_wait() {
  for (; !current->pending.empty() && current->pending.front().group < current->groups - kPending; current->pending.pop_front())
    emulator::execute(current->pending.front());
}
template <int kCount>
void pin(float (&)[kCount]) {}

}  // namespace srppo::hopper

namespace emulator {

void (*body)();

void start() {
  body();
  current->finished = true;
  pause();
}

// One launch of `grid` blocks in clusters of `size`, one cluster after the other. 0, 1 for a deadlock, 2 for a broken protocol.
int launch(void (*kernel)(), int grid, int size, unsigned seed) {
  std::mt19937 random(seed);
  body = kernel;
  gridDim = {grid};
  faults = 0;
  for (int first = 0; first < grid; first += size) {
    blocks.clear();
    threads.clear();
    cluster = Meeting{kBlockThreads * size};
    for (int rank = 0; rank < size; ++rank) {
      blocks.push_back(std::make_unique<Block>());
      blocks.back()->rank = rank;
      for (int i = 0; i < kBlockThreads; ++i) {
        auto thread = std::make_unique<Thread>();
        thread->block = blocks.back().get();
        thread->index = i;
        getcontext(&thread->context);
        thread->context.uc_stack.ss_sp = thread->stack.get();
        thread->context.uc_stack.ss_size = kStack;
        makecontext(&thread->context, &start, 0);
        threads.push_back(std::move(thread));
      }
    }
    const int warps = static_cast<int>(threads.size()) / 32;
    for (;;) {
      if (!loads.empty() && random() % 8 == 0) {
        std::swap(loads[random() % loads.size()], loads.back());
        land(loads.back());
        loads.pop_back();
      }
      bool ran = false;
      const int from = static_cast<int>(random() % warps);
      for (int w = 0; w < warps && !ran; ++w)
        for (int lane = 0; lane < 32; ++lane) {
          Thread* thread = threads[(from + w) % warps * 32 + lane].get();
          if (!thread->can_run()) continue;
          ran = true;
          current = thread;
          threadIdx = {thread->index};
          blockIdx = {first + thread->block->rank};
          swapcontext(&scheduler, &thread->context);
        }
      if (ran) continue;
      if (loads.empty()) break;
      std::swap(loads[random() % loads.size()], loads.back());
      land(loads.back());
      loads.pop_back();
    }
    for (auto& thread : threads) {
      if (!thread->finished) return 1;
      faults += !thread->stores.empty() || !thread->uncommitted.empty();
    }
    for (auto& block : blocks)
      for (auto& barrier : block->barriers) faults += barrier.pending != barrier.count || barrier.bytes != 0;
  }
  return faults ? 2 : 0;
}

}  // namespace emulator
