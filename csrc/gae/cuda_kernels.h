// CUDA kernels of GAE; cuda.cu launches them, and tests/gae/test_gae_cuda.py runs them on the host.
//
// A tile is 512 tokens, four a thread, counted from the row's last valid token. Each thread folds its tokens into one map, the
// block scans the maps, and each thread then steps through its tokens from the state that reaches it. All rows have the same
// tiles whatever their length, so padded and packed rows have the same bits.
//
//   gae_rows      a block walks a row from right to left: the one launch of an ordinary batch
//   row_ends, tile_maps, fold_tiles, tile_outputs, row_moments
//                 a block a tile, for few and very long rows, where one block would walk alone: the tiles' maps are folded
//                 with the same arithmetic, and every tile is scanned again from its state. The bits are those of gae_rows.
//
// Where they are asked for, the advantages' moments come out as well: a tile's in two passes over registers, a row's joined
// from right to left, all rows' merged by the block that finishes last.
#pragma once

#include "../common/scalar.h"
#include "moments.h"

namespace srppo::scalar {

#include "step.h"
#include "scan.h"

constexpr int kEach = 4;  // tokens a thread
constexpr int kWarps = 4, kThreads = kWarps * 32, kTile = kThreads * kEach;
constexpr int64_t kLong = 64 * kTile, kFew = 64;  // rows of at least so many tokens, at most so many rows: spread

struct GaeParams {
  const float* rewards;
  const float* values;
  const bool* mask;
  const float* gamma_rows;
  const float* lam_rows;
  const float* bootstrap;
  const int64_t* starts;
  double gamma, lam;
  int64_t steps;
  float* advantages;
  float* returns;
  MomentsOut moments;  // of the advantages; the partials are [rows, 3]
};

__device__ __forceinline__ GaeMap shuffle_up(GaeMap map, int by) {
  constexpr unsigned all = 0xffffffffu;
  GaeMap got;
  got.a = __shfl_up_sync(all, map.a, by);
  got.b = __shfl_up_sync(all, map.b, by);
  got.c = __shfl_up_sync(all, map.c, by);
  got.v = __shfl_up_sync(all, map.v, by);
  got.sets = __shfl_up_sync(all, static_cast<int>(map.sets), by) != 0;
  return got;
}

template <class Params>
__device__ __forceinline__ double gamma_of(const Params& p, int64_t row) {
  return p.gamma_rows ? static_cast<double>(p.gamma_rows[row]) : p.gamma;
}

template <class Params>
__device__ __forceinline__ GaeCoefficients coefficients(const Params& p, int64_t row) {
  const double gamma = gamma_of(p, row);
  const double lam = p.lam_rows ? static_cast<double>(p.lam_rows[row]) : p.lam;
  return {static_cast<float>(gamma * (1.0 - lam)), static_cast<float>(gamma * lam)};
}

__device__ __forceinline__ GaeState start_state(const GaeParams& p, int64_t row) {
  const float start = p.bootstrap ? p.bootstrap[row] : 0.0f;
  return {start, 0.0f, start};
}

template <class Params>
__device__ __forceinline__ int64_t row_begin(const Params& p, int64_t row) {
  return p.starts ? p.starts[row] : row * p.steps;
}

// How many tokens before the first valid one, from the right end of [begin, end) or from the left; they become 0 in both
// outputs. Called by a whole block.
template <bool from_right>
__device__ int64_t skip_invalid(const bool* mask, int64_t begin, int64_t end, float* one, float* other) {
  __shared__ int nearest;  // the first thread that sees a valid token
  const int thread = threadIdx.x;
  const int64_t length = end - begin;
  for (int64_t done = 0; done < length; done += kThreads) {
    const int64_t ahead = done + thread, at = from_right ? end - 1 - ahead : begin + ahead;
    if (thread == 0) nearest = kThreads;
    const bool valid = ahead < length && mask[at];
    const bool found = __syncthreads_or(valid);
    if (valid) atomicMin(&nearest, thread);
    __syncthreads();
    const int skipped = nearest;
    if (ahead < length && thread < skipped) one[at] = other[at] = 0.0f;
    __syncthreads();  // before `nearest` is set again
    if (found) return done + skipped;
  }
  return length;
}

__device__ inline int64_t find_end(const GaeParams& p, int64_t begin, int64_t row_end) {
  return row_end - skip_invalid<true>(p.mask, begin, row_end, p.advantages, p.returns);
}

// From each thread's map, what lies before it in the tile, and the whole tile, the same in every thread. Called by a whole block.
__device__ inline void scan_block(GaeMap upto, GaeMap* before, GaeMap* all) {
  __shared__ GaeMap totals[kWarps];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll
  for (int by = 1; by < 32; by *= 2) {  // inclusive
    const GaeMap other = shuffle_up(upto, by);
    if (lane >= by) upto = gae_compose(upto, other);
  }
  if (lane == 31) totals[warp] = upto;
  __syncthreads();
  *before = shuffle_up(upto, 1);
  if (lane == 0) *before = gae_identity();
  *all = gae_identity();
  for (int w = 0; w < kWarps; ++w) {
    if (w == warp) *before = gae_compose(*before, *all);
    *all = gae_compose(totals[w], *all);
  }
  __syncthreads();  // before `totals` is written again
}

// The tokens of a thread in the tile that ends at `right`, rightmost first, and the maps that it needs.
struct Tile {
  float reward[kEach], value[kEach];
  bool valid[kEach];
  GaeMap before;  // of what lies between the tile's right end and the thread's tokens
  GaeMap all;     // of the whole tile, the same in every thread
};

template <bool carry>
__device__ Tile scan_tile(const GaeParams& p, int64_t begin, int64_t right, GaeCoefficients k) {
  Tile tile;
  GaeMap upto = gae_identity();
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const int64_t at = right - 1 - (threadIdx.x * kEach + j);
    tile.valid[j] = at >= begin && p.mask[at];
    tile.reward[j] = tile.valid[j] ? p.rewards[at] : 0.0f;
    tile.value[j] = tile.valid[j] ? p.values[at] : 0.0f;
    upto = gae_compose(gae_map<carry>(tile.reward[j], tile.value[j], tile.valid[j], k), upto);
  }
  scan_block(upto, &tile.before, &tile.all);
  return tile;
}

