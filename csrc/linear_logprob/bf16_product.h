// A block of out (+)= A B with AVX-512 BF16, for cpu_product.cpp.
//
// A block of A, kPairs of K deep, stays in L2: by rows as it lies in memory, or, of A^T, as tiles of pairs. A panel of
// 32 columns of B is multiplied by all of it, tile by tile, and between tiles the next panel is packed. A sum is one
// accumulator over a block of K; blocks are added up in order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "../common/ahead.h"
#include "../common/scratch.h"
#include "../common/tensors.h"
#include "bf16_tile.h"

namespace srppo {
namespace {

#if defined(__x86_64__)

constexpr std::int64_t kPairs = 512;  // of K at a time: a panel of B is 64 KB

struct Bf16Matrix {
  const std::uint16_t* data;
  std::int64_t rows, columns, stride;

  Bf16Matrix(const Tensor& tensor, const char* name)
      : data(static_cast<const std::uint16_t*>(tensor.const_data_ptr())), rows(tensor.size(0)),
        columns(tensor.size(1)), stride(tensor.stride(0)) {
    STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == ScalarType::BFloat16 &&
                        (tensor.stride(1) == 1 || columns <= 1),
                    "srppo_native: ", name, " must be a bfloat16 CPU matrix with contiguous rows");
  }

  const std::uint16_t* row(std::int64_t i) const { return i < rows ? data + i * stride : nullptr; }
};

// The first `n` of 16 lanes.
inline __mmask16 first_lanes(std::int64_t n) {
  return static_cast<__mmask16>(n >= 16 ? 0xffffu : n > 0 ? (1u << n) - 1u : 0u);
}

// Two rows of bf16, element by element: `out[i] = first[i] | second[i] << 16` for up to 16 of them, 0 where `here` has
// none and for a row that is not there.
SRPPO_BF16 inline __m512i interleaved(const std::uint16_t* first, const std::uint16_t* second, __mmask16 here) {
  const __m512i low = first ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(here, first)) : _mm512_setzero_si512();
  const __m512i high = second ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(here, second)) : _mm512_setzero_si512();
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// `n` of them; 0 from there to `room`.
SRPPO_BF16 inline void interleave(const std::uint16_t* first, const std::uint16_t* second, std::int64_t n,
                                  std::int64_t room, std::uint32_t* out) {
  for (std::int64_t i = 0; i < room; i += 16) {
    const __m512i pairs = interleaved(first ? first + i : nullptr, second ? second + i : nullptr, first_lanes(n - i));
    _mm512_mask_storeu_epi32(out + i, first_lanes(room - i), pairs);
  }
}

// The same of 32 that are all there.
SRPPO_BF16 inline void interleave_panel(const std::uint16_t* first, const std::uint16_t* second, std::uint32_t* out) {
  const __m512i a = _mm512_loadu_si512(first), b = _mm512_loadu_si512(second);
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i low = _mm512_or_si512(lanes, _mm512_slli_epi32(_mm512_add_epi32(lanes, _mm512_set1_epi32(32)), 16));
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  _mm512_storeu_si512(out, _mm512_permutex2var_epi16(a, low, b));
  _mm512_storeu_si512(out + 16, _mm512_permutex2var_epi16(a, high, b));
}

constexpr std::int64_t kPairStride = kPairs + 16;  // of a row of A: an odd number of cache lines
constexpr std::int64_t kTileGap = 16;              // between tiles of A^T, which else share the sets of L1

// Words that `rows` rows of A take, however they are packed.
constexpr std::int64_t packed_words(std::int64_t rows) { return rows * kPairStride; }
static_assert(kPairStride >= kPairs + kTileGap, "a tile of one row has a gap too");

// Brings elements [from, from + count) of row k of A to L2, if it has that row. The rows of A^T lie a vocabulary apart,
// where the hardware does not run ahead.
inline void fetch_row(const Bf16Matrix& a, std::int64_t k, std::int64_t from, std::int64_t count) {
  const std::uint16_t* row = a.row(k);
  for (std::int64_t j = 0; row && j < count; j += 32) __builtin_prefetch(row + from + j, 0, 2);
}

