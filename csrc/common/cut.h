// How a result is cut into blocks, one a task: so that the thread which has most of them is done soonest.
//
// Of 2048 rows in seven blocks, as few as fit, one of two threads has four: it takes 8/7 of what four of eight would.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

namespace srppo {

// Rows or columns of a result.
struct Side {
  std::int64_t extent;
  std::int64_t most;     // a block
  std::int64_t unit;     // of which a block's size is a multiple
  std::int64_t packing;  // what a task does once, however long its block is on this side, as if it were so much longer

  std::int64_t blocks(std::int64_t size) const { return (extent + size - 1) / size; }
  std::int64_t fewest() const { return std::max<std::int64_t>(1, blocks(most)); }
  std::int64_t size_of(std::int64_t blocks) const {
    return std::max(unit, ((extent + blocks - 1) / blocks + unit - 1) / unit * unit);
  }
};

struct Block {
  std::int64_t rows, columns;
};

// Of cuts into up to two tasks a thread, or a little more than the fewest that fit, the one that is done soonest; of
// equal ones that of fewer blocks of rows, then of columns. A thread takes as many tasks as parallel_for deals to it: all of
// them by the number of threads, rounded up, and the last threads what is left.
inline Block cut_for(const Side& rows, const Side& columns, std::int64_t threads) {
  Block best{};
  std::int64_t least = std::numeric_limits<std::int64_t>::max();
  const auto last = [](const Side& side, std::int64_t wanted) {
    return std::max(side.fewest(), std::min(wanted, side.blocks(side.unit)));
  };
  for (std::int64_t r = rows.fewest(); r <= last(rows, std::max(rows.fewest() + threads, 2 * threads)); ++r) {
    for (std::int64_t c = columns.fewest(); c <= last(columns, (2 * threads + r - 1) / r); ++c) {
      const Block block{rows.size_of(r), columns.size_of(c)};
      const std::int64_t tasks = rows.blocks(block.rows) * columns.blocks(block.columns);
      const std::int64_t turns = (tasks + threads - 1) / threads;
      const std::int64_t cost = turns * (block.rows + rows.packing) * (block.columns + columns.packing);
      if (cost < least) {
        least = cost;
        best = block;
      }
    }
  }
  return best;
}

}  // namespace srppo
