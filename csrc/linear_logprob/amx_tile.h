// z (+)= x y^T in fp32 with AMX: blocks of 32 rows x 32 columns, in four of the eight tile registers.
//
//   C00 C01   +=   A0   [B0 B1]      A: 16 rows x 32 of K, B: 16 pairs of K x 16 columns, C: 16 rows x 16 columns
//   C10 C11        A1
//
// x is bf16 row by row, [rows][stride], rows and K padded with zeros to whole tiles; the panel of columns has two
// consecutive steps of K in 32 bits, tile by tile as panel_word() says. Its tiles are 1 KB of memory without a gap: as rows
// of [pairs][32], 128 bytes apart, their loads took a step from 87 to 125 cycles, where rows of x 1216 bytes apart cost
// nothing. A last block of 16 rows leaves A1 and its sums away.
//
// TDPBF16PS adds, for each element of C, the products of the 16 even and of the 16 odd steps in two chains of fused
// multiply-adds from 0, their sum, and C. Subnormal inputs count as 0, and subnormal sums become 0. C takes kTileBlock
// steps of K from 0; blocks are added up in z, in order. That is as close to float64 as the code without tiles, or
// closer, which C over all of K would not be. And an element sees the same operations in the same order whatever its
// row and the number of rows.
//
// Four products, of 16 cycles by the manual and of 20 as measured, run under four loads of 8.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "../common/amx.h"

