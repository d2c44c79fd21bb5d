// What a consumer of sm90_kernel.h does with its half of a tile: logits, the target's taken out, the rest absorbed into the
// rows' states, exponentials kept on request. A thread works in place on its 96 logits, 8 columns of a row at a time.
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
  const float* reference;             // [n up to whole clusters]: what exponentials are around; null: the maximum so far
  const int* count;                   // live rows
  float* state;                       // [3, groups, n]
  float* target_logits;               // [n]
  __nv_bfloat16* kept;                // [n, V] exponentials
  float* kept_max;                    // [n, parts; tiles with a reference]: what they are around
  std::int64_t stride_kept, stride_max;
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

// Accumulators to logits, in place; kLowest beyond the vocabulary.
template <bool kPlain>
__device__ __forceinline__ void to_logits(float (&acc)[kLogits], const ThreadRows& rows, int thread, int v0,
                                          const ScanParams& p) {
  if (kPlain) {
    const float factor = p.scale * p.inverse_temperature;
    each_logit(acc, thread, [&](int, int, float& z) { z *= factor; });
  } else {
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
  }
  if (v0 + kColumns > p.vocab)
    each_logit(acc, thread, [&](int, int column, float& z) { z = v0 + column < p.vocab ? z : kLowest; });
}

// Stores the target's logit where this thread holds it, and takes it out: kLowest in its place, the logit in `peak`. One
// tile in about 50 has a target of a warp's 16 rows at V = 152k, so looking costs a few instructions a tile.
__device__ __forceinline__ void take_targets(float (&acc)[kLogits], const ThreadRows& rows, int thread, int v0,
                                             float (&peak)[kThreadRows], const ScanParams& p) {
  bool here[kThreadRows];
#pragma unroll
  for (int slot = 0; slot < kThreadRows; ++slot) {
    const int column = rows.target[slot] - v0;
    here[slot] = column >= 0 && column < kColumns && column % 8 / 2 == thread % 4;
    peak[slot] = kLowest;
  }
  if (!here[0] && !here[1]) return;
  each_logit(acc, thread, [&](int slot, int column, float& z) {
    if (v0 + column != rows.target[slot]) return;
    peak[slot] = z;
    z = kLowest;
  });
#pragma unroll
  for (int slot = 0; slot < kThreadRows; ++slot)
    if (here[slot]) p.target_logits[hopper::computed_once(rows.first + row_offset(slot))] = peak[slot];
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Word j of thread q in a quad -> word q of thread j, of every row slot at a time, so that exchanges hide each other's latency.
__device__ __forceinline__ void transpose_quad(std::uint32_t (&word)[kThreadRows][4], int q) {
#pragma unroll
  for (int by = 1; by < 4; by *= 2) {
    const bool upper = q & by;
#pragma unroll
    for (int slot = 0; slot < kThreadRows; ++slot)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        std::uint32_t &low = word[slot][by == 1 ? 2 * i : i], &high = word[slot][by == 1 ? 2 * i + 1 : i + 2];
        const std::uint32_t got = __shfl_xor_sync(0xffffffffu, upper ? low : high, by);
        (upper ? low : high) = got;
      }
  }
}

struct alignas(16) Adjacent {
  std::uint32_t words[4];  // 8 exponentials
};

// The target's exponential, where it was taken out of a part's.
__device__ __forceinline__ void put_targets(float (&e)[kThreadRows][kEntries], const ThreadRows& rows, int first, int thread,
                                            const float (&peak)[kThreadRows]) {
#pragma unroll
  for (int slot = 0; slot < kThreadRows; ++slot) {
    if (!(peak[slot] > kLowest)) continue;
    const float of_target = softmax::exp2_of((peak[slot] - rows.state[slot].m) * softmax::kLog2e);
#pragma unroll
    for (int i = 0; i < kEntries; ++i)
      e[slot][i] = first + column_of(thread, i) == rows.target[slot] ? of_target : e[slot][i];
  }
}

