// Runs CUDA kernels that need no more than barriers, shuffles and atomics on the host, as they are: a coroutine a thread, and a
// scheduler that takes warps and their threads in random order. Blocks run one after the other, in random order.
//
// A thread waits at __syncthreads for its block and at a shuffle for its warp. If nobody can run, some thread has not come to a
// barrier that others wait at: that is a deadlock on a device, and aborts here.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)

struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx, blockDim, gridDim;  // they change under a thread whenever it waits

namespace emulator {

constexpr std::size_t kStack = 64 * 1024;

// Where `size` threads wait for each other. What they bring is kept for the generation before too: a thread may leave for the
// next meeting before its neighbour has read.
struct Meeting {
  int size = 0, arrived = 0;
  long generation = 0;
  std::uint64_t values[2][32] = {};
  bool any[2] = {};
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Meeting* waits_for = nullptr;
  long until = 0;
  bool done = false;
};

inline ucontext_t scheduler;
inline std::vector<Thread> threads;
inline std::vector<Meeting> warps;
inline Meeting block;
inline std::function<void()> body;

inline Meeting& warp() { return warps[threadIdx.x / 32]; }

inline void wait(Meeting& meeting) {
  const unsigned self = threadIdx.x;
  const long next = meeting.generation + 1;
  if (++meeting.arrived == meeting.size) {
    meeting.arrived = 0;
    meeting.generation = next;
    meeting.any[(next + 1) & 1] = false;
  }
  threads[self].waits_for = &meeting;
  threads[self].until = next;
  swapcontext(&threads[self].context, &scheduler);  // others run first even where this one was the last to come
}

inline void enter() {
  body();
  threads[threadIdx.x].done = true;
}

inline void run_block(int size, std::mt19937& random) {
  threads.clear();
  threads.resize(static_cast<std::size_t>(size));
  warps.assign(static_cast<std::size_t>(size / 32), Meeting{});
  for (Meeting& each : warps) each.size = 32;
  block = Meeting{};
  block.size = size;
  for (Thread& thread : threads) {
    thread.stack = std::make_unique<char[]>(kStack);
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = &scheduler;
    makecontext(&thread.context, enter, 0);
  }
  // One warp at a time, and the same one again half of the time: warps drift as far apart as barriers let them.
  std::vector<int> ready;
  const int warp_count = size / 32;
  int running = 0, unfinished = size;
  while (unfinished > 0) {
    if (random() & 1) running = static_cast<int>(random() % static_cast<unsigned>(warp_count));
    ready.clear();
    for (int tried = 0; tried < warp_count && ready.empty(); ++tried) {
      if (tried) running = (running + 1) % warp_count;
      for (int i = running * 32; i < running * 32 + 32; ++i) {
        const Thread& thread = threads[static_cast<std::size_t>(i)];
        if (!thread.done && (!thread.waits_for || thread.waits_for->generation >= thread.until)) ready.push_back(i);
      }
    }
    if (ready.empty()) {
      std::fprintf(stderr, "deadlock: threads of a block wait for one that does not come\n");
      std::abort();
    }
    std::shuffle(ready.begin(), ready.end(), random);
    for (const int i : ready) {
      Thread& thread = threads[static_cast<std::size_t>(i)];
      threadIdx.x = static_cast<unsigned>(i);
      thread.waits_for = nullptr;
      swapcontext(&scheduler, &thread.context);
      unfinished -= thread.done;
    }
  }
}

// kernel<<<grid, size>>>(...) where `call` calls the kernel.
inline void launch(std::int64_t grid, int size, unsigned seed, const std::function<void()>& call) {
  std::mt19937 random(seed);
  std::vector<unsigned> order(static_cast<std::size_t>(grid));
  for (std::size_t i = 0; i < order.size(); ++i) order[i] = static_cast<unsigned>(i);
  std::shuffle(order.begin(), order.end(), random);
  body = call;
  gridDim.x = static_cast<unsigned>(grid);
  blockDim.x = static_cast<unsigned>(size);
  for (const unsigned at : order) {
    blockIdx.x = at;
    run_block(size, random);
  }
}

template <class T>
T exchange(T mine, int from) {
  Meeting& here = warp();
  const int slot = static_cast<int>((here.generation + 1) & 1), lane = static_cast<int>(threadIdx.x % 32);
  std::memcpy(&here.values[slot][lane], &mine, sizeof(T));
  wait(here);
  T other = mine;
  if (from >= 0 && from < 32) std::memcpy(&other, &here.values[slot][from], sizeof(T));
  return other;
}

}  // namespace emulator

inline void __syncthreads() { emulator::wait(emulator::block); }
inline bool __syncthreads_or(bool mine) {
  emulator::Meeting& here = emulator::block;
  const int slot = static_cast<int>((here.generation + 1) & 1);
  here.any[slot] |= mine;
  emulator::wait(here);
  return here.any[slot];
}
template <class T>
T __shfl_up_sync(unsigned, T mine, int by) {
  return emulator::exchange(mine, static_cast<int>(threadIdx.x % 32) - by);
}
template <class T>
T __shfl_down_sync(unsigned, T mine, int by) {
  return emulator::exchange(mine, static_cast<int>(threadIdx.x % 32) + by);
}
inline void __threadfence() {}
template <class T>
T __ldcg(const T* from) {
  return *from;
}
template <class T>
T atomicAdd(T* to, T x) {
  const T before = *to;
  *to += x;
  return before;
}
template <class T>
T atomicMin(T* to, T x) {
  const T before = *to;
  *to = std::min(before, x);
  return before;
}
template <class T>
T atomicMax(T* to, T x) {
  const T before = *to;
  *to = std::max(before, x);
  return before;
}
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
using std::isnan;
