// CUDA kernels of GAE; cuda.cu launches them, and tests/gae/test_gae_cuda.py runs them on the host.
//
// A tile is 1024 tokens, eight a thread, counted from the row's last valid token. Each thread folds its tokens into one map, a
// warp scans its threads' maps, the state on the tile's right goes through the warps' totals in turn, and each thread then
// steps through its tokens from the state that reaches it. All rows have the same tiles whatever their length, so padded and
// packed rows have the same bits.
//
//   gae_rows      a block walks a row from right to left, a tile's loads on their way while the one before it is scanned: the
//                 one launch of an ordinary batch
//   row_ends, tile_maps, fold_tiles, tile_outputs, row_moments
//                 a block a tile, for few and very long rows, where one block would walk alone: the warps' totals are folded
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

constexpr int kEach = 8;  // tokens a thread
constexpr int kWarps = 4, kThreads = kWarps * 32, kTile = kThreads * kEach;
constexpr int64_t kLong = 32768, kFew = 64;  // rows of at least so many tokens, at most so many rows: spread

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
  got.s = __shfl_up_sync(all, map.s, by);
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
  __shared__ int nearest;
  const int64_t length = end - begin;
  const auto ahead = [](int j) { return j * kThreads + static_cast<int>(threadIdx.x); };
  const auto place = [&](int64_t skipped) { return from_right ? end - 1 - skipped : begin + skipped; };
  for (int64_t done = 0; done < length; done += kTile) {
    int mine = kTile;
#pragma unroll
    for (int j = kEach - 1; j >= 0; --j)
      if (done + ahead(j) < length && mask[place(done + ahead(j))]) mine = ahead(j);
    if (threadIdx.x == 0) nearest = kTile;
    const bool found = __syncthreads_or(mine < kTile);
    if (found) {
      atomicMin(&nearest, mine);
      __syncthreads();
    }
    const int skipped = found ? nearest : kTile;
#pragma unroll
    for (int j = 0; j < kEach; ++j)
      if (ahead(j) < skipped && done + ahead(j) < length) one[place(done + ahead(j))] = other[place(done + ahead(j))] = 0.0f;
    if (found) return done + skipped;
  }
  return length;
}

__device__ inline int64_t find_end(const GaeParams& p, int64_t begin, int64_t row_end) {
  return row_end - skip_invalid<true>(p.mask, begin, row_end, p.advantages, p.returns);
}

// A thread scans kEach neighbours, from place `along` of the tile on. Memory wants the lanes of a warp side by side: a thread
// reads and writes every 32nd token, from place `across` on. Both are the same tokens of a warp, which trades them through
// shared memory: a thread's own lie together there, on 16 bytes, four words apart from the next one's so that banks differ.
__device__ __forceinline__ int along() { return static_cast<int>(threadIdx.x) * kEach; }
__device__ __forceinline__ int across() { return static_cast<int>(threadIdx.x / 32 * (32 * kEach) + threadIdx.x % 32); }

template <bool to_along>
__device__ __forceinline__ void trade(float (&x)[kEach]) {
  constexpr int kOwn = kEach + 4, kEvery = 32 / kEach * kOwn;
  alignas(16) __shared__ float tokens[kThreads * kOwn];
  float* const own = tokens + threadIdx.x * kOwn;
  float* const every = tokens + across() / kEach * kOwn + across() % kEach;
  __syncwarp();  // the trade before this one is over
#pragma unroll
  for (int j = 0; j < kEach; ++j) (to_along ? every[j * kEvery] : own[j]) = x[j];
  __syncwarp();
#pragma unroll
  for (int j = 0; j < kEach; ++j) x[j] = to_along ? own[j] : every[j * kEvery];
}

// Of a tile that begins at `first` and walks in steps of 1 or -1, `count` tokens of it in the row: every 32nd float.
template <int step>
__device__ __forceinline__ void fetch(const float* first, int count, float (&x)[kEach]) {
  first += step * across();
  count -= across();
#pragma unroll
  for (int j = 0; j < kEach; ++j) x[j] = j * 32 < count ? first[step * j * 32] : 0.0f;
}

