// The softmax over logits from AMX tiles (amx_logits.h): blocks of [32 entries][32 hidden states], 16 hidden states a vector.
//
// A row's (m, s, t) of a vocabulary group is merged from blocks of 32 entries, in order, each lane for itself: its bits
// depend on neither the lanes beside it nor its place. Included after each_level.h has cpu_kernels.h, whose maths of level
// avx512 it uses.
//
// It runs beside the products of another block: a step of those for each four vectors of exponentials, of 60 or so
// instructions, in the 87 cycles in which else nothing but the tile unit works.
//
// Exponentials are kept relative to a row's maximum over the group's first block, not over the whole group, which is
// not known yet: e^(z - reference), and `reference` takes the place of the group's maximum. They may be larger than 1,
// up to e^kReach. Where a later block is more than kReach above the reference, that is raised to the block's maximum,
// and what is there already is multiplied by less than e^-kReach and rounded again. Twice is the most for a number that
// counts: none of those there is above the new reference, and another raise leaves them below e^-kReach.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "amx_logits.h"

namespace srppo {
namespace {

#define SRPPO_LANES __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")))

constexpr float kLowest = -3.402823466e38f, kReach = 60.0f;

// Of a panel of 32 rows and one vocabulary group.
struct TileState {
  alignas(64) float m[kTilePanel], s[kTilePanel], t[kTilePanel], zy[kTilePanel], reference[kTilePanel];
  alignas(64) float temperature[kTilePanel];
  alignas(64) std::int32_t column[kTilePanel];  // the target's in the group, or negative
  std::uint16_t* kept[kTilePanel];  // where the row's exponentials of this group go, or nullptr

