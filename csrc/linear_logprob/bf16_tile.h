// A tile of z = x y^T in fp32 with AVX-512 BF16: K goes in pairs (vdpbf16ps), 14 rows x 32 columns in registers.
//
// x is packed as [pairs][rows] and the panel of columns as [pairs][32], each element two consecutive steps of K in 32
// bits. A sum is one accumulator over kDepth steps; blocks of that many are added up in memory, in order, which keeps
// the error of a long sum down.
#pragma once

#include <algorithm>
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace srppo {

constexpr std::int64_t kBf16Panel = 32;  // columns a panel
constexpr std::int64_t kDepth = 128;     // steps of K (a pair counts as one) that one accumulator takes

#if defined(__x86_64__)
namespace {

#define SRPPO_BF16 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))

// z[rows][32] of x [pairs][rows] and panel [pairs][32], both pairs of bf16 in 32 bits; written or added to.
#define SRPPO_BF16_TILE(ROWS)                                                                                        \
  SRPPO_BF16 void bf16_tile_##ROWS(const std::uint32_t* x, const std::uint32_t* panel, std::int64_t pairs, float* z, \
                                   std::int64_t ldz, bool add) {                                                     \
    __m512 low[ROWS], high[ROWS];                                                                                    \
    _Pragma("GCC unroll 14") for (int i = 0; i < ROWS; ++i) low[i] = high[i] = _mm512_setzero_ps();                  \
    for (std::int64_t k = 0; k < pairs; ++k) {                                                                       \
      const __m512bh a = (__m512bh)_mm512_loadu_si512(panel + k * 32);                                               \
      const __m512bh b = (__m512bh)_mm512_loadu_si512(panel + k * 32 + 16);                                          \
      _Pragma("GCC unroll 14") for (int i = 0; i < ROWS; ++i) {                                                      \
        const __m512bh value = (__m512bh)_mm512_set1_epi32(static_cast<int>(x[k * ROWS + i]));                       \
        low[i] = _mm512_dpbf16_ps(low[i], value, a);                                                                 \
        high[i] = _mm512_dpbf16_ps(high[i], value, b);                                                               \
      }                                                                                                              \
    }                                                                                                                \
    _Pragma("GCC unroll 14") for (int i = 0; i < ROWS; ++i) {                                                        \
      float* out = z + i * ldz;                                                                                      \
      if (add) {                                                                                                     \
        low[i] = _mm512_add_ps(_mm512_loadu_ps(out), low[i]);                                                        \
        high[i] = _mm512_add_ps(_mm512_loadu_ps(out + 16), high[i]);                                                 \
      }                                                                                                              \
      _mm512_storeu_ps(out, low[i]);                                                                                 \
      _mm512_storeu_ps(out + 16, high[i]);                                                                           \
    }                                                                                                                \
  }
SRPPO_BF16_TILE(14)
SRPPO_BF16_TILE(4)
SRPPO_BF16_TILE(2)
SRPPO_BF16_TILE(1)

// z[rows][32] of `pairs` steps, for a height that a tile has; added to what is there if `add`.
inline void bf16_multiply(int rows, const std::uint32_t* x, const std::uint32_t* panel, std::int64_t pairs, float* z,
                          std::int64_t ldz, bool add) {
  std::int64_t k = 0;
  do {
    const std::int64_t depth = std::min(pairs - k, kDepth);
    const std::uint32_t *a = x + k * rows, *b = panel + k * kBf16Panel;
    if (rows == 14) bf16_tile_14(a, b, depth, z, ldz, add || k > 0);
    else if (rows == 4) bf16_tile_4(a, b, depth, z, ldz, add || k > 0);
    else if (rows == 2) bf16_tile_2(a, b, depth, z, ldz, add || k > 0);
    else bf16_tile_1(a, b, depth, z, ldz, add || k > 0);
    k += depth;
  } while (k < pairs);
}

// Largest tile that the remaining rows fill.
inline int bf16_tile_height(std::int64_t rows) { return rows >= 14 ? 14 : rows >= 4 ? 4 : rows >= 2 ? 2 : 1; }

}  // namespace
#endif

}  // namespace srppo
