// Logits of a block of bf16 rows over a part of the vocabulary, on AMX tiles: what cpu.cpp does with vector tiles, in
// another order of loops.
//
// kTileChunk columns at a time, K in blocks of kTileBlock, and within these a panel of 32 columns over all rows. What a
// panel's multiplications read and write is then 1 KB of each row and 1 KB of its logits, whatever the width: 1 MB at
// 512 rows, half of an L2 cache, so that a task can have many rows. Packing a panel costs about a tenth of its
// multiplications with 512 rows and a quarter with 256: tiles are that fast, and a head is read from memory once for
// each block of rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "../common/scratch.h"
#include "amx_tile.h"

namespace srppo {

constexpr std::int64_t kTileRowBlock = 512;  // rows a task
constexpr std::int64_t kTileChunk = 256;     // columns: a row's logits of them are 1 KB

class TileLogits {
 public:
  // fp32_tile.h's pack_panel, for pairs of bf16 in the bits of a float: 32 rows of `steps` to [steps][32].
  using Pack = void (*)(const float* const* sources, std::int64_t steps, float* panel);

  // `weight` is [vocab][stride], `width` of each row.
  TileLogits(const std::uint16_t* weight, std::int64_t stride, std::int64_t width, std::int64_t vocab,
             std::int64_t rows, Pack pack)
      : weight_(weight), weight_stride_(stride), width_(width), vocab_(vocab), pack_(pack), stride_(tile_stride(width)),
        rows_(whole_tiles(rows, kTileRows) * stride_), panel_(kTileBlock / 2 * kTilePanel),
        ends_(width % 2 ? kTilePanel * kTileBlock / 2 : 0), zeros_(kTileBlock / 2) {
    std::fill(rows_.data(), rows_.data() + whole_tiles(rows, kTileRows) * stride_, std::uint16_t{0});
    std::fill(zeros_.data(), zeros_.data() + kTileBlock / 2, 0.0f);
  }

  // `x.row(i)` is where a row begins, and `row_at(r)` the i of the block's r-th. K's padding stays 0.
  template <class Rows, class RowAt>
  void set_rows(const Rows& x, std::int64_t count, const RowAt& row_at) {
    for (std::int64_t r = 0; r < count; ++r)
      std::memcpy(rows_.data() + r * stride_, x.row(row_at(r)), static_cast<std::size_t>(2 * width_));
  }

  // z[count][size] of entries [v0, v0 + size); z has room for whole panels. The caller holds tiles::InUse.
  void multiply(std::int64_t count, std::int64_t v0, std::int64_t size, float* z, std::int64_t ldz) {
    const std::int64_t depths = std::max<std::int64_t>(1, (width_ + kTileBlock - 1) / kTileBlock);
    for (std::int64_t c = 0; c < size; c += kTileChunk) {
      const std::int64_t panels = (std::min(kTileChunk, size - c) + kTilePanel - 1) / kTilePanel;
      for (std::int64_t i = 0; i < depths * panels; ++i) {
        const std::int64_t k = i / panels * kTileBlock, p = c + i % panels * kTilePanel;
        const std::int64_t depth = whole_tiles(std::min(width_ - k, kTileBlock), kTileDepth);
        read(v0 + p, v0 + size, k);
        const std::int64_t shares = (count + 2 * kTileRows - 1) / (2 * kTileRows);
        if (i + 1 == depths * panels) ahead(v0 + c + kTileChunk, 0, shares);
        else ahead(v0 + c + (i + 1) % panels * kTilePanel, (i + 1) / panels * kTileBlock, shares);
        tile_multiply(count, kTilePanel, rows_.data() + k, stride_, panel_.data(), depth, z + p, ldz, k > 0,
                      [this] { fetch(); });
      }
    }
  }

 private:
  // Packs steps [k, k + kTileBlock) of K of entries [begin, begin + 32), zero from `end` on.
  void read(std::int64_t begin, std::int64_t end, std::int64_t k) {
    const std::int64_t depth = std::min(width_ - k, kTileBlock), pairs = (depth + 1) / 2;
    const float* sources[kTilePanel];
    for (std::int64_t i = 0; i < kTilePanel; ++i) {
      sources[i] = zeros_.data();
      if (begin + i >= end) continue;
      const std::uint16_t* row = weight_ + (begin + i) * weight_stride_ + k;
      sources[i] = reinterpret_cast<const float*>(row);
      if (depth % 2 == 0) continue;
      float* copy = ends_.data() + i * kTileBlock / 2;  // what follows an odd row is another's
      copy[pairs - 1] = 0.0f;
      std::memcpy(copy, row, static_cast<std::size_t>(2 * depth));
      sources[i] = copy;
    }
    auto* panel = reinterpret_cast<float*>(panel_.data());
    pack_(sources, pairs, panel);
    std::fill(panel + pairs * kTilePanel, panel + whole_tiles(depth, kTileDepth) / 2 * kTilePanel, 0.0f);
  }

  // The 32 x 1 KB that are packed next are brought to L2 in shares, between the multiplications of this panel.
  void ahead(std::int64_t begin, std::int64_t k, std::int64_t shares) {
    next_ = weight_ + begin * weight_stride_ + k;
    next_rows_ = std::clamp<std::int64_t>(vocab_ - begin, 0, kTilePanel);
    next_bytes_ = 2 * std::min(width_ - k, kTileBlock);
    share_ = (next_rows_ + shares - 1) / shares;
  }

  void fetch() {
    const std::int64_t rows = std::min(share_, next_rows_);
    for (std::int64_t i = 0; i < rows; ++i, next_ += weight_stride_) {
      for (std::int64_t at = 0; at < next_bytes_; at += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(next_) + at, 0, 2);
    }
    next_rows_ -= rows;
  }

  const std::uint16_t* weight_;
  std::int64_t weight_stride_, width_, vocab_;
  Pack pack_;
  std::int64_t stride_;
  Scratch<std::uint16_t> rows_;
  Scratch<std::uint32_t> panel_;
  Scratch<float> ends_, zeros_;
  const std::uint16_t* next_ = nullptr;
  std::int64_t next_rows_ = 0, next_bytes_ = 0, share_ = 0;
};

}  // namespace srppo