// Rows [r0, r0 + count) of the result, pairs [p0, p0 + pairs) of K.
inline void pack_a(const Bf16Matrix& a, bool transposed, std::int64_t r0, std::int64_t count, std::int64_t p0,
                   std::int64_t pairs, std::uint32_t* out) {
  if (!transposed) {
    const std::int64_t here = std::min(2 * pairs, a.columns - 2 * p0);
    for (std::int64_t r = 0; r < count; ++r) {
      auto* to = reinterpret_cast<std::uint16_t*>(out + r * kPairStride);
      std::memcpy(to, a.row(r0 + r) + 2 * p0, static_cast<std::size_t>(2 * here));
      if (here < 2 * pairs) std::memset(to + here, 0, 2);  // not a store of 16 bits: it is read as a word
    }
    return;
  }
  // Row by row of A, all tiles at once: a vocabulary apart, rows share few sets of a cache and would not stay.
  constexpr std::int64_t kAhead = 16;  // rows
  for (std::int64_t k = 2 * p0; k < 2 * (p0 + pairs); k += 2) {
    fetch_row(a, k + kAhead, r0, count);
    fetch_row(a, k + kAhead + 1, r0, count);
    const std::uint16_t *row = a.row(k) + r0, *next = k + 1 < a.rows ? a.row(k + 1) + r0 : nullptr;
    std::uint32_t* tile = out;
    for (std::int64_t r = 0; r < count;) {
      const int height = bf16_tile_height(count - r);
      interleave(row + r, next ? next + r : nullptr, height, height, tile + (k / 2 - p0) * height);
      tile += pairs * height + kTileGap;
      r += height;
    }
  }
}

// Columns of B from `column` on, pairs [p0, p0 + pairs) of K, packed as [pairs][32] a share at a time, between the
// multiplications of another panel. The rows of a panel are too short for the hardware to run ahead: a share's are
// fetched during the multiplication before it. Not earlier, as rows that are 4096 bytes apart have few sets of a cache.
class PanelPacker {
 public:
  PanelPacker(const Bf16Matrix& b, std::int64_t column, std::int64_t width, std::int64_t p0, std::int64_t pairs,
              std::int64_t shares, std::uint32_t* out)
      : b_(b), column_(column), width_(width), at_(2 * p0), end_(2 * (p0 + pairs)),
        share_(2 * ((pairs + shares - 1) / shares)), out_(out) {}

  void pack_share() {
    const std::int64_t to = std::min(end_, at_ + share_);
    const std::int64_t whole = width_ == kBf16Panel ? std::min(to, b_.rows / 2 * 2) : at_;
    const std::uint16_t* row = b_.data + at_ * b_.stride + column_;
    for (; at_ < whole; at_ += 2, row += 2 * b_.stride, out_ += kBf16Panel)
      interleave_panel(row, row + b_.stride, out_);
    for (; at_ < to; at_ += 2, row += 2 * b_.stride, out_ += kBf16Panel)
      interleave(row, at_ + 1 < b_.rows ? row + b_.stride : nullptr, width_, kBf16Panel, out_);
  }

  void pack_rest() {
    while (at_ < end_) pack_share();
  }

  // A row's last line in this panel, of the share that is packed next, during `steps` of a multiplication. Where rows do
  // not begin with a line, the first one is the last of the panel before.
  Ahead lines(std::int64_t steps) const {
    const std::int64_t rows = std::min(share_, std::min(end_, b_.rows) - at_);
    if (rows <= 0) return {};
    return {b_.row(at_) + column_ + width_ - 1, 2 * b_.stride, rows, steps};
  }

 private:
  const Bf16Matrix& b_;
  std::int64_t column_, width_, at_, end_, share_;
  std::uint32_t* out_;
};