  void begin() {
    for (std::int64_t r = 0; r < kTilePanel; ++r) m[r] = reference[r] = kLowest, s[r] = t[r] = zy[r] = 0.0f;
  }
};

SRPPO_LANES inline std::uint16_t rounded(float x) {
  std::uint16_t half;
  avx512::store_bf16(&half, _mm512_set1_ps(x), 1);
  return half;
}

// z to final logits.
SRPPO_LANES inline void tile_transform(const ScanArgs& args, float* z, std::int64_t entries, const float* bias,
                                       const float* temperature) {
  const __m512 lowest = _mm512_set1_ps(kLowest);
  for (std::int64_t h = 0; h < kTilePanel; h += 16) {
    const __m512 temperatures = _mm512_load_ps(temperature + h);
    float* half = z + h / 16 * kTileHalf;
    for (std::int64_t j = 0; j < entries; ++j) {
      __m512 x = _mm512_load_ps(half + j * 16);
      if (bias) x = x + _mm512_set1_ps(bias[j]);
      x = avx512::transform(x, args, temperatures);
      // A bias of -inf rules an entry out: the lowest finite number does the same, and makes no NaN of 0 * inf.
      if (bias) x = avx512::select(avx512::less(x, lowest), lowest, x);
      _mm512_store_ps(half + j * 16, x);
    }
  }
}

// e (16 rows across) of 32 entries, in bf16, to the rows: entries [at, at + count) of each.
SRPPO_LANES inline void store_kept(const __m512* e, std::uint16_t* const* rows, std::int64_t at, std::int64_t count) {
  alignas(64) static const std::uint16_t kPairs[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i pairs = _mm512_load_si512(kPairs);
  __m512 x[16];
  for (int i = 0; i < 16; ++i) {
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(e[2 * i + 1], e[2 * i]);
    x[i] = _mm512_castsi512_ps(_mm512_permutexvar_epi16(pairs, both));
  }
  avx512::transpose(x);
  const __mmask32 lanes = count >= 32 ? 0xffffffffu : (1u << count) - 1u;
  for (int r = 0; r < 16; ++r) {
    if (rows[r]) _mm512_mask_storeu_epi16(rows[r] + at, lanes, _mm512_castps_si512(x[r]));
  }
}

// Multiplies the first `count` kept exponentials of a row by e^fall. By its root twice: of e^kReach, a fall by more than 104
// leaves a number, and e^fall is 0.
SRPPO_LANES inline void scale_kept(std::uint16_t* kept, std::int64_t count, float fall) {
  const float root = _mm512_cvtss_f32(avx512::exp_of_negative(_mm512_set1_ps(0.5f * fall)));
  for (std::int64_t j = 0; j < count; ++j) {
    const std::uint32_t bits = static_cast<std::uint32_t>(kept[j]) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    kept[j] = rounded(value * root * root);
  }
}

// The hidden states [h, h + 16) of a panel: entries [begin, begin + entries) of the group, z [32][16].
template <bool kEntropy, bool kKeep>
SRPPO_LANES __attribute__((always_inline)) inline void softmax_half(TileSteps& beside, float* z, const float* sums,
                                                                    std::int64_t begin, std::int64_t entries,
                                                                    std::int64_t h, TileState& state) {
  const __m512 zero = _mm512_setzero_ps(), reach = _mm512_set1_ps(-104.0f), lowest = _mm512_set1_ps(kLowest);
  __m512 most[4] = {lowest, lowest, lowest, lowest};
  beside.step();
  for (std::int64_t j = 0; j < kTileEntries; j += 4) {
    if (j >= entries) break;
#pragma GCC unroll 4
    for (int lane = 0; lane < 4; ++lane) {
      float* at = z + (j + lane) * 16;
      __m512 x = _mm512_load_ps(at);
      if (sums) _mm512_store_ps(at, x = x + _mm512_load_ps(sums + (at - z)));
      if (j + lane < entries) most[lane] = avx512::larger(x, most[lane]);
    }
  }
  const __m512 largest = avx512::larger(avx512::larger(most[0], most[1]), avx512::larger(most[2], most[3]));
  // Of the rows whose target is here.
  const __m512i column = _mm512_sub_epi32(_mm512_load_si512(state.column + h), _mm512_set1_epi32(static_cast<int>(begin)));
  const __mmask16 inside = _mm512_cmplt_epu32_mask(column, _mm512_set1_epi32(static_cast<int>(entries)));
  for (unsigned rows = inside; rows; rows &= rows - 1) {
    const std::int64_t r = h + __builtin_ctz(rows);
    float& at = z[(state.column[r] - begin) * 16 + r - h];
    state.zy[r] = at;
    // The target stays out of the sums (chunked.py says why). A NaN there has to stay in.
    if (!(at != at)) at = kLowest;
  }
  const __m512 before = _mm512_load_ps(state.m + h), m = avx512::larger(largest, before);
  __m512 factor = zero;
  if constexpr (kKeep) {
    const __m512 reference = _mm512_load_ps(state.reference + h);
    const __mmask16 raised = _mm512_cmp_ps_mask(m - reference, _mm512_set1_ps(kReach), _CMP_GT_OQ);
    if (raised) {  // in the first block too, but where every entry is ruled out
      alignas(64) float now[16];
      _mm512_store_ps(now, m);
      for (int r = 0; r < 16; ++r) {
        if (!(raised >> r & 1)) continue;
        if (state.kept[h + r] && begin > 0) scale_kept(state.kept[h + r], begin, state.reference[h + r] - now[r]);
        state.reference[h + r] = now[r];
      }
    }
    factor = avx512::exp_of_negative(m - _mm512_load_ps(state.reference + h));
  }
  __m512 s[4] = {zero, zero, zero, zero}, t[4] = {zero, zero, zero, zero}, kept[kKeep ? kTileEntries : 1];
  const auto one = [&](std::int64_t i, int lane) SRPPO_LANES __attribute__((always_inline)) {
    const __m512 d = _mm512_load_ps(z + i * 16) - m, e = avx512::exp_of_negative(d);
    s[lane] = s[lane] + e;
    if constexpr (kEntropy) t[lane] = _mm512_fmadd_ps(e, d, t[lane]);
    if constexpr (kKeep) kept[i] = e * factor;
  };
  if (entries == kTileEntries) {
#pragma GCC unroll 1
    for (std::int64_t i = 0; i < kTileEntries; i += 4) {
      beside.step();
#pragma GCC unroll 4
      for (int lane = 0; lane < 4; ++lane) one(i + lane, lane);
    }
  } else {
    for (std::int64_t i = 0; i < entries; ++i) one(i, i % 4);
    if constexpr (kKeep) {
      for (std::int64_t i = entries; i < kTileEntries; ++i) kept[i] = zero;
    }
  }
  // From m = kLowest the fall overflows, and its product with s would be NaN: e^-104 is 0 anyway.
  const __m512 fall = avx512::larger(reach, before - m), a = avx512::exp_of_negative(fall);
  const __m512 s0 = _mm512_load_ps(state.s + h), t0 = _mm512_load_ps(state.t + h);
  _mm512_store_ps(state.m + h, m);
  _mm512_store_ps(state.s + h, _mm512_fmadd_ps(a, s0, (s[0] + s[1]) + (s[2] + s[3])));
  if constexpr (kEntropy)
    _mm512_store_ps(state.t + h, _mm512_fmadd_ps(a, _mm512_fmadd_ps(s0, fall, t0), (t[0] + t[1]) + (t[2] + t[3])));
  if constexpr (kKeep) {
    store_kept(kept, state.kept + h, begin, entries);
    for (unsigned rows = inside; rows; rows &= rows - 1) {
      const std::int64_t r = h + __builtin_ctz(rows);
      if (!state.kept[r]) continue;
      const float d = state.zy[r] - state.reference[r];
      state.kept[r][state.column[r]] = rounded(_mm512_cvtss_f32(avx512::exp_of_negative(_mm512_set1_ps(d))));
    }
  }
}

// Takes entries [begin, begin + entries) of the group, raw logits z and, unless it is nullptr, what is to be added to them
// into the rows' states, beside the products of another block.
template <bool kEntropy, bool kKeep>
SRPPO_LANES void tile_softmax(const ScanArgs& args, TileSteps& beside, float* z, const float* sums, std::int64_t begin,
                              std::int64_t entries, const float* bias, bool plain, TileState& state) {
  if (!plain) {
    if (sums) add_beside(beside, z, sums);
    sums = nullptr;
    tile_transform(args, z, entries, bias, state.temperature);
  }
  softmax_half<kEntropy, kKeep>(beside, z, sums, begin, entries, 0, state);
  softmax_half<kEntropy, kKeep>(beside, z + kTileHalf, sums ? sums + kTileHalf : nullptr, begin, entries, 16, state);
}

// A TileRows::Pack: a tile of the panel is 16 x 16 pairs, transposed.
SRPPO_LANES inline void pack_tile_panel(const float* const* sources, std::int64_t pairs, float* panel) {
  for (std::int64_t k = 0; k < pairs; k += 16)
    for (std::int64_t column = 0; column < kTilePanel; column += 16) {
      __m512 x[16];
      for (int i = 0; i < 16; ++i) x[i] = avx512::load(sources[column + i] + k, avx512::lanes_left(pairs - k));
      avx512::transpose(x);
      for (int i = 0; i < 16; ++i) _mm512_store_ps(panel + panel_word(k + i, column), x[i]);
    }
}

}  // namespace
}  // namespace srppo
#endif
