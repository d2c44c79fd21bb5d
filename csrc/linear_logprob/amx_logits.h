// Logits of a block of bf16 rows over a part of the vocabulary, on AMX tiles, for amx_softmax.h.
//
// The head's rows are the left operand: a tile of them is 16 rows of 64 bytes. The hidden states are the right one,
// packed in pairs of K once a call. So nothing of the head is shuffled, and a register of sums has an entry a row and 16
// hidden states across: the softmax runs down columns, 16 hidden states a vector, and never across lanes.
//
//   for each 32 entries of the head:
//     for each part of K, of equal size and at most kTileBlock:    copy the entries' part
//       for each panel of 32 hidden states:                        multiply: sums [2 halves of the panel][32 entries][16]
//
// The copy's rows are an odd number of cache lines apart: heads are often a power of two wide, and the rows of a tile would
// share a set of L1. It stays in L1 while the panels stream from L2. A tile unit that multiplies leaves the core's vectors
// idle: between its steps a thread copies the entries that come next, and does what is to be done with the sums of the block
// before (the softmax).
//
// In use are 84 KB of the head, 1.6 MB of packed hidden states at most, unless 128 of them are more, and where K has several
// parts 128 bytes of sums a hidden state, in an L2 of 2 MB.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "../common/scratch.h"
#include "amx_tile.h"

namespace srppo {

constexpr std::int64_t kTileEntries = 2 * kTileRows;           // of the head, at a time
constexpr std::int64_t kTileSums = kTileEntries * kTilePanel;  // of a block
constexpr std::int64_t kTileHalf = kTileSums / 2;              // of its first 16 hidden states
// Hidden states of a task; the fewest also where threads share a small workspace.
constexpr std::int64_t kTilePackedBytes = 1600 << 10, kTileMostRows = 1024, kTileFewestRows = 128;

constexpr std::int64_t tile_row_block(std::int64_t width) {
  const std::int64_t fitting = kTilePackedBytes / std::max<std::int64_t>(1, 2 * whole_tiles(width, kTileDepth));
  return std::clamp(fitting / kTilePanel * kTilePanel, kTileFewestRows, kTileMostRows);
}

// Hidden states, packed: panel by panel, each as panel_word() says.
class TileRows {
 public:
  // 32 rows of `pairs` pairs of bf16, in the bits of a float, to a panel whose last tiles are filled up with zeros.
  using Pack = void (*)(const float* const* sources, std::int64_t pairs, float* panel);

  TileRows(std::int64_t width, std::int64_t rows)
      : width_(width), pairs_(whole_tiles(width, kTileDepth) / 2),
        data_(whole_tiles(rows, kTilePanel) * pairs_) {}

  std::int64_t panel_words() const { return kTilePanel * pairs_; }
  std::uint32_t* panel(std::int64_t number) { return data_.data() + number * panel_words(); }

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
    pack(sources, here, reinterpret_cast<float*>(panel(number)));
  }

 private:
  std::int64_t width_, pairs_;
  Scratch<std::uint32_t> data_;
};

// The head on its way to the tiles: 32 rows and a part of K at a time, zeros where there is none.
class TileHead {
 public:
  // `weight` is [vocab][stride], `width` of each row.
  TileHead(const std::uint16_t* weight, std::int64_t stride, std::int64_t width, std::int64_t vocab)
      : weight_(weight), weight_stride_(stride), width_(width), vocab_(vocab), depth_(part_of(width)),
        stride_(tile_stride(depth_)), copies_(2 * kTileEntries * stride_) {}

  // Steps of K of a part: whole tiles.
  static std::int64_t part_of(std::int64_t width) {
    const std::int64_t parts = (width + kTileBlock - 1) / kTileBlock;
    return parts ? whole_tiles((width + parts - 1) / parts, kTileDepth) : 0;
  }
  static constexpr std::int64_t kMostBytes = 4 * kTileEntries * tile_stride(kTileBlock);  // of the copies

