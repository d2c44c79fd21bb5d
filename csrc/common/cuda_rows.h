// Tokens of [rows, steps] in blocks that padding does not move: block b of the grid takes part b / rows of row b % rows,
// counted from the row's first valid token on. Padding on either side of the rows then moves no token to another thread, and
// only appends blocks, whose partials are zeros at the end of the order in which cuda_reduce.h adds.
#pragma once

#include "cuda_reduce.h"

namespace srppo {

struct Rows {
  int64_t rows, steps;  // an empty batch is one row of no steps
};

// The first valid token of a row, or 0. Called by a whole block, once.
template <int kThreads>
__device__ int64_t first_valid(const bool* row, int64_t steps) {
  if (steps > 0 && row[0]) return 0;  // as where rows are padded on the right: no barrier
  constexpr int kAhead = 8;  // loads that are on their way together
  __shared__ int nearest;
  for (int64_t start = 0; start < steps; start += kAhead * kThreads) {
    int mine = kAhead * kThreads;
#pragma unroll
    for (int j = kAhead - 1; j >= 0; --j) {
      const int64_t at = start + j * kThreads + threadIdx.x;
      if (at < steps && row[at]) mine = j * kThreads + static_cast<int>(threadIdx.x);
    }
    if (threadIdx.x == 0) nearest = kAhead * kThreads;
    if (!__syncthreads_or(mine < kAhead * kThreads)) continue;
    atomicMin(&nearest, mine);
    __syncthreads();
    return start + nearest;
  }
  return 0;
}

// Valid tokens of a row. Called by a whole block.
template <int kThreads>
__device__ int64_t valid_tokens(const bool* row, int64_t steps) {
  double count = 0.0;
  for (int64_t at = threadIdx.x; at < steps; at += kThreads) count += row[at] ? 1.0 : 0.0;
  return static_cast<int64_t>(block_sum<kThreads>(count));
}

// A thread's tokens; made by a whole block.
template <int kThreads, int kEach>
struct RowTokens {
  const int64_t row, begin, steps, part, first;

  __device__ RowTokens(const Rows& shape, const bool* mask)
      : row(blockIdx.x % static_cast<unsigned>(shape.rows)),
        begin(row * shape.steps),
        steps(shape.steps),
        part(blockIdx.x / static_cast<unsigned>(shape.rows)),
        first(first_valid<kThreads>(mask + begin, shape.steps)) {}

  // Where the j-th token is, or -1 beyond the row. The tokens before the first valid one come last.
  __device__ int64_t at(int j) const {
    const int64_t place = part * kThreads * kEach + j * kThreads + threadIdx.x;
    if (place >= steps) return -1;
    return begin + (first + place < steps ? first + place : first + place - steps);
  }
};

// Blocks of a launch over `shape`; one at least, to write the zeros of an empty batch.
inline unsigned blocks_of(const Rows& shape, int tokens) {
  return shape.steps == 0 ? 1u : static_cast<unsigned>(shape.rows * ((shape.steps + tokens - 1) / tokens));
}

}  // namespace srppo
