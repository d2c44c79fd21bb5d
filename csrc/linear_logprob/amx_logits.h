// Logits of a block of bf16 rows over a part of the vocabulary, on AMX tiles, for amx_softmax.h.
//
// The head's rows are the left operand: a tile of them is 16 rows of 64 bytes as they lie in memory. The hidden states
// are the right one, packed in pairs of K once a call. So nothing of the head is shuffled, and a register of sums has
// an entry a row and 16 hidden states across: the softmax runs down columns, 16 hidden states a vector, and never
// across lanes.
//
//   z of a panel of 32 hidden states:  [entries][32]
//
// kTileChunk entries at a time, K in blocks of kTileBlock, and within these a panel over all entries. The chunk's rows
// are copied first, an odd number of cache lines apart: heads are often a power of two wide, and the rows of a tile
// would share a set of L1. In use are then 336 KB of the head, and of each hidden state 1.25 KB and 1 KB of logits:
// 1.5 MB with 512 of them, in an L2 of 2 MB, where the softmax finds the logits.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "../common/scratch.h"
#include "amx_tile.h"

namespace srppo {

constexpr std::int64_t kTileRowBlock = 512;  // hidden states a task
constexpr std::int64_t kTileChunk = 256;     // entries: 32 KB of logits a panel

// Hidden states, packed: panel by panel, [K in whole tiles / 2][32] pairs each.
class TileRows {
 public:
  // fp32_tile.h's pack_panel, for pairs of bf16 in the bits of a float: 32 rows of `steps` to [steps][32].
  using Pack = void (*)(const float* const* sources, std::int64_t steps, float* panel);

  TileRows(std::int64_t width, std::int64_t rows)
      : width_(width), pairs_(whole_tiles(width, kTileDepth) / 2),
        data_(whole_tiles(rows, kTilePanel) * pairs_) {}

  const std::uint32_t* panel(std::int64_t number) { return data_.data() + number * kTilePanel * pairs_; }

  // `x.row(i)` is where a row begins, and `row_at(r)` the i of the r-th; rows from `count` on are 0.
  template <class Rows, class RowAt>
  void set_panel(std::int64_t number, const Rows& x, std::int64_t count, const RowAt& row_at, Pack pack) {
    const std::int64_t here = (width_ + 1) / 2;
    Scratch<float> ends(width_ % 2 ? kTilePanel * here : 0), zeros(here);
    std::fill(zeros.data(), zeros.data() + here, 0.0f);
    const float* sources[kTilePanel];
    for (std::int64_t i = 0; i < kTilePanel; ++i) {
      sources[i] = zeros.data();
      if (number * kTilePanel + i >= count) continue;
      const auto* row = x.row(row_at(number * kTilePanel + i));
      sources[i] = reinterpret_cast<const float*>(row);
      if (width_ % 2 == 0) continue;
      float* copy = ends.data() + i * here;  // what follows an odd row is another's
      copy[here - 1] = 0.0f;
      std::memcpy(copy, row, static_cast<std::size_t>(2 * width_));
      sources[i] = copy;
    }
    auto* to = reinterpret_cast<float*>(data_.data() + number * kTilePanel * pairs_);
    pack(sources, here, to);
    std::fill(to + here * kTilePanel, to + pairs_ * kTilePanel, 0.0f);
  }

 private:
  std::int64_t width_, pairs_;
  Scratch<std::uint32_t> data_;
};

class TileLogits {
  static constexpr std::int64_t kStride = tile_stride(kTileBlock);

 public:
  static constexpr std::int64_t kCopyBytes = 2 * kTileChunk * kStride;

  // `weight` is [vocab][stride], `width` of each row.
  TileLogits(const std::uint16_t* weight, std::int64_t stride, std::int64_t width, std::int64_t vocab)
      : weight_(weight), weight_stride_(stride), width_(width), vocab_(vocab), copy_(kTileChunk * kStride) {}

  // z[panels][kTileChunk][32] of entries [v0, v0 + size), size <= kTileChunk; `next` is where the next call's begin.
  // The caller holds tiles::InUse.
  void multiply(TileRows& rows, std::int64_t first_panel, std::int64_t panels, std::int64_t v0, std::int64_t size,
                std::int64_t next, float* z) {
    std::int64_t k = 0;
    do {  // once where K is empty, for the zeros
      const std::int64_t depth = std::min(width_ - k, kTileBlock), whole = whole_tiles(depth, kTileDepth);
      const std::int64_t tiles_here = whole_tiles(size, kTileRows);
      for (std::int64_t i = 0; i < tiles_here; ++i) {
        std::uint16_t* to = copy_.data() + i * kStride;
        const std::int64_t filled = i < size ? depth : 0;
        std::memcpy(to, weight_ + (v0 + i) * weight_stride_ + k, static_cast<std::size_t>(2 * filled));
        std::fill(to + filled, to + whole, std::uint16_t{0});
      }
      const bool last = k + kTileBlock >= width_;
      ahead(last ? next : v0, last ? 0 : k + kTileBlock, panels * ((size + 2 * kTileRows - 1) / (2 * kTileRows)));
      for (std::int64_t p = 0; p < panels; ++p) {
        tile_multiply(size, kTilePanel, copy_.data(), kStride, rows.panel(first_panel + p) + k / 2 * kTilePanel, whole,
                      z + p * kTileChunk * kTilePanel, kTilePanel, k > 0, [this] { fetch(); });
      }
      k += kTileBlock;
    } while (k < width_);
  }

 private:
  // What is copied next is brought to L2 in shares, between the multiplications.
  void ahead(std::int64_t begin, std::int64_t k, std::int64_t shares) {
    next_ = weight_ + begin * weight_stride_ + k;
    next_rows_ = std::clamp<std::int64_t>(vocab_ - begin, 0, kTileChunk);
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
  Scratch<std::uint16_t> copy_;
  const std::uint16_t* next_ = nullptr;
  std::int64_t next_rows_ = 0, next_bytes_ = 0, share_ = 0;
};

}  // namespace srppo