// x by rows, as pack_a leaves A, or as tiles of A^T.
template <class End>
void multiply_tile(bool transposed, int rows, const std::uint32_t* x, const std::uint32_t* panel, std::int64_t pairs,
                   const End& end, const Ahead& ahead) {
  if (transposed) bf16_tile<InTiles>(rows, x, panel, pairs, end, ahead);
  else bf16_tile<ByRows<kPairStride>>(rows, x, panel, pairs, end, ahead);
}

// What the tasks of a thread pack into: a block of A, two panels of B, and the sums that a bf16 result is rounded from
// where K takes several blocks.
struct VectorScratch {
  std::int64_t lds;
  Scratch<std::uint32_t> packed, panels;
  Scratch<float> sums;

  VectorScratch(std::int64_t rows, std::int64_t columns, bool keeps_sums)
      : lds(columns + 16), packed(packed_words(rows)), panels(2 * kPairs * kBf16Panel),
        sums(keeps_sums ? rows * lds : 0) {}

  static std::int64_t bytes(std::int64_t rows, std::int64_t columns, bool keeps_sums) {
    return 4 * (packed_words(rows) + 2 * kPairs * kBf16Panel + (keeps_sums ? rows * (columns + 16) : 0));
  }
};

// `out` is float, or where it is nullptr `rounded` is bf16, which is written once.
inline void product_task(const Bf16Matrix& a, const Bf16Matrix& b, bool transposed, bool add, std::int64_t r0,
                         std::int64_t count, std::int64_t c0, std::int64_t width, float* out, std::uint16_t* rounded,
                         std::int64_t ldo, VectorScratch& scratch) {
  const std::int64_t all = (b.rows + 1) / 2, tiles = (count + kBf16Rows - 1) / kBf16Rows, lds = out ? ldo : scratch.lds;
  float* const sums = out ? out + r0 * ldo + c0 : scratch.sums.data();
  std::uint32_t *panel = scratch.panels.data(), *other = panel + kPairs * kBf16Panel;
  const auto packer = [&](std::int64_t p0, std::int64_t c, std::int64_t shares, std::uint32_t* to) {
    const std::int64_t pairs = std::clamp<std::int64_t>(all - p0, 0, kPairs);
    return PanelPacker(b, c0 + c, std::min(width - c, kBf16Panel), p0, pairs, shares, to);
  };
  packer(0, 0, 1, panel).pack_rest();
  for (std::int64_t p0 = 0; p0 < all; p0 += kPairs) {
    const std::int64_t pairs = std::min(all - p0, kPairs);
    const bool rounds = !out && p0 + kPairs >= all, sum = add || p0 > 0;
    pack_a(a, transposed, r0, count, p0, pairs, scratch.packed.data());
    for (std::int64_t c = 0; c < width; c += kBf16Panel) {
      const __mmask16 low = first_lanes(width - c), high = first_lanes(width - c - 16);
      const bool last = c + kBf16Panel >= width;
      PanelPacker next = packer(last ? p0 + kPairs : p0, last ? 0 : c + kBf16Panel, tiles, other);
      const std::uint32_t* x = scratch.packed.data();
      for (std::int64_t r = 0; r < count;) {
        const int height = bf16_tile_height(count - r);
        float* z = sums + r * lds + c;
        next.pack_share();
        if (rounds) {
          const Bf16Rounded end{sum ? z : nullptr, lds, rounded + (r0 + r) * ldo + c0 + c, ldo, low, high};
          multiply_tile(transposed, height, x, panel, pairs, end, next.lines(pairs));
        } else {
          multiply_tile(transposed, height, x, panel, pairs, Bf16Columns{z, lds, sum, low, high}, next.lines(pairs));
        }
        x += transposed ? pairs * height + kTileGap : kPairStride * height;
        r += height;
      }
      next.pack_rest();
      std::swap(panel, other);
    }
  }
}

#endif

}  // namespace
}  // namespace srppo