// A thread's own mask, a byte each that is still on its way: a bool would be waited for here.
template <int step>
__device__ __forceinline__ void fetch(const bool* first, int count, unsigned char (&x)[kEach]) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(first) + step * along();
  count -= along();
#pragma unroll
  for (int j = 0; j < kEach; ++j) x[j] = j < count ? bytes[step * j] : 0;
}

// Takes a thread's own tokens.
template <int step>
__device__ __forceinline__ void store(float* first, int count, float (&x)[kEach]) {
  trade<false>(x);
  first += step * across();
  count -= across();
#pragma unroll
  for (int j = 0; j < kEach; ++j)
    if (j * 32 < count) first[step * j * 32] = x[j];
}

__device__ __forceinline__ int tokens_in(int64_t begin, int64_t end) {
  return end - begin < kTile ? static_cast<int>(end - begin) : kTile;
}

// From each thread's map that of all lanes up to it.
__device__ __forceinline__ GaeMap scan_warp(GaeMap upto) {
#pragma unroll
  for (int by = 1; by < 32; by *= 2) {
    const GaeMap other = shuffle_up(upto, by);
    if (threadIdx.x % 32 >= by) upto = gae_compose(upto, other);
  }
  return upto;
}

// From each thread's map, and the state before the tile, the same in every thread: the state before the thread's tokens.
// Moves `state` behind the tile. Called by a whole block; `turn` is 0 and 1 by turns, so that the totals of a tile may be
// written while those of the tile before it are still read.
__device__ __forceinline__ GaeState scan_block(const GaeMap& map, GaeState& state, int turn) {
  __shared__ GaeMap totals[2][kWarps];
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const GaeMap upto = scan_warp(map), before = shuffle_up(upto, 1);
  if (lane == 31) totals[turn][warp] = upto;
  __syncthreads();
  GaeState here = state;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w == warp) here = state;
    state = gae_apply(totals[turn][w], state);
  }
  return lane == 0 ? here : gae_apply(before, here);
}

struct Tile {
  float reward[kEach], value[kEach];
  unsigned char valid[kEach];
};

// The tile that ends at `right`, as memory gives it; `sort_tile` hands every thread its own tokens.
__device__ __forceinline__ Tile fetch_tile(const GaeParams& p, int64_t begin, int64_t right) {
  const int count = tokens_in(begin, right);
  Tile tile;
  fetch<-1>(p.rewards + right - 1, count, tile.reward);
  fetch<-1>(p.values + right - 1, count, tile.value);
  fetch<-1>(p.mask + right - 1, count, tile.valid);
  return tile;
}

// -> the map of the thread's tokens.
template <bool carry>
__device__ __forceinline__ GaeMap sort_tile(Tile& tile, GaeCoefficients k) {
  trade<true>(tile.reward);
  trade<true>(tile.value);
  GaeMap map = gae_identity();
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    tile.reward[j] = tile.valid[j] ? tile.reward[j] : 0.0f;
    tile.value[j] = tile.valid[j] ? tile.value[j] : 0.0f;
    map = gae_compose(gae_map<carry>(tile.reward[j], tile.value[j], tile.valid[j], k), map);
  }
  return map;
}

// Outputs of the thread's tokens, from the state on their right -> the tile's moments, if they are wanted.
template <bool carry>
__device__ __forceinline__ Moments store_tile(const GaeParams& p, int64_t begin, int64_t right, GaeCoefficients k,
                                              const Tile& tile, GaeState here) {
  float advantages[kEach], returns[kEach];
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    here = gae_step<carry>(here, tile.reward[j], tile.value[j], tile.valid[j], k);
    advantages[j] = tile.valid[j] ? gae_advantage(here, tile.value[j]) : 0.0f;
    returns[j] = tile.valid[j] ? gae_return(here) : 0.0f;
  }
  const Moments moments = p.moments.moments ? block_moments<kThreads>(advantages, tile.valid) : Moments{};
  const int count = tokens_in(begin, right);
  store<-1>(p.advantages + right - 1, count, advantages);
  store<-1>(p.returns + right - 1, count, returns);
  return moments;
}

