// A tile of z = x y^T in fp32 with AVX-512 BF16: K goes in pairs (vdpbf16ps), 14 rows x 32 columns in registers.
//
// The panel of columns is packed as [pairs][32], each element two consecutive steps of K in 32 bits, and x as the scan or
// the product packs it (Bf16Layout). In the scan a sum is one accumulator over kDepth steps, and blocks of that many are
// added up in memory, in order, which keeps the error of a long sum down.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../common/ahead.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace srppo {

constexpr std::int64_t kBf16Panel = 32;  // columns a panel
constexpr std::int64_t kDepth = 128;     // steps of K (a pair counts as one) that one accumulator takes

#if defined(__x86_64__)
namespace {

#define SRPPO_BF16 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))

// Where x has the pair of a tile's row i and step k: at i * row + k * step.
template <std::int64_t kRow, std::int64_t kStep>
struct Bf16Layout {
  static constexpr std::int64_t row = kRow, step = kStep;
};

// What becomes of 32 sums of row i. All of a panel's columns, in fp32, written or added to.
struct Bf16Sums {
  float* z;
  std::int64_t ldz;
  bool add;

  SRPPO_BF16 void row(int i, __m512 low, __m512 high) const {
    float* out = z + i * ldz;
    if (add) {
      low = _mm512_add_ps(_mm512_loadu_ps(out), low);
      high = _mm512_add_ps(_mm512_loadu_ps(out + 16), high);
    }
    _mm512_storeu_ps(out, low);
    _mm512_storeu_ps(out + 16, high);
  }
};

// The same of the first columns of a panel alone.
struct Bf16Columns {
  float* z;
  std::int64_t ldz;
  bool add;
  __mmask16 low_columns, high_columns;

  SRPPO_BF16 void row(int i, __m512 low, __m512 high) const {
    float* out = z + i * ldz;
    if (add) {
      low = _mm512_add_ps(_mm512_maskz_loadu_ps(low_columns, out), low);
      high = _mm512_add_ps(_mm512_maskz_loadu_ps(high_columns, out + 16), high);
    }
    _mm512_mask_storeu_ps(out, low_columns, low);
    _mm512_mask_storeu_ps(out + 16, high_columns, high);
  }
};

// Rounded to bf16, after the sums so far (nullptr: none) were added.
struct Bf16Rounded {
  const float* sums;
  std::int64_t lds;
  std::uint16_t* out;
  std::int64_t ldo;
  __mmask16 low_columns, high_columns;

  SRPPO_BF16 void row(int i, __m512 low, __m512 high) const {
    if (sums) {
      low = _mm512_add_ps(_mm512_loadu_ps(sums + i * lds), low);
      high = _mm512_add_ps(_mm512_loadu_ps(sums + i * lds + 16), high);
    }
    const __mmask32 columns = low_columns | static_cast<__mmask32>(high_columns) << 16;
    _mm512_mask_storeu_epi16(out + i * ldo, columns, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
};

// A tile of kRows rows over `pairs` steps of x and panel [pairs][32], both pairs of bf16 in 32 bits.
template <int kRows, class Layout, class End>
SRPPO_BF16 void bf16_tile(const std::uint32_t* x, const std::uint32_t* panel, std::int64_t pairs, const End& end,
                          const Ahead& lines) {
  const char* line = lines.at;
  std::int64_t left = lines.count;
  __m512 low[kRows], high[kRows];
#pragma GCC unroll 14
  for (int i = 0; i < kRows; ++i) low[i] = high[i] = _mm512_setzero_ps();
  for (std::int64_t k = 0; k < pairs;) {
    if (left-- > 0) {
      __builtin_prefetch(line, 0, 2);
      line += lines.step;
    }
    for (const std::int64_t to = std::min(k + lines.every, pairs); k < to; ++k) {
      const __m512bh a = (__m512bh)_mm512_loadu_si512(panel + k * 32);
      const __m512bh b = (__m512bh)_mm512_loadu_si512(panel + k * 32 + 16);
#pragma GCC unroll 14
      for (int i = 0; i < kRows; ++i) {
        const auto pair = static_cast<int>(x[i * Layout::row + k * Layout::step]);
        const __m512bh value = (__m512bh)_mm512_set1_epi32(pair);
        low[i] = _mm512_dpbf16_ps(low[i], value, a);
        high[i] = _mm512_dpbf16_ps(high[i], value, b);
      }
    }
  }
#pragma GCC unroll 14
  for (int i = 0; i < kRows; ++i) end.row(i, low[i], high[i]);
}

// z[rows][32] of `pairs` steps, for a height that a tile has; added to what is there if `add`. x is [pairs][rows].
inline void bf16_multiply(int rows, const std::uint32_t* x, const std::uint32_t* panel, std::int64_t pairs, float* z,
                          std::int64_t ldz, bool add, const Ahead& lines) {
  std::int64_t k = 0;
  do {
    const std::int64_t depth = std::min(pairs - k, kDepth);
    const std::uint32_t *a = x + k * rows, *b = panel + k * kBf16Panel;
    const Bf16Sums sums{z, ldz, add || k > 0};
    const Ahead rest = lines.after(k);
    if (rows == 14) bf16_tile<14, Bf16Layout<1, 14>>(a, b, depth, sums, rest);
    else if (rows == 4) bf16_tile<4, Bf16Layout<1, 4>>(a, b, depth, sums, rest);
    else if (rows == 2) bf16_tile<2, Bf16Layout<1, 2>>(a, b, depth, sums, rest);
    else bf16_tile<1, Bf16Layout<1, 1>>(a, b, depth, sums, rest);
    k += depth;
  } while (k < pairs);
}

// Largest tile that the remaining rows fill.
inline int bf16_tile_height(std::int64_t rows) { return rows >= 14 ? 14 : rows >= 4 ? 4 : rows >= 2 ? 2 : 1; }

}  // namespace
#endif

}  // namespace srppo