// Outputs of the thread's tokens, from the state on the right of the tile -> the tile's moments, if they are wanted.
template <bool carry>
__device__ Moments store_tile(const GaeParams& p, int64_t begin, int64_t right, GaeCoefficients k, const Tile& tile,
                           GaeState state) {
  GaeState here = gae_apply(tile.before, state);
  double advantages[kEach] = {};
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const int64_t at = right - 1 - (threadIdx.x * kEach + j);
    if (at < begin) break;
    here = gae_step<carry>(here, tile.reward[j], tile.value[j], tile.valid[j], k);
    const float advantage = tile.valid[j] ? gae_advantage(here, tile.value[j]) : 0.0f;
    p.advantages[at] = advantage;
    p.returns[at] = tile.valid[j] ? gae_return(here) : 0.0f;
    advantages[j] = static_cast<double>(advantage);
  }
  return p.moments.moments ? block_moments<kThreads>(advantages, tile.valid) : Moments{};
}

template <bool carry>
__global__ void __launch_bounds__(kThreads) gae_rows(GaeParams p) {
  const int64_t row = blockIdx.x, begin = row_begin(p, row);
  const int64_t end = find_end(p, begin, row_begin(p, row + 1));
  const GaeCoefficients k = coefficients(p, row);
  GaeState state = start_state(p, row);  // on the right of the tile, the same in every thread
  Moments moments;
  for (int64_t right = end; right > begin; right -= kTile) {
    const Tile tile = scan_tile<carry>(p, begin, right, k);
    moments = join(moments, store_tile<carry>(p, begin, right, k, tile, state));
    state = gae_apply(tile.all, state);
  }
  if (p.moments.moments) merge_moments<kThreads>(p.moments, moments);
}

// Scratch of the spread kernels; `tiles` is what the longest row may have.
struct Spread {
  int64_t* ends;     // [rows]
  GaeMap* maps;      // [rows, tiles]
  GaeState* states;  // [rows, tiles], on the right of each tile
  Moments* moments;  // [rows, tiles], or null
  int64_t tiles;
};

__global__ void __launch_bounds__(kThreads) row_ends(GaeParams p, Spread spread) {
  const int64_t row = blockIdx.x, end = find_end(p, row_begin(p, row), row_begin(p, row + 1));
  if (threadIdx.x == 0) spread.ends[row] = end;
}

template <bool carry>
__global__ void __launch_bounds__(kThreads) tile_maps(GaeParams p, Spread spread) {
  const int64_t row = blockIdx.x / spread.tiles, at = blockIdx.x % spread.tiles;
  const int64_t begin = row_begin(p, row), right = spread.ends[row] - at * kTile;
  if (right <= begin) return;
  const Tile tile = scan_tile<carry>(p, begin, right, coefficients(p, row));
  if (threadIdx.x == 0) spread.maps[blockIdx.x] = tile.all;
}

__global__ void fold_tiles(GaeParams p, Spread spread, int64_t rows) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= rows) return;
  const int64_t tiles = (spread.ends[row] - row_begin(p, row) + kTile - 1) / kTile, first = row * spread.tiles;
  GaeState state = start_state(p, row);
#pragma unroll 8  // the maps of eight tiles are on their way while their states are still to come
  for (int64_t i = 0; i < tiles; ++i) {
    spread.states[first + i] = state;
    state = gae_apply(spread.maps[first + i], state);
  }
}

template <bool carry>
__global__ void __launch_bounds__(kThreads) tile_outputs(GaeParams p, Spread spread) {
  const int64_t row = blockIdx.x / spread.tiles, at = blockIdx.x % spread.tiles;
  const int64_t begin = row_begin(p, row), right = spread.ends[row] - at * kTile;
  if (right <= begin) return;
  const GaeCoefficients k = coefficients(p, row);
  const Tile tile = scan_tile<carry>(p, begin, right, k);
  const Moments moments = store_tile<carry>(p, begin, right, k, tile, spread.states[blockIdx.x]);
  if (spread.moments && threadIdx.x == 0) spread.moments[blockIdx.x] = moments;
}

__global__ void __launch_bounds__(kThreads) row_moments(GaeParams p, Spread spread) {
  const int64_t row = blockIdx.x, first = row * spread.tiles;
  const int64_t tiles = (spread.ends[row] - row_begin(p, row) + kTile - 1) / kTile;
  Moments moments;
  for (int64_t i = 0; i < tiles; ++i) moments = join(moments, spread.moments[first + i]);
  merge_moments<kThreads>(p.moments, moments);
}

}  // namespace srppo::scalar