  std::int64_t parts() const { return depth_ ? (width_ + depth_ - 1) / depth_ : 1; }
  std::int64_t begin_of(std::int64_t part) const { return part * depth_; }
  std::int64_t tiles_of(std::int64_t part) const {
    return whole_tiles(std::min(depth_, width_ - part * depth_), kTileDepth) / kTileDepth;
  }
  std::int64_t stride() const { return stride_; }

  // Entries from `v0` on are copied next, in some `turns` calls of fill(); those from `end` on are zeros.
  void copy_next(std::int64_t v0, std::int64_t end, std::int64_t part, std::int64_t turns) {
    const std::int64_t k = part * depth_, lines = tiles_of(part);
    row_ = reinterpret_cast<const char*>(weight_ + v0 * weight_stride_ + k);
    row_bytes_ = 2 * std::min(depth_, width_ - k);
    rows_ = std::clamp<std::int64_t>(std::min(end, vocab_) - v0, 0, kTileEntries);
    left_ = lines > 0 ? kTileEntries : 0;
    at_ = 0;
    to_ = reinterpret_cast<char*>(copies_.data() + (1 - current_) * kTileEntries * stride_);
    share_ = (kTileEntries * lines + turns - 1) / std::max<std::int64_t>(1, turns);
  }

  // A share of it, line by line. What is copied after it, 32 rows further down, is brought to L2 meanwhile.
  __attribute__((always_inline)) void fill() {
    for (std::int64_t i = 0; i < share_ && left_ > 0; ++i) line();
  }

  // The rest of it; where it is.
  const std::uint16_t* take() {
    while (left_ > 0) line();
    current_ = 1 - current_;
    return copies_.data() + current_ * kTileEntries * stride_;
  }

 private:
  __attribute__((always_inline)) void line() {
    const std::int64_t bytes = row_bytes_ - at_;
    if (rows_ > 0 && bytes >= 64) {
      __builtin_prefetch(row_ + at_ + kTileEntries * 2 * weight_stride_, 0, 2);
      std::memcpy(to_ + at_, row_ + at_, 64);
    } else {
      std::memset(to_ + at_, 0, 64);
      // A row's end, number by number, and no call: around one the caller's vectors would leave their registers.
      for (std::int64_t i = 0; rows_ > 0 && i < bytes; i += 2) {
        std::memcpy(to_ + at_ + i, row_ + at_ + i, 2);
        asm volatile("" : : : "memory");  // else it becomes one
      }
    }
    at_ += 64;
    if (at_ < row_bytes_) return;
    at_ = 0;
    row_ += 2 * weight_stride_;
    to_ += 2 * stride_;
    --rows_;
    --left_;
  }

  const std::uint16_t* weight_;
  std::int64_t weight_stride_, width_, vocab_, depth_, stride_;
  Scratch<std::uint16_t> copies_;
  std::int64_t current_ = 0;  // the copy in use; the other is filled
  const char* row_ = nullptr;
  char* to_ = nullptr;
  std::int64_t row_bytes_ = 0, at_ = 0, rows_ = 0, left_ = 0, share_ = 0;
};

// The products of a block, as something that goes on a step of 32 of K at a time beside other work.
class TileSteps {
 public:
  TileSteps(TileHead& head, const std::uint16_t* x, const std::uint32_t* panel, std::int64_t steps)
      : head_(head), x_(x), panel_(panel), left_(steps), bytes_(2 * head.stride()) {
    clear_sums<true>();
  }

  __attribute__((always_inline)) void step() {
    if (left_ == 0) return;
    --left_;
    tile_step<true>(x_, x_ + kTileRows * bytes_ / 2, bytes_, panel_);
    x_ += kTileDepth;
    panel_ += kTileDepth / 2 * kTilePanel;
    head_.fill();
  }

