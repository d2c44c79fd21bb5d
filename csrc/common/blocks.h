// The valid stretch of every row, cut into blocks of fixed size: the unit of work and of summation.
//
// Blocks start at the row's first valid token and partial sums are joined in block order. So neither the thread count nor
// padding, left, right or whole rows of it, changes one bit of a sum.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include <torch/csrc/stable/ops.h>

namespace srppo {

// Of a mask from begin on, as bytes: that of a tensor which was viewed as bool may be any number but 0.
inline std::uint64_t eight_of(const bool* mask, std::int64_t begin) {
  std::uint64_t eight;
  std::memcpy(&eight, mask + begin, 8);
  return eight;
}

inline bool is_valid(const bool* mask, std::int64_t at) {
  return reinterpret_cast<const unsigned char*>(mask)[at] != 0;
}

// The first valid token, or `end` if there is none. Padding is long: eight tokens at a time.
inline std::int64_t begin_of_valid(const bool* mask, std::int64_t begin, std::int64_t end) {
  while (end - begin >= 8 && !eight_of(mask, begin)) begin += 8;
  while (begin < end && !is_valid(mask, begin)) ++begin;
  return begin;
}

// One past the last valid token, or `begin` if there is none.
inline std::int64_t end_of_valid(const bool* mask, std::int64_t begin, std::int64_t end) {
  while (end - begin >= 8 && !eight_of(mask, end - 8)) end -= 8;
  while (end > begin && !is_valid(mask, end - 1)) --end;
  return end;
}

// Eight bytes are brought to 0 or 1 and added by one product, whose top byte is their sum. Widened one by one, 32768
// tokens took a fifth of a policy loss.
inline std::int64_t count_valid(const bool* mask, std::int64_t begin, std::int64_t end) {
  std::int64_t count = 0;
  for (; end - begin >= 8; begin += 8) {
    std::uint64_t eight = eight_of(mask, begin);
    eight |= eight >> 4;
    eight |= eight >> 2;
    eight |= eight >> 1;
    count += static_cast<std::int64_t>(((eight & 0x0101010101010101u) * 0x0101010101010101u) >> 56);
  }
  for (; begin < end; ++begin) count += is_valid(mask, begin);
  return count;
}

// The least that is worth a thread: 30 us of work or so. Waking one costs 10 us, and far more on a busy machine.
constexpr std::int64_t kTokensPerThread = 16384;

struct Block {
  std::int64_t row;
  std::int64_t begin, end;             // tokens to compute, as offsets into the flat tensor
  std::int64_t clear_from, clear_to;   // outputs in [clear_from, begin) and [end, clear_to) are 0
};

struct Blocks {
  static constexpr std::int64_t size = 2048;  // tokens: inputs and outputs of a block stay in L1 and L2

  std::vector<Block> list;
  std::vector<std::int64_t> lengths;  // valid tokens of each row
  std::int64_t valid = 0, rows_with_tokens = 0;

  Blocks(const bool* mask, std::int64_t rows, std::int64_t steps) : lengths(static_cast<std::size_t>(rows)) {
    list.reserve(static_cast<std::size_t>(rows * (1 + steps / size)));
    for (std::int64_t row = 0; row < rows; ++row) {
      const std::int64_t row_begin = row * steps, row_end = row_begin + steps;
      const std::int64_t first = begin_of_valid(mask, row_begin, row_end);
      const std::int64_t last = end_of_valid(mask, first, row_end);
      const std::int64_t length = count_valid(mask, first, last);
      lengths[static_cast<std::size_t>(row)] = length;
      valid += length;
      rows_with_tokens += length > 0;
      std::int64_t at = first;
      do {
        const std::int64_t end = std::min(at + size, last);
        list.push_back({row, at, end, at == first ? row_begin : at, end == last ? row_end : end});
        at = end;
      } while (at < last);
    }
  }

  // f(block, index) for every block, in parallel.
  template <class F>
  void each(const F& f) const {
    std::int64_t tokens = 0;
    for (const Block& block : list) tokens += block.clear_to - block.clear_from;
    const auto blocks = static_cast<std::int64_t>(list.size());
    const std::int64_t grain = std::max<std::int64_t>(1, blocks * kTokensPerThread / std::max<std::int64_t>(tokens, 1));
    torch::stable::parallel_for(0, blocks, grain, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) f(list[static_cast<std::size_t>(i)], static_cast<std::size_t>(i));
    });
  }
};

inline void clear_outside(const Block& block, float* out) {
  std::fill(out + block.clear_from, out + block.begin, 0.0f);
  std::fill(out + block.end, out + block.clear_to, 0.0f);
}

}  // namespace srppo
