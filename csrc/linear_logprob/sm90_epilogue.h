// What a consumer of sm90_kernel.h does with its half of a tile: logits, the target's taken out, the rest absorbed into the
// rows' states, exponentials kept on request. A thread works on its 96 logits, two columns of two rows at a time.
#pragma once

#include "sm90_tiles.h"
#include "softmax_state.h"

namespace srppo::sm90 {

using softmax::kLowest;
using softmax::RowState;

struct ScanParams {
  const float* bias;                  // [V], or null
  const std::int64_t* targets;        // [n]
  const float* inverse_temperatures;  // [n], or null
  const float* reference;             // [n up to whole clusters]: what a row's exponentials are around
  const int* count;                   // live rows
  float* state;                       // [3, groups, n]
  float* target_logits;               // [n]
  float* kept_max;                    // [n, tiles], or null: what a tile's kept exponentials are around
  std::int64_t stride_max;
  int n, width, vocab, group;
  float scale, softcap, inverse_softcap, inverse_temperature;  // softcap 0: none
};

// A thread's rows of a unit.
struct ThreadRows {
  RowState state[kThreadRows];
  int target[kThreadRows];  // -1 beyond the live rows
  int first;                // the first of them, counted among the live rows
  int live;

  __device__ __forceinline__ bool is_live(int slot) const { return first + row_offset(slot) < live; }
};

// Calls f(slot, entry, column of the tile, accumulator) for everything that the thread holds, with constant indices.
template <class F>
__device__ __forceinline__ void each_logit(float (&acc)[kLogits], int thread, F f) {
#pragma unroll
  for (int slot = 0; slot < kThreadRows; ++slot)
#pragma unroll
    for (int i = 0; i < kRowLogits; ++i) f(slot, column_of(thread, i), acc[register_of(slot, i)]);
}

// Accumulators to what `factor` makes logits of; returns it. With kPlain they stay, and the product is fused with what follows.
template <bool kPlain>
__device__ __forceinline__ float to_logits(float (&acc)[kLogits], const ThreadRows& rows, int thread, int v0,
                                           const ScanParams& p) {
  if (kPlain) return p.scale * p.inverse_temperature;
  if (p.bias) {
#pragma unroll
    for (int i = 0; i < kRowLogits; ++i) {
      const int v = v0 + column_of(thread, i);
      const float bias = v < p.vocab ? __ldg(p.bias + v) : 0.0f;
#pragma unroll
      for (int slot = 0; slot < kThreadRows; ++slot) acc[register_of(slot, i)] += bias;
    }
  }
  each_logit(acc, thread, [&](int, int, float& z) { z *= p.scale; });
  if (p.softcap != 0.0f)
    each_logit(acc, thread, [&](int, int, float& z) { z = softmax::capped(z, p.softcap, p.inverse_softcap); });
  float inverse[kThreadRows];
  const int row = hopper::computed_once(rows.first);  // an address is not kept over the next GEMM
#pragma unroll
  for (int slot = 0; slot < kThreadRows; ++slot) {
    const bool own = p.inverse_temperatures && rows.is_live(slot);
    inverse[slot] = own ? __ldg(p.inverse_temperatures + row + row_offset(slot)) : p.inverse_temperature;
  }
  // By comparison: a bias of -inf rules an entry out, and a NaN must stay one.
  each_logit(acc, thread, [&](int slot, int, float& z) {
    z *= inverse[slot];
    z = z < kLowest ? kLowest : z;
  });
  return 1.0f;
}

// Stores the target's logit where this thread holds it; whether a target is in the warp's part of the tile. One tile in
// about 50 has one at V = 152k, so looking costs a few instructions a tile.
__device__ __forceinline__ bool find_targets(float (&acc)[kLogits], float factor, const ThreadRows& rows, int thread, int v0,
                                             const ScanParams& p) {
  bool here[kThreadRows];
#pragma unroll
  for (int slot = 0; slot < kThreadRows; ++slot) {
    const int column = rows.target[slot] - v0;
    here[slot] = column >= 0 && column < kColumns && column % 8 / 2 == thread % 4;
  }
  if (here[0] || here[1]) {
    float peak[kThreadRows] = {};
    each_logit(acc, thread, [&](int slot, int column, float& z) {
      if (v0 + column == rows.target[slot]) peak[slot] = z * factor;
    });
#pragma unroll
    for (int slot = 0; slot < kThreadRows; ++slot)
      if (here[slot]) p.target_logits[hopper::computed_once(rows.first + row_offset(slot))] = peak[slot];
  }
  return __ballot_sync(0xffffffffu, here[0] || here[1]) != 0;
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Where a warp's exponentials go: half of its tile at a time, through its own part of shared memory.
struct Keeper {
  const CUtensorMap* map;  // of [n, V], in boxes of kWarpRows x kPart, with a 64-byte swizzle
  std::uint32_t memory;    // kKeptBytes of it
};

// Stores half `half` of a warp's tile, rounded pairs of columns as they lie in the accumulators, 8 columns a word. TMA writes
// what is inside of the matrix; of the warp's rows those beyond the live ones hold something.
__device__ __forceinline__ void keep(const std::uint32_t (&words)[kThreadRows][kHalfBlocks], int half, const ThreadRows& rows,
                                     int thread, int v0, const Keeper& keeper) {
  const int lane = thread % 32, row = lane % kWarpRows, first = rows.first - lane / 4;
  hopper::wait_until_read();  // what it held before
  __syncwarp();
  const std::uint32_t to = keeper.memory + kept_byte(row, lane / kWarpRows);
#pragma unroll
  for (int part = 0; part < kHalfParts; ++part)
#pragma unroll
    for (int block = 0; block < kPart / 8; block += 2) {
      const int i = part * (kPart / 8) + block;
      hopper::store_matrices((to ^ block * 16) + part * kPartBytes, words[0][i], words[1][i], words[0][i + 1], words[1][i + 1]);
    }
  hopper::fence_async();
  __syncwarp();
  // By a predicate: after a branch the compiler would not know any more that a warp's threads go through the ring together.
  const bool stores = lane == 0 && first < rows.live;
#pragma unroll
  for (int part = 0; part < kHalfParts; ++part)
    hopper::store_box_if(stores, keeper.map, v0 + (half * kHalfParts + part) * kPart, first, keeper.memory + part * kPartBytes);
  hopper::commit_stores();
}

// Sums of a tile around the rows' m, and what is kept. With kMasked the target and what is beyond the vocabulary do not count.
template <bool kKeep, bool kMasked>
__device__ __forceinline__ void sum_tile(const float (&acc)[kLogits], float factor, const ThreadRows& rows, int thread, int v0,
                                         float (&s)[kThreadRows], float (&t)[kThreadRows], const ScanParams& p,
                                         const Keeper& keeper) {
  softmax::Sums sums[kThreadRows];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    std::uint32_t words[kThreadRows][kHalfBlocks];
#pragma unroll
    for (int block = 0; block < kHalfBlocks; ++block)
#pragma unroll
      for (int slot = 0; slot < kThreadRows; ++slot) {
        float e[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int i = (half * kHalfBlocks + block) * 2 + j, v = v0 + column_of(thread, i);
          e[j] = fmaf(acc[register_of(slot, i)], factor, -rows.state[slot].m);
          if (kMasked && (v == rows.target[slot] || v >= p.vocab)) e[j] = kLowest;
        }
        softmax::exponentials(sums[slot], e);
        const __nv_bfloat162 pair = __floats2bfloat162_rn(e[0], e[1]);
        words[slot][block] = reinterpret_cast<const std::uint32_t&>(pair);
      }
    if (kKeep) keep(words, half, rows, thread, v0, keeper);
  }
#pragma unroll
  for (int slot = 0; slot < kThreadRows; ++slot) {
    s[slot] = sums[slot].s[0] + sums[slot].s[1];
    t[slot] = sums[slot].t[0] + sums[slot].t[1];
  }
}

// Moves the rows of `beyond` (a bit a lane of the warp) to their maximum of a tile.
template <bool kPlain>
__device__ __forceinline__ void raise(const float (&acc)[kLogits], float factor, ThreadRows& rows, int thread, int v0,
                                      const unsigned (&beyond)[kThreadRows], const ScanParams& p) {
  if (kPlain) factor = hopper::from_here(factor);  // else 96 products wait in registers for what is rare
#pragma unroll
  for (int slot = 0; slot < kThreadRows; ++slot) {
    float most = rows.state[slot].m;
#pragma unroll
    for (int i = 0; i < kRowLogits; ++i) {
      const int v = v0 + column_of(thread, i);
      if (v != rows.target[slot] && v < p.vocab) most = fmaxf(most, acc[register_of(slot, i)] * factor);
    }
#pragma unroll
    for (int by = 1; by < 4; by *= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, by));
    const bool own = beyond[slot] >> thread % 32 / 4 * 4 & 0xfu;  // by any of the row's quad
    if (own) softmax::raise(rows.state[slot], most);
  }
}

