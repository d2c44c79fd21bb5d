// Whether this machine's tiles multiply as amx_tile.h expects: asked once, before the first use.
//
// Small whole numbers, whose products and sums are exact in bf16 and fp32 in any order, so that every bit is known: 33
// rows (a block of 32, and one of 16 with a row in it) and kTileBlock + 32 steps of K, the last 32 in a block that is
// added to it. A virtual machine that gets a tile wrong costs the tiles, and nothing else.
#pragma once

#include <cstdint>
#include <cstring>

#include "../common/scratch.h"
#include "amx_tile.h"

namespace srppo {

// What is wrong with them; nullptr if nothing is.
inline const char* tile_fault() {
  constexpr std::int64_t kLive = 33, kAll = 48, kDepth = kTileBlock + kTileDepth, kStride = tile_stride(kDepth);
  constexpr std::int64_t kLdz = kTilePanel + 16;
  Scratch<std::uint16_t> x(kAll * kStride);
  Scratch<std::uint32_t> panel(kDepth / 2 * kTilePanel);
  Scratch<float> z(kAll * kLdz);
  std::uint32_t state = 1;
  const auto next = [&state] {  // a bf16 of -8 to 7
    state = state * 1664525u + 1013904223u;
    const float value = static_cast<float>(state >> 28) - 8.0f;
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return static_cast<std::uint16_t>(bits >> 16);
  };
  const auto widen = [](std::uint32_t half) {
    const std::uint32_t bits = half << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  };
  for (std::int64_t i = 0; i < kAll * kStride; ++i) x.data()[i] = i < kLive * kStride ? next() : std::uint16_t{0};
  for (std::int64_t i = 0; i < kDepth / 2 * kTilePanel; ++i) {
    const std::uint32_t even = next();
    panel.data()[i] = even | static_cast<std::uint32_t>(next()) << 16;
  }
  std::memset(z.data(), 0xff, static_cast<std::size_t>(4 * kAll * kLdz));  // NaN: nothing to add to
  {
    const tiles::InUse in_use;
    tile_multiply(kLive, kTilePanel, x.data(), kStride, panel.data(), kDepth, z.data(), kLdz, false);
  }
  for (std::int64_t r = 0; r < kAll; ++r) {
    float sums[kTilePanel] = {};
    for (std::int64_t p = 0; p < kDepth / 2; ++p) {
      const float even = widen(x.data()[r * kStride + 2 * p]), odd = widen(x.data()[r * kStride + 2 * p + 1]);
      for (std::int64_t j = 0; j < kTilePanel; ++j) {
        const std::uint32_t pair = panel.data()[panel_word(p, j)];
        sums[j] += even * widen(pair & 0xffffu) + odd * widen(pair >> 16);
      }
    }
    for (std::int64_t j = 0; j < kLdz; ++j) {
      const float value = z.data()[r * kLdz + j];
      const bool written = r < kLive && j < kTilePanel;
      if (written && value != sums[j]) return "a product on this machine's tiles is wrong";
      if (!written && value == value) return "a store of this machine's tiles goes beyond its rows or columns";
    }
  }
  return nullptr;
}

}  // namespace srppo
