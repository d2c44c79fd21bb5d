// The index arithmetic of sm90_kernel.h: which tile is computed when and by whom, which slot of the ring it comes through, where
// its elements lie in shared memory and which thread holds which logit. Plain constexpr C++, so that
// tests/linear_logprob/test_sm90_tables.py runs on the host what the device runs.
#pragma once

#include <cstdint>

namespace srppo::sm90 {

constexpr int kRows = 128;       // of a tile of logits
constexpr int kColumns = 128;
constexpr int kDepth = 64;       // of K that a stage holds: 128 bytes a row, the width of the swizzle
constexpr int kStep = 16;        // of K that a WGMMA takes
constexpr int kHalf = 64;        // rows of a WGMMA
constexpr int kConsumers = 2;    // warp groups in ping-pong
constexpr int kPart = 32;        // columns of a tile that are absorbed at a time and share a kept maximum
constexpr int kBand = 16;        // row blocks that go through the vocabulary together

// Shared memory: 7 stages of an X and a W tile, two barriers a stage and one a consumer, and what aligning the stages to 1024
// bytes may cost.
constexpr int kOperandBytes = 128 * kDepth * 2;
constexpr int kStageBytes = 2 * kOperandBytes;
constexpr int kStages = 7;
constexpr int kAlignment = 1024;  // a period of the swizzle: 8 rows of 128 bytes
constexpr int kSharedBytes = kStages * kStageBytes + (2 * kStages + kConsumers) * 8 + kAlignment;
static_assert(kSharedBytes <= 227 * 1024, "a block of sm_90 has 227 KiB");
static_assert(kRows == kColumns, "X and W tiles have one size");

// Slots --------------------------------------------------------------------------------------------------------------

// A place in the endless sequence of stages that the producer fills: the slot, and the parity of its use.
struct Ring {
  int stage = 0;
  std::uint32_t phase = 0;

  constexpr void next() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
  constexpr void skip(int stages) {
    stage += stages;
    const int laps = stage / kStages;
    stage -= laps * kStages;
    phase ^= static_cast<std::uint32_t>(laps) & 1;
  }
};

// Order --------------------------------------------------------------------------------------------------------------

// What a cluster does at a time: a row block against one vocabulary group a consumer and block.
struct Unit {
  int block;  // of rows
  int group;  // of consumer 0 in the cluster's block 0
};

// A tile of a unit, in the order in which a block computes them.
struct Turn {
  int consumer, tile;
};

struct Schedule {
  int blocks;   // that hold a live row
  int vocab;
  int group;    // entries of a vocabulary group, a multiple of kColumns
  int cluster;  // blocks of a cluster

  constexpr int width() const { return kConsumers * cluster; }  // groups of a unit
  constexpr int groups() const { return (vocab + group - 1) / group; }
  constexpr int units_a_block() const { return (groups() + width() - 1) / width(); }
  constexpr int units() const { return blocks * units_a_block(); }

  // Row blocks run fastest within a band of kBand: clusters that run at one time share the band's rows and a few weight
  // tiles, and both stay in L2. triton_scan.py has the same order.
  constexpr Unit unit(int i) const {
    const int band = i / (kBand * units_a_block());
    const int first = band * kBand, left = blocks - first, wide = left < kBand ? left : kBand;
    const int within = i - first * units_a_block();
    return {first + within % wide, within / wide * width()};
  }

  constexpr int group_of(Unit unit, int consumer, int rank) const { return unit.group + consumer * cluster + rank; }

  // Column tiles of a consumer. Blocks of a cluster run as many as the first, whose group is the longest: they share the
  // loads of X. Only tiles at the end of the vocabulary are computed in vain.
  constexpr int tiles(Unit unit, int consumer) const {
    const int entries = vocab - group_of(unit, consumer, 0) * group;
    const int mine = entries < 0 ? 0 : entries < group ? entries : group;
    return (mine + kColumns - 1) / kColumns;
  }

