// Preloaded by tests/sanitize.sh: torch's parallel loops on four threads that ThreadSanitizer knows of. It takes those of an
// OpenMP that was not built with it for threads that never wait for each other.
#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

#define INSTEAD_OF_TORCHS extern "C" __attribute__((visibility("default")))

constexpr std::int64_t kThreads = 4;
static thread_local bool inside = false;

INSTEAD_OF_TORCHS std::int32_t torch_get_num_threads(std::uint32_t* count) {
  *count = kThreads;
  return 0;
}

INSTEAD_OF_TORCHS std::int32_t torch_parallel_for(std::int64_t begin, std::int64_t end, std::int64_t grain,
                                                  void (*body)(std::int64_t, std::int64_t, void*), void* context) {
  if (begin >= end) return 0;
  const std::int64_t tasks = end - begin, parts = std::min(kThreads, grain > 0 ? (tasks + grain - 1) / grain : tasks);
  if (parts == 1 || inside) {
    body(begin, end, context);
    return 0;
  }
  const std::int64_t each = (tasks + parts - 1) / parts;
  std::vector<std::thread> threads;
  for (std::int64_t from = begin; from < end; from += each) {
    threads.emplace_back([=] {
      inside = true;
      body(from, std::min(end, from + each), context);
    });
  }
  for (std::thread& thread : threads) thread.join();
  return 0;
}

// Two threads at one number: what ThreadSanitizer has to find before it is believed.
INSTEAD_OF_TORCHS int race() {
  int number = 0;
  std::thread first([&] { ++number; }), second([&] { ++number; });
  first.join();
  second.join();
  return number;
}
