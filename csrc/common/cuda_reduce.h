// Sums over a block and over a grid, in a fixed order.
//
// Every block leaves float64 partials; the block that finishes last (`last_block`) adds them up with all its threads, thread t
// taking blocks t, t + kThreads, ..., so a result does not depend on which block it was, nor on zeros that further blocks
// leave. Nothing waits for the host, and nothing is cleared between launches: the last block resets the counter.
#pragma once

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#endif

namespace srppo {

// Adds up each of `x` over all threads, in two barriers: pairs in a warp, then the warps in order. All threads get the sums.
template <int kThreads, int kSums>
__device__ void block_sums(double (&x)[kSums]) {
  __shared__ double warps[kThreads / 32][kSums];
#pragma unroll
  for (int by = 16; by > 0; by /= 2) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) x[i] += __shfl_down_sync(0xffffffffu, x[i], by);
  }
  __syncthreads();  // the call before this one has been read
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    if ((threadIdx.x & 31) == 0) warps[threadIdx.x / 32][i] = x[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    x[i] = warps[0][i];
    for (int w = 1; w < kThreads / 32; ++w) x[i] += warps[w][i];
  }
}

template <int kThreads>
__device__ double block_sum(double x) {
  double sums[] = {x};
  block_sums<kThreads>(sums);
  return sums[0];
}

// Whether every other block has left its partials, which thread 0 of this one has stored before. Read them with __ldcg: L1
// may not know of them. `finished` is 0 whenever a kernel starts; launches that share one follow each other on a stream.
__device__ inline bool last_block(unsigned* finished) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(finished, 1u) == gridDim.x - 1;
    if (last) *finished = 0;
    __threadfence();
  }
  __syncthreads();
  return last;
}

}  // namespace srppo