namespace srppo {

constexpr std::int64_t kTileRows = tiles::kRows;
constexpr std::int64_t kTileDepth = 32;   // steps of K of a tile
constexpr std::int64_t kTilePanel = 32;   // columns of a panel
constexpr std::int64_t kTileBlock = 640;  // steps of K at a time: 40 KB of a panel; SmolLM2 and Qwen take one or two

// Where a panel has a pair of K and a column: [steps of 32 of K][2 halves][16 pairs][16 columns].
constexpr std::int64_t panel_word(std::int64_t pair, std::int64_t column) {
  return pair / 16 * 512 + column / 16 * 256 + pair % 16 * 16 + column % 16;
}

constexpr std::int64_t whole_tiles(std::int64_t size, std::int64_t tile) { return (size + tile - 1) / tile * tile; }

// Bytes between rows of at least `bytes`: whole cache lines, and an odd number of them, so that the 16 rows of a tile
// lie in 16 sets of the L1 cache. A power of two would put them all in one.
constexpr std::int64_t tile_stride_bytes(std::int64_t bytes) { return (whole_tiles(bytes, 64) / 64 | 1) * 64; }

// Elements between rows of x, K's padding included.
constexpr std::int64_t tile_stride(std::int64_t depth) {
  return tile_stride_bytes(2 * whole_tiles(depth, kTileDepth)) / 2;
}

constexpr int C00 = 0, C01 = 1, C10 = 2, C11 = 3, A0 = 4, A1 = 5, B0 = 6, B1 = 7;

template <bool kTwo>
__attribute__((always_inline)) inline void clear_sums() {
  tiles::zero<C00>();
  tiles::zero<C01>();
  if constexpr (!kTwo) return;
  tiles::zero<C10>();
  tiles::zero<C11>();
}

// 32 of K, 32 rows or 16; `below` is the 17th row.
template <bool kTwo>
__attribute__((always_inline)) inline void tile_step(const std::uint16_t* x, const std::uint16_t* below, std::int64_t x_bytes,
                                                     const std::uint32_t* panel) {
  tiles::load<A0>(x, x_bytes);
  tiles::load<B0>(panel, tiles::kRowBytes);
  tiles::dot_bf16<C00, A0, B0>();
  tiles::load<B1>(panel + panel_word(0, 16), tiles::kRowBytes);
  tiles::dot_bf16<C01, A0, B1>();
  if constexpr (!kTwo) return;
  tiles::load<A1>(below, x_bytes);
  tiles::dot_bf16<C10, A1, B0>();
  tiles::dot_bf16<C11, A1, B1>();
}

// Sums of `steps` of 32 of K, 32 rows or 16. A function of its own, and its loop as it stands: inlined and unrolled 16
// times, GCC keeps the addresses on the stack.
template <bool kTwo>
__attribute__((noinline)) void tile_block(const std::uint16_t* x, std::int64_t stride, const std::uint32_t* panel,
                                          std::int64_t steps, float* sums, std::int64_t lds) {
  const std::int64_t x_bytes = 2 * stride, sums_bytes = 4 * lds;
  const std::uint16_t* below = x + kTileRows * stride;
  clear_sums<kTwo>();
#pragma GCC unroll 1
  for (std::int64_t s = 0; s < steps; ++s) {
    tile_step<kTwo>(x, below, x_bytes, panel);
    x += kTileDepth;
    below += kTileDepth;
    panel += kTileDepth / 2 * kTilePanel;
  }
  tiles::store<C00>(sums, sums_bytes);
  tiles::store<C01>(sums + 16, sums_bytes);
  if constexpr (kTwo) {
    float* sums_below = sums + kTileRows * lds;
    tiles::store<C10>(sums_below, sums_bytes);
    tiles::store<C11>(sums_below + 16, sums_bytes);
  }
}

#if defined(SRPPO_TILES) || !defined(__x86_64__)
#define SRPPO_BESIDE_TILES
#else
#define SRPPO_BESIDE_TILES __attribute__((target("avx512f")))
#endif

// z (+)= sums, [rows][32] of which `columns` count.
SRPPO_BESIDE_TILES inline void add_block(const float* sums, std::int64_t rows, std::int64_t columns, float* z,
                                         std::int64_t ldz, bool add) {
  using Vector __attribute__((vector_size(64))) = float;
  for (std::int64_t r = 0; r < rows; ++r) {
    const float* from = sums + r * kTilePanel;
    float* to = z + r * ldz;
    for (std::int64_t j = 0; j < kTilePanel && columns == kTilePanel; j += 16) {
      Vector part, held;
      std::memcpy(&part, from + j, sizeof(part));
      std::memcpy(&held, to + j, sizeof(held));
      if (add) part = held + part;
      std::memcpy(to + j, &part, sizeof(part));
    }
    for (std::int64_t j = 0; j < columns && columns < kTilePanel; ++j) to[j] = add ? to[j] + from[j] : from[j];
  }
}

// z[rows][columns <= 32], written or added to, of x [whole tiles of rows][stride] and a panel of `depth`, in
// steps of 32; x and panel on cache lines, as a tile's row of 64 bytes would touch two of them. `between` is called
// before every block. The caller holds tiles::InUse.
template <class Between>
inline void tile_multiply(std::int64_t rows, std::int64_t columns, const std::uint16_t* x, std::int64_t stride,
                          const std::uint32_t* panel, std::int64_t depth, float* z, std::int64_t ldz, bool add,
                          const Between& between) {
  alignas(64) float sums[2 * kTileRows * kTilePanel];
  std::int64_t k = 0;
  do {  // once where K is empty, for the zeros
    const std::int64_t steps = std::min(depth - k, kTileBlock) / kTileDepth;
    const std::uint32_t* part = panel + k / 2 * kTilePanel;
    for (std::int64_t r = 0; r < rows; r += 2 * kTileRows) {
      const std::int64_t count = std::min(rows - r, 2 * kTileRows);
      const bool two = count > kTileRows, on = add || k > 0;
      const bool direct = !on && columns == kTilePanel && count == (two ? 2 : 1) * kTileRows;
      float* to = direct ? z + r * ldz : sums;
      const std::int64_t ldt = direct ? ldz : kTilePanel;
      between();
      if (two) tile_block<true>(x + r * stride + k, stride, part, steps, to, ldt);
      else tile_block<false>(x + r * stride + k, stride, part, steps, to, ldt);
      if (!direct) add_block(sums, count, columns, z + r * ldz, ldz, on);
    }
    k += kTileBlock;
  } while (k < depth);
}

inline void tile_multiply(std::int64_t rows, std::int64_t columns, const std::uint16_t* x, std::int64_t stride,
                          const std::uint32_t* panel, std::int64_t depth, float* z, std::int64_t ldz, bool add) {
  tile_multiply(rows, columns, x, stride, panel, depth, z, ldz, add, [] {});
}

}  // namespace srppo
