// sm_90a in inline PTX: mbarriers, TMA, stmatrix, WGMMA, thread block clusters and register reallocation, a function an
// instruction. Shared memory is addressed by the 32-bit addresses that these instructions take.
#pragma once

#include <cstdint>

#include <cuda.h>

namespace srppo::hopper {

__device__ __forceinline__ std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

// The same number, which the compiler may not compute anew wherever it is used.
__device__ __forceinline__ std::uint32_t computed_once(std::uint32_t number) {
  asm volatile("" : "+r"(number));
  return number;
}

// The same number, with which the compiler computes nothing before this point.
__device__ __forceinline__ float from_here(float number) {
  asm volatile("" : "+f"(number));
  return number;
}

// mbarriers. A phase completes when `count` arrivals and all expected bytes are in; the phases' parities are 0, 1, 0, ...
// A wait for parity P returns once the phase of parity P is the last one that completed; before the first one completes,
// a wait for parity 1 returns at once.

__device__ __forceinline__ void barrier_init(std::uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// Makes initialised barriers visible to the TMA unit and to the other blocks of the cluster, before a barrier of threads.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// One arrival, and `bytes` that TMA loads will bring within this phase.
__device__ __forceinline__ void arrive_expecting(std::uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// One arrival at the same barrier of block `rank` of the cluster. Without a scope it is a release within the block, which is
// all that a slot of TMA and WGMMA needs: neither writes through this thread. `.release.cluster` puts a MEMBAR in front of
// every arrival, which more than doubled the time of a whole scan (H100).
__device__ __forceinline__ void arrive_at(std::uint32_t barrier, int rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}\n" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

__device__ __forceinline__ void arrive(std::uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void wait(std::uint32_t barrier, std::uint32_t parity) {
  std::uint32_t done;
  do {  // each try sleeps in hardware for a while
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}\n"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (done == 0);
}

// Clusters.

__device__ __forceinline__ int cluster_rank() {
  std::uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// TMA. `x` counts elements of a row, `y` rows; what lies outside of the matrix arrives as zeros and counts as bytes.

__device__ __forceinline__ void prefetch(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

__device__ __forceinline__ void load_box(std::uint32_t to, const CUtensorMap* map, int x, int y, std::uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(map), "r"(x), "r"(y), "r"(barrier)
      : "memory");
}

// The same box to the same place, and its bytes to the same barrier, in every block whose bit is set in `blocks`.
__device__ __forceinline__ void load_box_to(std::uint32_t to, const CUtensorMap* map, int x, int y, std::uint32_t barrier,
                                            std::uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(map), "r"(x), "r"(y), "r"(barrier), "h"(blocks)
      : "memory");
}

// Four 8 x 8 matrices of 16-bit elements to shared memory. Lane l brings the address of row l % 8 of matrix l / 8, 16 bytes,
// and of each matrix columns 2 (l % 4) and the next of row l / 4.
__device__ __forceinline__ void store_matrices(std::uint32_t row, std::uint32_t m0, std::uint32_t m1, std::uint32_t m2,
                                               std::uint32_t m3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(m0), "r"(m1), "r"(m2), "r"(m3)
               : "memory");
}

// What this thread wrote to shared memory, TMA may read after the next barrier.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A box from shared memory, by the threads that say so; what lies outside of the matrix is not written. Part of the thread's
// next group of stores.
__device__ __forceinline__ void store_box_if(bool stores, const CUtensorMap* map, int x, int y, std::uint32_t from) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %4, 0;\n"
      "@p cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];\n"
      "}\n" ::"l"(map),
      "r"(x), "r"(y), "r"(from), "r"(static_cast<int>(stores))
      : "memory");
}

__device__ __forceinline__ void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until this thread's stores have read shared memory, or are there.
__device__ __forceinline__ void wait_until_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
__device__ __forceinline__ void wait_until_stored() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// Registers of a thread, for the whole warp group that executes it.

template <int kCount>
__device__ __forceinline__ void shrink_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

template <int kCount>
__device__ __forceinline__ void grow_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// WGMMA, by a warp group of 128 threads.

// Orders what the threads did to their accumulators before the WGMMAs that follow.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most `kPending` committed groups are not complete.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// A point across which the compiler moves no accumulator: it does not know that WGMMA writes them until the wait.
template <int kCount>
__device__ __forceinline__ void pin(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#define SRPPO_4(mode, d, i) mode(d[i]), mode(d[i + 1]), mode(d[i + 2]), mode(d[i + 3])
#define SRPPO_16(mode, d, i) \
  SRPPO_4(mode, d, i), SRPPO_4(mode, d, i + 4), SRPPO_4(mode, d, i + 8), SRPPO_4(mode, d, i + 12)
#define SRPPO_96(mode, d) \
  SRPPO_16(mode, d, 0), SRPPO_16(mode, d, 16), SRPPO_16(mode, d, 32), SRPPO_16(mode, d, 48), SRPPO_16(mode, d, 64), \
      SRPPO_16(mode, d, 80)
#define SRPPO_M64N192K16(accumulate) \
  "{\n" \
  ".reg .pred p;\n" \
  ".reg .b64 a, b;\n" \
  "setp.ne.b32 p, " accumulate ", 0;\n" \
  "mov.b64 a, {%96, %98};\n" \
  "mov.b64 b, {%97, %98};\n" \
  "wgmma.mma_async.sync.aligned.m64n192k16.f32.bf16.bf16 " \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95}, " \
  "a, b, p, 1, 1, 0, 0;\n" \
  "}\n"
#define SRPPO_OUT(x) "=f"(x)
#define SRPPO_INOUT(x) "+f"(x)

// d (+)= A B^T for A [64, 16] and B [192, 16] in bf16, both K-major in shared memory; `a` and `b` are the lower halves of their
// descriptors, kHigh the upper. The first of a sum overwrites d, and the compiler knows that it does: with a flag for both it
// keeps d alive from the sum before.
template <bool kFirst, std::uint32_t kHigh>
__device__ __forceinline__ void wgmma_m64n192k16(float (&d)[96], std::uint32_t a, std::uint32_t b) {
  if constexpr (kFirst) asm volatile(SRPPO_M64N192K16("0") : SRPPO_96(SRPPO_OUT, d) : "r"(a), "r"(b), "n"(kHigh));
  else asm volatile(SRPPO_M64N192K16("1") : SRPPO_96(SRPPO_INOUT, d) : "r"(a), "r"(b), "n"(kHigh));
}

#undef SRPPO_4
#undef SRPPO_16
#undef SRPPO_96
#undef SRPPO_M64N192K16
#undef SRPPO_OUT
#undef SRPPO_INOUT

}  // namespace srppo::hopper