// Takes a tile into the rows' states. A row's exponentials are around a number that was there before its first tile, its
// target's logit, which saves the maxima, their exchanges in a quad and a factor a part. It may be off by anything: a row whose
// sum of a tile passes kMost is taken once more, around its own maximum of that tile, and stays there. The target's
// exponential is neither counted nor kept: what takes its place is the caller's business.
constexpr float kMost = 1099511627776.0f;  // 2^40: of larger exponents the product with log2 e has lost digits

template <bool kPlain, bool kKeep>
__device__ __forceinline__ void absorb_tile(float (&acc)[kLogits], ThreadRows& rows, int thread, int v0, const ScanParams& p,
                                            const Keeper& keeper) {
  const float factor = to_logits<kPlain>(acc, rows, thread, v0, p);
  // What follows from it is worked out anew in every tile, as no register is left for it over a GEMM; of the other kernels
  // ptxas spills with this, and of this one without.
  if (kPlain) thread = hopper::computed_once(thread);
  const bool masked = find_targets(acc, factor, rows, thread, v0, p) || v0 + kColumns > p.vocab;
  float s[kThreadRows], t[kThreadRows];
  if (!masked) sum_tile<kKeep, false>(acc, factor, rows, thread, v0, s, t, p, keeper);
  else sum_tile<kKeep, true>(acc, factor, rows, thread, v0, s, t, p, keeper);
  unsigned beyond[kThreadRows];
#pragma unroll
  for (int slot = 0; slot < kThreadRows; ++slot) beyond[slot] = __ballot_sync(0xffffffffu, !(s[slot] <= kMost));  // or NaN
  if (beyond[0] | beyond[1]) {
    raise<kPlain>(acc, factor, rows, thread, v0, beyond, p);
    if (kKeep) hopper::wait_until_stored();  // before the same columns are stored again
    sum_tile<kKeep, true>(acc, factor, rows, thread, v0, s, t, p, keeper);
  }
#pragma unroll
  for (int slot = 0; slot < kThreadRows; ++slot) {
    rows.state[slot].s += s[slot];
    rows.state[slot].t += t[slot];
  }
  if (kKeep) {
#pragma unroll
    for (int slot = 0; slot < kThreadRows; ++slot) {
      const std::int64_t row = hopper::computed_once(rows.first + row_offset(slot));
      if (thread % 4 == 0 && rows.is_live(slot)) p.kept_max[row * p.stride_max + v0 / kColumns] = rows.state[slot].m;
    }
  }
}

}  // namespace srppo::sm90