// Keeps exponentials of columns `first` to `first` + kPart: a quad exchanges its pairs of columns, so that each of its threads
// stores 8 that are adjacent, and the quad a row's 64 bytes. The vocabulary is a multiple of 8. Called by whole warps.
template <bool kMaximum>  // of the part as well
__device__ __forceinline__ void keep(const float (&e)[kThreadRows][kEntries], const ThreadRows& rows, int first, int thread,
                                     const ScanParams& p) {
  const int q = thread % 4;
  std::uint32_t word[kThreadRows][4];
#pragma unroll
  for (int slot = 0; slot < kThreadRows; ++slot) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(e[slot][2 * i], e[slot][2 * i + 1]);
      word[slot][i] = reinterpret_cast<const std::uint32_t&>(pair);
    }
  }
  transpose_quad(word, q);
#pragma unroll
  for (int slot = 0; slot < kThreadRows; ++slot) {
    if (!rows.is_live(slot) || first + 8 * q >= p.vocab) continue;
    const std::int64_t row = hopper::computed_once(rows.first + row_offset(slot));  // as above
    const Adjacent mine{{word[slot][0], word[slot][1], word[slot][2], word[slot][3]}};
    *reinterpret_cast<Adjacent*>(p.kept + row * p.stride_kept + first + 8 * q) = mine;
    if (kMaximum && q == 0) p.kept_max[row * p.stride_max + first / kPart] = rows.state[slot].m;
  }
}

__device__ __forceinline__ void part_of(const float (&acc)[kLogits], int slot, int part, float (&z)[kEntries]) {
#pragma unroll
  for (int i = 0; i < kEntries; ++i) z[i] = acc[register_of(slot, part * kEntries + i)];
}

template <bool kPlain, bool kKeep>
__device__ __forceinline__ void absorb_tile(float (&acc)[kLogits], ThreadRows& rows, int thread, int v0, const ScanParams& p) {
  constexpr int kParts = kColumns / kPart, kTogether = 2;
  float peak[kThreadRows];
  to_logits<kPlain>(acc, rows, thread, v0, p);
  take_targets(acc, rows, thread, v0, peak, p);
#pragma unroll
  for (int first = 0; first < kParts; first += kTogether) {
    // The maxima of several parts together: the exchanges in a quad hide each other's latency.
    float most[kTogether][kThreadRows];
#pragma unroll
    for (int i = 0; i < kTogether; ++i)
#pragma unroll
      for (int slot = 0; slot < kThreadRows; ++slot) {
        float z[kEntries];
        part_of(acc, slot, first + i, z);
        most[i][slot] = softmax::largest(z);
        // Wherever in the tile the target is: a maximum that comes early does no harm.
        if (first + i == 0) most[i][slot] = fmaxf(most[i][slot], peak[slot]);
      }
#pragma unroll
    for (int by = 1; by < 4; by *= 2)
#pragma unroll
      for (int i = 0; i < kTogether; ++i)
#pragma unroll
        for (int slot = 0; slot < kThreadRows; ++slot)
          most[i][slot] = fmaxf(most[i][slot], __shfl_xor_sync(0xffffffffu, most[i][slot], by));
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      float e[kThreadRows][kEntries];
#pragma unroll
      for (int slot = 0; slot < kThreadRows; ++slot) {
        part_of(acc, slot, first + i, e[slot]);
        softmax::absorb(rows.state[slot], most[i][slot], e[slot]);
      }
      const int column = v0 + (first + i) * kPart;
      if (kKeep) {
        put_targets(e, rows, column, thread, peak);
        keep<true>(e, rows, column, thread, p);
      }
    }
  }
}

// The same around a reference that was there before the first tile, which saves the maxima, their exchanges and a factor a
// part. It may lie anywhere: a row whose sum of a tile passes kMost is taken once more, around its own maximum of that tile,
// and stays there. The target's exponential is not kept: what takes its place is the caller's business.
constexpr float kMost = 1099511627776.0f;  // 2^40: of larger exponents the product with log2 e has lost digits

