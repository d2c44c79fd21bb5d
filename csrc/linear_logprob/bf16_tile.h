// A tile of z = x y^T in fp32 with AVX-512 BF16: K goes in pairs (vdpbf16ps), 14 rows x 32 columns in registers.
//
// The panel of columns is packed as [pairs][32], each element two consecutive steps of K in 32 bits, and x as the scan or
// the product packs it (InTiles, ByRows). In the scan a sum is one accumulator over kDepth steps, and blocks of that many are
// added up in memory, in order, which keeps the error of a long sum down.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "../common/ahead.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace srppo {

constexpr std::int64_t kBf16Panel = 32;  // columns a panel
constexpr std::int64_t kDepth = 128;     // steps of K (a pair counts as one) that one accumulator takes

// Rows of the next tile, of at most `most`: the last two share what is left. A low tile has too few sums to keep the
// multipliers busy: a step of 13 rows as tiles of 4, 4, 4 and 1 takes 21 cycles of a Zen 5, and as one tile 13.
inline int tile_rows(std::int64_t rows, int most) {
  return static_cast<int>(rows >= 2 * most ? most : rows > most ? (rows + 1) / 2 : rows);
}

#if defined(__x86_64__)
namespace {

#define SRPPO_BF16 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))

constexpr int kBf16Rows = 14;  // a tile: 28 accumulators, two vectors of the panel and a pair leave one register

inline int bf16_tile_height(std::int64_t rows) { return tile_rows(rows, kBf16Rows); }

// Where x has the pair of a tile's row i and step k.
struct InTiles {
  template <int kRows>
  static constexpr std::int64_t at(std::int64_t i, std::int64_t k) { return k * kRows + i; }
};

template <std::int64_t kStride>
struct ByRows {
  template <int kRows>
  static constexpr std::int64_t at(std::int64_t i, std::int64_t k) { return i * kStride + k; }
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
        const auto pair = static_cast<int>(x[Layout::template at<kRows>(i, k)]);
        const __m512bh value = (__m512bh)_mm512_set1_epi32(pair);
        low[i] = _mm512_dpbf16_ps(low[i], value, a);
        high[i] = _mm512_dpbf16_ps(high[i], value, b);
      }
    }
  }
#pragma GCC unroll 14
  for (int i = 0; i < kRows; ++i) end.row(i, low[i], high[i]);
}

template <class Layout, class End, int... kLess>
constexpr auto bf16_tiles(std::integer_sequence<int, kLess...>) {
  return std::array{&bf16_tile<kLess + 1, Layout, End>...};
}

// The same for a number of rows known when it runs.
template <class Layout, class End>
void bf16_tile(int rows, const std::uint32_t* x, const std::uint32_t* panel, std::int64_t pairs, const End& end,
               const Ahead& lines) {
  static constexpr auto of = bf16_tiles<Layout, End>(std::make_integer_sequence<int, kBf16Rows>{});
  of[static_cast<std::size_t>(rows - 1)](x, panel, pairs, end, lines);
}

// z[rows][32] of `pairs` steps, for a tile's rows; added to what is there if `add`. x is [pairs][rows].
inline void bf16_multiply(int rows, const std::uint32_t* x, const std::uint32_t* panel, std::int64_t pairs, float* z,
                          std::int64_t ldz, bool add, const Ahead& lines) {
  std::int64_t k = 0;
  do {
    const std::int64_t depth = std::min(pairs - k, kDepth);
    bf16_tile<InTiles>(rows, x + k * rows, panel + k * kBf16Panel, depth, Bf16Sums{z, ldz, add || k > 0}, lines.after(k));
    k += depth;
  } while (k < pairs);
}

}  // namespace
#endif

}  // namespace srppo
