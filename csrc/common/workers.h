// Threads that keep within a workspace: as many work at once as it has room for their scratch, and the others are idle.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>

#include <torch/csrc/stable/ops.h>

namespace srppo {

// What a kernel may take beyond its results, in bytes; without a bound, what all threads take.
inline std::int64_t workspace_of(std::optional<std::int64_t> bound) {
  return bound ? std::max<std::int64_t>(0, *bound) : std::numeric_limits<std::int64_t>::max();
}

inline std::int64_t threads_there() { return static_cast<std::int64_t>(torch::stable::get_num_threads()); }

// f(begin, end) over all tasks, on no more threads at once than `workspace` has room for `each`, but on one at least.
template <class F>
void parallel_within(std::int64_t workspace, std::int64_t each, std::int64_t tasks, const F& f) {
  const std::int64_t room = workspace / std::max<std::int64_t>(1, each);
  const std::int64_t workers = std::clamp<std::int64_t>(room, 1, threads_there());
  torch::stable::parallel_for(0, tasks, std::max<std::int64_t>(1, (tasks + workers - 1) / workers), f);
}

}  // namespace srppo