// Sums around the rows' m, and what is kept.
template <bool kKeep>
__device__ __forceinline__ void sum_tile(const float (&acc)[kLogits], const ThreadRows& rows, int thread, int v0,
                                         float (&s)[kThreadRows], float (&t)[kThreadRows], const ScanParams& p) {
  softmax::Sums sums[kThreadRows];
#pragma unroll
  for (int part = 0; part < kColumns / kPart; ++part) {
    float e[kThreadRows][kEntries];
#pragma unroll
    for (int slot = 0; slot < kThreadRows; ++slot) {
      part_of(acc, slot, part, e[slot]);
      softmax::exponentials(sums[slot], rows.state[slot].m, e[slot]);
    }
    if (kKeep) keep<false>(e, rows, v0 + part * kPart, thread, p);
  }
#pragma unroll
  for (int slot = 0; slot < kThreadRows; ++slot) {
    s[slot] = sums[slot].s[0] + sums[slot].s[1];
    t[slot] = sums[slot].t[0] + sums[slot].t[1];
  }
}

// Moves the rows of `beyond` (a bit a lane of the warp) to their maximum of a tile.
__device__ __forceinline__ void raise(const float (&acc)[kLogits], ThreadRows& rows, int thread,
                                      const unsigned (&beyond)[kThreadRows]) {
#pragma unroll
  for (int slot = 0; slot < kThreadRows; ++slot) {
    float most = rows.state[slot].m;
#pragma unroll
    for (int i = 0; i < kRowLogits; ++i) most = fmaxf(most, acc[register_of(slot, i)]);
#pragma unroll
    for (int by = 1; by < 4; by *= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, by));
    const bool own = beyond[slot] >> thread % 32 / 4 * 4 & 0xfu;  // by any of the row's quad
    const float m = own ? most : rows.state[slot].m;
    softmax::add(rows.state[slot], softmax::move_of(rows.state[slot].m, m), m, softmax::Sums{});
  }
}

// What keep() does, in pairs of columns and without exchanges: rare, and to need no registers beside it.
__device__ __forceinline__ void keep_again(const float (&acc)[kLogits], const ThreadRows& rows, int thread, int v0,
                                           const ScanParams& p) {
#pragma unroll
  for (int slot = 0; slot < kThreadRows; ++slot) {
    const int row = hopper::computed_once(rows.first + row_offset(slot));
    const float m = rows.state[slot].m;
#pragma unroll
    for (int i = 0; i < kRowLogits; i += 2) {
      const float left = softmax::exp2_of((acc[register_of(slot, i)] - m) * softmax::kLog2e);
      const float right = softmax::exp2_of((acc[register_of(slot, i + 1)] - m) * softmax::kLog2e);
      const int column = v0 + column_of(thread, i);
      if (row < rows.live && column < p.vocab)
        *reinterpret_cast<__nv_bfloat162*>(p.kept + row * p.stride_kept + column) = __floats2bfloat162_rn(left, right);
    }
  }
}

template <bool kPlain, bool kKeep>
__device__ __forceinline__ void absorb_around_reference(float (&acc)[kLogits], ThreadRows& rows, int thread, int v0,
                                                        const ScanParams& p) {
  float peak[kThreadRows], s[kThreadRows], t[kThreadRows];
  to_logits<kPlain>(acc, rows, thread, v0, p);
  take_targets(acc, rows, thread, v0, peak, p);
  sum_tile<kKeep>(acc, rows, thread, v0, s, t, p);
  unsigned beyond[kThreadRows];
#pragma unroll
  for (int slot = 0; slot < kThreadRows; ++slot) beyond[slot] = __ballot_sync(0xffffffffu, !(s[slot] <= kMost));  // or NaN
  if (beyond[0] | beyond[1]) {
    raise(acc, rows, thread, beyond);
    sum_tile<false>(acc, rows, thread, v0, s, t, p);
    if (kKeep) {
      __syncwarp();  // these columns were stored a moment ago, by other threads of the quad
      keep_again(acc, rows, thread, v0, p);
    }
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
