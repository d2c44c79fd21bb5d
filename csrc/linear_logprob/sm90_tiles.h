// The index arithmetic of sm90_kernel.h: which tile is computed when and by whom, where its elements lie in shared memory and
// which thread holds which logit. Plain constexpr C++, so that tests/linear_logprob/test_sm90_tables.py runs on the host what
// the device runs.
#pragma once

#include <cstdint>

namespace srppo::sm90 {

constexpr int kRows = 128;  // of a tile of logits
constexpr int kColumns = 192;
constexpr int kDepth = 64;      // of K that a stage holds: 128 bytes a row, the width of the swizzle
constexpr int kStep = 16;       // of K that a WGMMA takes
constexpr int kBlockSteps = 8;  // stages that the tensor cores add up, which truncate; then their sum is added, rounded
constexpr int kConsumers = 2;   // warp groups, one above the other
constexpr int kHalf = kRows / kConsumers;
constexpr int kBand = 16;  // row blocks that go through the vocabulary together
static_assert(kHalf == 64, "a WGMMA has 64 rows");

// Shared memory: 5 stages of an X and a W tile, for every consumer's warp half of its tile's exponentials on their way out, two
// barriers a stage, one for the start, and what aligning the stages to 1024 bytes may cost.
constexpr int kXBytes = kRows * kDepth * 2, kWBytes = kColumns * kDepth * 2;
constexpr int kStageBytes = kXBytes + kWBytes;
constexpr int kStages = 5;
constexpr int kAlignment = 1024;  // a period of the swizzle: 8 rows of 128 bytes
constexpr int kWarpRows = kHalf / 4;
constexpr int kPart = 32;  // columns of what TMA stores at a time
constexpr int kHalfParts = kColumns / 2 / kPart, kHalfBlocks = kColumns / 2 / 8;
constexpr int kPartBytes = kWarpRows * kPart * 2, kKeptBytes = kHalfParts * kPartBytes;
constexpr int kSharedBytes =
    kStages * kStageBytes + 4 * kConsumers * kKeptBytes + (2 * kStages + 1) * 8 + kAlignment;
static_assert(kSharedBytes <= 227 * 1024, "a block of sm_90 has 227 KiB");
static_assert(kXBytes % kAlignment == 0 && kWBytes / 2 % kAlignment == 0, "half of a W tile is whole periods");
static_assert(kColumns % (2 * kPart) == 0 && kPartBytes % 512 == 0, "a part is whole periods of its swizzle");

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
};

// Order --------------------------------------------------------------------------------------------------------------

// What a cluster does at a time: as many row blocks as it has blocks, against one vocabulary group.
struct Unit {
  int block;  // of rows, of the cluster's block 0
  int group;
};

struct Schedule {
  int blocks;   // that hold a live row
  int vocab;
  int group;    // entries of a vocabulary group, a multiple of kColumns
  int cluster;  // blocks of a cluster

  constexpr int groups() const { return (vocab + group - 1) / group; }
  constexpr int sets() const { return (blocks + cluster - 1) / cluster; }  // of row blocks
  constexpr int units() const { return sets() * groups(); }

  // Row blocks run fastest within a band of kBand: clusters that run at one time share the band's rows and a few weight
  // tiles, and both stay in L2. triton_scan.py has the same order.
  constexpr Unit unit(int i) const {
    const int whole = kBand / cluster, band = i / (whole * groups());
    const int first = band * whole, left = sets() - first, wide = left < whole ? left : whole;
    const int within = i - first * groups();
    return {(first + within % wide) * cluster, within / wide};
  }

  constexpr int tiles(Unit unit) const {
    const int entries = vocab - unit.group * group;
    return ((entries < group ? entries : group) + kColumns - 1) / kColumns;
  }
};

// Shared memory ------------------------------------------------------------------------------------------------------

// Byte of element (row, k) in an operand's tile, as TMA writes it with a 128-byte swizzle: the 16-byte chunk of a row is
// XORed with the row's number modulo 8.
constexpr int tma_byte(int row, int k) { return row * 128 + (((k / 8) ^ (row % 8)) * 16) + k % 8 * 2; }

// Byte of 8 columns of a row in a part of kept exponentials, as TMA reads it with a 64-byte swizzle: the 16-byte chunk of a row
// is XORed with half the row's number modulo 4. So the 8 rows of a matrix that stmatrix stores lie in different banks.
constexpr std::uint32_t kept_byte(int row, int chunk) { return row * kPart * 2 + (chunk ^ row / 2 % 4) * 16; }

// WGMMA's descriptor of a K-major operand with that swizzle: address / 16 in bits 0 to 13; bytes / 16 from 8 rows to the
// next 8 in bits 32 to 45; base offset in bits 49 to 51: 0, as tiles are aligned to 1024 bytes;
// swizzle mode in bits 62 and 63: 1 is 128 bytes. Operands differ in the lower half alone.
constexpr std::uint32_t kDescriptorHigh = 8 * 128 / 16 | 1u << 30;
constexpr std::uint32_t descriptor(std::uint32_t address) { return (address & 0x3ffffu) >> 4; }

// What is added to a descriptor to start `rows` further down (a multiple of 8) and `k` further right (of 16, within the
// stage): the hardware swizzles the address that it has computed, so an offset inside the 128 bytes is a plain addition.
constexpr std::uint32_t advance(int rows, int k) { return static_cast<std::uint32_t>(rows * 128 + k * 2) / 16; }

// The address that WGMMA reads for element (row, k) of the operand that a descriptor points to.
constexpr std::uint32_t wgmma_byte(std::uint32_t descriptor, int row, int k) {
  const std::uint32_t start = (descriptor & 0x3fff) << 4, stride = (kDescriptorHigh & 0x3fff) << 4;
  const std::uint32_t linear = start + row / 8 * stride + row % 8 * 128 + k * 2;
  return linear ^ (linear >> 7 & 7) << 4;
}

// Registers ----------------------------------------------------------------------------------------------------------

// A thread holds 2 rows of its consumer's 64 and of each a quarter of the columns: accumulators of wgmma.m64n192k16 are rows
// lane / 4 and lane / 4 + 8 of the warp's 16, and two columns of every 8.
constexpr int kThreadRows = 2;
constexpr int kRowLogits = kColumns / 4, kLogits = kThreadRows * kRowLogits;

constexpr int first_row(int thread) { return thread / 32 * 16 + thread % 32 / 4; }
constexpr int row_offset(int slot) { return slot * 8; }  // from a thread's first row
// Column of logit `i`, 0 to 47, of a row.
constexpr int column_of(int thread, int i) { return i / 2 * 8 + thread % 4 * 2 + i % 2; }
// Accumulator of logit `i` of row slot `slot`.
constexpr int register_of(int slot, int i) { return i / 2 * 4 + slot * 2 + i % 2; }

}  // namespace srppo::sm90
