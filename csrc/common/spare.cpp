// Large tensors of CPU ops in memory that is used again: srppo_kernels/linear_logprob/spare.py says what for.
//
// malloc takes a large block from the system and gives it back at once. The system clears it page by page, at the first
// write to each: 0.9 to 2.2 us a page. A block that comes back here keeps its pages but lets the system take them when it
// is short of memory (MADV_FREE); until then a write to one costs a tenth of that.
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

#include <pthread.h>
#include <sys/mman.h>

#include <torch/csrc/stable/ops.h>

#include "tensors.h"

namespace srppo {
namespace {

constexpr std::size_t kPage = 4096, kMostBlocks = 4, kMostBytes = std::size_t{4} << 30;  // kept, in all

// Whole pages of the system's.
struct Block {
  void* data;
  std::size_t bytes;

  static Block map(std::size_t bytes) {
    void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return {data == MAP_FAILED ? nullptr : data, bytes};
  }

  void unmap() const { munmap(data, bytes); }

  // Whether the system may take the pages from now on, with what is in them, and until then leaves them.
  bool lend() const {
#if defined(MADV_FREE)
    return madvise(data, bytes, MADV_FREE) == 0;
#else
    return false;
#endif
  }
};

class Blocks;
Blocks& blocks();

class Blocks {
 public:
  Blocks() {
    free_.reserve(kMostBlocks + 1);
    // A child must not get the lock as another thread of its parent held it.
    pthread_atfork([] { blocks().mutex_.lock(); }, [] { blocks().mutex_.unlock(); }, [] { blocks().mutex_.unlock(); });
  }

  // The smallest that is large enough, and at most half empty; or a new one.
  Block take(std::size_t bytes) {
    {
      const std::lock_guard lock(mutex_);
      auto best = free_.end();
      for (auto block = free_.begin(); block != free_.end(); ++block) {
        const bool fits = block->bytes >= bytes && block->bytes / 2 <= bytes;
        if (fits && (best == free_.end() || block->bytes < best->bytes)) best = block;
      }
      if (best != free_.end()) {
        const Block found = *best;
        free_.erase(best);
        return found;
      }
    }
    Block made = Block::map(bytes);
    if (!made.data) {  // where addresses are limited, or memory is not promised twice
      drop();
      made = Block::map(bytes);
    }
    STD_TORCH_CHECK(made.data, "srppo_native: no memory for a tensor of ", bytes, " bytes");
    return made;
  }

  // The oldest go.
  void give_back(const Block& block) {
    if (block.bytes <= kMostBytes && block.lend()) keep_newest(&block, kMostBlocks, kMostBytes);
    else block.unmap();
  }

  void drop() { keep_newest(nullptr, 0, 0); }

 private:
  // Of the free ones and `more`; what goes is unmapped without the lock, as that takes milliseconds.
  void keep_newest(const Block* more, std::size_t most_blocks, std::size_t most_bytes) {
    std::array<Block, kMostBlocks + 1> gone;
    std::size_t count = 0;
    {
      const std::lock_guard lock(mutex_);
      if (more) free_.push_back(*more);
      std::size_t bytes = 0;
      for (const Block& kept : free_) bytes += kept.bytes;
      for (; free_.size() - count > most_blocks || bytes > most_bytes; ++count) {
        gone[count] = free_[count];
        bytes -= free_[count].bytes;
      }
      free_.erase(free_.begin(), free_.begin() + static_cast<std::ptrdiff_t>(count));
    }
    for (std::size_t i = 0; i < count; ++i) gone[i].unmap();
  }

  std::mutex mutex_;
  std::vector<Block> free_;  // the oldest first
};

// Never destroyed: a tensor may live longer than anything else of the process.
Blocks& blocks() {
  static Blocks* there = new Blocks;
  return *there;
}

std::int64_t bytes_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double: return 8;
    case ScalarType::Float: return 4;
    case ScalarType::BFloat16:
    case ScalarType::Half: return 2;
    default: STD_TORCH_CHECK(false, "srppo_native: empty_spare is for float64, float32, bfloat16 and float16");
  }
}

Tensor empty_spare(const std::vector<std::int64_t>& shape, ScalarType dtype) {
  std::vector<std::int64_t> strides(shape.size());
  std::int64_t elements = 1, bytes = 0;
  bool fits = true;
  for (std::size_t i = shape.size(); i-- > 0;) {
    strides[i] = elements;
    fits = fits && shape[i] >= 0 && !__builtin_mul_overflow(elements, shape[i], &elements);
  }
  fits = fits && !__builtin_mul_overflow(elements, bytes_of(dtype), &bytes) && bytes < std::int64_t{1} << 62;
  STD_TORCH_CHECK(fits, "srppo_native: empty_spare needs sizes of a tensor that can be");
  const std::size_t pages = (static_cast<std::size_t>(bytes) + kPage - 1) / kPage;
  const Block block = blocks().take(std::max<std::size_t>(1, pages) * kPage);
  return torch::stable::from_blob(block.data, shape, strides, torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype,
                                  [block](void*) { blocks().give_back(block); });
}

void empty_spare_cache() { blocks().drop(); }

}  // namespace
}  // namespace srppo

STABLE_TORCH_LIBRARY_FRAGMENT(srppo_native, m) {
  m.def("empty_spare(int[] shape, ScalarType dtype) -> Tensor");
  m.def("empty_spare_cache() -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(srppo_native, CompositeExplicitAutograd, m) {
  m.impl("empty_spare", TORCH_BOX(&srppo::empty_spare));
  m.impl("empty_spare_cache", TORCH_BOX(&srppo::empty_spare_cache));
}