template <bool carry>
__global__ void __launch_bounds__(kThreads) gae_rows(GaeParams p) {
  const int64_t row = blockIdx.x, begin = row_begin(p, row);
  const int64_t end = find_end(p, begin, row_begin(p, row + 1));
  Tile next = fetch_tile(p, begin, end);
  const GaeCoefficients k = coefficients(p, row);
  GaeState state = start_state(p, row);  // on the right of the tile, the same in every thread
  Moments moments;
  int turn = 0;
  for (int64_t right = end; right > begin; right -= kTile) {
    Tile tile = next;
    next = fetch_tile(p, begin, right - kTile);  // nothing where the row ends
    const GaeState here = scan_block(sort_tile<carry>(tile, k), state, turn ^= 1);
    const Moments of_tile = store_tile<carry>(p, begin, right, k, tile, here);
    if (p.moments.moments) moments = join(moments, of_tile);
  }
  if (p.moments.moments) merge_moments<kThreads>(p.moments, moments);
}

// Scratch of the spread kernels; `tiles` is what the longest row may have.
struct Spread {
  int64_t* ends;     // [rows]
  GaeMap* maps;      // [rows, tiles, kWarps], the warps' totals
  GaeState* states;  // [rows, tiles], on the right of each tile
  Moments* moments;  // [rows, tiles], or null
  int64_t tiles;

  __device__ int64_t tiles_of(const GaeParams& p, int64_t row) const {
    return (ends[row] - row_begin(p, row) + kTile - 1) / kTile;
  }
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
  Tile tile = fetch_tile(p, begin, right);
  const GaeMap upto = scan_warp(sort_tile<carry>(tile, coefficients(p, row)));
  if (threadIdx.x % 32 == 31) spread.maps[static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32] = upto;
}

// A block a row: all of its threads read maps, and one folds them.
__global__ void __launch_bounds__(kThreads) fold_tiles(GaeParams p, Spread spread) {
  __shared__ GaeMap maps[kThreads];
  const int64_t row = blockIdx.x, first = row * spread.tiles, count = spread.tiles_of(p, row) * kWarps;
  GaeState state = start_state(p, row);
  for (int64_t done = 0; done < count; done += kThreads) {
    const int here = count - done < kThreads ? static_cast<int>(count - done) : kThreads;
    __syncthreads();  // the maps before these have been read
    if (static_cast<int>(threadIdx.x) < here) maps[threadIdx.x] = spread.maps[first * kWarps + done + threadIdx.x];
    __syncthreads();
    if (threadIdx.x > 0) continue;
    for (int i = 0; i < here; i += kWarps) {
      spread.states[first + (done + i) / kWarps] = state;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) state = gae_apply(maps[i + w], state);
    }
  }
}

template <bool carry>
__global__ void __launch_bounds__(kThreads) tile_outputs(GaeParams p, Spread spread) {
  const int64_t row = blockIdx.x / spread.tiles, at = blockIdx.x % spread.tiles;
  const int64_t begin = row_begin(p, row), right = spread.ends[row] - at * kTile;
  if (right <= begin) return;
  const GaeCoefficients k = coefficients(p, row);
  GaeState state = spread.states[blockIdx.x];
  Tile tile = fetch_tile(p, begin, right);
  const GaeState here = scan_block(sort_tile<carry>(tile, k), state, 0);
  const Moments moments = store_tile<carry>(p, begin, right, k, tile, here);
  if (spread.moments && threadIdx.x == 0) spread.moments[blockIdx.x] = moments;
}

__global__ void __launch_bounds__(kThreads) row_moments(GaeParams p, Spread spread) {
  const int64_t row = blockIdx.x, first = row * spread.tiles, tiles = spread.tiles_of(p, row);
  Moments moments;
  for (int64_t i = 0; i < tiles; ++i) moments = join(moments, spread.moments[first + i]);
  merge_moments<kThreads>(p.moments, moments);
}

}  // namespace srppo::scalar