  // Sums of all steps, by halves of the hidden states: [2][32 entries][16].
  void store(float* sums) {
    while (left_ > 0) step();
    tiles::store<C00>(sums, tiles::kRowBytes);
    tiles::store<C10>(sums + kTileRows * 16, tiles::kRowBytes);
    tiles::store<C01>(sums + kTileHalf, tiles::kRowBytes);
    tiles::store<C11>(sums + kTileHalf + kTileRows * 16, tiles::kRowBytes);
  }

 private:
  TileHead& head_;
  const std::uint16_t* x_;
  const std::uint32_t* panel_;
  std::int64_t left_, bytes_;
};

// z += sums, of a block, beside the products of another.
SRPPO_BESIDE_TILES inline void add_beside(TileSteps& beside, float* z, const float* sums) {
  for (std::int64_t i = 0; i < kTileSums; i += 2 * kTilePanel) {
    beside.step();
    add_block(sums + i, 2, kTilePanel, z + i, kTilePanel, true);
  }
}

// A thread's sums: of the last block and of the one before it, and where K has several parts of all panels.
struct TileBlocks {
  Scratch<float> last, all;

  TileBlocks(std::int64_t parts, std::int64_t panels) : last(2 * kTileSums), all(parts > 1 ? panels * kTileSums : 0) {}
};

// Calls done(beside, z, sums, p, begin, entries) for each block of `panels` panels and entries [v0, v0 + size), beside the
// products of the next one: panel p and entries [begin, begin + entries), counted from v0, in z [2][32][16] and, unless it
// is nullptr, in `sums`, which are still to be added. The head has been told of v0, and is told of entries from `next` on,
// up to `next_end`, in the end. The caller holds tiles::InUse.
template <class Done>
void each_block(TileHead& head, const std::uint32_t* first_panel, std::int64_t panel_words, std::int64_t panels,
                std::int64_t v0, std::int64_t size, std::int64_t next, std::int64_t next_end, TileBlocks& blocks,
                const Done& done) {
  const std::int64_t parts = head.parts();
  struct {
    float* z = nullptr;
    const float* sums = nullptr;
    std::int64_t panel = 0, begin = 0, entries = 0;
    bool whole = false;  // all parts of K but for `sums`
  } before;
  const auto finish = [&](TileSteps& beside) {
    if (!before.z) return;
    if (before.whole) done(beside, before.z, before.sums, before.panel, before.begin, before.entries);
    else add_beside(beside, before.z, before.sums);
    before.z = nullptr;
  };
  std::int64_t slot = 0;
  for (std::int64_t begin = 0; begin < size; begin += kTileEntries) {
    const std::int64_t entries = std::min(kTileEntries, size - begin);
    const bool more = begin + kTileEntries < size;
    for (std::int64_t part = 0; part < parts; ++part) {
      const std::uint16_t* x = head.take();
      const std::int64_t steps = head.tiles_of(part);
      if (part + 1 < parts) head.copy_next(v0 + begin, v0 + size, part + 1, panels * steps);
      else if (more) head.copy_next(v0 + begin + kTileEntries, v0 + size, 0, panels * steps);
      else head.copy_next(next, next_end, 0, panels * steps);
      for (std::int64_t p = 0; p < panels; ++p) {
        const std::uint32_t* panel = first_panel + p * panel_words + head.begin_of(part) / 2 * kTilePanel;
        TileSteps products(head, x, panel, steps);
        finish(products);
        float *last = blocks.last.data() + slot * kTileSums, *z = parts > 1 ? blocks.all.data() + p * kTileSums : last;
        products.store(part > 0 ? last : z);
        slot = 1 - slot;
        if (part == 0 && parts > 1) continue;
        before.z = z, before.sums = part > 0 ? last : nullptr;
        before.panel = p, before.begin = begin, before.entries = entries, before.whole = part + 1 == parts;
      }
    }
  }
  TileSteps none(head, nullptr, nullptr, 0);
  finish(none);
}

}  // namespace srppo
