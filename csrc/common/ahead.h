// Lines of memory that are fetched to L2 during a multiplication, spread over its steps: of a burst of prefetches a CPU
// drops what its queue of misses has no room for. On a Zen 5 a burst of 50 lines before each tile gave nothing.
//
// Passed by reference and not copied: a copy reads back by 16 bytes what was stored by 8, and waits until the stores
// before it, which may be to memory, are done. At 128 rows dweight took 1.25 times as long.
#pragma once

#include <algorithm>
#include <cstdint>

namespace srppo {

struct Ahead {
  const char* at = nullptr;
  std::int64_t step = 0, count = 0;  // bytes from line to line; lines
  std::int64_t every = 1 << 20;      // steps of the multiplication a line

  Ahead() = default;
  Ahead(const void* first, std::int64_t bytes, std::int64_t lines, std::int64_t steps)
      : at(static_cast<const char*>(first)), step(bytes), count(lines),
        every(std::max<std::int64_t>(1, steps / std::max<std::int64_t>(1, lines))) {}

  // What `steps` have left for those after them.
  Ahead after(std::int64_t steps) const {
    const std::int64_t fetched = std::min(count, (steps + every - 1) / every);
    Ahead rest;
    rest.at = at + fetched * step;
    rest.step = step;
    rest.count = count - fetched;
    rest.every = every;
    return rest;
  }
};

}  // namespace srppo
