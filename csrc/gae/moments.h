// Count, mean and squared deviations of masked tokens on a GPU, for whitening: in float64 and a fixed order.
#pragma once

#include "../common/cuda_reduce.h"
#include "join.h"

namespace srppo {

// Of a thread's tokens and those of all others, two passes over registers. Every thread has the result.
template <int kThreads, class Value, class Valid, int kEach>
__device__ Moments block_moments(const Value (&value)[kEach], const Valid (&valid)[kEach]) {
  double sum = 0.0, squares = 0.0;
  int valid_here = 0;
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    sum += valid[j] ? static_cast<double>(value[j]) : 0.0;
    valid_here += valid[j] ? 1 : 0;  // a byte of a mask may be any number but 0
  }
  double sums[] = {static_cast<double>(valid_here), sum};
  block_sums<kThreads>(sums);
  const double count = sums[0], mean = sums[1] / (count > 0.0 ? count : 1.0);
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const double off = valid[j] ? static_cast<double>(value[j]) - mean : 0.0;
    squares += off * off;
  }
  return {count, mean, block_sum<kThreads>(squares)};
}

struct MomentsOut {
  double* partials;  // [blocks, 3]
  unsigned* finished;
  double* moments;  // [3]; null: none are wanted
};

// Leaves this block's moments; the last block merges all of them. Blocks without tokens at the end change nothing.
template <int kThreads>
__device__ void merge_moments(const MomentsOut& out, Moments mine) {
  if (threadIdx.x == 0) {
    out.partials[3 * static_cast<int64_t>(blockIdx.x)] = mine.count;
    out.partials[3 * static_cast<int64_t>(blockIdx.x) + 1] = mine.mean;
    out.partials[3 * static_cast<int64_t>(blockIdx.x) + 2] = mine.squares;
  }
  if (!last_block(out.finished)) return;
  double sums[2] = {}, within = 0.0, between = 0.0;  // of counts, of count times mean
  for (int64_t block = threadIdx.x; block < gridDim.x; block += kThreads) {
    const double c = __ldcg(out.partials + 3 * block);
    sums[0] += c;
    sums[1] += c * __ldcg(out.partials + 3 * block + 1);
    within += __ldcg(out.partials + 3 * block + 2);
  }
  block_sums<kThreads>(sums);
  const double n = sums[0], mean = sums[1] / (n > 0.0 ? n : 1.0);
  for (int64_t block = threadIdx.x; block < gridDim.x; block += kThreads) {
    const double c = __ldcg(out.partials + 3 * block), off = __ldcg(out.partials + 3 * block + 1) - mean;
    between += c > 0.0 ? c * off * off : 0.0;
  }
  within = block_sum<kThreads>(within + between);
  if (threadIdx.x == 0) {
    out.moments[0] = n;
    out.moments[1] = mean;
    out.moments[2] = within;
  }
}

}  // namespace srppo