  // Consumers take turns, 0 1 0 1 ..., until consumer 1, whose group comes later and may be shorter, has none left.
  static constexpr Turn turn(int i, int tiles_of_1) {
    return i < 2 * tiles_of_1 ? Turn{i & 1, i >> 1} : Turn{0, i - tiles_of_1};
  }
  // Whether the turn after this one is the other consumer's. After the unit's last comes consumer 0's first of the next.
  static constexpr bool hands_over(Turn t, int tiles_of_1) { return t.consumer == 1 || t.tile < tiles_of_1; }
  // The inverse of `turn`: a tile's place in that order.
  static constexpr int place(Turn t, int tiles_of_1) {
    return t.consumer == 1 ? 2 * t.tile + 1 : t.tile + (t.tile < tiles_of_1 ? t.tile : tiles_of_1);
  }
};

// Shared memory ------------------------------------------------------------------------------------------------------

// Byte of element (row, k) in an operand's tile, as TMA writes it with a 128-byte swizzle: the 16-byte chunk of a row is
// XORed with the row's number modulo 8.
constexpr int tma_byte(int row, int k) { return row * 128 + (((k / 8) ^ (row % 8)) * 16) + k % 8 * 2; }

// WGMMA's matrix descriptor of a K-major operand with a 128-byte swizzle, for the 14-bit fields in units of 16 bytes:
// start address in bits 0 to 13; leading dimension offset in bits 16 to 29, 0 as this layout does not use it; stride from
// 8 rows to the next 8 in bits 32 to 45: 1024 bytes; base offset in bits 49 to 51: 0, as tiles are aligned to 1024 bytes;
// swizzle mode in bits 62 and 63: 1 is 128 bytes.
constexpr std::uint64_t kStride = 8 * 128;
constexpr std::uint64_t descriptor(std::uint32_t address) {
  return (address & 0x3ffffu) >> 4 | kStride / 16 << 32 | std::uint64_t{1} << 62;
}

// What is added to a descriptor to start `rows` further down (a multiple of 8) and `k` further right (of 16, within the
// stage): the hardware swizzles the address that it has computed, so an offset inside the 128 bytes is a plain addition.
constexpr std::uint64_t advance(int rows, int k) { return static_cast<std::uint64_t>(rows * 128 + k * 2) / 16; }

// The address that WGMMA reads for element (row, k) of the operand that a descriptor points to.
constexpr std::uint32_t wgmma_byte(std::uint64_t descriptor, int row, int k) {
  const auto start = static_cast<std::uint32_t>(descriptor & 0x3fff) << 4;
  const auto stride = static_cast<std::uint32_t>(descriptor >> 32 & 0x3fff) << 4;
  const std::uint32_t linear = start + row / 8 * stride + row % 8 * 128 + k * 2;
  return linear ^ (linear >> 7 & 7) << 4;
}

// Registers ----------------------------------------------------------------------------------------------------------

// A thread holds 4 rows of a tile, and of each 8 columns of a part: `acc[half][j]` of wgmma.m64n128k16 are rows
// lane / 4 and lane / 4 + 8 of the warp's 16, and two columns of every 8.
constexpr int kThreadRows = 4;
constexpr int kEntries = kPart / 4;

constexpr int first_row(int thread) { return thread / 32 * 16 + thread % 32 / 4; }
constexpr int row_offset(int slot) { return slot / 2 * kHalf + slot % 2 * 8; }  // from a thread's first row
// Column of entry `i`, 0 to 31, of a row.
constexpr int column_of(int thread, int i) { return i / 2 * 8 + thread % 4 * 2 + i % 2; }
// Accumulator, within its half, of entry `i` of row slot `slot`.
constexpr int register_of(int slot, int i) { return i / 2 * 4 + slot % 2 * 2 + i % 2; }

}  // namespace srppo::sm90
