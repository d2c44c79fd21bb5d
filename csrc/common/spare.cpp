// Large tensors of CPU ops in memory that is used again: srppo_kernels/linear_logprob/spare.py says what for.
//
// malloc takes a large block from the system and gives it back at once. The system clears it page by page, at the first
// write to each: 0.9 to 2.2 us a page. A block that comes back here keeps its pages but lets the system take them when it
// is short of memory (MADV_FREE); until then a write to one costs a tenth of that.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

#include <sys/mman.h>

#include <torch/csrc/stable/ops.h>

#include "tensors.h"

namespace srppo {
namespace {

constexpr std::size_t kPage = 4096, kMostBlocks = 4, kMostBytes = std::size_t{1} << 30;  // kept, of a block

// Whole pages of the system's.
struct Block {
  void* data;
  std::size_t bytes;

  static Block map(std::size_t bytes) {
    void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    STD_TORCH_CHECK(data != MAP_FAILED, "srppo_native: no memory for a tensor of ", bytes, " bytes");
    return {data, bytes};
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

class Blocks {
 public:
  Blocks() { free_.reserve(kMostBlocks + 1); }

  // The smallest that is large enough, or a new one in place of the largest that is not.
  Block take(std::size_t bytes) {
    if (const std::unique_lock lock(mutex_, std::try_to_lock); lock && !free_.empty()) {
      const auto fits = [&](const Block& block) { return block.bytes >= bytes; };
      auto best = free_.end();
      for (auto block = free_.begin(); block != free_.end(); ++block)
        if (fits(*block) && (best == free_.end() || block->bytes < best->bytes)) best = block;
      if (best != free_.end()) {
        const Block found = *best;
        free_.erase(best);
        return found;
      }
      const auto largest = std::max_element(free_.begin(), free_.end(), smaller);
      largest->unmap();
      free_.erase(largest);
    }
    return Block::map(bytes);
  }

  void give_back(Block block) {
    if (block.bytes <= kMostBytes && block.lend()) {
      if (const std::unique_lock lock(mutex_, std::try_to_lock); lock) {
        free_.push_back(block);
        if (free_.size() <= kMostBlocks) return;
        const auto smallest = std::min_element(free_.begin(), free_.end(), smaller);
        block = *smallest;
        free_.erase(smallest);
      }
    }
    block.unmap();
  }

  void drop() {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock) return;
    for (const Block& block : free_) block.unmap();
    free_.clear();
  }

 private:
  static bool smaller(const Block& a, const Block& b) { return a.bytes < b.bytes; }

  std::mutex mutex_;  // only tried: a fork may have left it locked
  std::vector<Block> free_;
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
  std::int64_t elements = 1;
  for (std::size_t i = shape.size(); i-- > 0;) {
    strides[i] = elements;
    elements *= shape[i];
  }
  const auto bytes = static_cast<std::size_t>(elements * bytes_of(dtype));
  const Block block = blocks().take(std::max(kPage, (bytes + kPage - 1) / kPage * kPage));
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
